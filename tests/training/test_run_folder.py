"""The folder of a run and its checkpoints."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simple_hierarchical_transformer.training import checkpoints, run_folder


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
    run_folder.claim(tmp_path / 'second', dict(identity='0123abcd'), resumes=False, found=False).close()
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
from simple_hierarchical_transformer.training import checkpoints, run_folder
run_folder.claim(Path(sys.argv[1]), dict(identity='0123abcd'), resumes=True, found=False)
"""


def test_one_process_has_the_folder(tmp_path: Path) -> None:
    out = tmp_path / 'run'
    other = [sys.executable, '-c', CLAIM, str(out)]
    # when it begins and when it resumes
    for resumes in (False, True):
        held = run_folder.claim(out, dict(identity='0123abcd'), resumes=resumes, found=False)
        result = subprocess.run(other, capture_output=True, text=True)
        assert 'another run is active in this folder' in result.stderr
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
            run_folder.claim(out, mark, resumes=False, found=False)
    run_folder.claim(out, mark, resumes=False, found=False).close()
    assert checkpoints.read_mark(out) is not None


def test_pipes_are_no_records(tmp_path: Path) -> None:
    """Opening one would wait for another process for ever."""
    code = f"""
from pathlib import Path
from simple_hierarchical_transformer.training import checkpoints, run_folder
run = Path({str(tmp_path)!r})
print(checkpoints.read_mark(run), run_folder.run_of(run / 'final'))
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
