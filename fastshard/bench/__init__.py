"""Benchmarks, each a module to run; ``results/`` holds what they measured, as JSON."""
