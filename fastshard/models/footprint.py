"""ModelBytes: the memory that each part of a model takes, counted from its config alone."""

from dataclasses import dataclass

import torch

from fastshard.models.config import ModelConfig
from fastshard.models.part import divided


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's parts; every layer is as large as every other.

    Attributes:
        num_layers: Of the whole model.
        embedding: On the first shard.
        layer: Weights of one layer.
        head: On the last shard: the final norm, and the head unless it is tied.
        tied_head: The embedding on a last shard that is not the first, as far as it is the head's
            weights; 0 where the head is not tied to it.
        cache: Keys and values of one layer. A layer with a sliding window keeps as many slots as
            one without.
        table: The RoPE table, once on every shard.
    """

    num_layers: int
    embedding: int
    layer: int
    head: int
    tied_head: int
    cache: int = 0
    table: int = 0

    def weights(self, layers: range) -> int:
        """Weights of a shard of these layers, with the ends that they bring."""
        is_first, is_last = layers.start == 0, layers.stop == self.num_layers
        ends = self.embedding if is_first else is_last * self.tied_head
        return len(layers) * self.layer + ends + is_last * self.head

    def caches(self, layers: range) -> int:
        """Keys and values of these layers."""
        return len(layers) * self.cache

    def needed(self, layers: range) -> int:
        """Weights, cache and table of a shard of these layers."""
        return self.weights(layers) + self.caches(layers) + self.table


def model_bytes(
    config: ModelConfig, dtype: torch.dtype, context: int, batch: int = 1, tp: int = 1
) -> ModelBytes:
    """Count what the modules of ``config`` allocate.

    Args:
        dtype: Of the weights and of the cache.
        context: Slots of the cache, at most the config's ``max_seq_len``.
        batch: Rows of the cache.
        tp: Ranks that share each layer: the bytes are those of one of them.

    Raises:
        ValueError: the model cannot be divided by ``tp``.
    """
    part = divided(config, tp)
    q_size = part.num_heads * part.head_dim
    kv_size = part.num_kv_heads * part.head_dim
    hidden = config.hidden_size
    attention = hidden * (2 * q_size + 2 * kv_size)
    attention += config.qkv_bias * (q_size + 2 * kv_size) + config.output_bias * hidden
    attention += config.qk_norm * 2 * config.head_dim
    mlp = 3 * hidden * part.intermediate_size
    embedding = config.vocab_size * hidden
    rows, tied = embedding // tp, config.tie_word_embeddings  # of the head
    return ModelBytes(
        num_layers=config.num_layers,
        embedding=embedding * dtype.itemsize,
        layer=(attention + mlp + 2 * hidden) * dtype.itemsize,
        head=(hidden + (0 if tied else rows)) * dtype.itemsize,
        tied_head=(rows if tied else 0) * dtype.itemsize,
        cache=2 * batch * kv_size * min(context, config.max_seq_len) * dtype.itemsize,
        table=config.max_seq_len * (config.rotary_dim // 2) * 2 * torch.float32.itemsize,
    )
