"""A decoder layer of one's own over fastshard's ops, under ``torch.compile(fullgraph=True)``.

    python examples/compile_model.py

The ops are opaque to the compiler: it fuses what lies between them, and breaks no graph.
"""

import torch
from torch import Tensor, nn

from fastshard import ops

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 256, 8, 2, 64, 512


class Layer(nn.Module):
    """Grouped-query attention and a gated MLP, with a gate of its own on the attention."""

    def __init__(self):
        super().__init__()
        qkv_rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.qkv = nn.Parameter(torch.randn(qkv_rows, HIDDEN) * HIDDEN**-0.5)
        self.out = nn.Parameter(torch.randn(HIDDEN, HEADS * HEAD_DIM) * HIDDEN**-0.5)
        self.gate = nn.Parameter(torch.zeros(HIDDEN))
        # Rows gate 0, up 0, gate 1, up 1, ...: the layout of ops.fused_mlp
        self.gate_up = nn.Parameter(torch.randn(2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5)
        self.down = nn.Parameter(torch.randn(HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5)
        self.norms = nn.Parameter(torch.ones(2, HIDDEN))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[b, s, HIDDEN]``; so is the result."""
        qkv = ops.linear(ops.rms_norm(x, self.norms[0]), self.qkv)
        heads = qkv.unflatten(-1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        attended = ops.attention(*heads, causal=True).flatten(2)  # [b, s, HEADS * HEAD_DIM]
        gated = torch.sigmoid(self.gate) * ops.linear(attended, self.out)  # of the compiler
        normed, x = ops.add_rms_norm(gated, x, self.norms[1])
        return ops.fused_mlp(normed, self.gate_up, self.down, residual=x)


def main() -> None:
    on_gpu = ops.HAS_KERNELS and torch.cuda.is_available()
    placed = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {}
    torch.manual_seed(0)
    layer = Layer().to(**placed)
    # On a CPU, where nothing is to be gained, without a C++ compiler
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend="inductor" if on_gpu else "aot_eager"
    )
    for length in (5, 16, 33):  # one compilation serves every length
        x = torch.randn(2, length, HIDDEN, **placed)
        difference = (compiled(x) - layer(x)).abs().max().item()
        print(f"{length} tokens: compiled and eager differ by {difference:.1e}")


if __name__ == "__main__":
    main()
