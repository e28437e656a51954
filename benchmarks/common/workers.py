"""Two versions of the package, measured in turns. Each version runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.machine import ROOT

# sys.path holds this checkout last, so that `benchmarks` is found and the package of the worker stays the first
START = """
import importlib, sys
sys.path[:] = [*filter(None, sys.path), sys.argv[1]]
module, function, *args = sys.argv[2:]
getattr(importlib.import_module(module), function)(*args)
"""


def serve(handle: Callable[..., Any]) -> None:
    """Calls `handle` with the arguments on each line of standard input (JSON), and prints its answer as JSON."""
    for line in sys.stdin:
        print(json.dumps(dict(answer=handle(**json.loads(line)))), flush=True)


class Worker:
    """A process that imports a function of the benchmarks and calls it. The function must call `serve`.

    Args:
        module: such as `benchmarks.speed.train_step`.
        function: its name in the module.
        args: arguments of the function.
        python: interpreter to run. Only this package's own interpreter finds this checkout.
        package: folder that contains the package to measure.
        environment: more environment variables.
    """

    def __init__(
        self,
        module: str,
        function: str,
        *args: str,
        python: str = sys.executable,
        package: Path | None = None,
        **environment: str,
    ) -> None:
        paths = [str(package or ROOT), os.environ.get('PYTHONPATH', '')] if python == sys.executable else []
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), **environment}
        command = [python, '-c', START, str(ROOT), module, function, *args]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **arguments: Any) -> Any:
        """The worker's answer. Raises RuntimeError if the worker ends before it answers."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(arguments) + '\n')
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith('{"answer"'):
            if not line:
                raise RuntimeError('a worker ended before it answered')
        return json.loads(line)['answer']

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
