"""Attention: torchtune's ``MultiHeadAttention`` on fastshard's ops, by torchtune's own rules."""

import torch
from torch import Tensor, nn
from torchtune import modules

from fastshard import ops
from fastshard.integrations.torchtune.kv_cache import KVCache
from fastshard.integrations.torchtune.rope import rope_of
from fastshard.nn.linear import Linear, PackedLinears
from fastshard.nn.rope import RotaryEmbedding
from fastshard.ops.attention import ROTATING_ROWS


class ForwardPass:
    """What the layers of one model share during a forward pass.

    Attributes:
        overflow: ``[1]`` int32 or None, of the model's caches.
    """

    def __init__(self):
        self.overflow: Tensor | None = None
        self._mask: Tensor | None = None
        self._ends: Tensor | None = None

    def begin(self, mask: Tensor | None) -> None:
        """Find once for all layers where a mask over a cache ends."""
        self._mask, self._ends = mask, None
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 3:
            ends = torch.arange(1, mask.shape[2] + 1, device=mask.device)
            self._ends = (mask.any(1) * ends).amax(-1)

    def end(self) -> None:
        self._mask = self._ends = None

    def mask_ends(self, mask: Tensor | None) -> Tensor | None:
        """``[b | 1]`` int64: no token attends to a slot from there on; None where not known."""
        return self._ends if mask is not None and mask is self._mask else None


