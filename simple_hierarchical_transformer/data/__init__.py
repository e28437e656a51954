"""Text data: files in, batches of ids out.

`find_files` and `load_corpus` make a `Corpus` of any files. `load_download` loads a corpus that is known by name.
`Batches` draws the sequences of a training run from corpora, and `evaluation_batches` reads a split once.
"""

from .batches import Batches, evaluation_batches, split_bytes, streaming_rows
from .corpus import Corpus, load_corpus
from .download import DOWNLOADS, Download, fetch, load_download
from .files import find_files, standard_library

__all__ = [
    'DOWNLOADS',
    'Batches',
    'Corpus',
    'Download',
    'evaluation_batches',
    'fetch',
    'find_files',
    'load_corpus',
    'load_download',
    'split_bytes',
    'standard_library',
    'streaming_rows',
]
