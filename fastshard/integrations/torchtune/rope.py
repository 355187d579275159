"""torchtune's rotary embeddings as fastshard's."""

from torch import nn
from torchtune import modules
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings

from fastshard.nn.rope import RopeScaling, RotaryEmbedding

ROPES = (modules.RotaryPositionalEmbeddings, Llama3ScaledRoPE, Qwen2RotaryPositionalEmbeddings)
"""Those that the functions below read."""


def rope_of(theirs: nn.Module | None) -> RotaryEmbedding | None:
    """The float32 table of one of ``ROPES``, as long as its cache is, whatever that was cast to."""
    if theirs is None:
        return None
    cache = getattr(theirs, "cache", None)  # none yet where it was built on meta
    return RotaryEmbedding(
        theirs.dim,
        theirs.max_seq_len if cache is None else cache.shape[0],
        theirs.base,
        scaling=scaling_of(theirs),
        interleaved=is_interleaved(theirs),
        device="meta" if cache is None else cache.device,
    )


def is_interleaved(theirs: nn.Module) -> bool:
    """Whether one of ``ROPES`` rotates pairs (2i, 2i + 1), not (i, i + dim / 2)."""
    return type(theirs) is not Qwen2RotaryPositionalEmbeddings


def scaling_of(theirs: nn.Module) -> RopeScaling | None:
    """How one of ``ROPES`` scales its frequencies."""
    if type(theirs) is not Llama3ScaledRoPE:
        return None
    return RopeScaling(
        "llama3",
        theirs.scale_factor,
        theirs.low_freq_factor,
        theirs.high_freq_factor,
        theirs.old_context_len,
    )
