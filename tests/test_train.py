"""The training script and the sampling command as a user runs them."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, run, run_command
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simple_hierarchical_transformer import HierarchicalTransformer, sample
from simple_hierarchical_transformer.data import corpus as data
from simple_hierarchical_transformer.data.batches import evaluation_batches, split_bytes
from simple_hierarchical_transformer.training import cost, report, sources
from simple_hierarchical_transformer.training import run as run_module
from simple_hierarchical_transformer.training.optim import build_optimizer, learning_rate
from simple_hierarchical_transformer.training.plan import Plan, make_plan
from simple_hierarchical_transformer.training.scores import bits_per_byte
from simple_hierarchical_transformer.training.settings import (
    BYTES,
    PRESETS,
    Number,
    build_parser,
    folder,
    named,
    new_settings,
    parse_args,
)

TRACKED = 'simple-hierarchical-transformer'
MODEL: dict[str, Any] = dict(
    dim=32, depth=1, heads=2, hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=8, ngram_rows=64
)
TINY: tuple[object, ...] = (
    '--preset', 'cpu', '--seq-len', 32, '--batch-size', 2, '--valid-bytes', 1024, '--every', 10**6,
    '--model', *(f'{name}={value}' for name, value in MODEL.items()),
)  # fmt: skip


FEW: tuple[object, ...] = (
    '--preset', 'cpu', '--seq-len', 32, '--batch-size', 1, '--valid-bytes', 512, '--model', 'dim=16', 'depth=1',
    'heads=1', 'ngrams=()', 'word_ngrams=()', 'recall=()', 'word_recall=()',
)  # fmt: skip

# one level, which compiles soonest
FLAT: tuple[object, ...] = (
    *TINY, 'ff_mult=4', 'hierarchies=1', 'hierarchical_stride=1', 'window_sizes=None',
    # what is left out by chance is drawn otherwise in a compiled step
    'ngram_dropout=0', '--steps', 20, '--optimizer', 'muon', '--lr', 0.02,
)  # fmt: skip


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """train.py, in this process."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module('train')


