"""The package as it is installed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.generation.loop import Sampling, Settings

ROOT = Path(__file__).parent.parent


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


def test_an_editable_install_is_a_folder_on_the_path(tmp_path: Path) -> None:
    """Type checkers follow a path in a .pth file, not code that finds the package."""
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'simple_hierarchical_transformer', tmp_path / 'simple_hierarchical_transformer')
    code = 'from setuptools import build_meta; build_meta.build_editable("wheels")'
    (tmp_path / 'wheels').mkdir()
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = (tmp_path / 'wheels').glob('*.whl')
    archive = zipfile.ZipFile(wheel)
    (path,) = [archive.read(name).decode().strip() for name in archive.namelist() if name.endswith('.pth')]
    assert (Path(path) / 'simple_hierarchical_transformer' / 'py.typed').is_file()


def functions(file: str, name: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / 'simple_hierarchical_transformer' / file).read_text(encoding='utf-8'))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]


def arguments(function: ast.FunctionDef) -> set[str]:
    return {each.arg for each in (*function.args.args, *function.args.kwonlyargs)}


def test_overloads_have_all_arguments() -> None:
    """What they return is checked by mypy, in tests/typed_use.py."""
    *overloads, function = functions('generation/methods.py', 'score')
    assert len(overloads) == 2
    for overload in overloads:
        assert arguments(overload) == arguments(function)
    *overloads, function = functions('generation/methods.py', 'generate')
    assert len(overloads) == 6
    for overload in overloads:
        assert arguments(overload) | set(Sampling.__annotations__) == arguments(function)
    settings = arguments(function) - {'self', 'prompt', 'seq_len', 'return_state'}
    assert {*Sampling.__annotations__, *Settings.__annotations__} == settings


def test_the_overloads_of_a_call_have_all_arguments() -> None:
    # the last one is for flags whose values are not known, the one after it what mypy asks for
    *_, last, _ = functions('calls.py', '__call__')
    (forward,) = functions('model.py', 'forward')
    assert arguments(last) == arguments(forward)


def test_user_code_is_typed(tmp_path: Path) -> None:
    """By mypy with the cache that `make test` fills before the tests run."""
    env = {name: value for name, value in os.environ.items() if name != 'MYPYPATH'}
    command = [sys.executable, '-m', 'mypy', 'tests/typed_use.py']
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_a_model_is_shown_by_a_line_for_each_part() -> None:
    model = HierarchicalTransformer(
        num_tokens=256, dim=(8, 16), depth=2, seq_len=64, dim_head=4, heads=2, hierarchies=(1, 4), window_sizes=(0, 16)
    )
    text = repr(model)
    assert len(text.splitlines()) < 20 < len(nn.Module.__repr__(model).splitlines())
    assert f'{sum(p.numel() for p in model.parameters()):,} parameters, torch.float32, cpu' in text
    assert 'level 1x: stride 1, dim 8, depth 2, no attention, feed-forward of 32' in text
    assert 'level 4x: stride 1, dim 16, depth 2, attention of 2 x 4, window 16, feed-forward of 64' in text
    for name, part in model.named_children():
        shown = bool(len(part)) if isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)) else True
        assert (f'\n  ({name}): ' in text) is shown
    assert '(norms): 2 x LayerNorm, 48 parameters' in text


def test_imports_print_nothing_and_need_no_training_packages() -> None:
    code = (
        'import sys; sys.modules.update(dict.fromkeys(("matplotlib", "accelerate")));'
        'from simple_hierarchical_transformer import HierarchicalTransformer'
    )
    ran = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == ran.stderr == ''


def test_import_leaves_the_compiler_alone() -> None:
    # it takes longer to import than the package
    code = (
        'import sys, torch; before = set(sys.modules);'
        'import simple_hierarchical_transformer; print(*{"torch._dynamo", "sympy"} & set(sys.modules) - before)'
    )
    ran = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == '\n'
