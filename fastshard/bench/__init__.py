"""Benchmarks of kernels, decode steps and loading; ``results/`` holds what was measured."""
