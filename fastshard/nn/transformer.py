"""One decoder layer with torchtune's names and call."""

import torch
from torch import Tensor, nn

from fastshard.nn.attention import MultiHeadAttention
from fastshard.nn.kv_cache import CacheStep
from fastshard.nn.mlp import FeedForward
from fastshard.nn.norm import RMSNorm


class TransformerSelfAttentionLayer(nn.Module):
    """``x + attn(sa_norm(x))``, then the same with ``mlp_norm`` and ``mlp``."""

    def __init__(
        self, attn: MultiHeadAttention, mlp: FeedForward, *, sa_norm: RMSNorm, mlp_norm: RMSNorm
    ):
        super().__init__()
        self.sa_norm = sa_norm
        self.attn = attn
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int,
    ) -> None:
        """Allocate the cache; ``encoder_max_seq_len`` is torchtune's, and ignored."""
        self.attn.setup_cache(batch_size, dtype, max_seq_len=decoder_max_seq_len)

    def caches_are_setup(self) -> bool:
        return self.attn.kv_cache is not None

    def caches_are_enabled(self) -> bool:
        return self.attn.cache_enabled

    def reset_cache(self) -> None:
        self.attn.reset_cache()

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        first_key: Tensor | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """Map ``x``, ``[b, s, embed_dim]``, to its shape; keywords as ``MultiHeadAttention``'s."""
        h = self.sa_norm(x)
        h = self.attn(h, h, mask=mask, input_pos=input_pos, first_key=first_key, step=step)
        h, residual = self.mlp_norm.add(h, x)  # residual = attention output + x
        return self.mlp(h, residual=residual)
