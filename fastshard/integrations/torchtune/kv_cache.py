"""KVCache: torchtune's, whose room is checked without waiting for the device."""

import torch
from torch import Tensor, nn
from torchtune import modules


class KVCache(modules.KVCache):
    """Keys and values of one layer; ``update`` and ``size`` are torchtune's.

    How many tokens it holds is on the device, in ``cache_pos``, where a compiled or captured step
    counts. The host counts too: it reads the device again only where somebody else changed
    ``cache_pos``.

    Attributes:
        k_cache: ``[batch_size, num_kv_heads, max_seq_len, head_dim]``, zeros where no token is.
        v_cache: As ``k_cache``.
        cache_pos: ``[max_seq_len]`` int64: ``size``, ``size + 1``, ...
        overflow: ``[1]`` int32, the same for all caches of a model: a token was out of range since
            ``reset``, and was not written.
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ):
        with torch.inference_mode(False):  # later calls may be outside of it
            super().__init__(batch_size, max_seq_len, num_kv_heads, head_dim, dtype)
        self._start_counting()

    @classmethod
    def over(cls, cache: modules.KVCache) -> "KVCache":
        """One of the same tensors as ``cache``, with what they hold."""
        own = cls.__new__(cls)
        nn.Module.__init__(own)
        for name in ("k_cache", "v_cache", "cache_pos"):
            own.register_buffer(name, getattr(cache, name), persistent=False)
        own.batch_size = cache.batch_size
        own._start_counting()
        return own

    def _start_counting(self) -> None:
        with torch.inference_mode(False):
            overflow = torch.zeros(1, dtype=torch.int32, device=self.k_cache.device)
        self.register_buffer("overflow", overflow, persistent=False)
        self._num_held = 0
        self._counted: tuple[Tensor, int | None] | None = None  # cache_pos then, and its version

    def next_slots(self, num_rows: int, num_tokens: int) -> Tensor:
        """Say where the next tokens of each row go; ``advance`` counts them.

        Returns:
            ``[num_tokens]`` int64, a view of ``cache_pos``.

        Raises:
            ValueError: there are more rows than the cache has, or no room.
        """
        max_rows, _, max_tokens, _ = self.k_cache.shape
        if num_rows > max_rows:
            raise ValueError(f"batch must be at most the cache's {max_rows}, got {num_rows}")
        if not torch.compiler.is_compiling():
            if not self._is_counted():
                self._num_held = self.size
            if self._num_held + num_tokens > max_tokens:
                raise ValueError(
                    f"the cache must have room for all tokens: {self._num_held} of its "
                    f"{max_tokens} slots are used, got {num_tokens} tokens more"
                )
        return self.cache_pos[:num_tokens]

    def advance(self, num_tokens: int) -> None:
        """Count ``num_tokens`` more tokens in each row as held."""
        self.cache_pos.add_(num_tokens)
        if not torch.compiler.is_compiling():
            self.assume(self._num_held + num_tokens)

    def assume(self, num_held: int) -> None:
        """Take the caller's word for what ``cache_pos`` holds: nobody has to read it then."""
        self._num_held = num_held
        self._counted = self.cache_pos, _version(self.cache_pos)

    def follow(self, num_rows: int, num_tokens: int) -> None:
        """Count tokens that a CUDA graph is about to append, which runs no host code.

        Raises:
            ValueError: as ``next_slots``.
        """
        self.next_slots(num_rows, num_tokens)
        self.assume(self._num_held + num_tokens)

    def recount(self) -> None:
        """Read ``cache_pos`` when the count is needed next."""
        self._counted = None

    def reset(self) -> None:
        """Empty the cache.

        Raises:
            ValueError: a token since the last ``reset`` was out of range, and was not written.
        """
        has_overflowed = bool(self.overflow)
        super().reset()
        self.overflow.zero_()
        if has_overflowed:
            raise ValueError(
                f"input_pos must be positions of the RoPE table, and slots below "
                f"{self.k_cache.shape[2]}: a token was out of range and is not in the cache"
            )

    def _is_counted(self) -> bool:
        """Whether ``cache_pos`` is as ``advance`` left it."""
        if self._counted is None:
            return False
        tensor, version = self._counted
        return tensor is self.cache_pos and version is not None and version == tensor._version


def _version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version
