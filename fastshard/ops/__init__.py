"""The op layer: one file a family. Public functions here, raw ops as ``torch.ops.fastshard.*``.

- ``torch.compile``: one graph, symbolic sizes; the schemas name the arguments that are written to.
- ``torch.autocast`` has no effect: an op takes the dtypes it documents and computes as it says. A
  tensor that autocast made another dtype is a TypeError, never a silent cast.
- Autograd: norms, ``apply_rope``, ``act_and_mul`` and ``silu_and_mul`` have formulas, in reverse
  mode. Other public functions raise a RuntimeError where an argument requires grad, which names
  what to use instead (``INFERENCE_ONLY``). Of their raw ops PyTorch warns in the backward pass.
- ``torch.vmap`` calls an op in a loop; the ops that write to an argument raise.
- ``torch.inference_mode`` is cheapest under ``torch.compile`` without CUDA graphs: there an op with
  a formula else runs through the formula's Python kernel.
"""

from fastshard.ops._autograd import INFERENCE_ONLY
from fastshard.ops._decode_arguments import decode_rank_sums_size
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
from fastshard.ops.promoted import use_loader
from fastshard.ops.rope import apply_rope, rope_append
from fastshard.ops.sample import sample
from fastshard.ops.variants import use_tables

HAS_KERNELS = load_kernels()
"""Whether the compiled CUDA kernels are registered in this process."""
if HAS_KERNELS:
    use_tables()
    use_loader()

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
    "decode_rank_sums_size",
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
