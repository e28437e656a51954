"""Optimizers, schedules, averages, costs and the housekeeping of checkpoints, each against a plain form."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, configs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from simple_hierarchical_transformer import HierarchicalTransformer, terminal
from simple_hierarchical_transformer.training import checkpoints, cost, optim, processes, report, watch
from simple_hierarchical_transformer.training.roles import walk
from simple_hierarchical_transformer.training.settings import PRESETS, new_settings, parse_args, share

SMALL: dict[str, Any] = dict(num_tokens=11, dim=(8, 12), depth=2, seq_len=32, dim_head=4, heads=2, hierarchies=(1, 4))


# optimizers


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_orthogonalised_matrices_turn_and_do_not_stretch(rows: int, columns: int, scale: float) -> None:
    matrix = scale * torch.randn(2, rows, columns)
    result = optim.orthogonalise(matrix, 5)
    # the iteration leaves directions that were next to nothing below 1
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    strong = s > 0.05 * s.amax(dim=-1, keepdim=True)
    stretched = torch.einsum('bri,brc,bic->bi', u, result, v)
    assert (stretched[strong] > 0.5).all()
    assert (torch.linalg.matrix_norm(result, 2) < 1.3).all()
    assert torch.allclose(u @ (u.mT @ result @ v.mT) @ v, result, atol=1e-4)


def test_muon_moves_matrices_by_orthogonal_momentum() -> None:
    """Against the same written out for one matrix, two steps, with Nesterov's momentum and decay."""
    p = nn.Parameter(torch.randn(6, 4, 2))
    start, gradients = p.detach().clone(), torch.randn(2, 6, 4, 2)
    optimizer = optim.MixedOptimizer([dict(params=[p], weight_decay=0.1, rule='muon')], lr=0.01)
    momentum, expected = torch.zeros(6, 8), start.flatten(1)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        flat = gradient.flatten(1)
        momentum = 0.95 * momentum + 0.05 * flat
        move = optim.orthogonalise((0.05 * flat + 0.95 * momentum)[None])[0]
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(8) * move
    torch.testing.assert_close(p.detach().flatten(1), expected)


