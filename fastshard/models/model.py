"""ShardedGeneralModel: one shard on one device, with exo's generate step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastshard.models.config import ModelConfig
from fastshard.models.decoder import GeneralMHA, ShardTransformerDecoder
from fastshard.models.inputs import check_input, check_mask, check_positions
from fastshard.models.shard import Shard


class ShardedGeneralModel(nn.Module):
    """The layers of ``shard`` on one device, and one step of generation through them.

    Attributes:
        config: ``ModelConfig``.
        shard: ``Shard``.
        model: The decoder (``ShardTransformerDecoder``). ``model.state_dict()`` has torchtune's
            names with global layer indices: ``layers.{i}.attn.{q,k,v,output}_proj.weight`` (and
            ``.bias``), ``layers.{i}.attn.{q,k}_norm.scale``, ``layers.{i}.mlp.w1/w2/w3.weight``,
            ``layers.{i}.sa_norm.scale``, ``layers.{i}.mlp_norm.scale``; ``tok_embeddings.weight``
            on the first shard, and on the last where the head is tied to it; ``norm.scale`` on
            the last; ``output.weight`` on the last where the head is not tied.
        use_cache: Whether ``generate`` keeps keys and values between calls. The cache is made for
            the batch of a prompt, and made anew when a prompt does not fit; one that was made by
            ``model.setup_caches`` is kept as it is.
        max_generated_tokens: Slots that the cache has beyond a prompt, up to the context.
    """

    def __init__(
        self,
        config: ModelConfig | Mapping[str, Any],
        shard: Shard,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
        use_cache: bool = False,
        max_generated_tokens: int = 1024,
        *,
        build: Callable[..., ShardTransformerDecoder] = GeneralMHA,
    ):
        """Build with random weights; ``device="meta"`` allocates nothing (then ``to_empty``).

        ``build`` makes the decoder; it is called as ``GeneralMHA``.
        """
        super().__init__()
        self.model: ShardTransformerDecoder = build(config, shard, device=device, dtype=dtype)
        self.config: ModelConfig = self.model.config
        self.shard: Shard = shard
        self.use_cache = use_cache
        self.max_generated_tokens = max_generated_tokens
        self._made_cache: tuple[int, int] | None = None  # batch and slots of the cache made here

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the hidden state."""
        return self.model.dtype

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        hidden_state: Tensor | None = None,
        curr_pos: int = 0,
        *,
        first_key: Tensor | None = None,
        num_logits: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the shard's layers over the next tokens; appends them to the cache, if there is one.

        Args:
            tokens: ``[b, s]`` int64, for a first shard; others ignore them. With a cache those that
                follow the cached ones, without all of them.
            mask: ``[1 | b, T, S]``: a row for each token of the sequence, or for these s only.
                Bool, True = attend, or floating, added to the scores (so ones attend everywhere).
                With a cache S is at least the slots in use. None: causal.
            input_pos: ``[1 | b, T]`` positions for RoPE of the sequence, or of these s tokens;
                also ``[s]`` or 0-d. None: counted.
            hidden_state: ``[b, s, hidden_size]`` in the model's dtype, on other shards only.
            curr_pos: With a cache the index of the first of these tokens, without that of the
                last. 0 starts a new prompt of any length: the cache is emptied.
            first_key: ``[b]``, keys before it (left padding) are not attended to.
            num_logits: Logits of this many last tokens only.

        Returns:
            ``(hidden, None)`` after the shard's last layer, ``[b, s, hidden_size]`` in the model's
            dtype; of the last shard ``(None, logits)``, ``[b, s, vocab_size]`` float32.

        Raises:
            ValueError: a shape, device or value does not fit, or the cache is full. The cache
                holds what it held.
            TypeError: a dtype is wrong.
        """
        b, s = check_input(self.model, tokens, hidden_state)
        is_cached = self.use_cache or self.model.caches_are_enabled()
        start, end = self._range(curr_pos, s, is_cached)
        if mask is not None and mask.dim() == 3:
            mask = _rows("mask", mask, start, end)
        if input_pos is not None:
            if input_pos.dim() == 2:
                input_pos = _rows("input_pos", input_pos, start, end)
            input_pos = check_positions(self.model, input_pos, b, s)
        check_mask(self.model, mask, first_key, b, s, end)
        if num_logits is not None and num_logits < 1:
            raise ValueError(f"num_logits must be at least 1 or None, got {num_logits}")

        step = None
        if is_cached:
            if start == 0:
                self._make_room(b, s)
            step = self.model.next_step(b, s, start)
            if start == 0:
                self.model.reset_caches()
        out = self.model(
            tokens,
            mask=mask,
            input_pos=input_pos,
            hidden_state=hidden_state,
            first_key=first_key,
            step=step,
            num_logits=num_logits,
        )
        if is_cached:
            self.model.advance(b, s)
        return (None, out) if self.shard.is_last_layer() else (out, None)

    def _range(self, curr_pos: int, num_tokens: int, is_cached: bool) -> tuple[int, int]:
        """Indices in the sequence of the first of these tokens, and one past the last."""
        if curr_pos < 0:
            raise ValueError(f"curr_pos must be at least 0, got {curr_pos}")
        if is_cached:
            size = self.model.cache_size
            if curr_pos not in (0, size):
                raise ValueError(f"curr_pos must be 0 or the {size} tokens cached, got {curr_pos}")
            return curr_pos, curr_pos + num_tokens
        if curr_pos > 0 and num_tokens != curr_pos + 1:
            raise ValueError(
                f"without a cache all curr_pos + 1 = {curr_pos + 1} tokens must be given, "
                f"got {num_tokens}"
            )
        return 0, num_tokens

    def _make_room(self, batch_size: int, num_tokens: int) -> None:
        """Have a cache for this prompt, unless there is one that was not made here."""
        room = min(num_tokens + self.max_generated_tokens, self.config.max_seq_len)
        if num_tokens > room:
            raise ValueError(f"tokens must be at most max_seq_len={room} long, got {num_tokens}")
        if self.model.caches_are_enabled():
            cache = self.model.any_cache
            made = (cache.batch_size, cache.max_seq_len)
            if made != self._made_cache or (made[0] >= batch_size and made[1] >= room):
                return
            batch_size, room = max(made[0], batch_size), max(made[1], room)
        self.model.setup_caches(batch_size, self.dtype, decoder_max_seq_len=room)
        self._made_cache = (batch_size, room)


def _rows(name: str, x: Tensor, start: int, end: int) -> Tensor:
    """Rows ``start`` to ``end`` of ``x``, ``[b, T, ...]``, which may be just these."""
    if x.shape[1] >= end:
        return x[:, start:end]
    if x.shape[1] != end - start:
        raise ValueError(f"{name} must have {end} rows, got shape {list(x.shape)}")
    return x
