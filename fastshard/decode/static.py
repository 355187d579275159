"""Steps over static buffers, which a GPU replays from CUDA graphs.

``StaticDecoding`` goes on after one prompt. A ``Part``, shards on one device, takes prompt after
prompt, and is what both it and the slots of a pipeline are made of.
"""

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
        room = self._caches[0].max_seq_len - num_held
        self._parts = [
            Part(
                part,
                self._batch,
                room=room,
                is_persistent=is_persistent,
                sampling=sampling,
                first_key=first_key,
            )
            for part in by_device(self._models)
        ]
        for part in self._parts:
            part.begin(num_held)
        self._parts[0].x.copy_(tokens)

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
        return x

    def _check_caches(self) -> None:
        for model, cache in zip(self._models, self._caches, strict=True):
            if model.model.any_cache is not cache or cache.size != self._num_held:
                raise RuntimeError("the text cannot go on: its model was given another prompt")
            cache.check_room(self._batch, 1)

    def _run(self, part: "Part") -> Tensor:
        was_persistent = self.mode == "persistent"
        x, reason = part.run()
        if reason is not None and was_persistent:
            warn_of_fallback("persistent", "graph" if is_gpu(part.device) else "eager", reason)
        return x


def by_device(models: Sequence[ShardedGeneralModel]) -> list[list[ShardedGeneralModel]]:
    """Runs of shards on one device."""
    return [list(run) for _, run in groupby(models, key=lambda model: model.device)]


class Part:
    """Shards in turn on one device: their static buffers, and their CUDA graph.

    Attributes:
        device: Where they are.
        is_persistent: Whether a step of a shard is one launch.
        x: The input: tokens ``[b]`` int64, or the hidden state ``[b, hidden_size]``.
        history: ``[room + 1, b]`` int64, the tokens of every step, where it ends in logits.
    """

    def __init__(
        self,
        models: Sequence[ShardedGeneralModel],
        batch: int,
        *,
        room: int,
        is_persistent: bool,
        is_captured: bool = True,
        sampling: Sampling | None = None,
        first_key: Tensor | None = None,
    ):
        """Hold on to the caches that the models have, and to their weights.

        Args:
            models: In the order of their layers.
            batch: Rows.
            room: Most steps after a prompt.
            is_persistent: Whether to run a shard in one launch, while that is possible.
            is_captured: Whether a GPU replays a CUDA graph.
            sampling: How every prompt's tokens are chosen: a part of the graph. None: each
                ``begin`` says how, and the choice is launched beside the graph.
            first_key: ``[b]``, keys before it (left padding) are not attended to.
        """
        first, last = models[0], models[-1]
        self.device: torch.device = first.device
        self.is_persistent = is_persistent
        self._is_captured = is_captured and is_gpu(self.device)  # once it is warm
        self._sampling = sampling
        self._chooses_beside = sampling is None
        self._replay: Callable[[], None] | None = None
        self._is_warm = False
        self._num_steps = 0
        self._is_shared = any(model.model.parts for model in models)  # by ranks that do the same
        self._is_whole = first.shard.is_first_layer() and last.shard.is_last_layer()
        with torch.inference_mode(False):  # later steps may be outside of it
            first_key = None if first_key is None else first_key.to(self.device, torch.int64)
            self._first_key = first_key
            # Slots, positions and lengths of the rows, and the draw: one addition counts them all.
            self._counts = torch.zeros(3 * batch + 1, dtype=torch.int64, device=self.device)
            self._slots, self._positions, self._lengths = self._counts[:-1].view(3, batch)
            self._draw = self._counts[-1]
            self._shards = [
                ShardStep(model, self._slots, self._positions, self._lengths, first_key)
                for model in models
            ]
            if first.shard.is_first_layer():
                self.x = torch.zeros(batch, dtype=torch.int64, device=self.device)
            else:
                shape = (batch, first.config.hidden_size)
                self.x = torch.zeros(shape, dtype=first.dtype, device=self.device)
            self.history: Tensor | None = None
            if last.shard.is_last_layer():
                shape = (room + 1, batch)
                self.history = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._out = self.x

    @property
    def is_recorded(self) -> bool:
        """Whether a step is the replay of a graph: then it does not look at the models."""
        return self._replay is not None

    @property
    def will_be_recorded(self) -> bool:
        return self._is_captured and self._replay is None

    def drop_graph(self) -> None:
        """Forget the graph; another step would record one anew."""
        self._replay, self._is_warm = None, False

    @torch.no_grad()
    def begin(self, num_held: int, sampling: Sampling | None = None) -> None:
        """Go on after another prompt, of which the caches hold ``num_held`` tokens.

        Args:
            sampling: How its tokens are chosen, unless every prompt's are chosen in one way.
        """
        self._counts.fill_(num_held)
        if self._first_key is not None:
            self._positions -= self._first_key
        self._lengths += 1
        self._draw.fill_(0)
        self._num_steps = 0
        if self._chooses_beside:
            self._sampling = sampling

    @torch.no_grad()
    def choose_first(self, logits: Tensor) -> Tensor:
        """Choose the tokens that follow the prompt, draw 0: ``[b]`` of ``[b, vocab_size]``."""
        self._choose(logits)
        return self.history[0]

    @torch.no_grad()
    def run(self) -> tuple[Tensor, str | None]:
        """Launch one step, by the layers' own ops where one launch is not possible after all.

        Returns:
            The next tokens ``[b]``, a row of ``history``, or the hidden state ``[b, hidden_size]``,
            which the next step overwrites. And if this step gave up running persistently, why.
        """
        reason = None
        try:
            self._run()
        except RuntimeError as error:
            can_go_on = self.is_persistent and not self._is_shared
            if not can_go_on or _NOT_RESIDENT not in str(error):
                raise
            reason = str(error).splitlines()[0]
        if reason is not None:
            self.is_persistent = False
            self.drop_graph()
            self._run()
        self._num_steps += 1
        if self.history is None:
            return self._out, reason
        if self._chooses_beside:
            self._choose(self._out)
        return self.history[self._num_steps], reason

    def _run(self) -> None:
        if self._replay is None and self._is_warm and self._is_captured:
            self._replay = capture(self._launch, self.device)
        if self._replay is None:
            self._launch()
            self._is_warm = True
        else:
            self._replay()

    def _launch(self) -> None:
        x = self.x
        for shard in self._shards:
            x = shard.persistent(x) if self.is_persistent else shard.by_layers(x)
        self._counts += 1
        if self.history is not None and not self._chooses_beside:
            self._choose(x)
        self._out = x

    def _choose(self, logits: Tensor) -> None:
        """Draw the tokens of this step into ``history``, and into the input of a whole model."""
        tokens = self._sampling.choose(logits, self._draw)
        self.history.index_copy_(0, self._draw.view(1), tokens[None])
        if self._is_whole:
            self.x.copy_(tokens)


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