def test_matrices_of_one_shape_do_not_mix() -> None:
    def moved(count: int) -> torch.Tensor:
        ps = [nn.Parameter(torch.zeros(4, 3)) for _ in range(count)]
        for i, p in enumerate(ps):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        optim.MixedOptimizer([dict(params=ps, rule='muon')], lr=1.0).step()
        return ps[0].detach()

    torch.testing.assert_close(moved(1), moved(5))


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
@pytest.mark.parametrize(
    'changes',
    [{}, dict(merge='attention', compressor='attention', prophet_loss_weight=0.1, quantized_loss_weight=0.1),
     dict(autoencoder=True)],
    ids=['plain', 'attention', 'autoencoder'],
)  # fmt: skip
def test_every_parameter_learns_in_one_group_and_biases_do_not_decay(name: str, changes: dict[str, Any]) -> None:
    model = HierarchicalTransformer(**{**SMALL, **changes})
    optimizer = optim.build_optimizer(model, name, lr=1e-3, weight_decay=0.1)
    held = [p for group in optimizer.param_groups for p in group['params']]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    names = {p: key for key, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group['params']:
            assert (p.ndim >= 2 and not names[p].endswith('bias')) == (group['weight_decay'] > 0)
    if name == 'muon':
        by = {p for group in optimizer.param_groups if group['rule'] == 'muon' for p in group['params']}
        assert model.layers[0][0].ff.net[1].weight in by
        # tables have a row for each id, on one side
        ids = {11, 4 * 11, 1024}
        assert not [names[p] for p in by if ids & {*p.shape} or names[p].endswith('bias')]
    else:
        assert optimizer.defaults['fused']


def test_what_muon_does_not_take_is_as_adamw_has_it() -> None:
    torch.manual_seed(0)
    a, b = (nn.Linear(5, 3) for _ in range(2))
    b.load_state_dict(a.state_dict())
    ours = optim.MixedOptimizer([dict(params=list(a.parameters()), weight_decay=0.1)], lr=1e-2, betas=(0.9, 0.95))
    theirs = torch.optim.AdamW(b.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((a, ours), (b, theirs)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, its in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(mine, its)
    with pytest.raises(ValueError, match=r'muon is for matrices, got parameters of shape \(3,\)'):
        optim.MixedOptimizer([dict(params=list(a.parameters()), rule='muon')], lr=1e-2)


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_each_optimizer_learns(name: str) -> None:
    model = HierarchicalTransformer(**SMALL)
    optimizer = optim.build_optimizer(model, name, lr=2e-2, weight_decay=0.1)
    ids = torch.randint(1, 11, (4, 33))
    losses = []
    for _ in range(30):
        loss, parts = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts.ce.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize('clips', [False, True])
@pytest.mark.parametrize('sparse', [False, True])
def test_a_scaler_leaves_out_a_step_that_overflows(sparse: bool, clips: bool) -> None:
    """All of it, whatever the rules of its groups; and a step that does not overflow is the one without a scaler."""
    models = [build(dict(SMALL, ngrams=(2,), ngram_rows=64)).float() for _ in range(2)]
    optimizers = [optim.build_optimizer(each, 'muon', lr=1e-2, weight_decay=0.1, sparse=sparse) for each in models]
    scaled, ids = models[0], torch.randint(0, 11, (2, 20))
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    start = {name: p.detach().clone() for name, p in scaled.named_parameters()}

    def take_scaled_step(overflows: bool) -> None:
        scaler.scale(scaled(ids, return_loss=True)[0]).backward()
        if overflows:
            scaled.to_logits.weight.grad[0, 0] = math.inf
        if clips:
            scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()

    take_scaled_step(overflows=True)
    assert scaler.get_scale() == 512
    assert all(torch.equal(p, start[name]) for name, p in scaled.named_parameters())
    take_scaled_step(overflows=False)
    models[1](ids, return_loss=True)[0].backward()
    optimizers[1].step()
    for (name, ours), expected in zip(scaled.named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f'{name}: {said}')


@pytest.mark.parametrize('schedule', optim.SCHEDULES)
@pytest.mark.parametrize('warmup', [0.0, 0.1])
def test_learning_rates_rise_then_never_rise_again(schedule: str, warmup: float) -> None:
    rates = [optim.learning_rate(i / 1000, highest=2.0, schedule=schedule, warmup=warmup) for i in range(1001)]
    top = int(1000 * warmup)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[top] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx({'cosine': 0.2, 'linear': 0.0, 'constant': 2.0, 'wsd': 0.0}[schedule], abs=1e-9)
    assert all(rate > 0 for rate in rates[:-1])
    if schedule == 'wsd':
        assert rates[800] == pytest.approx(2.0)
        assert rates[900] == pytest.approx(1.0)


@pytest.mark.parametrize('schedule', optim.SCHEDULES)
@given(warmup=st.floats(0, 1, exclude_max=True), at=st.lists(st.floats(0, 1), max_size=20))
@example(warmup=0.9, at=[])
@example(warmup=0.8, at=[])
def test_learning_rates_are_continuous_for_every_warmup(schedule: str, warmup: float, at: list[float]) -> None:
    def rate(progress: float) -> float:
        return optim.learning_rate(progress, highest=2.0, schedule=schedule, warmup=warmup)

    share(str(warmup))  # the command line takes all of these
    left = 1 - warmup
    # each phase of a schedule is this steep at most
    steepest = 2.0 * max(1 / warmup if warmup else 0, math.pi / left, 1 / min(left, 0.2))
    places = sorted({0.0, *at, *(min(max(p + d, 0), 1) for p in (warmup, 0.8, 1) for d in (-1e-9, 0, 1e-9))})
    for before, after in pairwise(places):
        assert abs(rate(after) - rate(before)) <= steepest * (after - before) * 1.01 + 1e-6
    assert all(0 <= rate(progress) <= 2.0 for progress in places)
    # a clock may pass the end, where a rate below 0 would climb
    assert 0 <= rate(1.5) == rate(1.0)


def test_averages_follow_the_weights_and_stand_in_for_them() -> None:
    model = nn.Linear(3, 1, bias=False)
    p = model.weight
    average = optim.WeightAverage(model, decay=0.5)
    expected = p.detach().clone()
    for step in range(20):
        with torch.no_grad():
            p.add_(torch.randn(1, 3))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach()
    weight = p.detach().clone()
    with average.applied():
        torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(p.detach(), weight)
    torch.testing.assert_close(average.averages[0], expected)


# costs


@given(config=configs())
@settings(max_examples=20)
def test_levels_share_out_the_parameters(config: dict[str, Any]) -> None:
    model = build(config)
    counts = cost.parameters_by_level(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert set(counts) == {*range(len(model.levels)), None}
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for i in range(len(model.levels)):
        # of an hourglass' layers some have no block of this level
        blocks = [layer[i] for layer in model.layers if layer[i] is not None]
        own = [p for block in blocks for p in block.parameters() if names[id(p)] == 1]
        assert counts[i] >= sum(p.numel() for p in own)


class Operations(TorchDispatchMode):
    """Those of each kind, as PyTorch counts them. Its own counter hooks modules, which leave the fused routes then."""

    measures_routes = True

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.overloadpacket in flop_registry:
            self.counted[func.overloadpacket] += flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=out)
        return out


@pytest.mark.parametrize(
    'changes',
    [
        dict(hierarchies=1, dim=32),
        dict(hierarchies=1, dim=32, window_sizes=7),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=(16, 32)),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=(16, 32), merge='attention', merge_into='all'),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=(16, 32), merge='attention', merge_window=2),
        # level 4 hears at the end what nothing reads
        dict(hierarchies=(1, 4), dim=16, merge='attention', merge_into='all', recon_loss_weight=0.0),
        dict(hierarchies=(1, 4), dim=16, merge='attention', merge_into='all', recon_loss_weight=0.0, reversible=True),
        dict(hierarchies=(1, 2, 4), hierarchical_stride=(1, 2, 4), dim=(16, 32, 8), merge_into='all'),
        dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 2, 8), dim=(16, 8, 32), arrangement='hourglass'),
        dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 2, 8), dim=16, arrangement='hourglass', merge='linear'),
        dict(hierarchies=(1, 2, 4, 8), hierarchical_stride=(1, 2, 4, 8), dim=16, merge='linear', merge_into='all'),
        dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 2, 8), dim=16, arrangement='hourglass', merge='attention'),
        dict(hierarchies=(1, 4, 8), hierarchical_stride=(1, 1, 8), dim=(16, 32, 8), compressor='attention'),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=16, autoencoder=True, prophet_loss_weight=0.1),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=16, share_feed_forward=True, compressor='linear'),
    ],
)
def test_operations_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """Products with weights, those of attention left out: it runs in kernels that torch counts otherwise."""
    n = 64
    model = HierarchicalTransformer(
        num_tokens=50, depth=2, seq_len=n, dim_head=8, heads=2, **changes, next_latent_loss_weight=0.0
    )
    weights = forms_at_once = 0.0
    for weight in (weight for visit in walk(model, n) for weight in visit.weights if weight.multiplies):
        each = 2 * weight.parameter.numel() * weight.tokens
        weights += each
        # with logits, the two products of their gradient
        forms_at_once += 2 * each * (weight.role == 'head')

    with Operations() as counter:
        model(torch.randint(1, 50, (1, n + 1)), return_loss=True)
    counted = counter.counted
    products = sum(flops for op, flops in counted.items() if 'attention' not in str(op) and 'bmm' not in str(op))
    # a compressor by attention scores the zeros before the first token, too
    assert products == pytest.approx(weights + forms_at_once, rel=0.005 if 'compressor' in changes else 1e-9)
    assert weights < cost.step_flops(model, n) / 3 < 2 * weights


