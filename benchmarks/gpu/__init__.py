"""Benchmarks on one CUDA GPU."""
