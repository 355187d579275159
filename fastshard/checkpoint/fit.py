"""How many bytes a shard needs, and into which shards a model must be cut to fit a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fastshard.models import ModelConfig, Shard

_WORKSPACE_BYTES = 256 << 20  # activations, library handles and workspaces of a running model


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's parts, weights and key-value cache of ``context`` tokens together.

    Attributes:
        embedding: The first shard's own part; also the last's, where the head is tied to it.
        layer: One layer.
        head: The last shard's own part without a tied embedding.
        tied: Whether the head is the embedding.
    """

    embedding: int
    layer: int
    head: int
    tied: bool

    def of(self, start: int, stop: int, num_layers: int) -> int:
        """Bytes of layers ``start`` to ``stop``, half open, with the ends that they bring."""
        is_first, is_last = start == 0, stop == num_layers
        embeds = is_first or (is_last and self.tied)
        return (
            _WORKSPACE_BYTES
            + (stop - start) * self.layer
            + embeds * self.embedding
            + is_last * self.head
        )


def model_bytes(config: ModelConfig, dtype: torch.dtype, context: int) -> ModelBytes:
    """Count the parameters of each part, and the cache of one sequence of ``context`` tokens."""
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    attention = hidden * (2 * q_size + 2 * kv_size)
    attention += config.qkv_bias * (q_size + 2 * kv_size) + config.output_bias * hidden
    attention += config.qk_norm * 2 * config.head_dim
    mlp = 3 * hidden * config.intermediate_size
    cache = 2 * kv_size * min(context, config.max_seq_len)
    embedding = config.vocab_size * hidden
    tied = config.tie_word_embeddings
    return ModelBytes(
        embedding=embedding * dtype.itemsize,
        layer=(attention + mlp + 2 * hidden + cache) * dtype.itemsize,
        head=(hidden + (0 if tied else embedding)) * dtype.itemsize,
        tied=tied,
    )


def split_that_fits(sizes: ModelBytes, num_layers: int, available: int) -> list[range] | None:
    """The fewest shards of at most ``available`` bytes each, as even as they can be.

    Returns:
        Half-open ranges of layers, in order, or None where one layer with its ends is too much.
    """
    for count in range(1, num_layers + 1):
        ranges = even_split(num_layers, count)
        # An end takes the place of layers: move them to the neighbours, from either end inwards.
        bounds = [part.start for part in ranges] + [num_layers]
        for i in range(count - 1):
            while bounds[i + 1] > bounds[i] + 1 and (
                sizes.of(bounds[i], bounds[i + 1], num_layers) > available
            ):
                bounds[i + 1] -= 1
        for i in range(count - 1, 0, -1):
            while bounds[i] < bounds[i + 1] - 1 and (
                sizes.of(bounds[i], bounds[i + 1], num_layers) > available
            ):
                bounds[i] += 1
        parts = [range(a, b) for a, b in pairwise(bounds)]
        if all(part and sizes.of(part.start, part.stop, num_layers) <= available for part in parts):
            return parts
    return None


def even_split(num_layers: int, count: int) -> list[range]:
    """``count`` ranges of layers whose lengths differ by at most one, longer ones first.

    Raises:
        ValueError: not ``1 <= count <= num_layers``.
    """
    if not 1 <= count <= num_layers:
        raise ValueError(f"shards must be 1 to the model's {num_layers} layers, got {count}")
    base, longer = divmod(num_layers, count)
    bounds = [i * base + min(i, longer) for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def check_fit(
    config: ModelConfig,
    shards: Sequence[Shard],
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    available: int,
) -> None:
    """Raise where the shards together need more than ``available`` bytes of ``device``.

    Raises:
        RuntimeError: says what is needed, what is there, and the shards that would fit.
    """
    sizes = model_bytes(config, dtype, context)
    needed = sum(
        sizes.of(shard.start_layer, shard.end_layer + 1, config.num_layers) for shard in shards
    )
    needed -= (len(shards) - 1) * _WORKSPACE_BYTES
    if needed <= available:
        return
    parts = split_that_fits(sizes, config.num_layers, available)
    if parts is None:
        advice = "not even one layer a device would fit"
    elif len(parts) == 1:
        advice = "the whole model would fit as one shard"
    else:
        layers = ",".join(f"{part.start}-{part.stop - 1}" for part in parts)
        advice = f"{len(parts)} shards on devices like this would fit: layers {layers}"
    raise RuntimeError(
        f"{_describe(shards)} of the model in {dtype} with a cache of "
        f"{min(context, config.max_seq_len)} tokens needs {needed / 2**30:.2f} GiB on {device}, "
        f"which has {available / 2**30:.2f} GiB free; {advice}"
    )


def _describe(shards: Sequence[Shard]) -> str:
    return "layers " + ",".join(f"{shard.start_layer}-{shard.end_layer}" for shard in shards)