@pytest.fixture(scope='module')
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp('runs') / 'run'
    settings = ('--seq-len', 128, '--batch-size', 2, '--steps', 60, '--checkpoint-every', 25, '--every', 20)
    settings += ('--log-with', 'tensorboard', '--log-every', 5, '--keep', 9)
    result = run('--preset', 'cpu', '--data', corpus, '--out', out, *settings)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_learns_and_leaves_a_record(trained: tuple[Path, str]) -> None:
    out, said = trained
    rows = list(csv.DictReader((out / 'metrics.csv').open()))
    first, last = (float(row['valid_bits_per_byte']) for row in (rows[0], rows[-1]))
    assert (int(rows[0]['step']), int(rows[-1]['step'])) == (0, 60)
    assert int(rows[-1]['bytes']) == 60 * 2 * 128
    assert first > 6
    assert last < 0.5 * first
    assert (out / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(path.name for path in out.glob('*-*/')) == [
        'checkpoint-25',
        'checkpoint-50',
        'checkpoint-60',
        TRACKED,
    ]
    assert f'{last:.3f} bits per byte' in said


def test_the_tracker_has_the_curves(trained: tuple[Path, str]) -> None:
    out, _ = trained
    events = EventAccumulator(str(out / TRACKED)).Reload()
    assert 'train/next_latent/4x' in events.Tags()['scalars']
    for name in ('ce', 'recon', 'bits_per_byte', 'gradient_norm', 'learning_rate', 'bytes_per_second', 'share_of_peak'):
        values = events.Scalars(f'train/{name}')
        assert [each.step for each in values] == list(range(5, 61, 5))
    losses = [each.value for each in events.Scalars('train/bits_per_byte')]
    assert losses[-1] < 0.5 * losses[0]

    rows = validated(out)
    logged = {each.step: each.value for each in events.Scalars('valid_bits_per_byte')}
    assert logged == {int(row['step']): pytest.approx(float(row['valid_bits_per_byte'])) for row in rows}


def test_the_report_says_how_it_went(trained: tuple[Path, str]) -> None:
    out, _ = trained
    text = (out / 'report.md').read_text()
    last = list(csv.DictReader((out / 'metrics.csv').open()))[-1]
    assert text.startswith(f'# {float(last["valid_bits_per_byte"]):.3f} bits per byte')
    assert '![training and validation score by step](loss.png)' in text
    assert f'python train.py --resume {out}' in text
    assert f'python -m simple_hierarchical_transformer.sample {out}/final --prompt "The "' in text
    assert '>>>' in text
    assert '| seq_len | `128` |' in text
    card = (out / 'final' / 'README.md').read_text()
    assert re.search(r'60 steps of muon, 15,360 bytes read in \d:\d\d:\d\d', card)
    assert str(out) not in card
    assert '| 4x | 4 | 96 | 2 x 48 | full |' in card
    assert f'| valid | {float(next(csv.DictReader((out / "metrics.csv").open()))["valid_bits_per_byte"]):.3f} |' in card


def test_a_tracker_that_cannot_begin_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / 'tensorboard').mkdir()
    (tmp_path / 'tensorboard' / '__init__.py').write_text('raise RuntimeError("no ink")')
    args = ('--data', corpus, '--out', tmp_path / 'run', *TINY, '--steps', 2, '--log-with', 'tensorboard')
    result = run(*args, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert re.search('error: --log-with tensorboard: .*no ink', result.stderr)
    assert 'Traceback' not in result.stderr


def test_averaged_weights_are_what_is_scored_and_saved(corpus: Path, tmp_path: Path) -> None:
    settings = ('--steps', 12, '--ema', 0.9, *TINY, '--schedule', 'wsd', '--gradient-checkpointing')
    result = run('--data', corpus, '--out', tmp_path / 'run', *settings)
    assert result.returncode == 0, result.stderr
    final = HierarchicalTransformer.from_pretrained(tmp_path / 'run' / 'final')
    raw = load_file(tmp_path / 'run' / 'checkpoint-12' / 'training.safetensors')
    assert not torch.equal(final.token_emb.weight, raw['weights.token_emb.weight'])
    corpus_ = data.load_corpus('corpus', [corpus], tmp_path)
    windows = evaluation_batches(
        corpus_, split_bytes(len(corpus_), seq_len=32)['valid'], seq_len=32, batch_size=8, max_bytes=1024
    )
    last = list(csv.DictReader((tmp_path / 'run' / 'metrics.csv').open()))[-1]
    score = bits_per_byte(final, windows, torch.device('cpu'))
    assert score == pytest.approx(float(last['valid_bits_per_byte']), abs=1e-6)


def test_texts_stay_apart_and_sources_have_weights(corpus: Path, tmp_path: Path) -> None:
    lines = corpus.read_text().split('.')[:2000]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(dict(body=line + '.')) for line in lines))
    out = tmp_path / 'run'
    sources_ = (f'{tmp_path / "rows.jsonl"}=3', f'{corpus}=1')
    result = run('--data', *sources_, '--documents', '--text-key', 'body', '--steps', 40, '--out', out, *TINY)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((out / 'metrics.csv').open()))
    by_source = [float(rows[-1][f'valid_{name}_bits_per_byte']) for name in (tmp_path / 'rows.jsonl', corpus)]
    assert float(rows[-1]['valid_bits_per_byte']) == pytest.approx(0.75 * by_source[0] + 0.25 * by_source[1])
    assert float(rows[-1]['valid_bits_per_byte']) < 0.8 * float(rows[0]['valid_bits_per_byte'])
    # a stream would read on from one text into the next
    assert rows[-1]['valid_streaming_bits_per_byte'] == ''
    assert '--text-key body' in result.stdout
    assert json.loads((out / 'final' / 'config.json').read_text())['num_tokens'] == 258

    sampled = run(
        out / 'final', '--length', 2000, '--temperature', 0, '--stop', '###', '--repetition-penalty', 1.01,
        module='simple_hierarchical_transformer.sample',
    )  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    # a sentence, and no more
    assert len(sampled.stdout) < 1000
    scored = run('--eval', out / 'final', '--data', corpus)
    assert scored.returncode == 0, scored.stderr


@pytest.mark.parametrize('flags', ['--compile', '--mixed-precision bf16'])
def test_flags_that_change_how_a_step_runs_learn_the_same(
    corpus: Path, tmp_path: Path, plain: list[float], flags: str
) -> None:
    result = run('--data', corpus, '--out', tmp_path / 'run', *FLAT, *flags.split())
    assert result.returncode == 0, result.stderr
    assert scores_of(tmp_path / 'run') == pytest.approx(plain, abs=2e-2)
    assert plain[-1] < 0.8 * plain[0]


