"""Settings and fixtures of all tests. Functions that only some tests need are in tests/support/."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
from collections.abc import Callable
from pathlib import Path

# before torch reads it: small tensors gain nothing from threads, and test files run in parallel
os.environ.setdefault('OMP_NUM_THREADS', '1')
# before huggingface_hub reads it: no test may depend on the network
os.environ['HF_HUB_OFFLINE'] = '1'

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.commands import ROOT, run, run_command  # noqa: F401
from support.configs import SEQ_LEN, build, configs, loss_of_a_copy  # noqa: F401
from support.golden import GOLDEN, Golden, load_golden

# files of tests that train or compile models or start processes: `make fast` leaves them out
SLOW = {
    'benchmarks/test_benchmark_boundaries.py',
    'benchmarks/test_benchmark_gpu.py',
    'benchmarks/test_benchmark_quality.py',
    'benchmarks/test_benchmark_race.py',
    'benchmarks/test_benchmark_report.py',
    'benchmarks/test_benchmark_speed.py',
    'boundaries/test_placed_levels.py',
    'boundaries/test_placed_tools.py',
    'boundaries/test_sharded_pieces.py',
    'data/test_download.py',
    'data/test_formats.py',
    'docs/test_examples.py',
    'generation/test_captured.py',
    'memory/test_state_growth.py',
    'mixers/test_mixer_precision.py',
    'mixers/test_mixers_in_models.py',
    'pretrained/test_load_pretrained.py',
    'pretrained/test_save_pretrained.py',
    'pretrained/test_untrusted_folders.py',
    'test_adapters.py',
    'test_package.py',
    'test_rows.py',
    'training/test_command.py',
    'training/test_curves.py',
    'training/test_failing_runs.py',
    'training/test_placed_processes.py',
    'training/test_placed_runs.py',
    'training/test_plan.py',
    'training/test_processes.py',
    'training/test_resume.py',
    'training/test_resumed_folders.py',
    'training/test_run_folder.py',
    'training/test_run_report.py',
    'training/test_step_memory.py',
    'training/test_train.py',
    'training/test_train_options.py',
}

# the same examples on every machine, and no deadline: a busy machine must not fail a test
settings.register_profile(
    'suite',
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile('suite')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(tests) and item.path.relative_to(tests).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs train.py in this process with arguments it must refuse, and returns its message."""
    monkeypatch.syspath_prepend(ROOT)
    train = importlib.import_module('train')

    def ended(*args: object) -> str:
        said = io.StringIO()
        with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(said):
            train.main(list(map(str, args)))
        # argparse writes to stderr and exits with a number, the script exits with its message
        assert end.value.code not in (None, 0)
        return f'{said.getvalue()}{end.value.code}'

    return ended


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs train.py in this process, which is faster than a subprocess."""
    monkeypatch.syspath_prepend(ROOT)
    train = importlib.import_module('train')
    return lambda *args: train.main(list(map(str, args)))


@pytest.fixture(scope='session')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a small grammar: 4 bits per byte or more before training, well below 1 after."""
    draw = random.Random(0)
    words = [('the', 'a'), ('old', 'young', 'wise'), ('king', 'queen', 'fox'), ('sees', 'hears'), ('us', 'you')]
    folder = tmp_path_factory.mktemp('corpus')
    folder.chmod(0o755)
    path = folder / 'text.txt'
    path.write_text(' '.join(' '.join(map(draw.choice, words)) + '.' for _ in range(4000)))
    return path
