"""The report of a run, signals, and what its terminal shows."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from simple_hierarchical_transformer import terminal
from simple_hierarchical_transformer.training import processes, report, watch


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

    # five steps of 5.0 and three of 3.0 since the previous validation
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
    # surrogates that represent no byte of a name
    assert terminal.printable('a \ud800 \u00e9') == 'a \\ud800 \u00e9'


def test_a_run_hears_of_hang_ups_unless_it_was_told_not_to() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        stop = processes.Stop()
        for _ in range(2):
            # closing terminals send several
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
        # later output does not fail either
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