@pytest.fixture(scope='module')
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp('plain') / 'run'
    result = run('--data', corpus, '--out', out, *FLAT)
    assert result.returncode == 0, result.stderr
    return scores_of(out)


def scores_of(out: Path) -> list[float]:
    return [float(row['valid_bits_per_byte']) for row in validated(out)]


def validated(out: Path) -> list[dict[str, str]]:
    """The rows of metrics with a score of the validation split."""
    with (out / 'metrics.csv').open(encoding='utf-8') as file:
        return [row for row in csv.DictReader(file) if row['valid_bits_per_byte']]


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
    # more than any machine has, whatever asks for it
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


def test_the_commands_it_names_score_and_sample(trained: tuple[Path, str]) -> None:
    commands = [shlex.split(line) for line in re.findall(r'python (.+)', trained[1])]
    assert len(commands) == 2

    scored = run(*commands[0][1:], '--split', 'test')
    assert scored.returncode == 0, scored.stderr
    windows, stream = map(float, re.findall(r'test: ([\d.]+) bits per byte', scored.stdout))
    assert stream < windows + 0.1 < 4

    module, *args = commands[1][1:]
    sampled = [run(*args, '--length', 20, '--seed', 1, module=module) for _ in range(2)]
    assert sampled[0].returncode == 0, sampled[0].stderr
    assert sampled[0].stdout.startswith('The ')
    assert len(sampled[0].stdout) >= len('The ') + 20 + 1
    assert sampled[0].stdout == sampled[1].stdout
    assert re.search(r'20 bytes, \d+ a second', sampled[0].stderr)


def test_a_sample_ends_where_it_is_told_to(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    args = map(str, (trained[0] / 'final', '--prompt', 'The ', '--length', 200, '--seed', 1))
    sample.main([*args])
    whole = capsys.readouterr().out
    stops = [whole[20:22], whole[30:33]]
    sample.main(
        [
            str(trained[0] / 'final'),
            '--prompt',
            'The ',
            '--length',
            '200',
            '--seed',
            '1',
            '--stop',
            stops[0],
            '--stop',
            stops[1],
        ]
    )
    ended = capsys.readouterr().out
    end = min(whole.index(stop, 4) + len(stop) for stop in stops)
    assert ended == whole[:end] + '\n'

    sample.main(
        [str(trained[0] / 'final'), '--prompt', 'The ', '--length', '200', '--seed', '1', '--repetition-penalty', '3']
    )
    assert len(set(capsys.readouterr().out)) > len(set(whole))


def test_samples_from_a_file_and_shows_broken_bytes(trained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / 'prompt').write_bytes(b'caf\xc3\xa9 \xff ')
    module = 'simple_hierarchical_transformer.sample'
    result = run(trained[0] / 'final', '--prompt-file', tmp_path / 'prompt', '--length', 3, module=module)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('caf\u00e9 \\xff ')


def test_ctrl_c_ends_sampling_cleanly(trained: tuple[Path, str]) -> None:
    endless = run_command(trained[0] / 'final', '--length', 10**6, module='simple_hierarchical_transformer.sample')
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert len(process.stdout.read(30)) == 30
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r'\d+ bytes, \d+ a second', errors)
    assert 'Traceback' not in errors


def test_the_config_is_json_without_surprises(trained: tuple[Path, str]) -> None:
    config = json.loads((trained[0] / 'final' / 'config.json').read_text())
    assert config['seq_len'] == 128
    assert config['ignore_index'] == -1