def test_what_is_kept_for_the_backward_pass_is_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = torch.randn(32, 8, requires_grad=True)
    # the input, and what tanh returns, once for its own gradient and the next product's
    assert cost.bytes_kept(model, x) == 4 * (32 * 8 + 32 * 16)


def test_the_peak_is_one_that_products_reach() -> None:
    peak = cost.matmul_peak(torch.device('cpu'))
    assert 1e8 < peak < 1e14


# checkpoints


@pytest.mark.parametrize('damage', ['gone', 'misshapen', 'of another rule', 'of no parameter'])
def test_tensors_of_another_optimizer_are_refused(damage: str) -> None:
    model = HierarchicalTransformer(**SMALL, ngrams=(2,), ngram_rows=16)
    optimizer = optim.build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1)
    model(torch.randint(11, (2, 17)), return_loss=True)[0].backward()
    optimizer.step()
    whole = checkpoints.gather_optimizer(model, optimizer)
    restored = optim.build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1)
    checkpoints.restore_optimizer(model, restored, whole)
    assert whole.keys() == checkpoints.gather_optimizer(model, restored).keys()
    # of a run that has not learnt yet there are none
    checkpoints.restore_optimizer(model, restored, {})

    for name, tensor in whole.items():
        held = dict(whole)
        if damage == 'gone':
            del held[name]
        elif damage == 'misshapen':
            held[name] = torch.zeros(*tensor.shape, 2)
        elif damage == 'of another rule':
            held[f'{name}s'] = held.pop(name)
        else:
            held[f'optimizer.nothing.{name}'] = tensor
        with pytest.raises(ValueError, match='optimizer'):
            checkpoints.restore_optimizer(model, restored, held)


