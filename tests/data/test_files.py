"""Sources stand for files: folders, globs, links and names that look like globs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import load, text_of, tree

from simple_hierarchical_transformer.data import find_files, standard_library


def test_reads_folders_and_globs_in_order(tmp_path: Path) -> None:
    (tmp_path / 'texts' / 'deep').mkdir(parents=True)
    (tmp_path / 'texts' / '.git').mkdir()
    (tmp_path / 'texts' / '.git' / 'config').write_bytes(b'hidden')
    (tmp_path / 'texts' / 'b.txt').write_bytes(b'second ')
    (tmp_path / 'texts' / 'a.txt').write_bytes(b'first ')
    (tmp_path / 'texts' / 'deep' / 'c.md').write_bytes(b'third')

    def read(source: str | Path) -> bytes:
        return text_of(load(*find_files(source), cache=tmp_path / 'cache'))

    assert read(tmp_path / 'texts') == b'first second third'
    assert read(str(tmp_path / 'texts' / '*.txt')) == b'first second '
    assert read(str(tmp_path / '**' / '*.md')) == b'third'


def test_missing_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is not a file or folder, and matches no file as a glob'):
        find_files(tmp_path / 'nothing')
    with pytest.raises(ValueError, match='is a folder without files'):
        find_files(tmp_path)
    (tmp_path / 'empty').touch()
    with pytest.raises(ValueError, match='hold no byte'):
        load(*find_files(tmp_path), cache=tmp_path / 'cache')


def test_a_folder_is_read_through_links_and_each_file_once(tmp_path: Path) -> None:
    inside, outside = tree(tmp_path / 'in', b_c='1 ', d='2 '), tree(tmp_path / 'out', e_f='3 ', g='4 ', h='5 ')
    (inside / 'a').symlink_to(inside / 'b')
    (inside / 'b' / 'loop').symlink_to(inside)
    (inside / 'b' / 'link').symlink_to(inside / 'd')
    (inside / 'out').symlink_to(outside)
    (inside / 'again').symlink_to(outside / 'e')
    (outside / 'e' / 'back').symlink_to(outside)
    (inside / 'z').symlink_to(outside / 'h')
    files = find_files(inside)
    # Own paths are preferred over links, and short ways through links over long ones.
    assert [str(file.relative_to(inside)) for file in files] == ['again/f', 'b/c', 'd', 'out/g', 'out/h']
    assert text_of(load(*files, cache=tmp_path / 'cache')) == b'3 1 2 4 5 '


def test_globs_of_many_folders_read_each_file_once(tmp_path: Path) -> None:
    folder = tree(tmp_path / 'in', a_b_c='1', a_d='2', e='3')
    for number in range(3):
        # glob.glob would follow these links 40 levels deep.
        (folder / 'a' / f'loop{number}').symlink_to(folder)
    for pattern, names in (
        ('**', ['a/b/c', 'a/d', 'e']),
        ('**/*', ['a/b/c', 'a/d', 'e']),
        ('**/**/[cd]', ['a/b/c', 'a/d']),
        ('a/**/c', ['a/b/c']),
        ('*/**/b/*', ['a/b/c']),
        ('a/*', ['a/d']),
    ):
        assert [str(file.relative_to(folder)) for file in find_files(folder / pattern)] == names


def test_what_exists_is_no_glob(tmp_path: Path) -> None:
    def read(source: Path) -> str:
        return text_of(load(*find_files(source), cache=tmp_path / 'cache')).decode()

    rows = tmp_path / 'rows'
    for name in ('a*.jsonl', 'a1.jsonl', 'a2.jsonl', 'a[2].jsonl'):
        tree(rows, **{name: json.dumps({'text': f'{name} '})})
    assert [read(rows / name) for name in ('a*.jsonl', 'a[2].jsonl')] == ['a*.jsonl ', 'a[2].jsonl ']
    assert read(rows) == 'a*.jsonl a1.jsonl a2.jsonl a[2].jsonl '
    assert read(rows / 'a[12].jsonl') == 'a1.jsonl a2.jsonl '

    tree(tmp_path / 'x[2024]', b='', c_d='')
    tree(tmp_path / 'x2', b='')
    for pattern, names in (('x[2024]', ['b', 'c/d']), ('x[2024]/*', ['b']), ('x[2024]/**/*', ['b', 'c/d'])):
        found = find_files(tmp_path / pattern)
        assert [str(file.relative_to(tmp_path / 'x[2024]')) for file in found] == names


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    folder = tree(tmp_path / 'in', a='1')
    (folder / 'b').symlink_to(tmp_path / 'nothing')
    with pytest.raises(ValueError, match=r'in/b is a link to a file or folder that is not there'):
        find_files(folder)


def test_standard_library_is_at_hand() -> None:
    files = standard_library()
    assert sum(file.stat().st_size for file in files) > 5_000_000
    assert not any('site-packages' in file.parts for file in files)