def test_refuses_before_work_is_lost(
    trained: tuple[Path, str], corpus: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    out, _ = trained
    before = (out / 'metrics.csv').read_bytes()
    short = tmp_path / 'short.txt'
    short.write_text('too short')
    new = tmp_path / 'new'
    cases: list[tuple[tuple[object, ...], str]] = [
        (('--data', corpus, '--out', out), f'--out: {out} is not empty'),
        (('--data', tmp_path / 'missing', '--out', new), 'is no file, no folder, and matches none as a glob'),
        (('--data', short, '--out', new), f'{short}: data has 9 bytes'),
        (
            ('--data', corpus, f'{corpus}=2', '--out', new),
            '--data takes a weight above 0 for every source',
        ),
        (('--data', f'{corpus}=-1', '--out', new), '--data: weights must be finite and above 0, got -1.0'),
        (('--data', corpus, '--model', 'dim=7', 'width=3', '--out', new), '--model: '),
        (('--data', corpus, '--model', 'dim=-7', '--out', new), 'dim must be'),
        (('--data', corpus, '--model', 'dim', '--out', new), '--model takes NAME=VALUE, got dim'),
        (('--steps', 3, '--minutes', 1), '--steps and --minutes: give one of them'),
        (('--steps', 0), 'argument --steps: must be from 1 to 1e+12, got 0'),
        (('--ema', 1), 'argument --ema: must be at least 0 and below 1, got 1'),
        (('--data', corpus, '--valid-bytes', 10, '--out', new), '--valid-bytes must be at least 16, got 10'),
        (('--workers', -1), 'argument --workers: must be from 0 to 1024, got -1'),
        (('--split', 'test'), '--split is for --eval, which was not given'),
        (('--eval', out / 'final', '--lr', 1), '--lr is for training, --eval does none'),
        (('--eval', out / 'final', '--dry-run'), '--dry-run is for training, --eval does none'),
        (('--eval', out / 'final', '--resume', out), '--resume is for training, --eval does none'),
        (('--eval', out / 'final', '--seq-len', 256, '--data', corpus), '--seq-len must be at most the 128'),
        (('--data', corpus, '--segment-length', 10**6, '--out', new), 'too few'),
        (('--data', corpus, '--segment-length', 3, '--out', new), 'must be at least the largest stride, 4, got 3'),
        (('--lr', 'fast'), "argument --lr: invalid float value: 'fast'"),
        (('--eval', tmp_path, '--data', corpus), f'--eval: {tmp_path} is no saved model'),
        (('--resume', '--out', new, '--data', tmp_path / 'missing'), 'is no file'),
        (('--data', corpus, '--out', tmp_path / '\udcff', *FEW), 'must have a name in UTF-8'),
    ]
    for args, message in cases:
        assert message in refuse(*args)
    assert (out / 'metrics.csv').read_bytes() == before
    assert not new.exists()


HOSTILE = ('nan', 'inf', '-inf', '-1', '0', '1e308', str(10**30), '9' * 5000, '', 'x', '0x10', '1e-320', '{1, 2}', '\0')
ZERO_IS_FINE = {'--seed', '--workers', '--warmup', '--weight-decay', '--ema'}


def parsed(*args: str) -> tuple[dict[str, Any], str]:
    """The settings of a run with these arguments, or none, and what the command says where it refuses them."""
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(said):
        return new_settings(parse_args(list(args), None)), ''
    return {}, said.getvalue()


@pytest.mark.parametrize(
    'option', [each for each in build_parser(None)._actions if each.dest not in ('help', 'data', 'model')],
    ids=lambda each: each.dest,
)  # fmt: skip
def test_no_option_takes_what_a_run_could_not_use(option: argparse.Action) -> None:
    flag = option.option_strings[0]
    for value in HOSTILE:
        found, refusal = parsed(f'{flag}={value}')
        if found:
            # a path or a name, which may not exist
            assert option.type in (folder, named, None) or (flag in ZERO_IS_FINE and float(value) < 1)
            assert value or option.type is None
        else:
            assert f'argument {"/".join(option.option_strings)}: ' in refusal or f'{flag} is for ' in refusal


def test_the_largest_and_smallest_numbers_overflow_nowhere() -> None:
    numbers = [each for each in build_parser(None)._actions if isinstance(each.type, Number)]
    assert len(numbers) >= 16
    for chosen in itertools.product(('least', 'most'), repeat=2):
        ends = dict(zip(('lr', 'table_lr'), chosen, strict=True))
        given = [f'{each.option_strings[0]}={getattr(each.type, ends.get(each.dest, "most"))}' for each in numbers
                 if each.dest != 'steps']  # fmt: skip
        found, _ = parsed(*given)
        model = torch.nn.ModuleDict(dict(token_emb=torch.nn.Embedding(3, 4), inner=torch.nn.Linear(4, 4)))
        optimizer = build_optimizer(
            model, 'muon', lr=found['lr'], table_lr=found['table_lr'], weight_decay=found['weight_decay']
        )
        for group in optimizer.param_groups:
            rate = learning_rate(0.5, highest=found['lr'], schedule=found['schedule'], warmup=found['warmup'])
            group['lr'] = rate * group['scale']
        model['inner'](model['token_emb'](torch.tensor([0, 1]))).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), found['clip'])
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert report.duration(60 * found['minutes'])


