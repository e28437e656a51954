"""A language model that reads a sequence at several resolutions at once."""

from .model import HierarchicalTransformer as HierarchicalTransformer
from .objectives import LossParts as LossParts
from .version import __version__ as __version__
