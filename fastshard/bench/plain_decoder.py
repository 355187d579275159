"""The peers' decoder: one decode step in plain PyTorch over static caches, and its float64 golden.

Nothing of ``fastshard.ops`` runs here. It is written for speed in eager PyTorch and for
``torch.compile(fullgraph=True, mode="reduce-overhead")``: weights are packed (q, k and v; gate and
up), every tensor is a buffer of fixed address, the position is a tensor.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastshard.models import ModelConfig
from fastshard.models.decoder import ShardTransformerDecoder
from fastshard.nn import TransformerSelfAttentionLayer

ATTENTIONS = ("sdpa", "matmul")
GOLDEN_ELEMENTS = 1 << 27  # of the head that are float64 at a time, 1 GiB


class PlainDecoder(nn.Module):
    """All layers of a model, for one token a row at a time.

    Args:
        model: Of all layers, with caches; weights are shared where the layout is the same.
        batch_size: b; as many rows of the caches are copied.
        context: Slots of the caches, which hold what the model's first ones hold.
        attention: ``"sdpa"``, or ``"matmul"``: two products around a softmax, which a compiler can
            fuse.

    Raises:
        ValueError: ``attention`` is none of them, or a window is shorter than the context.
    """

    def __init__(
        self,
        model: ShardTransformerDecoder,
        batch_size: int,
        context: int,
        *,
        attention: str = "sdpa",
    ):
        super().__init__()
        config = model.config
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if config.windowed_layers and config.sliding_window < context:
            raise ValueError(
                f"context must be at most the window of {config.sliding_window}, got {context}"
            )
        self.config = config
        self.layers = nn.ModuleList(
            PlainLayer(layer, config, batch_size, context, attention)
            for layer in model.layers.values()
        )
        head = model.tok_embeddings if model.output is None else model.output
        table = next(iter(model.layers.values())).attn.pos_embeddings.table(model.device)
        self.register_buffer("embedding", model.tok_embeddings.weight.detach())
        self.register_buffer("norm", model.norm.scale.detach())
        self.register_buffer("head", head.weight.detach())
        self.register_buffer("rope_table", table[:context].clone())

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Append a token to every row's cache.

        Args:
            tokens: ``[b]`` int64.
            position: ``[1]`` int64, the slot and the position of all of them.

        Returns:
            Logits, ``[b, vocab_size]`` float32.
        """
        x = self.embedding[tokens]  # [b, hidden_size]
        rotation = self.rope_table[position]  # [1, rotary_dim // 2, 2]
        for layer in self.layers:
            x = layer(x, rotation, position)
        return self.unembed(x)

    def unembed(self, x: Tensor) -> Tensor:
        """Norm and head: ``[b, hidden_size]`` to ``[b, vocab_size]`` float32."""
        return F.linear(_norm(x, self.norm, self.config.norm_eps), self.head).float()

    def copied(self, attention: str) -> "PlainDecoder":
        """A decoder of the same tensors, caches too, that attends otherwise."""
        decoder = copy.copy(self)
        layers = nn.ModuleList(layer.copied(attention) for layer in self.layers)
        decoder._modules = {"layers": layers}
        return decoder

    @torch.no_grad()
    def golden(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The same in float64, one layer at a time, so that one layer's copy is all it needs."""
        x = self.embedding[tokens].double()
        rotation = self.rope_table[position].double()
        for layer in self.layers:
            x = layer.copied("matmul", torch.float64)(x, rotation, position)
        return self.unembed_golden(x)

    def unembed_golden(self, x: Tensor) -> Tensor:
        """``unembed`` in float64, a part of the head at a time."""
        x = _norm(x, self.norm.double(), self.config.norm_eps)
        rows = max(1, GOLDEN_ELEMENTS // self.head.shape[1])
        return torch.cat([F.linear(x, part.double()) for part in self.head.split(rows)], dim=-1)


class PlainLayer(nn.Module):
    """One decoder layer with caches ``[b, num_kv_heads, context, head_dim]``."""

    def __init__(
        self,
        layer: TransformerSelfAttentionLayer,
        config: ModelConfig,
        batch_size: int,
        context: int,
        attention: str,
    ):
        super().__init__()
        self.config = config
        self.attention = attention
        attn, mlp = layer.attn, layer.mlp
        tensors = {
            "sa_norm": layer.sa_norm.scale,
            "qkv": attn.packed_weight,
            "qkv_bias": attn.packed_bias,
            "q_norm": attn.q_norm and attn.q_norm.scale,
            "k_norm": attn.k_norm and attn.k_norm.scale,
            "output": attn.output_proj.weight,
            "output_bias": attn.output_proj.bias,
            "mlp_norm": layer.mlp_norm.scale,
            "gate_up": torch.cat([mlp.w1.weight, mlp.w3.weight]),  # [2 * I, H], not interleaved
            "down": mlp.w2.weight,
            "k_cache": attn.kv_cache.k_cache[:batch_size, :, :context].clone(),
            "v_cache": attn.kv_cache.v_cache[:batch_size, :, :context].clone(),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, x: Tensor, rotation: Tensor, position: Tensor) -> Tensor:
        """Map ``x``, ``[b, hidden_size]``, to its shape; writes slot ``position`` of the caches.

        Args:
            x: Dtype of the weights.
            rotation: ``[1, rotary_dim // 2, 2]``, cosine and sine, float32 or wider.
            position: ``[1]`` int64.
        """
        q, k, v = self.project(x, rotation)  # [b, n, d]
        self.k_cache[:, :, position] = k[:, :, None]
        self.v_cache[:, :, position] = v[:, :, None]
        return self.finish(x, self._attend(q, position))

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of ``x``, ``[..., n, head_dim]``, q and k rotated."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = F.linear(_norm(x, self.sa_norm, config.norm_eps), self.qkv, self.qkv_bias)
        q, k, v = qkv.unflatten(-1, (-1, config.head_dim)).split(heads, dim=-2)
        if self.q_norm is not None:
            q = _norm(q, self.q_norm, config.norm_eps)
            k = _norm(k, self.k_norm, config.norm_eps)
        return self._rotate(q, rotation), self._rotate(k, rotation), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add to ``x`` its attention's output, ``[..., num_heads * head_dim]``, and the MLP's."""
        config = self.config
        x = x + F.linear(attended, self.output, self.output_bias)
        gate, up = F.linear(_norm(x, self.mlp_norm, config.norm_eps), self.gate_up).chunk(2, -1)
        return x + F.linear(_ACTIVATIONS[config.hidden_act](gate) * up, self.down)

    def copied(self, attention: str, dtype: torch.dtype | None = None) -> "PlainLayer":
        """A layer of the same tensors, or of their copies in ``dtype``."""
        layer = copy.copy(self)
        layer.attention = attention
        if dtype is not None:
            layer._buffers = {n: t if t is None else t.to(dtype) for n, t in self._buffers.items()}
        return layer

    def _rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Rotate ``x``, ``[..., n, d]``; rounds once."""
        rotary_dim = 2 * rotation.shape[-2]
        cos, sin = rotation.unbind(-1)
        head, rest = x[..., :rotary_dim].to(rotation.dtype), x[..., rotary_dim:]
        if self.config.rope_interleaved:
            a, b = head.unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = head.chunk(2, -1)
            rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([rotated.to(x.dtype), rest], dim=-1)

    def _attend(self, q: Tensor, position: Tensor) -> Tensor:
        """``q`` ``[b, num_heads, d]`` over slots up to ``position``, to ``[b, num_heads * d]``.

        The query heads of one key/value head are the rows of one product: no copy of keys.
        """
        q = q.unflatten(1, (self.config.num_kv_heads, -1))  # [b, num_kv_heads, group, d]
        visible = torch.arange(self.k_cache.shape[2], device=q.device) <= position  # [context]
        if self.attention == "sdpa":
            mask = visible.expand(q.shape[0], q.shape[1], q.shape[2], -1)
            out = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        else:
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = (q @ self.k_cache.mT).to(wide) / math.sqrt(self.config.head_dim)
            weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
            out = weights.to(q.dtype) @ self.v_cache
        return out.flatten(1)


_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, scale.shape, scale, eps)
