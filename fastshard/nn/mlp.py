"""Gated MLP with torchtune's names: w1 gate, w3 up, w2 down."""

import torch
from torch import Tensor

from fastshard import ops
from fastshard.nn.linear import Linear, PackedLinears, random_weight


class FeedForward(PackedLinears):
    """``w2(activation(w1 x) * w3 x)``.

    ``packed_weight`` is ``[2 * hidden_dim, dim]``: row i of w1, row i of w3, row i + 1 of w1, ...,
    so that one thread of the kernel holds both factors of a product.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = activation
        rows = {"w1": hidden_dim, "w3": hidden_dim}
        self.pack(rows, dim, interleaved=True, device=device, dtype=dtype)
        self.w2: Linear = Linear(random_weight(dim, hidden_dim, device, dtype))

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map ``x``, ``[..., dim]``, to ``[..., dim]``, plus ``residual``."""
        return ops.fused_mlp(
            x, self.packed_weight, self.w2.weight, activation=self.activation, residual=residual
        )