@pytest.mark.parametrize('value', ['{1, 2}', "b'x'", '1j', '...', '{(1, 2): 3}', '[{1}]'])
def test_what_a_run_could_not_keep_is_no_argument_of_the_model(value: str) -> None:
    assert (
        f'--model dim: must be a number, a string, None, True, False, a tuple or a dict, got {value}'
        in (parsed('--model', f'dim={value}')[1])
    )


@pytest.mark.parametrize('value', ['{[]: 1}', '(' * 5000 + ')' * 5000, '9' * 5000, '\0'])
def test_what_python_cannot_read_is_a_string(value: str) -> None:
    assert parsed('--model', f'dim={value}')[0]['model']['dim'] == value


@pytest.mark.parametrize('precision', ['fp8', 'half', ''])
def test_the_launchers_precision_is_checked(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str], precision: str
) -> None:
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', precision)
    said = refuse('--data', corpus, *FEW, '--dry-run')
    assert f'ACCELERATE_MIXED_PRECISION must be one of no, bf16, fp16, got {precision!r}' in said


def test_a_tracker_that_is_not_there_is_named(
    corpus: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert '--log-with wandb: it is not installed (pip install wandb)' in refuse(
        '--data', corpus, '--log-with', 'wandb'
    )


def test_the_sampling_command_refuses_too(
    tmp_path: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    final = trained[0] / 'final'
    for name, damage in (('torn', lambda text: text[:-50]), ('weightless', None), ('garbage', lambda text: b'{')):
        folder = shutil.copytree(final, tmp_path / name)
        file = folder / ('config.json' if name == 'garbage' else 'model.safetensors')
        if damage:
            file.write_bytes(damage(file.read_bytes()))
        else:
            file.unlink()
    for args, message in (
        ((tmp_path,), 'is no saved model'),
        ((tmp_path / 'torn',), 'is torn'),
        ((tmp_path / 'weightless',), 'No such file'),
        ((tmp_path / 'garbage',), 'error: '),
        ((final, '--prompt', ''), 'prompt must hold at least one token'),
        ((final, '--temperature', '-1'), 'temperature must be a finite number of at least 0'),
        ((final, '--prompt-file', tmp_path / 'missing'), 'No such file'),
    ):
        with pytest.raises(SystemExit) as end:
            sample.main(list(map(str, args)))
        assert message in str(end.value.code)
    for option, value, message in (
        ('--seed', 10**30, 'must be from -9.22337e+18 to 1.84467e+19, got 1'),
        ('--seed', 'x', "invalid int value: 'x'"),
        ('--length', -3, 'must be from 0 to 1e+12, got -3'),
        ('--length', 10**13, 'must be from 0 to 1e+12, got 1'),
    ):
        with pytest.raises(SystemExit):
            sample.main([str(final), f'{option}={value}'])
        said = capsys.readouterr()
        assert f'argument {option}: {message}' in said.err
        assert said.out == ''
    result = run(tmp_path / 'torn', module='simple_hierarchical_transformer.sample')
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr


# train.py that says with each step how often it takes its text to have been read before
READINGS = """
import sys
import train
from simple_hierarchical_transformer.training.learner import Learner
whole = Learner.gradients
def gradients(learner, ids):
    found = whole(learner, ids)
    print('readings', *learner.model.ngram_emb.readings.tolist())
    return found
Learner.gradients = gradients
train.main(sys.argv[1:])
"""


def test_n_grams_are_left_out_where_the_text_was_read_before(tmp_path: Path) -> None:
    path = tmp_path / 'text.txt'
    path.write_text('what has been read once is read again. ' * 30 + 'And again.')
    settings = (*TINY, 'ngram_dropout=0.5', '--steps', 36, '--data', path, '--out', tmp_path / 'run')
    command = [sys.executable, '-c', READINGS, *map(str, settings)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = [
        [float(each) for each in line.split()[1:]] for line in result.stdout.splitlines() if line.startswith('readings')
    ]
    # two sequences a step, of the 33 that 90 % of the text come to
    assert found == [[0.0, 0.0]] * 16 + [[0.0, 1.0]] + [[1.0, 1.0]] * 16 + [[2.0, 2.0]] * 3


def test_trains_on_segments_that_remember(corpus: Path, tmp_path: Path) -> None:
    settings = ('--seq-len', 64, '--segment-length', 16, '--batch-size', 2, '--steps', 40, '--grad-accum', 2)
    result = run('--preset', 'cpu', '--data', corpus, '--out', tmp_path / 'run', *settings)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / 'run' / 'metrics.csv').open()))
    assert float(rows[-1]['valid_streaming_bits_per_byte']) < 0.7 * float(rows[0]['valid_streaming_bits_per_byte'])
    assert int(rows[-1]['bytes']) == 40 * 2 * 2 * 16