class Attention(PackedLinears, modules.MultiHeadAttention):
    """Stands in for a ``MultiHeadAttention``, of whose linear layers it takes the weights.

    torchtune's rules: RoPE comes before the norms of q and k; with a cache and no mask every query
    attends to the whole cache, zeros included; without a mask the causal rule holds only where no
    cache is set up. Unlike torchtune's, a query that may attend to nothing gives zeros.

    ``packed_weight`` is ``[(num_heads + 2 * num_kv_heads) * head_dim, embed_dim]``.
    """

    def __init__(
        self,
        theirs: modules.MultiHeadAttention,
        rope: RotaryEmbedding | None = None,
        forward_pass: ForwardPass | None = None,
    ):
        """Take over weights and cache.

        Args:
            theirs: Its linear layers are ``nn.Linear``; they share memory with this from here on.
            rope: What :func:`rope_of` its ``pos_embeddings`` gives, shared by layers.
            forward_pass: Shared by the layers of a model.
        """
        nn.Module.__init__(self)
        for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "max_seq_len"):
            setattr(self, name, getattr(theirs, name))
        self.attn_dropout = theirs.attn_dropout
        self.is_causal = theirs.is_causal
        self.cache_enabled = theirs.cache_enabled
        self.kv_cache: KVCache | None = None
        self.adopt({name: getattr(theirs, name) for name in ("q_proj", "k_proj", "v_proj")})
        self.output_proj = Linear(theirs.output_proj.weight, theirs.output_proj.bias)
        self.q_norm, self.k_norm = theirs.q_norm, theirs.k_norm
        self.pos_embeddings = theirs.pos_embeddings  # for who looks for it: not called
        self.rope = rope_of(theirs.pos_embeddings) if rope is None else rope
        self.forward_pass = ForwardPass() if forward_pass is None else forward_pass
        if theirs.kv_cache is not None:
            self._take_cache(KVCache.over(theirs.kv_cache))

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate and enable a cache beside the weights; where there is one, warn and keep it.

        Raises:
            TypeError: ``dtype`` is not that of the weights.
        """
        if self.kv_cache is not None:
            super().setup_cache(batch_size, dtype, max_seq_len)  # warns
            return
        weight = self.packed_weight
        if dtype != weight.dtype:
            raise TypeError(f"dtype must be {weight.dtype}, that of the weights, got {dtype}")
        sizes = (batch_size, max_seq_len, self.num_kv_heads, self.head_dim)
        with weight.device:
            self._take_cache(KVCache(*sizes, dtype))
        self.cache_enabled = True

    def _take_cache(self, cache: KVCache) -> None:
        """Hold ``cache``, with the flag of the model's other caches."""
        if (
            self.forward_pass.overflow is None
            or self.forward_pass.overflow.device != cache.overflow.device
        ):
            self.forward_pass.overflow = cache.overflow
        cache.overflow = self.forward_pass.overflow
        self.kv_cache = cache

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``x`` to ``y``; with an enabled cache, append y's keys and values to it.

        Args:
            x: ``[b, s, embed_dim]``, gives the queries.
            y: ``[b, s_y, embed_dim]``, gives keys and values; None: attend to the cache as it is.
            mask: ``[b | 1, s | 1, S]``, S the keys, with a cache all its slots: bool, True =
                attend, or floating, added.
            input_pos: ``[b, s]``, ``[s]``, or any shape of as many positions; by default 0 to
                s - 1, with a cache too.

        Returns:
            ``[b, s, embed_dim]``.

        Raises:
            ValueError: shapes do not fit, a position is not in the RoPE table, or the cache is full
                or too small for the batch.
            TypeError: the mask is of another type, such as a ``BlockMask``.
            RuntimeError: dropout is asked for.
        """
        if self.training and self.attn_dropout > 0:
            raise RuntimeError(
                f"attn_dropout must be 0 in training mode, got {self.attn_dropout}: call eval(), "
                "or undo(model) to train"
            )
        b, s, _ = x.shape
        cache = self.kv_cache if self.cache_enabled else None
        if y is None and cache is None:
            raise ValueError("y must be given where no cache is enabled, got None")
        positions = self._positions(input_pos, b, s)
        if y is None:
            q, rope = self._turned(self._heads(self.q_proj(x)), positions, self.q_norm), {}
        else:
            s_y = y.shape[1]
            of_keys = positions if s_y == s else self._positions(input_pos, b, s_y)
            q, k, v, rope = self._project(x, y, positions, of_keys)
            if cache is not None:
                q, rope = self._append(q, k, v, of_keys, rope)
        ends = None
        if cache is not None:
            k, v = (t[:b].transpose(1, 2) for t in (cache.k_cache, cache.v_cache))
            ends = self.forward_pass.mask_ends(mask)
        out = self._attend(q, k, v, mask, ends, rope)
        if cache is not None and y is not None:
            cache.advance(y.shape[1])
        return self.output_proj(out.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """``[b, s, n * head_dim]`` as ``[b, s, n, head_dim]``."""
        return x.unflatten(-1, (-1, self.head_dim))

    def _positions(self, input_pos: Tensor | None, b: int, s: int) -> Tensor | None:
        """``[b, s]`` or ``[s]`` int64; None without RoPE."""
        if self.rope is None:
            return None
        limit = self.rope.max_seq_len
        if input_pos is None:
            if s > limit:
                raise ValueError(f"x must have at most the RoPE table's {limit} tokens, got {s}")
            return torch.arange(s, device=self.packed_weight.device)
        if input_pos.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_pos must be int64 or int32, got {input_pos.dtype}")
        if input_pos.numel() not in (s, b * s):
            raise ValueError(
                f"input_pos must have the {s} or {b} x {s} positions of x, "
                f"got shape {list(input_pos.shape)}"
            )
        positions = input_pos.reshape(-1, s).long()
        if positions.device.type == "cpu" and not torch.compiler.is_compiling() and s > 0:
            low, high = (int(value) for value in torch.aminmax(positions))
            if low < 0 or high >= limit:
                wrong = low if low < 0 else high
                raise ValueError(f"input_pos must be in the RoPE table's [0, {limit}), got {wrong}")
        return positions if positions.shape[0] > 1 else positions[0]

    def _project(self, x: Tensor, y: Tensor, positions: Tensor | None, of_keys: Tensor | None):
        """q, k, v, ``[b, s | s_y, n, head_dim]``, and the keywords by which attention rotates q.

        Where there are norms, q and k come rotated and normed. Else q does not, and k is rotated
        here only where there is no cache, which takes it unrotated.
        """
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if x is y:
            qkv = ops.linear(x, self.packed_weight, self.packed_bias)
            q, k, v = self._heads(qkv).split(sizes, dim=2)
        else:
            q, k, v = (
                self._heads(of(t))
                for of, t in ((self.q_proj, x), (self.k_proj, y), (self.v_proj, y))
            )
        if self.q_norm is not None:
            q = self._turned(q, positions, self.q_norm)
            return q, self._turned(k, of_keys, self.k_norm), v, {}
        if self.rope is None:
            return q, k, v, {}
        rope = {
            "rope_table": self.rope.table(q.device),
            "rope_positions": positions,
            "rope_interleaved": self.rope.interleaved,
        }
        if self.kv_cache is None or not self.cache_enabled:
            k = self.rope(k, input_pos=of_keys)
        return q, k, v, rope

    def _turned(self, x: Tensor, positions: Tensor | None, norm: nn.Module | None) -> Tensor:
        """``x`` by its positions, then through its norm."""
        if self.rope is not None:
            x = self.rope(x, input_pos=positions)
        return x if norm is None else norm(x)

    def _append(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, rope: dict):
        """Write k and v to the cache; return q and what is left to do to it."""
        cache, s = self.kv_cache, k.shape[1]
        slots = cache.next_slots(k.shape[0], s)
        table = rope.get("rope_table")
        group = self.num_heads // self.num_kv_heads
        is_rotated_here = s == q.shape[1] and s * group < ROTATING_ROWS
        appended = ops.rope_append(
            q if is_rotated_here else k[:, :, :0],
            k,
            v,
            table,
            slots if table is None else positions,
            cache.k_cache,
            cache.v_cache,
            slots,
            cache.overflow,
            interleaved=rope.get("rope_interleaved", True),
        )
        return (appended, {}) if is_rotated_here else (q, rope)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ends: Tensor | None, rope: dict
    ) -> Tensor:
        b, s, num_keys = q.shape[0], q.shape[1], k.shape[1]
        causal = mask is None and self.kv_cache is None and self.is_causal
        if causal and num_keys != s:  # torchtune aligns the rule top left
            mask = torch.ones(1, s, num_keys, dtype=torch.bool, device=q.device).tril()
            causal = False
        elif mask is not None:
            mask = _checked_mask(mask, b, s, num_keys)
        if ends is not None and ends.shape[0] != b:
            ends = ends.expand(b)
        return ops.attention(q, k, v, mask=mask, causal=causal, kv_lengths=ends, **rope)


def _checked_mask(mask: Tensor, b: int, s: int, num_keys: int) -> Tensor:
    """``mask`` as ``[b | 1, s, num_keys]``."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask must be a bool or floating tensor, got {type(mask).__name__}: give the mask "
            "itself, or undo(model)"
        )
    if mask.dim() != 3 or mask.shape[0] not in (1, b) or mask.shape[1] not in (1, s):
        raise ValueError(f"mask must be [1 or {b}, {s}, {num_keys}], got {list(mask.shape)}")
    if mask.shape[2] != num_keys:
        raise ValueError(f"mask must be [1 or {b}, {s}, {num_keys}], got {list(mask.shape)}")
    return mask.expand(-1, s, -1)
