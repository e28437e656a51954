"""Every format is read, or refused with its name, whatever the file is called."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from support.commands import ROOT

from simple_hierarchical_transformer.data import Corpus, find_files, formats, load_corpus
from simple_hierarchical_transformer.data.texts import TextWriter

# Longer than what is read at once.
TEXT = random.Random(0).randbytes(100_000) * 2


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, text in members.items():
            # So that two members can have the same name.
            archive.writestr(name.rstrip('\0'), text)
    return file.getvalue()


def tarred(style: int = tarfile.PAX_FORMAT, **members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w', format=style) as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name.rstrip('\0'))
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return file.getvalue()


def by_pyarrow(codec: str) -> Callable[[bytes], bytes]:
    def pack(text: bytes) -> bytes:
        file = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(file, codec) as packed:
            packed.write(text)
        return file.getvalue().to_pybytes()

    return pack


def parquet(*texts: str | bytes | None, key: str = 'text') -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({'n': range(len(texts)), key: texts}), file)
    return file.getvalue()


def jsonl(*texts: str | None) -> bytes:
    return '\n'.join(json.dumps({'text': text}) for text in texts).encode()


STREAMS: dict[str, Callable[[bytes], bytes]] = {
    '.gz': gzip.compress,
    '.bz2': bz2.compress,
    '.xz': lzma.compress,
    '.lzma': lambda text: lzma.compress(text, format=lzma.FORMAT_ALONE),
    '.zst': by_pyarrow('zstd'),
    '.lz4': by_pyarrow('lz4'),
}
ARCHIVES: dict[str, Callable[..., bytes]] = {'.zip': zipped, '.tar': tarred}


def load(path: Path, key: str = 'text') -> Corpus:
    return load_corpus('corpus', find_files(path), path.parent / 'cache', text_key=key)


def read(path: Path, key: str = 'text') -> list[bytes]:
    """Returns the texts of a file."""
    corpus = load(path, key)
    [ids] = corpus.read(torch.tensor([0]), torch.tensor([len(corpus)]), len(corpus), pad=0)
    ends = corpus.ends.tolist()
    return [bytes(ids[start:stop].tolist()) for start, stop in zip([0, *ends], ends, strict=False)]


def refused(path: Path, content: bytes, key: str = 'text') -> str:
    """Returns the error of a file that cannot be read, and checks that the cache is empty afterwards."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f'data: {path}')) as error:
        load(path, key)
    assert not list(path.parent.glob('cache/*'))
    return str(error.value)


# Compressed text and archives.


