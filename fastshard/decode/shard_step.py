"""One shard's decode step over static buffers, in one launch or by its layers' own ops."""

from typing import Any

import torch
from torch import Tensor

from fastshard import ops
from fastshard.models import ShardedGeneralModel, ShardTransformerDecoder
from fastshard.nn import CacheStep


class ShardStep:
    """A step of one shard, from tokens ``[b]`` or the hidden state ``[b, hidden_size]``."""

    def __init__(
        self,
        model: ShardedGeneralModel,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor,
        first_key: Tensor | None,
    ):
        self._decoder = decoder = model.model
        self._slots = slots
        self._positions = positions
        self._lengths = lengths
        self._first_key = first_key
        # Held for as long as a graph may read them, also if the model is moved meanwhile.
        self._weights = decode_weights(decoder)
        self._caches = [layer.attn.kv_cache for layer in decoder.layers.values()]
        self._buffers: dict[str, Any] = {}

    def by_layers(self, x: Tensor) -> Tensor:
        """Logits ``[b, vocab_size]`` float32, or the hidden state."""
        is_first = self._decoder.shard.is_first_layer()
        out = self._decoder(
            x[:, None] if is_first else None,
            hidden_state=None if is_first else x[:, None],
            input_pos=self._positions[:, None],
            first_key=self._first_key,
            step=CacheStep(self._slots[:1], self._lengths, self._caches[0].overflow),
        )
        return out[:, 0]

    def persistent(self, x: Tensor) -> Tensor:
        """As ``by_layers``, in one launch."""
        decoder, config, weights = self._decoder, self._decoder.config, self._weights
        attn = next(iter(decoder.layers.values())).attn
        if not self._buffers:
            self._buffers = _buffers(weights, x.shape[0], attn.num_heads) | decoder.rank_sums()
        ops.decode_step(
            x,
            weights,
            k_cache=[cache.k_cache for cache in self._caches],
            v_cache=[cache.v_cache for cache in self._caches],
            rope_table=attn.pos_embeddings.table(x.device),
            positions=self._positions,
            slots=self._slots,
            first_key=self._first_key,
            overflow=self._caches[0].overflow,
            num_heads=attn.num_heads,
            norm_eps=config.norm_eps,
            weight_in_fp32=True,
            rope_interleaved=config.rope_interleaved,
            activation=config.hidden_act,
            windows=[config.window(i) or 0 for i in decoder.shard.layers],
            **self._buffers,
        )
        out = self._buffers["out"]
        return out if weights.head is None else decoder.join_logits(out)


def _buffers(weights: ops.DecodeWeights, batch: int, num_heads: int) -> dict[str, Tensor]:
    """The workspace and the output of ``ops.decode_step``."""
    like = weights.sa_norm[0]
    with torch.inference_mode(False):
        if weights.head is None:
            out = like.new_empty((batch, len(like)))
        else:
            out = like.new_empty((batch, len(weights.head)), dtype=torch.float32)
        workspace = ops.new_decode_workspace(weights, batch, num_heads=num_heads)
    return {"workspace": workspace, "out": out}


def decode_weights(decoder: ShardTransformerDecoder) -> ops.DecodeWeights:
    """The shard's weights as ``ops.decode_step`` takes them: the modules' own memory, no copies."""
    layers = decoder.layers.values()
    attns = [layer.attn for layer in layers]
    config, shard = decoder.config, decoder.shard

    def each(tensors, is_there: bool = True) -> list[Tensor]:
        return [tensor.detach() for tensor in tensors] if is_there else []

    is_last = shard.is_last_layer()
    return ops.DecodeWeights(
        sa_norm=each(layer.sa_norm.scale for layer in layers),
        qkv_weight=each(attn.packed_weight for attn in attns),
        output_weight=each(attn.output_proj.weight for attn in attns),
        mlp_norm=each(layer.mlp_norm.scale for layer in layers),
        gate_up_weight=each(layer.mlp.packed_weight for layer in layers),
        down_weight=each(layer.mlp.w2.weight for layer in layers),
        qkv_bias=each((attn.packed_bias for attn in attns), config.qkv_bias),
        output_bias=each((attn.output_proj.bias for attn in attns), config.output_bias),
        q_norm=each((attn.q_norm.scale for attn in attns), config.qk_norm),
        k_norm=each((attn.k_norm.scale for attn in attns), config.qk_norm),
        embedding=decoder.tok_embeddings.weight.detach() if shard.is_first_layer() else None,
        norm=decoder.norm.scale.detach() if is_last else None,
        head=decoder.head.detach() if is_last else None,
    )
