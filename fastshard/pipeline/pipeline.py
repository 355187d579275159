"""Pipeline: a checkpoint over the ranks of a world, and prompts through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastshard.checkpoint import Checkpoint
from fastshard.decode import WholeModel, check_mode, shards_of
from fastshard.devices import available_bytes
from fastshard.dist import WORKSPACE_BYTES, Sent, Steps, World, connect, partition
from fastshard.loading import load_shard
from fastshard.models import Shard
from fastshard.pipeline.engine import Engine, serve
from fastshard.pipeline.rank import PipelineRank
from fastshard.pipeline.texts import TextRequest, Texts
from fastshard.token_loop import (
    DEFAULT_PREFILL_CHUNK_SIZE,
    check_chunk_size,
    check_prompts,
    check_room,
)


@dataclass(frozen=True)
class Settings:
    """What all ranks must agree on; rank 0's hold.

    Attributes:
        context: Tokens of a prompt and what follows it, at most.
        dtype: Of weights, caches and hidden states.
        in_flight: Prompts that are generated in turns, each with a cache of its own. At least as
            many as stages keep all of them at work.
        layers: Half-open ranges, one a stage; None: by the memory that each has free.
        mode: One of ``decode.MODES``.
        chunk_size: Tokens of a prompt at a time.

    Raises:
        ValueError: a number is not positive, or there is no such mode.
    """

    context: int
    dtype: torch.dtype
    in_flight: int = 1
    layers: tuple[range, ...] | None = None
    mode: str = "auto"
    chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context must be at least 1, got {self.context}")
        if self.in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, got {self.in_flight}")
        check_chunk_size(self.chunk_size)
        check_mode(self.mode)


class Pipeline:
    """One rank of a checkpoint's pipeline: rank 0 runs prompts, and all others serve meanwhile.

    Attributes:
        world: ``World``.
        shard: The layers of this rank.
        settings: ``Settings``, rank 0's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        world: World,
        settings: Settings | None = None,
        *,
        report: Callable[[int, int], None] | None = None,
        steps: Steps | None = None,
    ):
        """Load this rank's layers, no byte of the others'; every rank must.

        Args:
            settings: Of rank 0; those of other ranks are ignored.
            report: Called while weights are copied, with elements done and elements in all.
            steps: To be told what this rank is at.

        Raises:
            ValueError: the layers do not fit, cannot be shared by the ranks of a stage, or are not
                one range a stage: on every rank.
        """
        self.world = world
        steps = steps or Steps()
        steps.begin("agreeing on the settings")
        self.settings: Settings = world.gather(settings)[0]
        steps.begin("meeting its neighbours")
        hops = connect(world)
        if world.tensor_parallel is not None:
            world.tensor_parallel.connect(world.device)
        steps.begin("agreeing on the layers")
        self.shard: Shard = _shards(checkpoint, world, self.settings)[world.rank]
        steps.hold(self.shard.layers)
        # Files may have to be fetched first.
        steps.begin("finding its weights", is_patient=True)
        model = load_shard(
            checkpoint,
            self.shard,
            device=world.device,
            dtype=self.settings.dtype,
            max_generated_tokens=self.settings.context,
            tensor_parallel=world.tensor_parallel,
            report=_report_to(steps, report),
        )
        self._vocab_size = checkpoint.config.vocab_size
        self._rank = PipelineRank(
            world,
            [model],
            hops,
            num_slots=self.settings.in_flight,
            context=self.settings.context,
            chunk_size=self.settings.chunk_size,
            mode=self.settings.mode,
            steps=steps,
        )
        world.at_end(self._rank.drop_graphs)
        steps.begin("generating", by_commands=True)
        self._engine = Engine(self._rank) if world.rank == 0 else None

    def generate_many(self, requests: Sequence[TextRequest]) -> Texts:
        """Continue each prompt, in their order; on rank 0.

        Raises:
            ValueError: a prompt is empty or does not fit the context.
        """
        context = self.settings.context
        for request in requests:
            check_prompts([request.prompt], request.max_new_tokens, context, self._vocab_size)
        _limit(requests, context)
        return Texts(requests, self._engine.run)

    def serve(self) -> bool:
        """Do what rank 0 says until it stops; on all other ranks.

        Returns:
            Whether it stopped because all is done.
        """
        stop = serve(self._rank)
        self._rank.steps.begin("closing")
        if not stop.is_failure:
            self._rank.finish()
        return not stop.is_failure

    def stop(self, *, is_failure: bool = False) -> None:
        """Let the others' ``serve`` return; on rank 0, once."""
        self._engine.stop(is_failure=is_failure)
        self._rank.steps.begin("closing")
        if not is_failure:
            self._rank.finish()

    def hops(self) -> list[Sent]:
        """What each stage but the last sent to the next; every rank must call it, after the end."""
        sent = self.world.gather(self._rank.sent)
        return [sent[self.world.ranks_of(stage)[0]] for stage in range(self.world.num_stages - 1)]


def _report_to(
    steps: Steps, report: Callable[[int, int], None] | None
) -> Callable[[int, int], None]:
    """Counts what is copied as progress, from the first bytes on."""
    has_begun = False

    def tell(done: int, total: int) -> None:
        nonlocal has_begun
        if not has_begun:
            steps.begin("loading its weights")
            has_begun = True
        steps.advance()
        if report is not None:
            report(done, total)

    return tell


def generate_in_process(
    model: WholeModel,
    requests: Sequence[TextRequest],
    *,
    in_flight: int = 1,
    chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
    mode: str | None = None,
) -> Texts:
    """Continue each prompt by a model of this process, in their order.

    Raises:
        ValueError: a prompt is empty or does not fit the context, or a setting is out of its range.
    """
    mode = check_mode(mode)
    check_chunk_size(chunk_size)
    if in_flight < 1:
        raise ValueError(f"in_flight must be at least 1, got {in_flight}")
    context = 1
    for request in requests:
        room = check_room(model, [request.prompt], request.max_new_tokens)
        context = max(context, len(request.prompt) + room)
    _limit(requests, context)
    rank = PipelineRank(
        World(device=model.device),
        shards_of(model),
        num_slots=min(in_flight, len(requests)),
        context=context,
        chunk_size=chunk_size,
        mode=mode,
    )
    return Texts(requests, Engine(rank).run)


def _limit(requests: Sequence[TextRequest], context: int) -> None:
    """Let each text end where the context is full."""
    for request in requests:
        room = context - len(request.prompt)
        request.max_new_tokens = min(request.max_new_tokens, room)


def _shards(checkpoint: Checkpoint, world: World, settings: Settings) -> list[Shard]:
    """Each rank's layers, the same on every rank."""
    return partition(
        checkpoint.config,
        world.gather(available_bytes(world.device) // world.num_sharing),
        dtype=settings.dtype,
        context=settings.context,
        batch=settings.in_flight,
        reserve=WORKSPACE_BYTES,
        layers=settings.layers,
        tp=world.tp,
        model_id=checkpoint.name,
    )
