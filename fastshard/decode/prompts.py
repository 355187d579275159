"""PromptGraphs: whole prompts, replayed from CUDA graphs.

Of a short prompt or a small model a GPU is done with a layer before the host has launched the next.
A graph is launched at once. It is of one length: a prompt takes the least that holds it, and what
is behind its end is computed in vain. No token sees what follows it, and in the caches the next
tokens take those places.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastshard.decode import modes, static
from fastshard.decode.modes import WholeModel, shards_of
from fastshard.decode.shard_step import decode_weights
from fastshard.models import ShardedGeneralModel
from fastshard.nn import KVCache


class PromptGraphs:
    """A CUDA graph for prompts of up to each of some lengths, one row each.

    A graph is captured when a prompt needs it first, and again where weights or caches were
    replaced since. Each has memory of its own for the activations of its length.

    Attributes:
        lengths: Sorted.
    """

    def __init__(self, model: WholeModel, lengths: Sequence[int]):
        """Capture nothing yet.

        Args:
            model: All layers, with caches.
            lengths: Tokens, as ``(64, 256, 1024)``.

        Raises:
            ValueError: a length is not in 1 to the context, or there is none; or a CUDA graph
                cannot hold the model.
        """
        context = model.config.max_seq_len
        if not lengths or not all(1 <= length <= context for length in lengths):
            raise ValueError(
                f"lengths must be at least one, each of 1 to {context}, got {list(lengths)}"
            )
        for shard in shards_of(model):
            if not modes.is_gpu(shard.device):
                raise ValueError(f"a CUDA graph needs a GPU, got {shard.device}")
            if not shard.model.is_capturable:
                raise ValueError("a CUDA graph cannot hold a sum over ranks by other than nccl")
        self.lengths: list[int] = sorted(set(lengths))
        self._model = model
        self._graphs: dict[int, _PromptGraph] = {}

    def holds(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens fits into a graph."""
        return num_tokens <= self.lengths[-1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_graphs": {}}  # a copy of the model captures its own

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Tensor:
        """Run a new prompt, as ``model.generate(tokens, num_logits=1)``.

        Args:
            tokens: ``[1, s]`` int64 on the first shard's device, s at most the largest length.

        Returns:
            Logits of the last token, ``[1, 1, vocab_size]`` float32; the next run overwrites them.

        Raises:
            ValueError: the caches are too small, and not the model's to make anew.
        """
        length = self.lengths[bisect.bisect_left(self.lengths, tokens.shape[1])]
        graph = self._graphs.get(length)
        if graph is None or not graph.is_current():
            self._graphs.pop(length, None)  # its memory is free before the next one takes its own
            graph = self._graphs[length] = _PromptGraph(self._model, length)
        return graph.run(tokens)


class _PromptGraph:
    """Prompts of up to one length: a graph for each run of shards on one device."""

    def __init__(self, model: WholeModel, length: int):
        self._models = shards_of(model)
        device = model.device
        # Makes the caches, and sets up what a capture must find.
        model.generate(torch.zeros((1, length), dtype=torch.int64, device=device), num_logits=1)
        self._caches = [_caches(shard) for shard in self._models]
        self._weights = [decode_weights(shard.model) for shard in self._models]  # kept alive
        with torch.inference_mode(False):
            self._parts = [_Part(part, length) for part in static.by_device(self._models)]

    def is_current(self) -> bool:
        """Whether the models' weights and caches are still those of the graphs."""
        caches = [_caches(shard) for shard in self._models]
        if [[*map(id, part)] for part in caches] != [[*map(id, part)] for part in self._caches]:
            return False
        weights = [decode_weights(shard.model) for shard in self._models]
        return [*map(_addresses, weights)] == [*map(_addresses, self._weights)]

    def run(self, tokens: Tensor) -> Tensor:
        num_tokens = tokens.shape[1]
        for shard in self._models:
            shard.model.reset_caches()
        x = tokens
        for part in self._parts:
            x = part.run(x, num_tokens)
        for shard in self._models:
            shard.model.advance(1, num_tokens)
        return x


class _Part:
    """Shards in turn on one device, over static buffers."""

    def __init__(self, models: Sequence[ShardedGeneralModel], length: int):
        first = models[0]
        self._models = models
        device = first.device
        if first.shard.is_first_layer():
            self._x = torch.zeros((1, length), dtype=torch.int64, device=device)
        else:
            shape = (1, length, first.config.hidden_size)
            self._x = torch.zeros(shape, dtype=first.dtype, device=device)
        self._last = torch.full((1,), length - 1, device=device)
        self._steps = [model.model.next_step(1, length, 0) for model in models]
        self._out = self._x
        self._replay: Callable[[], None] | None = None

    def run(self, x: Tensor, num_tokens: int) -> Tensor:
        """Tokens or the hidden state of the shards before, to hidden state or logits."""
        self._x[:, : x.shape[1]].copy_(x, non_blocking=True)
        self._last.fill_(num_tokens - 1)
        if self._replay is None:
            self._replay = static.capture(self._launch, self._x.device)
        self._replay()
        return self._out

    def _launch(self) -> None:
        x = self._x
        for model, step in zip(self._models, self._steps, strict=True):
            is_first = model.shard.is_first_layer()
            x = model.model(
                x if is_first else None,
                hidden_state=None if is_first else x,
                step=step,
                logits_at=self._last,
            )
        self._out = x


def _caches(model: ShardedGeneralModel) -> list[KVCache]:
    return [layer.attn.kv_cache for layer in model.model.layers.values()]


def _addresses(weights) -> list[int]:
    """Of all tensors."""
    found = []
    for value in vars(weights).values():
        tensors = value if isinstance(value, list) else [value]
        found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
    return found
