"""Multi-head attention with torchtune's call: packed q, k and v, RoPE, mask, cache."""

import torch
from torch import Tensor, nn

from fastshard import ops
from fastshard.nn.kv_cache import CacheStep, KVCache
from fastshard.nn.linear import Linear, PackedLinears, random_weight
from fastshard.nn.rope import RotaryEmbedding, token_positions
from fastshard.ops.attention import ROTATING_ROWS


class MultiHeadAttention(PackedLinears):
    """Grouped-query attention, ``attn(x, y, mask=, input_pos=)``.

    ``packed_weight`` is ``[(num_heads + 2 * num_kv_heads) * head_dim, embed_dim]``, q rows, then k
    rows, then v rows; ``q_proj``, ``k_proj`` and ``v_proj`` are views of it.

    Two differences from torchtune's: without a mask it is causal also with a cache, and a query
    that may attend to nothing gives zeros.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        pos_embeddings: RotaryEmbedding | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        max_seq_len: int = 4096,
        is_causal: bool = True,
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build with random weights.

        Args:
            embed_dim: Width of the input and the output; need not be ``num_heads * head_dim``.
            num_heads: Query heads, a multiple of ``num_kv_heads``.
            num_kv_heads: Key and value heads.
            head_dim: Width of a head.
            qkv_bias: Whether the q, k and v projections have a bias.
            output_bias: Whether the output projection has one.
            pos_embeddings: Rotates q and k, after their norms.
            q_norm: Norm over ``head_dim`` of each query head; together with ``k_norm``.
            k_norm: As ``q_norm``, of each key head.
            max_seq_len: Largest cache.
            is_causal: What no mask means without a cache.
            window: A query sees this many last keys only; a part of the causal rule.
            device: By default PyTorch's.
            dtype: By default PyTorch's.

        Raises:
            ValueError: the heads do not divide, or only one of the norms is given.
        """
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_heads}"
            )
        if (q_norm is None) != (k_norm is None):
            raise ValueError("q_norm and k_norm must be given together")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.is_causal = is_causal
        self.window = window
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        rows = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.pack(rows, embed_dim, bias=qkv_bias, device=device, dtype=dtype)
        weight = random_weight(embed_dim, q_size, device, dtype)
        self.output_proj: Linear = Linear(
            weight, weight.new_zeros(embed_dim) if output_bias else None
        )
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.pos_embeddings = pos_embeddings
        self.kv_cache: KVCache | None = None
        self.cache_enabled: bool = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate and enable the cache; an earlier one is dropped, with what it holds.

        Raises:
            TypeError: ``dtype`` is not that of the weights.
            ValueError: ``max_seq_len`` is above the module's.
        """
        if dtype != self.packed_weight.dtype:
            raise TypeError(f"dtype must be {self.packed_weight.dtype}, got {dtype}")
        if max_seq_len > self.max_seq_len:
            raise ValueError(f"max_seq_len must be at most {self.max_seq_len}, got {max_seq_len}")
        self.kv_cache = None  # its memory is free before the next one is taken
        self.kv_cache = KVCache(
            batch_size,
            max_seq_len,
            self.num_kv_heads,
            self.head_dim,
            dtype,
            self.packed_weight.device,
        )
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empty the cache.

        Raises:
            RuntimeError: there is none.
        """
        if self.kv_cache is None:
            raise RuntimeError("the key value cache is not set up; call setup_cache first")
        self.kv_cache.reset()

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        first_key: Tensor | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """Attend from ``x`` to ``y``; with an enabled cache, append y's keys and values to it.

        Args:
            x: ``[b, s, embed_dim]``, gives the queries.
            y: ``[b, s_y, embed_dim]``, gives keys and values; ``x`` itself for self-attention.
                None: attend to all that the cache holds. With a cache s_y must be s.
            mask: ``[b | 1, s, S]`` over keys, or with a cache over its slots: bool, True = attend,
                or floating, added. It replaces the causal rule and the window.
            input_pos: ``[b, s]``, ``[s]`` or 0-d positions for RoPE; by default they count on.
            first_key: ``[b]``, keys before it (left padding) are not attended to.
            step: What ``kv_cache.next_step`` gave, where the caller counts; by default the cache
                counts itself.

        Returns:
            ``[b, s, embed_dim]``.

        Raises:
            ValueError: shapes do not fit, the cache is full or too small for the batch.
        """
        b, s, _ = x.shape
        is_cached = self.kv_cache is not None and self.cache_enabled
        if y is None:
            if not is_cached:
                raise ValueError("y must be given where no cache is enabled, got None")
            return self._attend_to_cache_only(x, mask, input_pos, first_key)
        q, k, v = self._project(x, y)
        positions = None if input_pos is None else token_positions(input_pos, b, s)
        if not is_cached:
            if self.pos_embeddings is not None:
                k = self.pos_embeddings(k, input_pos=positions)
            causal = mask is None and self.is_causal
            window = self.window if causal else None
            rules = {"mask": mask, "first_key": first_key, "window": window}
            out = ops.attention(q, k, v, causal=causal, **rules, **self._rope_of(q, positions))
            return self.output_proj(out.flatten(2))

        if y.shape[1] != s:
            raise ValueError(f"y must have the {s} tokens of x with a cache, got {y.shape[1]}")
        is_counting = step is None
        if is_counting:
            step = self.kv_cache.next_step(b, s)
        positions = step.slots if positions is None else positions
        if s * self.num_heads // self.num_kv_heads < ROTATING_ROWS:
            q, rope = self._append(q, k, v, positions, step), {}
        else:
            self._append(q[:, :, :0], k, v, positions, step)
            rope = self._rope_of(q, positions)
        del k, v  # views of a product that takes more memory than any other tensor here
        out = self._attend(q, step.kv_lengths, mask, first_key, rope)
        if is_counting:
            self.kv_cache.advance(b, s)
        return self.output_proj(out.flatten(2))

    def _project(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[b, s, num_heads, head_dim]``, k and v ``[b, s_y, num_kv_heads, head_dim]``, normed.

        Self-attention's are strided views of one product.
        """
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if x is y:
            qkv = ops.linear(x, self.packed_weight, self.packed_bias)
            q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        else:
            q, k, v = (
                projection(tensor).unflatten(-1, (-1, self.head_dim))
                for projection, tensor in ((self.q_proj, x), (self.k_proj, y), (self.v_proj, y))
            )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _rope_of(self, q: Tensor, positions: Tensor | None) -> dict[str, Tensor | bool]:
        """Keywords by which attention rotates q; without positions they count from 0."""
        rope = self.pos_embeddings
        table = None if rope is None else rope.table(q.device)
        if table is None:  # as on meta
            return {}
        if positions is None:
            positions = torch.arange(q.shape[1], device=q.device)
        return {
            "rope_table": table,
            "rope_positions": positions,
            "rope_interleaved": rope.interleaved,
        }

    def _append(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, step: CacheStep):
        """Write k and v to the cache, rotated; return q, rotated."""
        rope = self.pos_embeddings
        return ops.rope_append(
            q,
            k,
            v,
            None if rope is None else rope.table(q.device),
            positions,
            self.kv_cache.k_cache,
            self.kv_cache.v_cache,
            step.slots,
            step.overflow,
            interleaved=rope is None or rope.interleaved,
        )

    def _attend(
        self,
        q: Tensor,
        kv_lengths: Tensor | None,
        mask: Tensor | None,
        first_key: Tensor | None,
        rope: dict[str, Tensor | bool],
    ) -> Tensor:
        """Attend to the cache, which holds q's own keys and values too, or nothing else."""
        caches = self.kv_cache.k_cache, self.kv_cache.v_cache
        window = self.window if mask is None else None
        rules = {"mask": mask, "first_key": first_key, "window": window, **rope}
        if kv_lengths is not None:
            return ops.cached_attention(q, *caches, kv_lengths, **rules)
        k, v = (cache[: q.shape[0], :, : q.shape[1]].transpose(1, 2) for cache in caches)
        return ops.attention(q, k, v, causal=mask is None, **rules)

    def _attend_to_cache_only(
        self,
        x: Tensor,
        mask: Tensor | None,
        input_pos: Tensor | None,
        first_key: Tensor | None,
    ) -> Tensor:
        b = x.shape[0]
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.pos_embeddings is not None:
            q = self.pos_embeddings(q, input_pos=input_pos)
        size = self.kv_cache.size
        k, v = (
            cache[:b, :, :size].transpose(1, 2)
            for cache in (self.kv_cache.k_cache, self.kv_cache.v_cache)
        )
        if mask is not None:
            mask = mask[..., :size]
        out = ops.attention(q, k, v, mask=mask, first_key=first_key)
        return self.output_proj(out.flatten(2))
