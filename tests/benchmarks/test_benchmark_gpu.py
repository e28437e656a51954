"""The GPU benchmarks run at toy size on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a script of benchmarks/gpu at toy size in this process, and returns its results."""
    monkeypatch.setenv('OUT', str(tmp_path))
    monkeypatch.syspath_prepend(ROOT)

    def ask(script: str, *args: object) -> dict[str, Any]:
        importlib.import_module(f'benchmarks.gpu.{script}').main(['--toy', *map(str, args)])
        return json.loads((tmp_path / f'{script}.json').read_text())

    return ask


def test_speed_on_a_gpu_is_measured_in_turns(gpu: Callable[..., dict[str, Any]], capsys: Any) -> None:
    held = gpu('speed', '--sections', 'main', '--models', 'flat, full', 'plain transformer')
    assert held['about']['bf16_peak'] > 0
    assert held['about']['copy_rate'] > 0
    assert not held['failed']
    [section] = held['sections'].values()
    assert section['in_turns']
    assert len(section['models']) == 4
    for row in section['models'].values():
        phases = sum(row[phase] for phase in ('forward', 'backward', 'optimizer'))
        assert 0.5 * row['seconds'] < phases < 2 * row['seconds']
        assert row['bytes_a_second'] == pytest.approx(row['rows'] * row['context'] / row['seconds'])
        assert row['share'] == pytest.approx(row['flops'] / row['seconds'] / held['about']['bf16_peak'])
        assert row['graphs'] > 0 or row['mode'] == 'eager'
    assert section['models']['flat, full, eager']['memory_estimate'] > 0
    assert set(section['ratios']) == {
        'bytes_a_second of flat, full / plain transformer, eager',
        'bytes_a_second of flat, full / plain transformer, compiled',
        'bytes_a_second of flat, full, compiled / eager',
        'bytes_a_second of plain transformer, compiled / eager',
    }
    assert '| flat, full, compiled ' in capsys.readouterr().out