def write_config(folder: Path) -> None:
    (folder / 'config.json').write_text('{}')


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        checkpoints.save(tmp_path, step, write_config, {}, {}, scratch=tmp_path / 'partial')
    (tmp_path / 'checkpoint-x').mkdir()
    checkpoints.prune(tmp_path, 100, 2, best=5, scratch=tmp_path / 'partial')
    assert list(checkpoints.steps_of(tmp_path)) == [5, 15, 100]
    checkpoints.prune(tmp_path, 100, 9, best=5, scratch=tmp_path / 'partial')
    assert list(checkpoints.steps_of(tmp_path)) == [5, 15, 100]
    checkpoints.prune(tmp_path, 100, 1, best=None, scratch=tmp_path / 'partial')
    assert list(checkpoints.steps_of(tmp_path)) == [100]
    found = checkpoints.newest(tmp_path, print)
    assert found
    assert found[1]['step'] == 100


def test_a_run_may_have_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / 'checkpoint-test'
    checkpoints.save(run, 5, write_config, {}, {}, scratch=run / 'partial')
    found = checkpoints.find(str(run), None, tmp_path, print)
    assert found
    assert found[0] == run / 'checkpoint-5'
    with pytest.raises(ValueError, match='there is no such folder'):
        checkpoints.find(str(tmp_path / 'checkpoint-5'), None, tmp_path, print)


def test_the_run_at_work_last_may_have_no_checkpoint_yet(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / 'first', 5, write_config, {}, {}, scratch=tmp_path / 'first' / 'partial')
    checkpoints.claim(tmp_path / 'second', dict(identity='0123abcd'), resumes=False, found=False).close()
    for last in ('first', 'second'):
        for i, name in enumerate(sorted(('first', 'second'), key=lambda name: name == last)):
            os.utime(tmp_path / name, (i, i))
        found = checkpoints.find('latest', None, tmp_path, print)
        assert found
        assert found[0] == (tmp_path / 'first' / 'checkpoint-5' if last == 'first' else tmp_path / 'second')


@pytest.mark.parametrize('keep', [1, 2, 3])
def test_torn_checkpoints_are_not_kept_instead_of_whole_ones(tmp_path: Path, keep: int) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        checkpoints.save(tmp_path, step, write_config, {}, {}, scratch=tmp_path / 'partial')
    for step in (10, 25, 30):
        (tmp_path / f'checkpoint-{step}' / 'config.json').unlink()
    checkpoints.save(tmp_path, 22, write_config, {}, {}, scratch=tmp_path / 'partial')
    checkpoints.prune(tmp_path, 22, keep, best=None, scratch=tmp_path / 'partial')
    whole = [step for step in checkpoints.steps_of(tmp_path) if step not in (10, 25, 30)]
    assert whole == [5, 15, 20, 22][-keep:]
    found = checkpoints.newest(tmp_path, lambda said: None)
    assert found
    assert found[1]['step'] == 22


