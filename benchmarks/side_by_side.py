"""Two packages measured in turns, each in a process of its own, by what the benchmarks share."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = fn()
    return time.perf_counter() - start, result


def machine() -> str:
    """What the figures were measured with, for the line above a table."""
    threads = torch.get_num_threads()
    return (
        f'{time.strftime("%Y-%m-%d")}, {platform.machine()}, {threads} thread{"s" if threads > 1 else ""}, '
        f'torch {torch.__version__}, float32, no GPU'
    )


@torch.no_grad()
def writing(model: Any, *, context: int, new: int = 100) -> dict[str, float]:
    """Bytes a second in generation after a context of random ids, the best of three, and the bytes of its state."""
    prompt = torch.randint(0, 256, (1, context))
    _, state = model.eval()(prompt, return_state=True)
    model.generate(prompt[:, :1], 2, state=state.clone())
    seconds = min(timed(lambda: model.generate(prompt[:, :1], new, state=state.clone()))[0] for _ in range(3))
    return dict(bytes_a_second=new / seconds, state=state.nbytes)


def serve(handle: Callable[..., Any]) -> None:
    """Answers each line of standard input, JSON of the arguments of `handle`, with a line of JSON."""
    for line in sys.stdin:
        print(json.dumps(dict(answer=handle(**json.loads(line)))), flush=True)


class Worker:
    """A script under another interpreter, that runs `serve`. With our own, it finds this checkout."""

    def __init__(self, python: str, script: str, *args: str, **extra: str) -> None:
        env = {**os.environ, 'PYTHONPATH': str(ROOT) if python == sys.executable else '', **extra}
        self.process = subprocess.Popen(
            [python, script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def ask(self, **asked: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + '\n')
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith('{"answer"'):
            if not line:
                raise RuntimeError('a worker ended before it answered')
        return json.loads(line)['answer']

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
