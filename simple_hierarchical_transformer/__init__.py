"""A language model that reads a sequence at several resolutions at once."""

from .losses import LossParts as LossParts
from .model import HierarchicalTransformer as HierarchicalTransformer
from .version import __version__ as __version__