def test_parts_that_fail_or_have_no_time_are_named(
    gpu: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    models = importlib.import_module('benchmarks.gpu.models')
    build = models.build

    def failing(name: str, *args: Any) -> Any:
        if name == 'flat, full':
            raise RuntimeError('as if out of memory')
        return build(name, *args)

    monkeypatch.setattr(models, 'build', failing)
    flags = ('--sections', 'main', '--modes', 'eager', '--models', 'flat, full', 'plain transformer')
    held = gpu('speed', *flags)
    assert [error for name, error in held['failed'].items() if 'flat, full' in name] == [
        'RuntimeError: as if out of memory'
    ]
    [section] = held['sections'].values()
    assert list(section['models']) == ['plain transformer, eager']
    held = gpu('speed', *flags, '--minutes', 0)
    assert len(held['left_out']) == 3
    assert 'left out: ' in capsys.readouterr().out


def test_both_packages_are_timed_in_turns(gpu: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    speed = importlib.import_module('benchmarks.gpu.speed')
    monkeypatch.setattr(speed, 'PUBLISHED_ROWS', dict([*speed.PUBLISHED_ROWS.items()][-2:]))
    # this package stands in for the published one
    held = gpu('speed', '--sections', 'published', '--published', ROOT)
    assert not held['failed']
    # two models, each in bf16 and in float32
    assert len(held['published']) == 4
    for row in held['published'].values():
        assert row['ratio'] == pytest.approx(row['published']['seconds'] / row['here']['seconds'])


def test_a_step_is_profiled(gpu: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    held = gpu('profile', '--models', 'flat, window 64')
    [row] = held['profiles']
    by_kind = sum(sum(each.values()) for each in row['kinds'].values())
    assert by_kind == pytest.approx(row['device_seconds'])
    assert row['kinds']['attention']['backward'] > 0
    assert row['kernels'][0]['seconds'] >= row['kernels'][1]['seconds'] > 0
    assert 'flat, window 64, eager, ms' in (tmp_path / 'profile.txt').read_text()
    assert (tmp_path / 'trace-flat-window-64-eager.json.gz').stat().st_size > 1000


def test_a_trace_of_a_gpu_is_read(gpu: Callable[..., dict[str, Any]]) -> None:
    module = importlib.import_module('benchmarks.gpu.trace')

    def event(cat: str, name: str, ts: float, dur: float, **args: object) -> dict[str, Any]:
        return dict(ph='X', cat=cat, name=name, ts=ts, dur=dur, tid=1, args=args)

    events = [
        event('user_annotation', 'forward', 0, 100),
        event('user_annotation', 'backward', 100, 100),
        event('cuda_runtime', 'cudaLaunchKernel', 10, 5, correlation=1),
        event('cuda_runtime', 'cudaMemcpyAsync', 20, 5, correlation=2),
        event('cuda_driver', 'cuLaunchKernelEx', 110, 5, correlation=3),
        event('cuda_runtime', 'cudaStreamSynchronize', 120, 50),
        # outside of any step
        event('cuda_runtime', 'cudaLaunchKernel', 300, 5, correlation=4),
        event('cuda_runtime', 'cudaDeviceSynchronize', 310, 50),
        event('gpu_user_annotation', 'forward', 30, 80),
        event('kernel', 'nvjet_sm90_tst', 30, 40, correlation=1),
        event('gpu_memcpy', 'Memcpy DtoD (Device -> Device)', 70, 10, correlation=2, bytes=64),
        # issued in the backward pass
        event('kernel', 'triton_tem_fused_flex_attention_backward_1', 150, 20, correlation=3),
        event('kernel', 'nvjet_sm90_tst', 320, 40, correlation=4),
    ]
    trace = module.Trace(events, steps=1)
    assert trace.total() == pytest.approx(70e-6)
    assert trace.total(kind='matmul', phase='forward') == pytest.approx(40e-6)
    assert trace.total(kind='attention', phase='backward') == pytest.approx(20e-6)
    assert trace.total(kind='copy, cast') == pytest.approx(10e-6)
    assert trace.gaps()['backward'] == dict(seconds=pytest.approx(70e-6), count=1)
    assert trace.launches() == dict(forward=1, backward=1, optimizer=0)
    assert trace.waits() == {'cudaStreamSynchronize': dict(calls=1, seconds=pytest.approx(50e-6))}
    assert trace.copied_bytes() == 64


def test_places_that_wait_for_a_gpu_are_named(gpu: Callable[..., dict[str, Any]]) -> None:
    profile = importlib.import_module('benchmarks.gpu.profile')
    places: Counter[str] = Counter()
    with profile.noting_waits(places, torch.device('cpu')):
        for _ in range(2):
            warnings.warn('called a synchronizing CUDA operation', stacklevel=1)
        warnings.warn('something else', stacklevel=1)
    [(place, count)] = places.items()
    assert count == 2
    assert place.startswith('test_benchmark_gpu.py:')


def test_writing_is_timed_as_a_user_runs_it(tmp_path: Path) -> None:
    # in a process of its own: compiling imports `profile`, which must be that of the standard library
    script = ROOT / 'benchmarks' / 'gpu' / 'decode.py'
    command = [sys.executable, str(script), '--toy', '--models', 'flat, full', '--ways', 'generate', 'compiled']
    env = {**os.environ, 'OUT': str(tmp_path)}
    done = subprocess.run([*command, '--batches', '2'], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '| flat, full, compiled ' in done.stdout
    held = json.loads((tmp_path / 'decode.json').read_text())
    assert not held['failed']
    assert len(held['rows']) == 2
    for row in held['rows']:
        assert row['bytes_a_second'] == pytest.approx(row['batch'] / row['seconds'])
        assert (row['graphs'] > 0) == (row['way'] == 'compiled')
    assert list(held['ratios']) == ['flat, full, batch 2: compiled / generate']


def test_models_race_for_the_same_minutes(gpu: Callable[..., dict[str, Any]], corpus: Path) -> None:
    held = gpu('race', '--data', corpus, '--each', 0.01, '--models', 'flat, window 64', '--test-bytes', 2048)
    assert not held['failed']
    [run] = held['runs']
    assert run['curve'][0]['minutes'] < run['curve'][-1]['minutes']
    assert run['curve'][-1]['valid_bits_per_byte'] <= run['curve'][0]['valid_bits_per_byte']
    assert 0 < run['test_bits_per_byte'] < 8


def test_a_benchmark_of_a_gpu_says_that_there_is_none(
    gpu: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        importlib.import_module('benchmarks.gpu.speed').main([])
    assert 'no CUDA device was found' in capsys.readouterr().err