def test_without_a_network_the_standard_library_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = dataclasses.replace(data.DOWNLOADS['enwik8'], url='http://127.0.0.1:9/')
    monkeypatch.setitem(data.DOWNLOADS, 'enwik8', nowhere)

    def load(source: str | None) -> Any:
        return sources.load_sources(source and [source], tmp_path, text_key='text', say=print)[0][0]

    corpus = load(None)
    assert corpus.name == 'stdlib'
    assert len(corpus) > 5_000_000
    said = capsys.readouterr().out
    assert f'enwik8 is not in {tmp_path} and cannot be had' in said
    assert "using the source text of Python's standard library instead" in said

    with pytest.raises(OSError, match='could not be fetched'):
        load('enwik8')
    (tmp_path / 'enwik8').write_bytes(b'half of it')
    with pytest.raises(ValueError, match='enwik8 has 100,000,000, so it is torn'):
        load(None)


# what is written while a run goes


def test_short_runs_have_a_curve(
    corpus: Path,
    tmp_path: Path,
    train_here: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_module, 'sample_text', lambda *args: 'text')
    out = tmp_path / 'run'
    train_here('--data', corpus, '--out', out, *FEW, '--steps', 30, '--log-every', 2)
    with (out / 'metrics.csv').open(encoding='utf-8') as file:
        rows = {int(row['step']): row for row in csv.DictReader(file)}
    assert [step for step in rows if rows[step]['valid_bits_per_byte']] == list(range(0, 31, 3))
    trained = [step for step in rows if rows[step]['train_bits_per_byte']]
    assert trained == sorted({*range(2, 31, 2), *range(3, 31, 3)})
    assert all(1 < float(rows[step]['train_bits_per_byte']) < 16 for step in trained)
    # a log has the bar once, at the end
    assert capsys.readouterr().err.count(' bytes/s, ') == 1


