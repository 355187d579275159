"""ShardTransformerDecoder: the layers of one shard, with torchtune's names and global indices.

Reads top to bottom: build the parts this shard holds, check the inputs, run them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastshard import ops
from fastshard.models.config import ModelConfig
from fastshard.models.inputs import check_input, check_mask, check_positions
from fastshard.models.part import TensorPart
from fastshard.models.shard import Shard
from fastshard.nn import (
    CacheStep,
    FeedForward,
    KVCache,
    Linear,
    MultiHeadAttention,
    RMSNorm,
    RotaryEmbedding,
    TransformerSelfAttentionLayer,
)
from fastshard.nn.linear import random_weight


def GeneralMHA(
    config: ModelConfig | Mapping[str, Any],
    shard: Shard,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> "ShardTransformerDecoder":
    """Build the decoder of ``shard`` for any of the families; ``config`` may be a plain dict."""
    return ShardTransformerDecoder(config, shard, device=device, dtype=dtype)


class ShardTransformerDecoder(nn.Module):
    """Layers ``shard.start_layer`` to ``shard.end_layer``, both included, of a model.

    Attributes:
        config: ``ModelConfig``.
        shard: ``Shard``.
        tok_embeddings: On the first shard, and on the last where the head is tied to it; or None.
        layers: Global index, as a string -> layer.
        norm: On the last shard, or None.
        output: The head, on the last shard where it is not tied, or None.
    """

    def __init__(
        self,
        config: ModelConfig | Mapping[str, Any],
        shard: Shard,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build with random weights; ``device="meta"`` allocates nothing (then ``to_empty``).

        Raises:
            ValueError: the config is incomplete, or has not the shard's number of layers.
        """
        super().__init__()
        if not isinstance(config, ModelConfig):
            config = ModelConfig.from_dict(config, shard.model_id)
        if config.num_layers != shard.n_layers:
            raise ValueError(
                f"n_layers of the shard must be the config's num_layers={config.num_layers}, "
                f"got {shard.n_layers}"
            )
        self.config = config
        self.shard = shard
        self.max_seq_len: int = config.max_seq_len
        placed = {"device": device, "dtype": dtype}
        is_first, is_last = shard.is_first_layer(), shard.is_last_layer()
        is_tied = config.tie_word_embeddings
        size = (config.vocab_size, config.hidden_size)

        self.tok_embeddings: nn.Embedding | None = None
        if is_first or (is_last and is_tied):
            self.tok_embeddings = nn.Embedding(*size, _weight=random_weight(*size, device, dtype))
        rope = RotaryEmbedding(
            config.rotary_dim,
            config.max_seq_len,
            config.rope_base,
            scaling=config.rope_scaling,
            interleaved=config.rope_interleaved,
            device=device,
        )
        self.layers: nn.ModuleDict = nn.ModuleDict(
            {str(i): _layer(config, i, rope, placed) for i in shard.layers}
        )
        self.norm: RMSNorm | None = None
        if is_last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, **placed)
        self.output: Linear | None = None
        if is_last and not is_tied:
            self.output = Linear(random_weight(*size, device, dtype))
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self._any_layer.sa_norm.scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self._any_layer.sa_norm.scale.dtype

    @property
    def head(self) -> Tensor:
        """Of a last shard: weights of the head, ``[vocab_size, hidden_size]``, tied or its own."""
        return (self.tok_embeddings if self.output is None else self.output).weight

    @property
    def parts(self) -> dict[str, TensorPart]:
        """Name in the state dict -> which part of the checkpoint's tensor it is, if not all."""
        return {}

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph can hold a pass: no layer waits on the host."""
        return True

    @property
    def launch_refusal(self) -> str | None:
        """Why ``ops.decode_step`` cannot run the layers, whatever their sizes; None: it can."""
        return None

    def rank_sums(self) -> dict[str, Any]:
        """Arguments by which ``ops.decode_step`` adds up over ranks that share the layers."""
        return {}

    def join_logits(self, logits: Tensor) -> Tensor:
        """Logits ``[b, vocab_size]`` from those of this rank's rows of the head."""
        return logits

    @property
    def _any_layer(self) -> TransformerSelfAttentionLayer:
        return self.layers[str(self.shard.start_layer)]

    # Caches: every layer has its own and counts; they count the same.

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Allocate and enable every layer's cache; earlier ones are dropped.

        Args:
            batch_size: Most rows.
            dtype: That of the weights.
            encoder_max_seq_len: torchtune's; ignored.
            decoder_max_seq_len: Slots, by default and at most the config's ``max_seq_len``.
        """
        for layer in self.layers.values():
            layer.setup_caches(
                batch_size, dtype, decoder_max_seq_len=decoder_max_seq_len or self.max_seq_len
            )

    def caches_are_setup(self) -> bool:
        return self._any_layer.caches_are_setup()

    def caches_are_enabled(self) -> bool:
        return self._any_layer.caches_are_enabled()

    def reset_caches(self) -> None:
        """Empty every cache, for the next prompt.

        Raises:
            RuntimeError: there are none.
        """
        self._any_layer.reset_cache()  # and its flag, which a pass uses for all layers
        for layer in self.layers.values():
            layer.attn.kv_cache.count_as(self.any_cache)

    @property
    def any_cache(self) -> KVCache | None:
        """One layer's cache: all have the same shape and size."""
        return self._any_layer.attn.kv_cache

    @property
    def cache_size(self) -> int:
        """Tokens held in the caches; 0 without."""
        return self.any_cache.size if self.caches_are_setup() else 0

    def next_step(self, num_rows: int, num_tokens: int, start: int | None = None) -> CacheStep:
        """Say where tokens go, as ``KVCache.next_step``; the same for every layer."""
        return self.any_cache.next_step(num_rows, num_tokens, start)

    def advance(self, num_rows: int, num_tokens: int) -> None:
        """Count ``num_tokens`` more tokens in every cache as held."""
        self.any_cache.advance(num_rows, num_tokens)
        for layer in self.layers.values():
            layer.attn.kv_cache.count_as(self.any_cache)

    def raise_on_overflow(self) -> None:
        """Raise if a token since ``reset_caches`` was out of range; waits for the device."""
        self.any_cache.raise_on_overflow()

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        hidden_state: Tensor | None = None,
        first_key: Tensor | None = None,
        step: CacheStep | None = None,
        num_logits: int | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Run the shard's layers.

        Args:
            tokens: ``[b, s]`` int64 or int32, for a first shard; others ignore them.
            mask: ``[b | 1, s, S]`` over keys, or with caches over slots (S at least those in use):
                bool, True = attend, or floating, added. None: causal, with caches too.
            input_pos: ``[b | 1, s]``, ``[s]`` or 0-d positions for RoPE; by default they count on
                from what the cache holds, and from ``first_key``.
            hidden_state: ``[b, s, hidden_size]`` in the model's dtype, on other shards only.
            first_key: ``[b]``, keys before it (left padding) are not attended to.
            step: What ``next_step`` gave, where the caller counts (``advance``). Then the pass
                reads no host state: it compiles once and can be captured in a CUDA graph.
            num_logits: Logits of this many last tokens only.
            logits_at: ``[n]`` int64 on the device, below s: logits of these tokens only. The host
                need not know them, as where a CUDA graph runs prompts that end before s.

        Returns:
            Of the last shard logits, ``[b, s, vocab_size]`` float32; else the hidden state after
            the shard's last layer, ``[b, s, hidden_size]`` in the model's dtype.

        Raises:
            ValueError: a shape, device or value does not fit, or the cache is full.
            TypeError: a dtype is wrong.
        """
        b, s = check_input(self, tokens, hidden_state)
        is_counting = step is None and self.caches_are_enabled()
        if is_counting:
            step = self.next_step(b, s)
        num_keys = self.cache_size + s if is_counting else s
        check_mask(self, mask, first_key, b, s, num_keys)
        if input_pos is None:
            positions = self._count_positions(first_key, s, step)
        else:
            positions = check_positions(self, input_pos, b, s)

        is_first = self.shard.is_first_layer()
        h = self.tok_embeddings(tokens) if is_first else hidden_state  # [b, s, hidden_size]
        for layer in self.layers.values():
            h = layer(h, mask=mask, input_pos=positions, first_key=first_key, step=step)
        if is_counting:
            self.advance(b, s)
        if not self.shard.is_last_layer():
            return h
        if logits_at is not None:
            h = h.index_select(1, logits_at)
        elif num_logits is not None:
            h = h[:, -num_logits:]
        return self.unembed(h)

    def unembed(self, h: Tensor) -> Tensor:
        """Norm and head: ``[b, s, hidden_size]`` to ``[b, s, vocab_size]`` float32."""
        return ops.linear(self.norm(h), self.head).float()

    def _count_positions(self, first_key: Tensor | None, s: int, step: CacheStep | None) -> Tensor:
        """``[b, s]`` or ``[s]``: the tokens' places in the sequence, without its left padding."""
        if step is None and s > self.max_seq_len:
            raise ValueError(f"tokens must be at most max_seq_len={self.max_seq_len}, got {s}")
        slots = torch.arange(s, device=self.device) if step is None else step.slots
        if first_key is None:
            return slots
        return (slots - first_key[:, None]).clamp(min=0)


def _layer(config: ModelConfig, index: int, rope: RotaryEmbedding, placed: dict):
    """The layer with this global index."""
    hidden_size, head_dim, eps = config.hidden_size, config.head_dim, config.norm_eps
    attn = MultiHeadAttention(
        embed_dim=hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=head_dim,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        pos_embeddings=rope,
        q_norm=RMSNorm(head_dim, eps, **placed) if config.qk_norm else None,
        k_norm=RMSNorm(head_dim, eps, **placed) if config.qk_norm else None,
        max_seq_len=config.max_seq_len,
        window=config.window(index),
        **placed,
    )
    return TransformerSelfAttentionLayer(
        attn,
        FeedForward(hidden_size, config.intermediate_size, activation=config.hidden_act, **placed),
        sa_norm=RMSNorm(hidden_size, eps, **placed),
        mlp_norm=RMSNorm(hidden_size, eps, **placed),
    )
