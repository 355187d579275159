"""Sharded Llama and Qwen inference with fused CUDA kernels for Ampere-class GPUs."""

from fastshard import ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]
