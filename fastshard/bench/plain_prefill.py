"""The peers' prefill: a whole prompt in plain PyTorch into static caches, and its float64 golden.

Nothing of ``fastshard.ops`` runs here; the layers and their tensors are those of ``PlainDecoder``.
"""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastshard.bench.plain_decoder import PlainDecoder, PlainLayer


class PlainPrefill(nn.Module):
    """All layers of a model on a prompt, logits of its last position.

    Args:
        decoder: Gives tensors and caches, whose first slots are overwritten.
    """

    def __init__(self, decoder: PlainDecoder):
        super().__init__()
        self.decoder = decoder
        self.backend: SDPBackend | None = None

    def using(self, backend: SDPBackend | None) -> "PlainPrefill":
        """The same, attending with this backend of PyTorch's; None: with its own choice."""
        prefill = copy.copy(self)
        prefill.backend = backend
        return prefill

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``tokens``, ``[b, s]`` int64, to logits, ``[b, vocab_size]`` float32."""
        decoder = self.decoder
        x = decoder.embedding[tokens]  # [b, s, hidden_size]
        rotation = decoder.rope_table[: tokens.shape[1], None]  # [s, 1, rotary_dim // 2, 2]
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            for layer in decoder.layers:
                x = _layer(layer, x, rotation)
        return decoder.unembed(x[:, -1])

    @torch.no_grad()
    def golden(self, tokens: Tensor) -> Tensor:
        """The same in float64, a layer at a time; its keys and values go nowhere."""
        decoder = self.decoder
        x = decoder.embedding[tokens].double()
        rotation = decoder.rope_table[: tokens.shape[1], None].double()
        for layer in decoder.layers:
            x = _layer(layer.copied("sdpa", torch.float64), x, rotation)
        return decoder.unembed_golden(x[:, -1])


def _layer(layer: PlainLayer, x: Tensor, rotation: Tensor) -> Tensor:
    """One layer on ``x``, ``[b, s, hidden_size]``; writes slots 0 to s of its caches."""
    q, k, v = (tensor.transpose(1, 2) for tensor in layer.project(x, rotation))  # [b, n, s, d]
    layer.k_cache[:, :, : x.shape[1]] = k
    layer.v_cache[:, :, : x.shape[1]] = v
    return layer.finish(x, _attend(q, k, v).transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, ``[b, n, s, d]``; in float64 a key head at a time, for its scores' sake."""
    if q.dtype != torch.float64:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    groups = q.chunk(k.shape[1], 1), k.split(1, 1), v.split(1, 1)
    heads = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for q, k, v in zip(*groups, strict=True)
    ]
    return torch.cat(heads, 1)
