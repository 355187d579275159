"""RMSNorm with torchtune's names: the scale is multiplied in float32, and rounded once."""

import torch
from torch import Tensor, nn

from fastshard import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        ones = torch.ones(dim, device=device, dtype=dtype)
        self.scale: nn.Parameter = nn.Parameter(ones, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, ``[..., dim]``, any strides; contiguous result of its dtype."""
        return ops.rms_norm(x, self.scale, self.eps, weight_in_fp32=True)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(norm(x + residual), x + residual)`` in one pass; both ``[..., dim]``."""
        return ops.add_rms_norm(x, residual, self.scale, self.eps, weight_in_fp32=True)

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}, eps={self.eps}"
