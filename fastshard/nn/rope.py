"""Rotary position embedding: frequencies, the table, and the module with torchtune's call."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastshard import ops


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

    def __post_init__(self) -> None:
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


def rope_frequencies(rotary_dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Compute the angle per position of each rotated pair.

    Args:
        rotary_dim: Elements of a head that rotate, two a pair.
        base: Theta of the geometric progression.
        scaling: None as trained.

    Returns:
        ``[rotary_dim // 2]``, float32, on the CPU: the same bits for every device.

    Source: Su et al. 2021 (RoFormer), section 3.2.2; Llama 3.1's ``apply_scaling``.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    frequencies = 1.0 / (base**exponents)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies  # in positions
    kept = (scaling.original_max_position_embeddings / wavelengths - low) / (high - low)
    kept = kept.clamp(0, 1)  # 0: longer than the old context / low, 1: shorter than it / high
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def token_positions(input_pos: Tensor, num_rows: int, num_tokens: int) -> Tensor:
    """Bring torchtune's ``input_pos`` to the shape that the ops take.

    Args:
        input_pos: ``[b | 1, s]``, ``[s]``, or 0-d for a single token; int64 or int32.
        num_rows: b.
        num_tokens: s.

    Returns:
        ``[b, s]`` or ``[s]``, int64.

    Raises:
        ValueError: another shape.
        TypeError: another dtype.
    """
    if input_pos.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_pos must be int64 or int32, got {input_pos.dtype}")
    shape = tuple(input_pos.shape)
    if shape not in ((num_rows, num_tokens), (1, num_tokens), (num_tokens,)) and (
        shape != () or num_tokens != 1
    ):
        raise ValueError(
            f"input_pos must have shape [{num_rows}, {num_tokens}] or [{num_tokens}], "
            f"got {list(shape)}"
        )
    if len(shape) == 0 or shape == (1, num_tokens):
        input_pos = input_pos.reshape(num_tokens)
    return input_pos.long()


class RotaryEmbedding(nn.Module):
    """Rotation of each head of ``[b, s, num_heads, head_dim]`` by its token's position.

    The float32 table is no buffer: casts and ``to_empty`` leave its values alone, and it follows
    the module to its device.
    """

    def __init__(
        self,
        rotary_dim: int,
        max_seq_len: int,
        base: float = 10000.0,
        *,
        scaling: RopeScaling | None = None,
        interleaved: bool = True,
        device: torch.device | str | None = None,
    ):
        """Build the table on ``device``, or at first use where that is ``meta``.

        Args:
            rotary_dim: Leading elements of a head that rotate; the rest passes through.
            max_seq_len: Positions in the table.
            base: Theta of the frequencies.
            scaling: Of a longer context than trained on.
            interleaved: Pairs (2i, 2i + 1), torchtune's Llama; else (i, i + rotary_dim / 2),
                torchtune's Qwen2 and Hugging Face.
            device: By default PyTorch's.
        """
        super().__init__()
        self.rotary_dim = rotary_dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.scaling = scaling
        self.interleaved = interleaved
        self._table: Tensor | None = None
        self._place(torch.empty(0, device=device).device)

    def table(self, device: torch.device) -> Tensor:
        """``[max_seq_len, rotary_dim // 2, 2]`` float32 on ``device``: cosine and sine."""
        if self._table is None or self._table.device != device:
            self._place(device)
        return self._table

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotate ``x``, ``[b, s, num_heads, head_dim]``.

        Args:
            x: float32, float16 or bfloat16.
            input_pos: ``[b, s]``, ``[s]`` or 0-d positions; by default 0 to s - 1.

        Returns:
            Shape and dtype of ``x``, contiguous.
        """
        b, s = x.shape[:2]
        if input_pos is None:
            positions = torch.arange(s, device=x.device)
        else:
            positions = token_positions(input_pos, b, s)
        return ops.apply_rope(x, self.table(x.device), positions, interleaved=self.interleaved)

    def _place(self, device: torch.device) -> None:
        """Have the table on ``device``; on ``meta`` only remember that it is not built."""
        self._device = device
        if device.type == "meta":
            return
        # Not an inference tensor, also where the first use is inside torch.inference_mode().
        with torch.inference_mode(False):
            if self._table is None:
                positions = torch.arange(self.max_seq_len, dtype=torch.float32, device="cpu")
                frequencies = rope_frequencies(self.rotary_dim, self.base, self.scaling)
                angles = torch.outer(positions, frequencies)
                self._table = torch.stack([angles.cos(), angles.sin()], dim=-1)
            self._table = self._table.to(device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place(fn(torch.empty(0, device=self._device)).device)
        return self

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, {self.max_seq_len}, interleaved={self.interleaved}"
