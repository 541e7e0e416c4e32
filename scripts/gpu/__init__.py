"""Checks and measurements of `bench_gpu.py`."""