CLAIM = """
import sys
from pathlib import Path
from simple_hierarchical_transformer.training import checkpoints
checkpoints.claim(Path(sys.argv[1]), dict(identity='0123abcd'), resumes=True, found=False)
"""


def test_one_process_has_the_folder(tmp_path: Path) -> None:
    out = tmp_path / 'run'
    other = [sys.executable, '-c', CLAIM, str(out)]
    # as it begins, and as it goes on
    for resumes in (False, True):
        held = checkpoints.claim(out, dict(identity='0123abcd'), resumes=resumes, found=False)
        result = subprocess.run(other, capture_output=True, text=True)
        assert 'another run is at work in this folder' in result.stderr
        assert checkpoints.read_mark(out) is not None
        held.close()
        assert subprocess.run(other).returncode == 0


@pytest.mark.parametrize('room', [0, 30])
def test_a_folder_that_cannot_be_marked_is_named_and_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    out, mark = tmp_path / 'run', dict(identity='0123abcd')

    def write(file: int, text: bytes, whole: Any = os.write) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(file, text[:room])

    with monkeypatch.context() as patch:
        patch.setattr(os, 'write', write)
        with pytest.raises(OSError, match=rf'^{re.escape(str(out))}/run\.json could not be written: .*No space left'):
            checkpoints.claim(out, mark, resumes=False, found=False)
    checkpoints.claim(out, mark, resumes=False, found=False).close()
    assert checkpoints.read_mark(out) is not None


def test_pipes_are_no_records(tmp_path: Path) -> None:
    """Opening one would wait for another process for ever."""
    code = f"""
from pathlib import Path
from simple_hierarchical_transformer.training import checkpoints
run = Path({str(tmp_path)!r})
print(checkpoints.read_mark(run), checkpoints.run_of(run / 'final'))
checkpoints.refuse_foreign(run / 'final', '0123abcd')
"""
    (tmp_path / 'final').mkdir()
    for name in ('run.json', 'final/training.json'):
        os.mkfifo(tmp_path / name)
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert result.stdout == 'None None\n'
    assert 'is not as this run wrote it' in result.stderr


def test_a_whole_checkpoint_stays_and_a_torn_one_is_written_again(tmp_path: Path) -> None:
    def write(text: str) -> Any:
        return lambda folder: (folder / 'config.json').write_text(text)

    folder = checkpoints.save(tmp_path, 5, write('first'), {}, {}, scratch=tmp_path / 'partial')
    checkpoints.save(tmp_path, 5, write('second'), {}, {}, scratch=tmp_path / 'partial')
    assert (folder / 'config.json').read_text() == 'first'
    (folder / 'config.json').write_text('torn')
    checkpoints.save(tmp_path, 5, write('third'), {}, {}, scratch=tmp_path / 'partial')
    assert (folder / 'config.json').read_text() == 'third'
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint-5']


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_config(folder)
        raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match=r'checkpoint-5 could not be written: .*No space left on device'):
        checkpoints.save(tmp_path, 5, write, {}, {}, scratch=tmp_path / 'partial')
    assert list(tmp_path.iterdir()) == []


# settings and reports


def test_every_preset_builds_its_model() -> None:
    for name, preset in PRESETS.items():
        chosen = new_settings(parse_args(['--preset', name, '--model', 'depth=1', 'dim=64'], None))
        assert chosen['model'] == {**new_settings(parse_args(['--preset', name], None))['model'], 'depth': 1, 'dim': 64}
        with torch.device('meta'):
            HierarchicalTransformer(num_tokens=256, seq_len=preset['seq_len'], **preset['model'])


def test_what_has_an_option_of_its_own_is_not_taken_for_the_model() -> None:
    for name in ('seq_len=8', 'gradient_checkpointing=True', 'ignore_index=0'):
        with pytest.raises(ValueError, match=f'--model {name.partition("=")[0]}: '):
            new_settings(parse_args(['--preset', 'cpu', '--model', name], None))


def test_time_can_be_asked_for_either_way() -> None:
    assert new_settings(parse_args(['--preset', 'cpu', '--steps', '5'], None))['minutes'] is None
    assert new_settings(parse_args(['--preset', 'gpu', '--minutes', '5'], None))['steps'] is None


