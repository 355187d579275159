"""Modules with torchtune 0.6.1's call contract and state-dict names, over ``fastshard.ops``.

For inference: parameters need no gradient.
"""

from fastshard.nn.attention import MultiHeadAttention
from fastshard.nn.kv_cache import CacheStep, KVCache
from fastshard.nn.linear import Linear, PackedLinears
from fastshard.nn.mlp import FeedForward
from fastshard.nn.norm import RMSNorm
from fastshard.nn.rope import RopeScaling, RotaryEmbedding, rope_frequencies
from fastshard.nn.transformer import TransformerSelfAttentionLayer

__all__ = [
    "CacheStep",
    "FeedForward",
    "KVCache",
    "Linear",
    "MultiHeadAttention",
    "PackedLinears",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "TransformerSelfAttentionLayer",
    "rope_frequencies",
]
