"""Tensor parallelism: the ranks of a group hold a part of every layer each, and add up the results.

Rows of q, k and v (heads), w1 and w3 (units of the MLP) and the head (the vocabulary) are divided,
and the columns of output_proj and w2 that take what they give; the embedding, norms and the
output's bias are whole on every rank. Activations between layers are whole, and the same bits on
every rank: a layer sums ``[b, s, hidden_size]`` twice, after attention and after the MLP.

Every rank of a group runs the same passes in the same order, each on one stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastshard import ops
from fastshard.dist.one_shot import OneShotSum
from fastshard.models import (
    ModelConfig,
    Shard,
    ShardTransformerDecoder,
    TensorPart,
    divided,
)
from fastshard.nn import FeedForward, Linear
from fastshard.nn.linear import random_weight

_BY_ROWS = ("attn.q_proj.", "attn.k_proj.", "attn.v_proj.", "mlp.w1.", "mlp.w3.")
_BY_COLUMNS = ("attn.output_proj.weight", "mlp.w2.weight")
# Some torch has it under the second name alone, and a later one warns of that.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class TensorParallel:
    """This rank among those that share each layer.

    Attributes:
        index: Which part it holds.
        size: Ranks in the group.
        group: Theirs alone, in the order of the parts; None: PyTorch's default group.
        one_shot: Sums what it takes; None: the group sums everything.

    Raises:
        ValueError: not ``0 <= index < size``.
    """

    index: int
    size: int
    group: dist.ProcessGroup | None = None
    one_shot: OneShotSum | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.size:
            raise ValueError(f"index must be 0 to size - 1 = {self.size - 1}, got {self.index}")

    @classmethod
    def of(
        cls, group: dist.ProcessGroup | None = None, one_shot: OneShotSum | None = None
    ) -> "TensorParallel":
        """This rank's place in ``group``."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group, one_shot)

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph can hold a sum: gloo's waits on the host.

        Before a capture run the pass once: NCCL makes its connections at a first sum of a size. And
        drop the graph before the group is destroyed, which waits for that.
        """
        return "cuda:nccl" in dist.get_backend_config(self.group)

    def build(
        self,
        config: ModelConfig | Mapping[str, Any],
        shard: Shard,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TensorParallelDecoder":
        """Build this rank's part of the decoder of ``shard``, as ``GeneralMHA`` does the whole."""
        return TensorParallelDecoder(config, shard, self, device=device, dtype=dtype)

    def connect(self, device: torch.device) -> None:
        """Meet the other ranks; each of them must.

        NCCL does at the first sum, and takes memory: better before the free memory is shared out.
        """
        self.add_up(torch.zeros(1, device=device))

    def add_up(self, x: Tensor) -> Tensor:
        """Sum contiguous ``x`` over the ranks, in place and its dtype: the same bits everywhere.

        This is the one place where the way to sum is chosen.
        """
        if self.one_shot is not None and self.one_shot.takes(x):
            return self.one_shot.add_up(x)
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Give every rank all ranks' contiguous ``x``: ``[size, *x.shape]``."""
        parts = x.new_empty((self.size * len(x), *x.shape[1:]))
        _gather(parts, x, group=self.group)
        return parts.unflatten(0, (self.size, -1))