def test_a_sample_cannot_break_out_of_its_report() -> None:
    assert report.fenced('a\n```\nb').startswith('````text\n')
    assert report.duration(3725.4) == '1:02:05'


def test_a_curve_has_every_row_and_the_table_means_over_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valid = dict(valid_bits_per_byte=4.0, valid_streaming_bits_per_byte=None)
    scores = [None, 7.0, 6.0, 5.0, 3.0]
    rows = [
        dict(step=step, minutes=0.0, bytes=8 * step, skipped=0, train_bits_per_byte=score)
        | (valid if step in (0, 10, 18) else {})
        for step, score in zip((0, 5, 10, 15, 18), scores, strict=True)
    ]
    drawn: list[tuple[str, list[int]]] = []
    plot = Axes.plot
    monkeypatch.setattr(
        'matplotlib.axes.Axes.plot',
        lambda self, x, y, *, label, marker: drawn.append((label, [*map(int, x)])) or plot(self, [], [], label=label),
    )
    report.draw_curve(rows, tmp_path / 'loss.png')
    assert drawn == [('training', [5, 10, 15, 18]), ('validation', [0, 10, 18])]
    report.write_metrics(rows, tmp_path / 'metrics.csv')
    assert (tmp_path / 'metrics.csv').read_text().splitlines()[2] == '5,0.0,40,0,7.0,,'

    # five steps of 5.0 and three of 3.0 since the validation before
    said = report.account(dict(optimizer='muon'), rows, ['text'], 'here', steps=18, size=144, seconds=1.0)
    assert '| train |  | 4.250 |' in said
    said = report.report(dict(data=['text'], table_lr=None), rows, '', facts={}, commands={}, picture=None, sample='')
    assert said.startswith(
        '# 4.000 bits per byte\n\nOn the validation split, at step 18; the best was 4.000 at step 0.'
    )
    assert 'null' not in said


def test_texts_are_utf8_and_hold_what_is_none_as_escapes(tmp_path: Path) -> None:
    name = b'caf\xc3\xa9 \xff'.decode('ascii', 'surrogateescape')
    report.write_text(tmp_path / 'text', f'{name}\n')
    assert (tmp_path / 'text').read_bytes() == b'caf\xc3\xa9 \\xff\n'
    # surrogates that are no byte of a name
    assert terminal.printable('a \ud800 \u00e9') == 'a \\ud800 \u00e9'


# signals and terminals


def test_a_run_hears_of_hang_ups_unless_it_was_told_not_to() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        stop = processes.Stop()
        for _ in range(2):
            # terminals that close send several
            signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP
        stop.release()
        assert signal.getsignal(signal.SIGHUP) is before

        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = processes.Stop()
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0
        stop.release()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_nobody_reads_tells_a_run_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread() -> Any:
        reads, writes = os.pipe()
        os.close(reads)
        return os.fdopen(writes, 'w')

    monkeypatch.setattr(sys, 'stdout', unread())
    with pytest.raises(BrokenPipeError):
        processes.say('nothing to stop')
    monkeypatch.setattr(sys, 'stdout', unread())
    stop = processes.Stop()
    try:
        processes.say('there is')
        assert stop.number == signal.SIGPIPE
        # nor does anything that is said after it fail
        processes.say('nor this')
        sys.stdout.flush()
    finally:
        stop.release()


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii'])
def test_what_a_terminal_cannot_show_is_replaced(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(shown, encoding))
    terminal.prepare()
    processes.say('a \u65e5 \udcff')
    assert shown.getvalue().decode().split() == ['a', '\\u65e5', '\\xff']


def test_a_log_has_each_state_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bar = watch.Bar(0.0, flops=1.0, peak=1.0, shown=True)
    for step in range(1, 5):
        bar.add(8, 0.1)
        bar.show(step / 4, step, 2.0, 0)
        processes.say('a validation')
        processes.say('a sample')
    bar.close()
    said = capsys.readouterr().err
    assert said.startswith('100% step 4, 2.000 bits per byte')
    assert said.count('bits per byte') == 1
