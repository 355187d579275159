"""What is tuned: an op with a dtype and a shape. And what measuring one of its variants gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

AUTO = "auto"
"""The variant that the heuristics in csrc choose."""

SIZES = {
    "rms_norm": ("rows", "hidden_size"),
    "add_rms_norm": ("rows", "hidden_size"),
    "layer_norm": ("rows", "hidden_size"),
    "add_layer_norm": ("rows", "hidden_size"),
    "fused_mlp": ("rows", "hidden_size", "intermediate_size"),
    "linear": ("rows", "in_features", "out_features"),
    "attention": ("batch", "s_q", "s_kv", "num_qo_heads", "num_kv_heads", "head_dim"),
    "cached_attention": ("batch", "s_q", "s_kv", "num_qo_heads", "num_kv_heads", "head_dim"),
}
"""Every op that has variants, with the names of its sizes as in ``variants.Entry``.

``attention`` is causal, of a whole prompt; ``cached_attention`` is over a cache of s_kv slots.
"""


@dataclass(frozen=True)
class Problem:
    """One op at one dtype and shape.

    Attributes:
        op: Of ``SIZES``.
        dtype: float16 or bfloat16.
        shape: The op's sizes.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]

    def sizes(self) -> dict[str, int]:
        """The sizes by name."""
        return dict(zip(SIZES[self.op], self.shape, strict=True))

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Measurement:
    """What became of one variant of a problem.

    Attributes:
        us: Microseconds of a call, the median; None where the variant may not be chosen.
        p20: 20th percentile, None like ``us``.
        p80: 80th percentile, None like ``us``.
        auto_us: Microseconds of ``AUTO`` in the same rounds, None like ``us``.
        limit_us: What the device takes at least for the bytes and FLOPs, None like ``us``.
        error: Largest relative error against float64; None where nothing came out.
        reason: Why the variant may not be chosen; None where it may.
        seconds: What measuring it took.
    """

    us: float | None
    p20: float | None
    p80: float | None
    auto_us: float | None
    limit_us: float | None
    error: float | None
    reason: str | None
    seconds: float

    @property
    def ratio(self) -> float:
        """Time over that of ``AUTO``, measured beside it; infinity where it may not be chosen."""
        return float("inf") if self.us is None else self.us / self.auto_us


def rejected(reason: str, seconds: float, error: float | None = None) -> Measurement:
    """A measurement of a variant that may not be chosen."""
    return Measurement(None, None, None, None, None, error, reason, seconds)


class Measurer(Protocol):
    """Measures variants, or plays back what was measured."""

    device: str
    """Name of the device, for the table."""

    def __call__(self, problem: Problem, variants: Sequence[str]) -> list[Measurement]:
        """One measurement for each of ``variants``, interleaved with ``AUTO``."""

    def confirm(self, problem: Problem, variant: str) -> Measurement:
        """Measure once more, with other inputs and in a fresh process."""
