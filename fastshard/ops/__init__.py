"""The op layer: one file a family. Public functions here, raw ops as ``torch.ops.fastshard.*``."""

from fastshard.ops._autograd import INFERENCE_ONLY
from fastshard.ops._library import COSTS, Cost, load_kernels
from fastshard.ops.activation import act_and_mul, silu_and_mul
from fastshard.ops.attention import attention, attention_layer_norm, cached_attention
from fastshard.ops.decode import (
    DecodeWeights,
    decode_step,
    decode_step_refusal,
    decode_workspace_size,
    new_decode_workspace,
)
from fastshard.ops.linear import linear
from fastshard.ops.mlp import fused_mlp
from fastshard.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastshard.ops.rope import apply_rope, rope_append
from fastshard.ops.sample import sample
from fastshard.ops.variants import use_tables

HAS_KERNELS = load_kernels()
"""Whether the compiled CUDA kernels are registered in this process."""
if HAS_KERNELS:
    use_tables()

__all__ = [
    "COSTS",
    "HAS_KERNELS",
    "INFERENCE_ONLY",
    "Cost",
    "DecodeWeights",
    "act_and_mul",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "attention_layer_norm",
    "cached_attention",
    "decode_step",
    "decode_step_refusal",
    "decode_workspace_size",
    "fused_mlp",
    "layer_norm",
    "linear",
    "new_decode_workspace",
    "rms_norm",
    "rope_append",
    "sample",
    "silu_and_mul",
    "use_tables",
]