def test_runs_in_minutes_have_a_curve_too(
    corpus: Path, tmp_path: Path, train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves on by a tick whenever it is read."""
    ticks = itertools.count()
    seconds = 0.0
    whole = run_module.Run.validate

    def validate(run: Any) -> None:
        nonlocal seconds
        whole(run)
        seconds += slow

    clock = types.SimpleNamespace(**{**vars(time), 'monotonic': lambda: 0.05 * next(ticks) + seconds})
    monkeypatch.setattr(run_module, 'time', clock)
    monkeypatch.setattr(run_module, 'sample_text', lambda *args: 'text')
    monkeypatch.setattr(run_module.Run, 'validate', validate)
    # two ticks a step: 30 steps, where scoring takes no time
    slow = 0.0
    train_here('--data', corpus, '--out', tmp_path / 'quick', *FEW, '--minutes', 0.05)
    assert len(validated(tmp_path / 'quick')) >= 11
    # and where it takes a third of the run, it does not take all of it
    slow = 1.0
    train_here('--data', corpus, '--out', tmp_path / 'slow', *FEW, '--minutes', 0.05)
    rows = validated(tmp_path / 'slow')
    assert len(rows) in (3, 4)
    assert int(rows[-1]['step']) > 10


def test_what_is_scored_is_what_the_run_read(
    corpus: Path,
    tmp_path: Path,
    train_here: Callable[..., None],
    refuse: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, out = tmp_path / 'text.txt', tmp_path / 'run'
    text.write_text(corpus.read_text()[:9000])
    load = run_module.load_sources
    # the default, which is fetched elsewhere
    monkeypatch.setattr(
        run_module, 'load_sources', lambda data, *args, **kwargs: load(data or [str(text)], *args, **kwargs)
    )
    train_here('--out', out, *FEW, '--steps', 2)
    monkeypatch.setattr(run_module, 'load_sources', load)
    assert f'| data | `["{text}"]` |' in (out / 'report.md').read_text(encoding='utf-8')
    assert '`null`' not in (out / 'report.md').read_text(encoding='utf-8')

    capsys.readouterr()
    train_here('--eval', out / 'final', '--batch-size', 5)
    shown = capsys.readouterr()
    assert f'the data of the run: {text}\n' in shown.out
    assert f'over 450 bytes of {text}, in windows of 32' in shown.out
    # 15 windows, five a batch
    assert '3/3' in shown.err
    for model in (out / 'checkpoint-2', out / 'final'):
        train_here('--eval', model, '--data', text)
        assert 'the data of the run' not in capsys.readouterr().out
        train_here('--eval', model)
        assert f'the data of the run: {text}\n' in capsys.readouterr().out

    text.write_text(corpus.read_text()[1:9001])
    assert f'--eval: the data of the run, {text}, has changed since. Give --data' in refuse('--eval', out / 'final')
    text.unlink()
    assert f'--eval: the data of the run, {text}, cannot be had: ' in refuse('--eval', out / 'final')


@pytest.mark.parametrize('fails', ['say', 'sample_text'])
def test_a_checkpoint_is_written_before_anything_is_shown(
    corpus: Path, tmp_path: Path, train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*args: Any) -> str:
        if fails == 'say' and not str(args[0]).startswith('step 2'):
            return ''
        raise RuntimeError('cannot be shown')

    monkeypatch.setattr(run_module, fails, fail)
    command = ('--data', corpus, '--out', tmp_path / 'run', *FEW, '--steps', 2)
    if fails == 'say':
        with pytest.raises(RuntimeError, match='cannot be shown'):
            train_here(*command)
    else:
        # a model that cannot go on with a text does not end the run
        train_here(*command)
        assert 'no sample: cannot be shown' in (tmp_path / 'run' / 'report.md').read_text(encoding='utf-8')
    assert (tmp_path / 'run' / 'checkpoint-2' / 'training.json').exists()


BOTH = """
import sys
import train
from simple_hierarchical_transformer import sample
train.main(sys.argv[1:])
out = sys.argv[sys.argv.index('--out') + 1]
train.main(['--resume', out, '--steps', '4'])
train.main(['--eval', out + '/final'])
sample.main([out + '/final', '--prompt', 'a \\u65e5 \\xe9', '--length', '3'])
"""


@pytest.mark.parametrize(
    ('env', 'says'),
    [(dict(PYTHONIOENCODING='cp1252'), b'a \\u65e5 \xe9'), (dict(LC_ALL='C', PYTHONUTF8='0'), b'a \\u65e5 \\xe9')],
)
def test_terminals_that_do_not_know_a_character_are_told_of_it(
    tmp_path: Path, env: dict[str, str], says: bytes
) -> None:
    name = 'caf\u00e9 \u65e5.txt'
    for file in (name.encode(), b'broken \xff.txt'):
        Path(os.fsdecode(bytes(tmp_path) + b'/' + file)).write_bytes('\u65e5\u672c \u2026 '.encode() * 300)
    args = (bytes(tmp_path) + b'/' + name.encode(), bytes(tmp_path) + b'/broken \xff.txt', b'--out')
    args += (bytes(tmp_path) + b'/r\xc3\xbcn', *(str(each).encode() for each in (*FEW, '--steps', 2)))
    script = BOTH.replace("'a \\u65e5 \\xe9'", "__import__('os').fsdecode('a \\u65e5 \\xe9'.encode())")
    result = subprocess.run(
        [sys.executable, '-c', script, b'--data', *args], capture_output=True, timeout=300, cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **env},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode(errors='replace')
    assert says in result.stdout
    out = tmp_path / 'r\u00fcn'
    report = (out / 'report.md').read_text(encoding='utf-8')
    assert name in report
    assert 'broken \\xff.txt' in report
    assert '\u65e5\u672c' in report
    columns = (out / 'metrics.csv').read_text(encoding='utf-8').splitlines()[0]
    assert f'{name}_bits_per_byte' in columns
    assert 'broken \\xff.txt_bits_per_byte' in columns
    assert 'broken \\xff.txt' in (out / 'final' / 'README.md').read_text(encoding='utf-8')


def test_readers_of_a_sample_may_leave(trained: tuple[Path, str]) -> None:
    module = 'simple_hierarchical_transformer.sample'
    command = run_command(trained[0] / 'final', '--length', 10**6, module=module)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr
        assert process.stderr.read() == ''
