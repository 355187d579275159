"""Sharded Llama and Qwen inference with fused CUDA kernels for Ampere-class GPUs."""

from fastshard import nn, ops
from fastshard.models import (
    GeneralMHA,
    ModelConfig,
    Shard,
    ShardedGeneralModel,
    ShardTransformerDecoder,
)

__version__ = "0.1.0"

__all__ = [
    "GeneralMHA",
    "ModelConfig",
    "Shard",
    "ShardTransformerDecoder",
    "ShardedGeneralModel",
    "__version__",
    "nn",
    "ops",
]