class TensorParallelDecoder(ShardTransformerDecoder):
    """This rank's part of every layer of a shard, with the whole shard's inputs and outputs.

    Names in the state dict are the whole decoder's. ``config`` is the whole model's.
    """

    def __init__(
        self,
        config: ModelConfig | Mapping[str, Any],
        shard: Shard,
        ranks: TensorParallel,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build with random weights; ``device="meta"`` allocates nothing (then ``to_empty``).

        Raises:
            ValueError: heads, key/value heads, the MLP or the vocabulary do not divide; else as
                ``ShardTransformerDecoder``.
        """
        if not isinstance(config, ModelConfig):
            config = ModelConfig.from_dict(config, shard.model_id)
        part = divided(config, ranks.size)
        super().__init__(part, shard, device=device, dtype=dtype)
        self.config = config
        self.ranks = ranks
        for layer in self.layers.values():
            layer.attn.output_proj = _SummedLinear(layer.attn.output_proj, ranks)
            layer.mlp = _SummedFeedForward(
                config.hidden_size,
                part.intermediate_size,
                ranks,
                activation=config.hidden_act,
                device=device,
                dtype=dtype,
            )
        if shard.is_last_layer():
            size = (config.vocab_size // ranks.size, config.hidden_size)
            if self.output is not None:
                self.output = Linear(random_weight(*size, device, dtype))
            elif not shard.is_first_layer():  # which needs the whole embedding
                weight = random_weight(*size, device, dtype)
                self.tok_embeddings = nn.Embedding(*size, _weight=weight)
        self.requires_grad_(False)

    @property
    def head(self) -> Tensor:
        """Of a last shard: this rank's rows of the head, ``[vocab_size / size, hidden_size]``."""
        weight, num_rows = super().head, self.config.vocab_size // self.ranks.size
        if len(weight) == num_rows:
            return weight
        return weight[self.ranks.index * num_rows :][:num_rows]

    @property
    def parts(self) -> dict[str, TensorPart]:
        rows, columns = (TensorPart(dim, self.ranks.index, self.ranks.size) for dim in (0, 1))
        parts = {}
        for i in self.layers:
            for name in self.layers[i].state_dict():
                if name.startswith(_BY_ROWS):
                    parts[f"layers.{i}.{name}"] = rows
                elif name in _BY_COLUMNS:
                    parts[f"layers.{i}.{name}"] = columns
        if self.output is not None:
            parts["output.weight"] = rows
        elif self.shard.is_last_layer() and not self.shard.is_first_layer():
            parts["tok_embeddings.weight"] = rows
        return parts

    @property
    def is_capturable(self) -> bool:
        return self.ranks.is_capturable

    @property
    def launch_refusal(self) -> str | None:
        if self.ranks.one_shot is None:
            return "ranks add up within a launch where they do in one shot (FASTSHARD_SUMS)"
        return None

    def rank_sums(self) -> dict[str, Any]:
        size = ops.decode_rank_sums_size(self.ranks.size, self.config.hidden_size)
        return {"rank_sums": self.ranks.one_shot.step_memory(size), "rank": self.ranks.index}

    def join_logits(self, logits: Tensor) -> Tensor:
        """Parts ``[..., rows]`` to ``[..., vocab_size]`` float32."""
        parts = self.ranks.gather(logits).movedim(0, -2)  # [..., size, rows]
        return parts.to(torch.float32, memory_format=torch.contiguous_format).flatten(-2)

    def unembed(self, h: Tensor) -> Tensor:
        """Norm and head: ``[b, s, hidden_size]`` to ``[b, s, vocab_size]`` float32."""
        return self.join_logits(ops.linear(self.norm(h), self.head))


# What is added once, the bias and the residual, is added by the first rank, before the sum: in the
# product's own epilogue, so that no rank runs a kernel for it.


class _SummedLinear(Linear):
    """Columns of a linear layer, given this rank's part of the input: the sum over the ranks."""

    def __init__(self, part: Linear, ranks: TensorParallel):
        super().__init__(part.weight.detach(), None if part.bias is None else part.bias.detach())
        self.ranks = ranks

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        if self.ranks.index == 0:
            return self.ranks.add_up(super().forward(x, residual=residual))
        return self.ranks.add_up(ops.linear(x, self.weight))


class _SummedFeedForward(FeedForward):
    """Units of a gated MLP: the sum over the ranks."""

    def __init__(self, dim: int, hidden_dim: int, ranks: TensorParallel, **settings: Any):
        super().__init__(dim, hidden_dim, **settings)
        self.ranks = ranks

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        residual = residual if self.ranks.index == 0 else None
        return self.ranks.add_up(super().forward(x, residual=residual))
