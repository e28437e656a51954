"""Every Python example of README.md, CONTRIBUTING.md and docs/ runs by itself, exactly as written."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from simple_hierarchical_transformer import HierarchicalTransformer, objectives

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', *sorted((ROOT / 'docs').glob('*.md'))]
LINKED = [*PAGES, ROOT / 'data' / 'README.md', *sorted((ROOT / 'benchmarks').rglob('*.md'))]
BLOCK = re.compile(r'(<!-- not run: [^\n]* -->\n)?```python\n(.*?)```', flags=re.DOTALL)
LINK = re.compile(r'\]\(([^)\s#]*)(#[^)\s]*)?\)')
HEADING = re.compile(r'^#+ (.*)$', flags=re.MULTILINE)


class Example(NamedTuple):
    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def examples() -> list[Example]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding='utf-8')
        found += [
            Example(page, text.count('\n', 0, match.start(2)) + 1, match[2])
            for match in BLOCK.finditer(text)
            if not match[1]
        ]
    return found


@pytest.mark.parametrize('example', examples(), ids=str)
def test_example_runs_as_written(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # an example may add to it
    monkeypatch.setattr(objectives, 'OBJECTIVES', objectives.OBJECTIVES)
    if "'model.pt'" in example.code:
        # the file that a user of version 0.4.0 has
        old = HierarchicalTransformer(num_tokens=256, dim=64, depth=2, hierarchies=(1, 4))
        torch.save(old.state_dict(), 'model.pt')
    # a line number in a traceback is that of the page; the future statements of this file do not count
    code = compile('\n' * (example.line - 1) + example.code, str(example.page), 'exec', dont_inherit=True)
    names: dict[str, Any] = {'__name__': '__main__'}
    exec(code, names)
    # large models should not leave their memory behind
    names.clear()
    gc.collect()


def test_readme_is_short_and_has_its_sections_in_order() -> None:
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 250
    assert [title for level, title in re.findall(r'^(##?) (.*)$', text, flags=re.MULTILINE) if level == '##'] == [
        'When to use it', 'Install', 'Quick start', 'Usage', 'Generation', 'Long texts', 'Saving', 'Results',
        'Migrating from 0.4.0', 'Development', 'Citation',
    ]  # fmt: skip


def test_the_readme_table_is_the_one_of_the_results_page() -> None:
    rows = [line for line in (ROOT / 'README.md').read_text(encoding='utf-8').splitlines() if line.startswith('|')]
    assert rows
    assert set(rows) <= set((ROOT / 'docs' / 'results.md').read_text(encoding='utf-8').splitlines())


def test_contributing_names_every_module() -> None:
    package = ROOT / 'simple_hierarchical_transformer'
    layout = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8').split('## Layout')[1].split('```')[1]
    modules = {path.name for path in package.glob('*.py')} - {'__init__.py', 'version.py'}
    folders = {f'{path.parent.name}/' for path in package.glob('*/__init__.py')}
    assert {*modules, *folders} <= set(layout.replace(',', ' ').split())


def anchor(heading: str) -> str:
    """The id that GitHub and mkdocs give to a heading of these pages."""
    return '#' + re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


@pytest.mark.parametrize('page', LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    for target, place in LINK.findall(text):
        if '://' in target:
            continue
        path = page.parent / target if target else page
        assert path.is_file(), f'{page.name} links to {target}'
        if not place or path.name == 'api.md':
            continue
        source = ROOT / 'CONTRIBUTING.md' if path.name == 'contributing.md' else path
        anchors = {anchor(heading) for heading in HEADING.findall(source.read_text(encoding='utf-8'))}
        assert place in anchors, f'{page.name} links to {target}{place}'
