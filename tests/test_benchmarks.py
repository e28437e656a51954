"""The benchmarks run, whatever the figures are."""

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

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    return importlib.import_module('ablations')


def test_each_ablation_changes_the_model(ablations: Any) -> None:
    outs: list[float] = []
    weights: dict[str, torch.Tensor] = {}
    for changes in ablations.OPTIONS.values():
        torch.manual_seed(0)
        model = HierarchicalTransformer(num_tokens=256, seq_len=64, **{**ablations.BASE, 'dim': 8, **changes})
        # the default's weights wherever there are such, so that what is built and never used changes nothing
        held = dict(model.named_parameters())
        weights = weights or {name: p.detach().clone() for name, p in held.items()}
        for name, p in held.items():
            if name in weights and weights[name].shape == p.shape:
                p.data.copy_(weights[name])
        torch.manual_seed(0)
        loss, _ = model(torch.randint(1, 256, (1, 33)), return_loss=True)
        outs.append(loss.item())
    # in so short a text the half of each window is all there is, or less: every option gives another loss
    assert len(set(outs)) == len(outs)


def test_ablations_go_on_where_they_stopped(
    ablations: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(ablations.BASE, 'dim', 8)
    monkeypatch.setattr(ablations.paced, 'ROUNDS', 1)

    def ask(*args: object) -> dict[str, Any]:
        monkeypatch.setattr(
            sys, 'argv', ['ablations.py', '--data', str(corpus), '--out', str(tmp_path), *map(str, args)]
        )
        ablations.main()
        return json.loads((tmp_path / 'ablations.json').read_text())['runs']

    settings = ('--minutes', 0.01, '--valid-bytes', 2048)
    first = ask(*settings, '--seeds', 1, '--only', 'default')
    runs = ask(*settings, '--seeds', 1, '--only', 'default', 'hourglass')
    assert runs['default'] == first['default']
    assert set(first['default']['0']['silent']) == {'4x', '16x', '4x, 16x'}
    assert 2 < runs['hourglass']['0']['bits'] < 9

    table = (tmp_path / 'ablations.md').read_text()
    assert '| default |' in table
    assert '| hourglass |' in table
    assert (tmp_path / 'ablations.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match='was made with'):
        ask('--minutes', 0.02, '--only', 'default')


def test_options_that_compute_the_same_have_one_pace(
    ablations: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    monkeypatch.setattr(ablations.paced, 'ROUNDS', 1)
    plain = dict(dim=8, depth=1, heads=1, dim_head=8)
    options = dict(plain=plain, faster=plain | dict(train=dict(lr=1.0)), averaged=plain | dict(train=dict(ema=0.9)))
    ms, ratios = ablations.paced.pace(options, 'plain', data=str(corpus), length=32, batch=1)
    assert ms > 0
    assert ratios['faster'] == ratios['plain'] == 1
    assert ratios['averaged'] != 1


def test_mixers_are_timed_trained_and_reported(monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    mixers = importlib.import_module('mixers')
    monkeypatch.setattr(mixers, 'LENGTH', 64)
    monkeypatch.setattr(mixers.paced, 'ROUNDS', 1)
    monkeypatch.setitem(mixers.BASE, 'dim', 8)
    settings = (
        '--minutes',
        0.002,
        '--valid-bytes',
        1024,
        '--seeds',
        1,
        '--only',
        'attention',
        's4d',
        '--lengths',
        1024,
    )
    monkeypatch.setattr(sys, 'argv', ['mixers.py', '--data', str(corpus), '--out', str(tmp_path), *map(str, settings)])
    mixers.main()
    held = json.loads((tmp_path / 'mixers.json').read_text())
    assert 2 < held['runs']['s4d']['0']['bits'] < 9
    costs = json.loads((tmp_path / 'mixers_costs.json').read_text())['found']
    assert costs['s4d']['writing']['state'] < costs['attention']['writing']['state']
    assert '| s4d |' in (tmp_path / 'mixers.md').read_text()
    assert (tmp_path / 'mixers_by_length.png').stat().st_size > 1000


def test_synthetic_tasks_have_one_answer_and_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    synthetics = importlib.import_module('synthetics')
    ids, answers = synthetics.recall(50)
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        # all that ever followed the key that is asked for
        assert {row[i + 1] for i in range(0, len(row) - 1, 2) if row[i] == row[-1]} == {answer}
    ids, answers = synthetics.induction(50)
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        assert [row[i + 1] for i in range(len(row) - 1) if row[i] == row[-1]] == [answer]

    monkeypatch.setattr(synthetics, 'HERE', tmp_path)
    monkeypatch.setattr(synthetics, 'RESULTS', tmp_path / 'synthetics.json')
    monkeypatch.setattr(sys, 'argv', ['synthetics.py', '--steps', '5', '--seeds', '1', '--only', 'hyena'])
    synthetics.main()
    assert '| hyena |' in (tmp_path / 'synthetics.md').read_text()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The results of a script of benchmarks/gpu at toy size, run in this process."""
    monkeypatch.setenv('OUT', str(tmp_path))
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')

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
    common = importlib.import_module('benchmarks.gpu.common')
    build = common.build

    def failing(name: str, *args: Any) -> Any:
        if name == 'flat, full':
            raise RuntimeError('as if out of memory')
        return build(name, *args)

    monkeypatch.setattr(common, 'build', failing)
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


def test_both_packages_are_timed_in_turns(gpu: Callable[..., dict[str, Any]]) -> None:
    # this package in the place of the published one
    held = gpu('speed', '--sections', 'published', '--published', ROOT)
    assert not held['failed']
    assert len(held['published']) == 8
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
    profile = importlib.import_module('benchmarks.gpu.profile')

    def event(cat: str, name: str, ts: float, dur: float, **args: object) -> dict[str, Any]:
        return dict(ph='X', cat=cat, name=name, ts=ts, dur=dur, tid=1, args=args)

    events = [
        event('user_annotation', 'forward', 0, 100),
        event('user_annotation', 'backward', 100, 100),
        event('cuda_runtime', 'cudaLaunchKernel', 10, 5, correlation=1),
        event('cuda_runtime', 'cudaMemcpyAsync', 20, 5, correlation=2),
        event('cuda_driver', 'cuLaunchKernelEx', 110, 5, correlation=3),
        event('cuda_runtime', 'cudaStreamSynchronize', 120, 50),
        # of no step
        event('cuda_runtime', 'cudaLaunchKernel', 300, 5, correlation=4),
        event('cuda_runtime', 'cudaDeviceSynchronize', 310, 50),
        event('gpu_user_annotation', 'forward', 30, 80),
        event('kernel', 'nvjet_sm90_tst', 30, 40, correlation=1),
        event('gpu_memcpy', 'Memcpy DtoD (Device -> Device)', 70, 10, correlation=2, bytes=64),
        # issued in the backward pass
        event('kernel', 'triton_tem_fused_flex_attention_backward_1', 150, 20, correlation=3),
        event('kernel', 'nvjet_sm90_tst', 320, 40, correlation=4),
    ]
    trace = profile.Trace(events, steps=1)
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
    assert place.startswith('test_benchmarks.py:')


def test_writing_is_timed_as_a_user_runs_it(tmp_path: Path) -> None:
    # a process of its own: the folder's profile.py must not hide the standard library's, which compiling imports
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
