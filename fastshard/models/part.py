"""Equal parts of every layer: which part of a tensor a decoder holds, and the sizes that it has."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fastshard.models.config import ModelConfig


class TensorPart(NamedTuple):
    """Part ``index`` of ``count`` equal parts of a checkpoint's tensor.

    Attributes:
        dim: It is cut along: 0 into rows, 1 into columns.
    """

    dim: int = 0
    index: int = 0
    count: int = 1

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor, of which this part has ``shape``."""
        return tuple(n * self.count if dim == self.dim else n for dim, n in enumerate(shape))

    def span(self, dim: int, size: int) -> range:
        """Indices along ``dim`` of the checkpoint's tensor, where this part has ``size``."""
        start = self.index * size if dim == self.dim else 0
        return range(start, start + size)


WHOLE = TensorPart()


def divided(config: ModelConfig, tp: int) -> ModelConfig:
    """Sizes of a model whose layers have 1/``tp`` of the heads and of the MLP.

    Raises:
        ValueError: heads, the MLP or the vocabulary, whose head is divided too, do not divide.
    """
    names = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
    for name in names:
        if getattr(config, name) % tp:
            raise ValueError(f"{name} must be a multiple of tp={tp}, got {getattr(config, name)}")
    return replace(config, **{name: getattr(config, name) // tp for name in names[:3]})
