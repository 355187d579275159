"""Rotary position embedding: frequencies, the table, and the module with torchtune's call."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a longer context derive from those trained on.

    Attributes:
        rope_type: ``"llama3"``: frequencies of wavelengths above ``old_context / low_freq_factor``
            are divided by ``factor``, those below ``old_context / high_freq_factor`` kept, and
            those between blended. ``"linear"``: all are divided by ``factor``.
        factor: How many times longer the context is.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
        original_max_position_embeddings: ``old_context``, in tokens; llama3 only.
    """

    rope_type: str = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.rope_type not in ("llama3", "linear"):
            raise ValueError(f"rope_type must be llama3 or linear, got {self.rope_type!r}")
        for name in ("factor", "low_freq_factor", "original_max_position_embeddings"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )
