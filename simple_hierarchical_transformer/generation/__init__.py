"""Generation and scoring with models that carry a state."""