@pytest.mark.parametrize('name', ['right', 'none', 'wrong', 'LARGE'])
@pytest.mark.parametrize('kind', [*STREAMS, *ARCHIVES])
def test_formats_are_told_by_their_bytes(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / {'right': f'a{kind}', 'none': 'a', 'wrong': 'a.txt', 'LARGE': f'a{kind.upper()}'}[name]
    path.write_bytes(STREAMS[kind](TEXT) if kind in STREAMS else ARCHIVES[kind](b=TEXT))
    assert read(path) == [TEXT]


@pytest.mark.parametrize(
    ('name', 'inner', 'outer'),
    [
        ('.tar.gz', '.tar', '.gz'),
        ('.tgz', '.tar', '.gz'),
        ('.tar.bz2', '.tar', '.bz2'),
        ('.txz', '.tar', '.xz'),
        ('.tar.zst', '.tar', '.zst'),
        ('.zip.gz', '.zip', '.gz'),
        ('.zip.xz', '.zip', '.xz'),
    ],
)
def test_packed_archives(tmp_path: Path, name: str, inner: str, outer: str) -> None:
    path = tmp_path / f'a{name}'
    path.write_bytes(STREAMS[outer](ARCHIVES[inner](a=b'1', b=TEXT)))
    assert read(path) == [b'1', TEXT]


@pytest.mark.parametrize('style', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_style(tmp_path: Path, style: int) -> None:
    (tmp_path / 'a.tar').write_bytes(tarred(style, **{f'{"x" * 80}/{"y" * 80}': b'1', 'b': b'', './c': TEXT}))
    assert read(tmp_path / 'a.tar') == [b'1', b'', TEXT]


@pytest.mark.parametrize('kind', ARCHIVES)
def test_members_are_read_as_files_of_a_folder(tmp_path: Path, kind: str) -> None:
    members = {
        '.hidden/a': b'hidden',
        'b/.DS_Store': b'hidden',
        'b/._c.txt': b'hidden',
        '__MACOSX/b/._c.txt': b'hidden',
        '__MACOSX/d': b'hidden',
        'b/c.txt': b'1',
        'b/d.jsonl': jsonl('2', None, '3'),
        'b/e.txt.gz': gzip.compress(b'4'),
        'b/f.jsonl.xz': lzma.compress(jsonl('5')),
        'b/g.parquet': parquet('6', '7'),
        'b/h': tarred(i=b'8', j=zipped(k=b'9')),
    }
    path = tmp_path / f'a{kind}'
    path.write_bytes(ARCHIVES[kind](**members))
    assert read(path) == [b'1', b'2', b'3', b'4', b'5', b'6', b'7', b'8', b'9']


@pytest.mark.parametrize('kind', ARCHIVES)
def test_members_of_one_name_are_each_read_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f'a{kind}'
    path.write_bytes(ARCHIVES[kind](**{'a': b'1', 'b': b'2', 'b\0': b'3', 'c': b'4', 'c\0': b'5'}))
    assert read(path) == [b'1', b'2', b'3', b'4', b'5']


def test_links_and_devices_in_a_tar_are_no_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f'a{kind!r}')
            member.type, member.linkname = kind, '/etc/passwd'
            archive.addfile(member)
        member = tarfile.TarInfo('../../b')
        member.size = 1
        archive.addfile(member, io.BytesIO(b'1'))
    assert read(tmp_path / 'a.tar') == [b'1']
    assert {path.name for path in tmp_path.iterdir()} == {'a.tar', 'cache'}


@pytest.mark.parametrize('kind', STREAMS)
def test_streams_one_after_the_other_are_all_read(tmp_path: Path, kind: str) -> None:
    first, second = STREAMS[kind](TEXT), STREAMS[kind](b'second')
    # A .lzma extends to the end of its file.
    if kind != '.lzma':
        (tmp_path / f'a{kind}').write_bytes(first + second)
        assert read(tmp_path / f'a{kind}') == [TEXT + b'second']
    if kind in ('.gz', '.xz'):
        (tmp_path / f'b{kind}').write_bytes(first + bytes(8) + second + bytes(70_000))
        assert read(tmp_path / f'b{kind}') == [TEXT + b'second']
    for number, rest in enumerate((b'no stream', second[:-1], second[:4], second[4:])):
        (tmp_path / str(number)).mkdir()
        said = refused(tmp_path / str(number) / f'a{kind}', first + rest)
        assert f'is damaged, or not a {kind} file' in said


@pytest.mark.parametrize('kind', [*STREAMS, *ARCHIVES])
@pytest.mark.parametrize('damage', ['torn', 'foreign', 'empty', 'turned'])
def test_broken_files_are_named_and_leave_nothing(tmp_path: Path, kind: str, damage: str) -> None:
    if damage == 'turned' and kind in ('.lzma', '.zst', '.lz4'):
        # These formats have no checksum.
        return
    packed = STREAMS[kind](TEXT) if kind in STREAMS else ARCHIVES[kind](a=b'1', b=TEXT, c=TEXT)
    turned = bytearray(packed)
    # Change a byte of the contents. A tar has checksums of its headers only, so change one of the last header.
    turned[-len(TEXT) // 1000 if kind != '.tar' else packed.rindex(b'c' + bytes(99))] ^= 1
    content = {'torn': packed[: len(packed) // 2], 'foreign': b'no archive', 'empty': b'', 'turned': bytes(turned)}
    assert f'a{kind} is damaged, or not a {kind} file' in refused(tmp_path / f'a{kind}', content[damage])


def test_what_is_broken_within_is_named(tmp_path: Path) -> None:
    torn = gzip.compress(TEXT)[:-9]
    said = refused(tmp_path / 'a.tar', tarred(b=b'1', **{'c.gz': torn}))
    assert said.startswith(f'data: {tmp_path}/a.tar/c.gz is damaged, or not a .gz file')
    said = refused(tmp_path / 'a.tar.gz', gzip.compress(tarred(b=TEXT))[:-9])
    assert said.startswith(f'data: {tmp_path}/a.tar.gz is damaged, or not a .gz file')


def test_damage_of_any_kind_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    draw = random.Random(0)
    text = draw.randbytes(300) + b'text ' * 100
    whole = [pack(text) for pack in STREAMS.values()] + [pack(a=b'1', b=text) for pack in ARCHIVES.values()]
    whole += [gzip.compress(tarred(a=text)), zipped(a=tarred(b=text)), parquet('a', 'b'), jsonl('a', 'b')]
    read = 0
    for number in range(1500):
        content = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(content))
            content[at : at + draw.choice((0, 1, 9))] = draw.randbytes(draw.choice((0, 1, 5)))
        path = tmp_path / draw.choice(('a', 'a.jsonl', 'a.zip', 'a.tar', 'a.gz', 'a.parquet', 'a.tgz', 'a.zst'))
        path.write_bytes(content)
        with open(tmp_path / 'bytes', 'wb') as to, open(tmp_path / 'ends', 'wb') as ends:
            said = f'data: {path}'
            try:
                TextWriter(to, ends, 'text').add_file(path)
                read += 1
            except ValueError as error:
                said = str(error)
        assert said.startswith(f'data: {path}'), number
    assert 100 < read < 1000


def test_an_archive_of_archives_without_end_is_refused(tmp_path: Path) -> None:
    packed = b'text'
    for _ in range(9):
        packed = gzip.compress(packed)
    assert 'is packed in more than 8 layers' in refused(tmp_path / 'a', packed)
    (tmp_path / 'b').write_bytes(gzip.decompress(packed))
    assert read(tmp_path / 'b') == [b'text']


def test_a_locked_archive_is_named(tmp_path: Path) -> None:
    packed = bytearray(zipped(a=TEXT))
    # The bit for encryption, in the local header and in the directory.
    packed[6] |= 1
    packed[packed.rindex(b'PK\x01\x02') + 8] |= 1
    assert re.search(r'locked\.zip cannot be unpacked: .*encrypted', refused(tmp_path / 'locked.zip', bytes(packed)))


@pytest.mark.parametrize(
    ('kind', 'head'),
    [
        ('.7z', b"7z\xbc\xaf'\x1c\0\4"),
        ('.rar', b'Rar!\x1a\x07\0'),
        ('.rar', b'Rar!\x1a\x07\1\0'),
        ('.lz', b'LZIP\1'),
        ('.z', b'\x1f\x9d\x90'),
        ('.cab', b'MSCF\0\0\0\0'),
        ('.lzo', b'\x89LZO\0\r\n\x1a\n'),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, kind: str, head: bytes) -> None:
    for name in ('a.txt', 'a', f'a{kind}', f'a{kind.upper()}'):
        assert f'is packed as {kind}, which is not supported: unpack it first' in refused(tmp_path / name, head + TEXT)
    assert f'is packed as {kind}' in refused(tmp_path / 'b.tar', tarred(c=head + TEXT))
    assert 'is packed as .br' in refused(tmp_path / 'a.br', b'text')


def test_text_that_resembles_a_format_is_text(tmp_path: Path) -> None:
    for number, text in enumerate((b'BZh9 is no stream', b'PK', b'PAR1 is a gene', b'Rar! ', b'LZIP is a tool', b'7z')):
        (tmp_path / str(number)).write_bytes(text * 100)
        assert formats.kind_of_file(tmp_path / str(number)) is None
    (tmp_path / 'zeros').write_bytes(bytes(10_000))
    assert formats.kind_of_file(tmp_path / 'zeros') is None


@pytest.mark.parametrize('kind', ['.zst', '.lz4', '.parquet'])
def test_without_pyarrow_its_formats_are_refused_by_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = parquet('a') if kind == '.parquet' else STREAMS[kind](TEXT)
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    monkeypatch.setattr(formats, 'zstd', None)
    for name in (f'a{kind}', 'a.txt'):
        assert f'is a {kind} file, which pyarrow reads: pip install pyarrow' in refused(tmp_path / name, content)


# Tables.


@pytest.mark.parametrize('name', ['a.jsonl', 'a.ndjson', 'a.JSONL', 'a.parquet', 'a', 'a.jsonl.bz2', 'a.jsonl.zip'])
def test_rows_are_texts(tmp_path: Path, name: str) -> None:
    texts = ('caf\u00e9', None, '', 'a\nb\u2028c\r', 'last')
    pack = {'.bz2': bz2.compress, '.zip': lambda rows: zipped(**{'a.jsonl': rows})}.get(name[-4:], bytes)
    content = pack(jsonl(*texts)) if '.' in name and name != 'a.parquet' else parquet(*texts)
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ['caf\u00e9'.encode(), 'a\nb\u2028c\r'.encode(), b'last']


def test_rows_of_a_jsonl_may_differ(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_bytes(
        b'\xef\xbb\xbf\n{"meta": [1]}\r\n\n  {"text": "1", "n": NaN}  \r\n{"n": 2, "text": "\\ud800"}\n{"text": "2"}'
    )
    assert read(tmp_path / 'a.jsonl') == [b'1', b'\xed\xa0\x80', b'2']


@pytest.mark.parametrize(
    ('content', 'key', 'message'),
    [
        (jsonl('a'), 'body', "cannot be read: there is no column 'body', only text"),
        (b'{"a": 1, "b": 2}\n' * 1001 + b'torn', 'text', "cannot be read: there is no column 'text', only a, b"),
        (b'{"text": 3}', 'text', "cannot be read: column 'text' holds int, not text"),
        (b'{"text": {"text": ""}}', 'text', "cannot be read: column 'text' holds dict, not text"),
        (jsonl('a') + b'\n{"te', 'text', 'cannot be read: row 2: Unterminated string'),
        (jsonl('a') + jsonl('b'), 'text', 'cannot be read: row 1: Extra data'),
        (b'[{"text": "a"}]', 'text', 'cannot be read: row 1: it is a list, not an object'),
        (b'{"text": "\xff"}', 'text', "cannot be read: row 1: 'utf-8' codec can't decode"),
        (b'{"n": ' + b'1' * 5000 + b'}', 'text', 'cannot be read'),
        (b'{"text": ' + b'[' * 100_000 + b']' * 100_000 + b'}', 'text', 'cannot be read: row 1: '),
        (b'{"a":' * 100_000 + b'1' + b'}' * 100_000, 'text', 'cannot be read: row 1: '),
        (parquet('a'), 'body', "cannot be read: there is no column 'body', only n, text"),
        (parquet('a'), 'n', "cannot be read: column 'n' holds int, not text"),
        (parquet('a')[:-20], 'text', 'cannot be read: '),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path: Path, content: bytes, key: str, message: str) -> None:
    # The first bytes identify a .parquet.
    assert message in refused(tmp_path / 'a.jsonl', content, key)


def test_a_row_that_nests_without_end_ends_no_process(tmp_path: Path) -> None:
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'{"text": ' + b'[' * 1_000_000)
    code = f"""
        from pathlib import Path
        from simple_hierarchical_transformer.data import load_corpus
        try:
            load_corpus('a', [Path({str(path)!r})], Path({str(tmp_path / 'cache')!r}))
        except ValueError as error:
            print(error)
        """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f'data: {path} cannot be read: row 1: ')
    assert result.stdout.count('\n') == 1


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.bz2', 'a.jsonl.zst', 'a.tar', 'a.jsonl.zip'])
def test_tables_are_read_in_little_memory(tmp_path: Path, name: str) -> None:
    rows = jsonl(*['x' * 1000] * 10_000)
    pack = {'.zip': lambda rows: zipped(**{'b.jsonl': rows}), '.tar': lambda rows: tarred(**{'b.jsonl': rows})}
    (tmp_path / name).write_bytes({**STREAMS, **pack}.get(Path(name).suffix, bytes)(rows))
    del rows
    tracemalloc.start()
    try:
        corpus = load(tmp_path / name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(corpus) == 10_000_000
    assert peak < 3_000_000


def test_a_row_longer_than_a_row_may_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('simple_hierarchical_transformer.data.texts.MAX_ROW', 1000)
    assert 'row 2: it is longer than 1,000 bytes' in refused(tmp_path / 'a.jsonl', jsonl('a', 1000 * 'b'))


def test_other_columns_of_a_parquet_are_not_read(tmp_path: Path) -> None:
    rows = {'text': ['a', 'b'], 'text.length': [1, 2], 'other': [{'deep': [1]}, None]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / 'a.parquet')
    assert read(tmp_path / 'a.parquet') == [b'a', b'b']
    pyarrow.parquet.write_table(pyarrow.table({'text': [b'\xff', b'b']}), tmp_path / 'b.parquet')
    assert read(tmp_path / 'b.parquet') == [b'\xff', b'b']
    texts = pyarrow.array(['a', 'b', 'a']).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), tmp_path / 'c.parquet')
    assert read(tmp_path / 'c.parquet') == [b'a', b'b', b'a']
