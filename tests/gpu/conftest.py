"""Fixtures of the tests that run on a device.

    python -m pytest -m gpu tests/gpu

The tests compare a CUDA device with the CPU. Without a CUDA device they are skipped. With `GPU_TESTS_DEVICE=cpu` they
run on the CPU, which checks the tests themselves. Tests that need CUDA are skipped then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = os.environ.get('GPU_TESTS_DEVICE') or ('cuda' if torch.cuda.is_available() else None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason='no CUDA device (GPU_TESTS_DEVICE=cpu tries the tests without one)')
    for item in items:
        if DEVICE is None and item.get_closest_marker('gpu'):
            item.add_marker(skip)


@pytest.fixture(scope='session')
def device() -> torch.device:
    return torch.device(DEVICE or 'cpu')


@pytest.fixture(scope='session')
def cuda(device: torch.device) -> torch.device:
    """The device. Skips tests that need CUDA on other devices."""
    if device.type != 'cuda':
        pytest.skip(f'needs CUDA, and the device is {device}')
    return device


@pytest.fixture(scope='package', autouse=True)
def _exact_products() -> Iterator[None]:
    """Turns TF32 off: it keeps 10 bits of a float32, too few for comparisons with the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
