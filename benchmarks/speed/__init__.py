"""Time and memory on a CPU."""
