"""The planned cost of a run, and whether it fits into memory."""

from __future__ import annotations

import importlib
import re
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.commands import ROOT, run
from support.runs import MODEL, TINY

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.plan import Plan, make_plan
from simple_hierarchical_transformer.training.settings import (
    BYTES,
    PRESETS,
    new_settings,
    parse_args,
)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """train.py, in this process."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module('train')


def test_a_dry_run_tells_the_cost_and_leaves_no_trace(corpus: Path, tmp_path: Path) -> None:
    result = run('--dry-run', '--data', corpus, '--out', tmp_path / 'run', *TINY, '--optimizer', 'muon', '--ema', 0.9)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / 'run').exists()
    said = result.stdout
    counts = re.findall(r'(?:parameters:|level \dx|logits) +([\d,]+)', said)
    total, *parts = (int(count.replace(',', '')) for count in counts)
    model = HierarchicalTransformer(**BYTES, **{**PRESETS['cpu']['model'], **MODEL}, seq_len=32)
    assert total == sum(parts) == sum(p.numel() for p in model.parameters())
    whole, *sizes = (float(size) for size in re.findall(r'([\d.]+) GB', said))
    assert whole == pytest.approx(sum(sizes), abs=0.003)
    assert f'{corpus}: {corpus.stat().st_size:,} bytes in 1 texts' in said
    assert re.search(r'a step: [\d.]+ s for 64 bytes', said)
    assert re.search(r'the run: [\d,]+ steps', said)
    assert 'warning' not in said


def test_a_run_that_does_not_fit_says_so_before_memory_is_taken(
    corpus: Path, tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ('--data', corpus, '--out', tmp_path / 'run', *TINY)
    monkeypatch.setattr(cost, 'device_memory', lambda device: 2 * 10**5)
    assert re.search(r'error: the run needs about 0\.0 GB and this machine has 0\.0 GB \(cpu\)', refuse(*args))
    assert not (tmp_path / 'run').exists()
    # settings that need more memory than any machine has
    monkeypatch.undo()
    for more in (
        ('--batch-size', 10**12),
        ('--batch-size', 10**9, '--gradient-checkpointing'),
        ('--grad-accum', 10**12),
        ('--model', *TINY[9:], 'dim=1000000'),
        ('--model', *TINY[9:], 'num_rollouts=1', 'ngram_rows=274877906944'),
    ):
        assert re.search(r'error: the run needs about [\d,.]+ GB and this machine has', refuse(*args, *more))
    for more in ('dim=1000000000', 'heads=100000000000', 'dim_head=100000000000'):
        assert re.search(
            'error: (--model: |a step of this run |the run needs )', refuse(*args, '--model', *TINY[9:], more)
        )


def test_a_dry_run_that_does_not_fit_tells_the_cost_all_the_same(
    corpus: Path, tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the gpu preset, on a machine that could not even build it."""
    monkeypatch.setattr(cost, 'device_memory', lambda device: 10**9)
    data_ = tmp_path / 'text.txt'
    data_.write_bytes(corpus.read_bytes() * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train.main(['--dry-run', '--preset', 'gpu', '--mixed-precision', 'no', '--data', str(data_)])
    said = capsys.readouterr().out
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 5 * 10**5
    )  # in KB; its weights alone are 1.9 GB
    found = re.search(r'the run needs about ([\d.]+) GB and this machine has 1\.0 GB', said)
    assert found
    assert float(found[1]) == pytest.approx(float(re.search(r'peak of a step: ([\d.]+) GB', said)[1]), abs=0.06)
    assert re.search(r'parameters: 463,446,656', said)
    assert 'the run: ' not in said


def test_a_device_without_room_for_the_weights_is_refused_and_one_that_is_tight_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accelerators say so where their memory ends, and their kernels may take less than was planned."""
    s = SimpleNamespace(**new_settings(parse_args(list(map(str, TINY)), None)))
    accelerator: Any = SimpleNamespace(is_fsdp2=False, num_processes=1, device=torch.device('cuda'))

    def planned() -> Plan:
        return make_plan(s, accelerator, length=32, segments=1)

    for limit, shortage, fits in ((None, False, True), (10**10, False, True), (10**5, True, False), (1, True, False)):
        monkeypatch.setattr(cost, 'device_memory', lambda device, limit=limit: limit)
        plan = planned()
        assert (bool(plan.shortage), plan.fits) == (shortage, fits)
    held = sum(plan.memory.values()) - plan.memory['activations of 2 x 32']
    monkeypatch.setattr(cost, 'device_memory', lambda device: held)
    plan = planned()
    assert plan.shortage
    assert plan.fits


def test_a_run_whose_memory_cannot_be_planned_begins_all_the_same(
    corpus: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError('no such kernel on meta')

    monkeypatch.setattr(cost, 'step_memory', fail)
    train.main(['--dry-run', '--data', str(corpus), *map(str, TINY)])
    said = capsys.readouterr().out
    assert 'warning: how much memory the run needs could not be planned: no such kernel on meta' in said
    assert 'memory of one device' not in said
    assert re.search(r'the run: [\d,]+ steps', said)


def test_limits_of_control_groups_are_found(tmp_path: Path) -> None:
    own = tmp_path / 'own'
    assert cost.control_group_limits(tmp_path, own) == [cost.MOST_BYTES]
    own.write_text('0::/a/b\n')
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    (tmp_path / 'memory.max').write_text('max\n')
    (tmp_path / 'a' / 'memory.max').write_text('500\n')
    assert min(cost.control_group_limits(tmp_path, own)) == 500
    (tmp_path / 'a' / 'b' / 'memory.max').write_text('70\n')
    assert min(cost.control_group_limits(tmp_path, own)) == 70
    assert 10**8 < cost.device_memory(torch.device('cpu')) < 10**14
