"""KVCache: preallocated keys and values of one layer, counted on the host."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class CacheStep(NamedTuple):
    """Where the next tokens go: all that the layers of one forward pass need to know of a cache.

    Tensors on the cache's device, no Python number: a compiled or captured step takes the next
    ones as inputs. Of a new prompt the host knows all lengths, and attention chooses by them.

    Attributes:
        slots: ``[s]`` int64, rows of the caches that the tokens are written to.
        kv_lengths: ``[b]`` int64, rows in use once they are; None: these tokens alone, of a new
            prompt.
        overflow: ``[1]`` int32, set by a write out of range.
    """

    slots: Tensor
    kv_lengths: Tensor | None
    overflow: Tensor


class KVCache(nn.Module):
    """Keys and values of up to ``max_seq_len`` tokens for up to ``batch_size`` rows.

    Attributes:
        k_cache: ``[batch_size, num_kv_heads, max_seq_len, head_dim]``; only the first ``size``
            slots mean anything.
        v_cache: As ``k_cache``.
        overflow: ``[1]`` int32 on the device: some write was out of range, and suppressed.
        size: Tokens held, the same for every row.
    """

    k_cache: Tensor
    v_cache: Tensor
    overflow: Tensor
    size: int

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self._num_rows = 0  # of the prompt that the cache holds
        self._indices: Tensor | None = None
        # The count is the length of a view: torch.compile makes a size that changes symbolic, but
        # takes an int of a module for a constant, and would compile anew for every token.
        self._held: Tensor | None = None
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        with torch.inference_mode(False):  # later calls may be outside of it
            for name in ("k_cache", "v_cache"):
                buffer = torch.empty(shape, dtype=dtype, device=device)
                self.register_buffer(name, buffer, persistent=False)
            overflow = torch.zeros(1, dtype=torch.int32, device=device)
            self.register_buffer("overflow", overflow, persistent=False)

    @property
    def size(self) -> int:
        """Tokens held."""
        return 0 if self._held is None else self._held.shape[0]

    @size.setter
    def size(self, size: int) -> None:
        self._held = self._device_indices()[:size] if size > 0 else None

    def next_step(self, num_rows: int, num_tokens: int, start: int | None = None) -> CacheStep:
        """Say where ``num_tokens`` of each row go. Changes nothing: ``advance`` counts them.

        Args:
            num_rows: b.
            num_tokens: s.
            start: First slot; by default the first free one, 0 for a new prompt.

        Raises:
            ValueError: they do not fit, or there are more rows than the cache or its prompt has.
        """
        start = self.size if start is None else start
        self.check_room(num_rows, num_tokens, start)
        end = start + num_tokens
        indices = self._device_indices()
        lengths = None
        if start > 0:
            lengths = indices[end : end + 1]
            if num_rows != 1:
                lengths = lengths.repeat(num_rows)
        return CacheStep(indices[start:end], lengths, self.overflow)

    def check_room(self, num_rows: int, num_tokens: int, start: int | None = None) -> None:
        """Raise unless ``next_step`` of the same arguments would give a step.

        Raises:
            ValueError: they do not fit, or there are more rows than the cache or its prompt has.
        """
        start = self.size if start is None else start
        if num_rows > self.batch_size:
            raise ValueError(f"batch must be at most the cache's {self.batch_size}, got {num_rows}")
        if start > 0 and num_rows > self._num_rows:
            raise ValueError(
                f"batch must be at most the {self._num_rows} of the cached prompt, got {num_rows}"
            )
        end = start + num_tokens
        if end > self.max_seq_len:
            raise ValueError(
                f"the cache must have room for all tokens: {start} of its {self.max_seq_len} slots "
                f"are used, got {num_tokens} tokens more"
            )

    def advance(self, num_rows: int, num_tokens: int) -> None:
        """Count ``num_tokens`` more tokens in each of ``num_rows`` rows as held."""
        self._num_rows = num_rows
        self._held = self._device_indices()[: self.size + num_tokens]

    def count_as(self, other: "KVCache") -> None:
        """Take over the count of another layer's cache, which was given the same tokens."""
        self._num_rows = other._num_rows
        self._held = other._held

    def reset(self) -> None:
        """Hold nothing, for the next prompt. Costs nothing: unused slots are never read."""
        self._held = None
        self.overflow.zero_()

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values and return both caches, as torchtune's ``KVCache.update``.

        Args:
            k_val: ``[b, num_kv_heads, s, head_dim]``.
            v_val: Shape of ``k_val``.
        """
        num_rows, _, num_tokens, _ = k_val.shape
        self.next_step(num_rows, num_tokens)
        slots = slice(self.size, self.size + num_tokens)
        self.k_cache[:num_rows, :, slots] = k_val
        self.v_cache[:num_rows, :, slots] = v_val
        self.advance(num_rows, num_tokens)
        return self.k_cache, self.v_cache

    def raise_on_overflow(self) -> None:
        """Read the flag from the device (waits for it) and raise if a write was out of range.

        Raises:
            ValueError: a token's cache slot or RoPE position was out of range since ``reset``.
        """
        if self.overflow.item():
            raise ValueError(
                f"input_pos must be positions of the RoPE table, and slots below {self.max_seq_len}"
                ": a token was out of range and is not in the cache; reset it"
            )

    def _device_indices(self) -> Tensor:
        """``[max_seq_len + 1]`` int64 from 0 up: slots and lengths are views, free per token."""
        if self._indices is None or self._indices.device != self.k_cache.device:
            with torch.inference_mode(False):
                count = self.max_seq_len + 1
                self._indices = torch.arange(count, device=self.k_cache.device)
        return self._indices

    def extra_repr(self) -> str:
        return f"{list(self.k_cache.shape)}, size={self.size}"
