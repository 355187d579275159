"""What stands in for torchtune's MLP, norm and decoder layer."""

from torch import Tensor, nn
from torchtune import modules

from fastshard import ops
from fastshard.integrations.torchtune.attention import ForwardPass
from fastshard.nn.linear import Linear, PackedLinears


class FeedForward(PackedLinears, modules.FeedForward):
    """Stands in for a SiLU ``FeedForward`` without biases, of whose layers it takes the weights.

    ``packed_weight`` is ``[2 * hidden_dim, dim]``, rows of w1 and w3 in turn.
    """

    def __init__(self, theirs: modules.FeedForward):
        nn.Module.__init__(self)
        self.adopt({"w1": theirs.w1, "w3": theirs.w3}, interleaved=True)
        w3 = self._modules.pop("w3")
        self.w2 = Linear(theirs.w2.weight)
        self.add_module("w3", w3)  # the state dict's order
        self.activation = theirs.activation

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map ``x``, ``[..., dim]``, to ``[..., dim]``, plus ``residual``."""
        return ops.fused_mlp(x, self.packed_weight, self.w2.weight, residual=residual)


class RMSNorm(modules.RMSNorm):
    """Stands in for an ``RMSNorm``, whose parameter it has."""

    def __init__(self, theirs: modules.RMSNorm):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = theirs.normalized_shape, theirs.eps
        self.scale = theirs.scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, ``[..., dim]``; by torchtune's code if the scale has another dtype."""
        if x.dtype != self.scale.dtype:
            return super().forward(x)
        return ops.rms_norm(x, self.scale, self.eps, weight_in_fp32=True)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(norm(x + residual), x + residual)`` in one pass; both ``[..., dim]``."""
        if x.dtype != self.scale.dtype:
            residual = x + residual
            return self(residual), residual
        return ops.add_rms_norm(x, residual, self.scale, self.eps, weight_in_fp32=True)


class Layer(modules.TransformerSelfAttentionLayer):
    """Stands in for a layer whose parts were replaced: its additions are part of their kernels."""

    def __init__(
        self,
        theirs: modules.TransformerSelfAttentionLayer,
        forward_pass: ForwardPass,
        *,
        is_first: bool,
        is_last: bool,
    ):
        """Take the parts of ``theirs``; the first and the last layer frame a forward pass."""
        nn.Module.__init__(self)
        for name, part in theirs.named_children():
            self.add_module(name, part)
        self.forward_pass = forward_pass
        self._is_first, self._is_last = is_first, is_last

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None, **ignored
    ) -> Tensor:
        """Map ``x``, ``[b, s, embed_dim]``, to its shape; keywords as ``Attention``'s.

        ``ignored`` is what torchtune's decoder hands to layers with an encoder.
        """
        if self._is_first and self.attn.cache_enabled:
            self.forward_pass.begin(mask)
        h = self.sa_norm(x)
        h = self.attn(h, h, mask=mask, input_pos=input_pos)
        h, residual = self.mlp_norm.add(h, x)  # residual = attention output + x
        h = self.mlp(h, residual=residual)
        if self._is_last:
            self.forward_pass.end()
        return h
