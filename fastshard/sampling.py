"""How the next token is chosen from the logits."""

from dataclasses import dataclass

from torch import Tensor

from fastshard import ops


@dataclass(frozen=True)
class Sampling:
    """Settings of ``ops.sample``, checked.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: Only this many likeliest tokens; 0 is all.
        top_p: Only the likeliest tokens that together reach this probability.
        min_p: Only tokens at least this likely, relative to the likeliest.
        seed: The same seed gives the same text.

    Raises:
        ValueError: a setting outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN fails.
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")

    def choose(self, logits: Tensor, step: Tensor) -> Tensor:
        """Next tokens ``[b]`` of ``logits`` ``[b, vocab_size]``; ``step`` is int64 [] there."""
        return ops.sample(
            logits,
            step,
            seed=self.seed,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )
