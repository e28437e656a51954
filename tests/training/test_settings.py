"""The command line and the settings of a run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import FEW

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.config import Config
from simple_hierarchical_transformer.training import report
from simple_hierarchical_transformer.training.optim import build_optimizer, learning_rate
from simple_hierarchical_transformer.training.settings import (
    ELSEWHERE,
    PRESETS,
    Number,
    build_parser,
    folder,
    named,
    new_settings,
    parse_args,
)

HOSTILE = ('nan', 'inf', '-inf', '-1', '0', '1e308', str(10**30), '9' * 5000, '', 'x', '0x10', '1e-320', '{1, 2}', '\0')

ZERO_IS_FINE = {'--seed', '--workers', '--warmup', '--weight-decay', '--ema'}


def parsed(*args: str) -> tuple[dict[str, Any], str]:
    """The settings of a run with these arguments, or nothing and the message of the refusal."""
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
            # a path or a name, which need not exist
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


def test_help_of_the_model_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(['--model', 'help'], None)
    assert end.value.code == 0
    listed = capsys.readouterr().out
    for option in fields(Config):
        # options that the run sets have arguments of their own
        assert (f'\n{option.name}: {option.metadata["help"][:20]}' in f'\n{listed}') == (option.name not in ELSEWHERE)
