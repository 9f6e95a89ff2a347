"""Benchmarks for CUDA devices: `python -m benchmarks.gpu`, which `make gpu` runs after the GPU's tests."""
