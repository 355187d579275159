"""StaticDecoding: steps over static buffers, which a GPU replays from CUDA graphs."""

import functools
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from fastshard.decode.modes import is_gpu, warn_of_fallback
from fastshard.decode.shard_step import ShardStep
from fastshard.models import ShardedGeneralModel
from fastshard.sampling import Sampling

_NOT_RESIDENT = "decode_step: cannot be resident"


class StaticDecoding:
    """Steps over static buffers; shards in turn on one GPU are one CUDA graph.

    The first step of each runs as it is, which is also what a capture needs before it.
    """

    def __init__(
        self,
        models: Sequence[ShardedGeneralModel],
        tokens: Tensor,
        num_held: int,
        sampling: Sampling,
        first_key: Tensor | None,
        is_persistent: bool,
    ):
        self._models = list(models)
        self._caches = [model.model.any_cache for model in models]
        self._batch = len(tokens)
        self._num_held = num_held
        self._num_steps = 0
        with torch.inference_mode(False):  # later steps may be outside of it
            self._parts = [
                _Part(part, tokens, num_held, sampling, first_key, is_persistent)
                for part in _by_device(self._models)
            ]

    @property
    def mode(self) -> str:
        if all(part.is_persistent for part in self._parts):
            return "persistent"
        return "graph" if any(is_gpu(part.device) for part in self._parts) else "eager"

    @torch.no_grad()
    def step(self) -> Tensor:
        self._check_caches()
        x = None
        for part in self._parts:
            if x is not None:
                part.x.copy_(x, non_blocking=True)
            x = self._run(part)
        if len(self._parts) > 1:
            self._parts[0].x.copy_(x, non_blocking=True)
        for model in self._models:
            model.model.advance(self._batch, 1)
        self._num_held += 1
        self._num_steps += 1
        return self._parts[-1].history[self._num_steps]

    def _check_caches(self) -> None:
        for model, cache in zip(self._models, self._caches, strict=True):
            if model.model.any_cache is not cache or cache.size != self._num_held:
                raise RuntimeError("the text cannot go on: its model was given another prompt")
            cache.check_room(self._batch, 1)

    def _run(self, part: "_Part") -> Tensor:
        was_persistent = self.mode == "persistent"
        try:
            return part.run()
        except RuntimeError as error:
            if not part.is_persistent or _NOT_RESIDENT not in str(error):
                raise
            reason = str(error).splitlines()[0]
        part.use_layers()
        if was_persistent:
            warn_of_fallback("persistent", "graph" if is_gpu(part.device) else "eager", reason)
        return part.run()


def _by_device(models: Sequence[ShardedGeneralModel]) -> list[list[ShardedGeneralModel]]:
    """Runs of shards on one device."""
    return [list(run) for _, run in groupby(models, key=lambda model: model.device)]


class _Part:
    """Shards in turn on one device: their static buffers, and their CUDA graph.

    Attributes:
        x: The input: tokens ``[b]`` int64, or the hidden state ``[b, hidden_size]``.
        history: ``[steps + 1, b]`` int64, the tokens of every step, where it ends in logits.
    """

    def __init__(
        self,
        models: Sequence[ShardedGeneralModel],
        tokens: Tensor,
        num_held: int,
        sampling: Sampling,
        first_key: Tensor | None,
        is_persistent: bool,
    ):
        first, last, b = models[0], models[-1], len(tokens)
        self.device = first.device
        self.is_persistent = is_persistent
        self._sampling = sampling
        self._replay: Callable[[], None] | None = None
        self._is_warm = False
        first_key = None if first_key is None else first_key.to(self.device, torch.int64)

        # Slots, positions and lengths of the rows, and the draw: one addition counts them all.
        self._counts = torch.full((3 * b + 1,), num_held, device=self.device)
        slots, positions, lengths = self._counts[:-1].view(3, b)
        if first_key is not None:
            positions -= first_key
        lengths += 1
        self._draw = self._counts[-1].fill_(1)
        self._shards = [ShardStep(model, slots, positions, lengths, first_key) for model in models]

        self._is_whole = first.shard.is_first_layer() and last.shard.is_last_layer()
        if first.shard.is_first_layer():
            self.x = tokens.to(self.device, copy=True)
        else:
            shape = (b, first.config.hidden_size)
            self.x = torch.empty(shape, dtype=first.dtype, device=self.device)
        self.history: Tensor | None = None
        if last.shard.is_last_layer():
            room = last.model.any_cache.max_seq_len - num_held
            self.history = torch.zeros((room + 1, b), dtype=torch.int64, device=self.device)
        self._out = self.x

    def run(self) -> Tensor:
        """Launch one step; returns the next tokens ``[b]``, or the hidden state."""
        if self._replay is None and self._is_warm and is_gpu(self.device):
            self._replay = capture(self._launch, self.device)
        if self._replay is None:
            self._launch()
            self._is_warm = True
        else:
            self._replay()
        return self._out

    def use_layers(self) -> None:
        """Go on by the layers' own ops."""
        self.is_persistent, self._replay, self._is_warm = False, None, False

    def _launch(self) -> None:
        x = self.x
        for shard in self._shards:
            x = shard.persistent(x) if self.is_persistent else shard.by_layers(x)
        if self.history is not None:
            x = self._sampling.choose(x, self._draw)
            self.history.index_copy_(0, self._draw.view(1), x[None])
            if self._is_whole:
                self.x.copy_(x)
        self._counts += 1
        self._out = x


@functools.cache
def _capture_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)  # one: libraries keep memory for each that they have seen


def capture(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what ``launch`` launches in a CUDA graph, without running it; returns its replay."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        launch()
    return graph.replay
