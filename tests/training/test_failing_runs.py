"""Full disks, folders without permission, and steps that are not finite."""

from __future__ import annotations

import csv
import ctypes
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.commands import ROOT, run
from support.resumed import PLAIN, SETTINGS, assert_same, contents, copy_half, outcome, start, train_whole

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import checkpoints


@pytest.fixture(scope='module')
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whole(corpus, tmp_path_factory.mktemp('unbroken') / 'run')


@pytest.fixture
def halfway(unbroken: Path, tmp_path: Path) -> Path:
    """The run as it was after step 15."""
    return copy_half(unbroken, tmp_path / 'run')


@pytest.mark.parametrize('what', ['model.safetensors', 'training.safetensors', 'loss.png'])
def test_a_full_disk_ends_the_run_and_touches_nothing(unbroken: Path, halfway: Path, what: str) -> None:
    size = (unbroken / ('.' if what == 'loss.png' else 'checkpoint-15') / what).stat().st_size

    def small_files() -> None:
        # like a full disk, refuses larger files; Python ignores the signal that comes with it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))

    before = {name: data for name, data in contents(halfway).items() if name.startswith('checkpoint')}
    process = start('--resume', halfway, preexec_fn=small_files)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert 'Traceback' not in said
    errors = re.findall(r'error: .*', said)
    assert len(errors) == 1
    assert 'could not be written' in errors[0]
    assert {name: data for name, data in contents(halfway).items() if name.startswith('checkpoint')} == before
    assert list(halfway.glob('.*')) == []

    if what == 'training.safetensors':
        assert run('--resume', halfway).returncode == 0
        assert_same(outcome(halfway), outcome(unbroken))


def without_power_over_permissions() -> None:
    """Takes from root what lets it write everywhere; from others there is nothing to take."""
    pr_capbset_drop, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def test_a_folder_that_cannot_be_written_is_named(halfway: Path, corpus: Path) -> None:
    before = contents(halfway)
    halfway.chmod(0o555)
    try:
        for args in (('--resume', halfway), ('--data', corpus, '--out', halfway / 'new', *SETTINGS)):
            process = start(*args, preexec_fn=without_power_over_permissions)
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 1, said
            assert re.search(r'error: .*Permission denied', said), said
            assert 'Traceback' not in said
    finally:
        halfway.chmod(0o755)
    assert contents(halfway) == before


INJECT = textwrap.dedent(
    """
    import sys
    import train
    from simple_hierarchical_transformer import HierarchicalTransformer

    what, broken = sys.argv[1], set(map(int, sys.argv[2].split(',')))
    losses, calls = HierarchicalTransformer.losses, [0]

    def spoilt(self, *args):
        loss, parts = losses(self, *args)
        if loss.is_meta:
            # the plan of the memory, not a step
            return loss, parts
        step, calls[0] = calls[0], calls[0] + 1
        if step in broken:
            # a loss that is not finite, or a finite loss whose gradient is not
            loss = loss * float('nan') if what == 'loss' else loss + (0 * self.norms[0].weight.sum()).sqrt()
        return loss, parts

    HierarchicalTransformer.losses = spoilt
    train.main(sys.argv[3:])
    """
)


def inject(what: str, steps: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-c', INJECT, what, steps, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_a_step_that_is_not_finite_is_left_out(corpus: Path, tmp_path: Path, what: str) -> None:
    result = inject(what, '2,7,8', '--data', corpus, '--out', tmp_path / 'run', *PLAIN)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / 'run' / 'metrics.csv').open()))
    # step 8 was skipped, so its checkpoint waits for a step that is not
    assert [(int(row['step']), int(row['skipped'])) for row in rows] == [(0, 0), (4, 1), (8, 2), (12, 3)]
    assert sorted(path.name for path in (tmp_path / 'run').glob('checkpoint-*')) == ['checkpoint-12', 'checkpoint-4']
    assert all(float(row['valid_bits_per_byte']) < 9 for row in rows)
    model = HierarchicalTransformer.from_pretrained(tmp_path / 'run' / 'final')
    assert all(p.isfinite().all() for p in model.parameters())
    assert '| steps skipped | 3 |' in (tmp_path / 'run' / 'report.md').read_text()


def test_several_in_a_row_end_the_run(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / 'run'
    result = inject('loss', '5,6,7,8,9,10,11', '--data', corpus, '--out', out, *PLAIN)
    assert result.returncode == 1
    assert 'not finite in 5 steps in a row, up to step 10' in result.stderr
    assert 'Traceback' not in result.stderr
    record = checkpoints.read_record(out / 'checkpoint-4')
    assert record['progress']['skipped'] == 0

    # without the injected error, the run continues
    assert run('--resume', out).returncode == 0
    assert checkpoints.read_record(out / 'checkpoint-12')['progress']['skipped'] == 0
