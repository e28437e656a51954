"""The package as it is installed, and the README's examples as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), flags=re.DOTALL)


def test_wheel_installs_and_imports_elsewhere(tmp_path: Path) -> None:
    pip = [sys.executable, '-m', 'pip', '--quiet']
    build = ['wheel', str(ROOT), '--no-deps', '--no-build-isolation', '--wheel-dir', str(tmp_path)]
    subprocess.run([*pip, *build], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob('simple_hierarchical_transformer-*.whl')

    names = zipfile.ZipFile(wheel).namelist()
    assert 'simple_hierarchical_transformer/py.typed' in names
    assert 'simple_hierarchical_transformer/mixers/attention.py' in names
    assert not [name for name in names if name.startswith(('tests', 'train', 'benchmarks'))]

    target = tmp_path / 'elsewhere'
    subprocess.run([*pip, 'install', '--no-deps', '--target', str(target), str(wheel)], check=True, cwd=tmp_path)
    code = (
        'import torch, simple_hierarchical_transformer as package;'
        'model = package.HierarchicalTransformer(num_tokens=4, dim=8, depth=1, hierarchies=(1, 2));'
        'model(torch.zeros(1, 5, dtype=torch.long), return_loss=True)[0].backward();'
        'print(package.__file__)'
    )
    env = {'PYTHONPATH': str(target), 'PATH': ''}
    command = [sys.executable, '-c', code]
    ran = subprocess.run(command, check=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.stdout.startswith(str(target))


def test_imports_print_nothing_and_need_no_training_packages() -> None:
    code = (
        'import sys; sys.modules.update(dict.fromkeys(("matplotlib", "accelerate")));'
        'from simple_hierarchical_transformer import HierarchicalTransformer'
    )
    ran = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == ran.stderr == ''


def test_readme_has_the_three_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize('example', EXAMPLES, ids=lambda code: code.split('(')[0].split()[-1])
def test_readme_example_runs_as_written(example: str) -> None:
    """In a process of its own: the large ones should not leave their memory behind."""
    subprocess.run([sys.executable, '-c', example], check=True, cwd=ROOT, timeout=600)
