"""The op layer: one file a family. Public functions here, raw ops as ``torch.ops.fastshard.*``."""

from fastshard.ops._library import COSTS, Cost, load_kernels
from fastshard.ops.attention import attention, attention_layer_norm, cached_attention
from fastshard.ops.linear import linear
from fastshard.ops.mlp import fused_mlp
from fastshard.ops.norm import rms_norm

HAS_KERNELS = load_kernels()
"""Whether the compiled CUDA kernels are registered in this process."""

__all__ = [
    "COSTS",
    "HAS_KERNELS",
    "Cost",
    "attention",
    "attention_layer_norm",
    "cached_attention",
    "fused_mlp",
    "linear",
    "rms_norm",
]
