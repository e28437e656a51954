"""Token mixers: what lets a level's tokens hear of the ones before them."""

from .attention import Attention as Attention
