"""Sharded Llama and Qwen inference with fused CUDA kernels for Ampere-class GPUs."""

from fastshard import nn, ops
from fastshard.checkpoint import CheckpointError
from fastshard.generate import ShardChain
from fastshard.loading import load
from fastshard.models import (
    GeneralMHA,
    ModelConfig,
    Shard,
    ShardedGeneralModel,
    ShardInferenceState,
    ShardTransformerDecoder,
)
from fastshard.token_loop import generate_batch

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "GeneralMHA",
    "ModelConfig",
    "Shard",
    "ShardChain",
    "ShardInferenceState",
    "ShardTransformerDecoder",
    "ShardedGeneralModel",
    "__version__",
    "generate_batch",
    "load",
    "nn",
    "ops",
]
