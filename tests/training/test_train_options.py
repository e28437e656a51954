"""Options of train.py that change what or how a run trains."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import ROOT, run
from support.runs import FLAT, TINY, scores_of

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data import load_corpus
from simple_hierarchical_transformer.data.batches import evaluation_batches, split_bytes
from simple_hierarchical_transformer.data.download import DOWNLOADS
from simple_hierarchical_transformer.training import sources
from simple_hierarchical_transformer.training.scores import bits_per_byte


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
    corpus_ = load_corpus('corpus', [corpus], tmp_path)
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
    # a stream would continue from one text into the next
    assert rows[-1]['valid_streaming_bits_per_byte'] == ''
    assert '--text-key body' in result.stdout
    assert json.loads((out / 'final' / 'config.json').read_text())['num_tokens'] == 258

    sampled = run(
        out / 'final', '--length', 2000, '--temperature', 0, '--stop', '###', '--repetition-penalty', 1.01,
        module='simple_hierarchical_transformer.sample',
    )  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    # one sentence only
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


# train.py that prints how often each row of a step was read before
READINGS = """
import sys
import train
from simple_hierarchical_transformer.embeddings import NGramEmbedding
whole = NGramEmbedding.forward
def forward(embedding, hashes, *readings):
    for each in readings:
        print('readings', *each.tolist())
    return whole(embedding, hashes, *readings)
NGramEmbedding.forward = forward
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
    # two sequences a step; the training split has 33
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
    nowhere = dataclasses.replace(DOWNLOADS['enwik8'], url='http://127.0.0.1:9/')
    monkeypatch.setitem(DOWNLOADS, 'enwik8', nowhere)

    def load(source: str | None) -> Any:
        return sources.load_sources(source and [source], tmp_path, text_key='text', say=print)[0][0]

    corpus = load(None)
    assert corpus.name == 'stdlib'
    assert len(corpus) > 5_000_000
    said = capsys.readouterr().out
    assert f'enwik8 is not in {tmp_path} and cannot be downloaded' in said
    assert "using the source text of Python's standard library instead" in said

    with pytest.raises(OSError, match='could not be fetched'):
        load('enwik8')
    (tmp_path / 'enwik8').write_bytes(b'half of it')
    with pytest.raises(ValueError, match='enwik8 has 100,000,000, so it is damaged'):
        load(None)
