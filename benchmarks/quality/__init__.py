"""How well models predict text for the same time or the same operations."""
