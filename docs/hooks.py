"""Builds parts of the pages: included sections, the table of options, and pages that live beside the code.

- `<!-- include: FILE -->` and `<!-- include: FILE#Heading -->` insert a file of the repository, or one section of it.
- `<!-- options -->` inserts the table of the fields of `Config`.
- `<!-- per-level options -->` inserts the names of those that take one value for each hierarchy.
- Links such as `../benchmarks/README.md` lead to Markdown files and pictures outside docs/. These become pages too.
- The API page shows the docstring that `HierarchicalTransformer` makes when it is imported.
"""

from __future__ import annotations

import dataclasses
import inspect
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.config import Config
from simple_hierarchical_transformer.options import default_of

ROOT = Path(__file__).parent.parent
# what may be linked from a page, although it lives outside docs/
OUTSIDE = ('benchmarks/**/*.md', 'benchmarks/**/*.png', 'data/README.md')
# the pages that show a file of the repository's root
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}

FENCE = re.compile(r'^(```.*?^```\s*?)$', flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(!?\[[^\]]*\])\(([^)\s#]*)(#[^)\s]*)?\)')
INCLUDE = re.compile(r'<!-- include: ([^#\n]+?)(?:#([^\n]+?))? -->')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    outside = not (Path(config.docs_dir) / page.file.src_uri).exists()
    if outside:
        # a link to a script has no page to lead to
        return relink(markdown, page, files, posixpath.dirname(page.file.src_uri), keep_broken=False)
    markdown = relink(markdown, page, files, posixpath.join('docs', posixpath.dirname(page.file.src_uri)))

    def include(found: re.Match[str]) -> str:
        return relink(included(found[1], found[2]), page, files, '', keep_broken=False)

    markdown = INCLUDE.sub(include, markdown).replace('<!-- options -->', options_table())
    return markdown.replace('<!-- per-level options -->', f'They are {per_level_options()}.')


def relink(markdown: str, page: Page, files: Files, folder: str, *, keep_broken: bool = True) -> str:
    """Makes links that are relative to `folder` of the repository relative to the page.

    A link to a file without a page becomes plain text, unless `keep_broken`. The strict mode then names it.
    """

    def replace(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ''
        if not target or '://' in target or target.startswith('mailto:'):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = PAGES.get(path) or path.removeprefix('docs/')
        if files.get_file_from_path(uri) is None:
            return found[0] if keep_broken else label[1:-1]
        return f'{label}({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")}{anchor})'

    return outside_code(markdown, lambda text: LINK.sub(replace, text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    return ''.join(part if part.startswith('```') else change(part) for part in FENCE.split(markdown))


def included(name: str, heading: str | None) -> str:
    text = (ROOT / name).read_text(encoding='utf-8')
    if heading is None:
        return text
    found = re.search(rf'^## {re.escape(heading)}\n(.*?)(?=^## |\Z)', text, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f'{name} has no section {heading!r}')
    return found[1].strip()


def per_level_options() -> str:
    *names, last = (f'`{each.name}`' for each in dataclasses.fields(Config) if each.metadata['per_level'])
    return f'{", ".join(names)} and {last}'


def options_table() -> str:
    options = [each for each in dataclasses.fields(Config) if each.init]
    rows = [
        f'These arguments take one value, or a tuple with one value for each hierarchy: {per_level_options()}.',
        '',
        '| argument | default | description |',
        '|---|---|---|',
    ]
    for each in options:
        default = default_of(each)
        shown = f'`{default}`' if default else 'required'
        # a pipe inside a code span would show its escape
        annotation = str(each.type).replace('|', '&#124;')
        description = each.metadata['help'].replace('|', r'\|')
        rows.append(f'| `{each.name}` | {shown} | {description}<br><small><code>{annotation}</code></small> |')
    return '\n'.join(rows)


class ImportedDocstring(griffe.Extension):
    """Gives the API page the docstring and the arguments of the model, which are not in the source as they are."""

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        if cls.path != f'{HierarchicalTransformer.__module__}.{HierarchicalTransformer.__qualname__}':
            return
        init = cls.members['__init__']
        assert isinstance(init, griffe.Function)
        init.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    each.name,
                    annotation=str(each.type),
                    kind=griffe.ParameterKind.keyword_only,
                    default=default_of(each) or None,
                )
                for each in dataclasses.fields(Config)
            )
        )
        cls.docstring = griffe.Docstring(inspect.getdoc(HierarchicalTransformer) or '', parent=cls, parser='google')
