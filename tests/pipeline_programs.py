"""What the ranks of tests/pipeline run: requests of tokens, and the pipelines that take them."""

from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from recorded_graphs import pretend_to_capture

from fastshard.checkpoint import Checkpoint
from fastshard.dist import Sent, TensorParallel, World, join_world
from fastshard.pipeline import Pipeline, Settings
from fastshard.sampling import Sampling


class TokenRequest:
    """A prompt of tokens, and the tokens that follow it."""

    def __init__(self, prompt, max_new_tokens, sampling=None, ends=()):
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling()
        self.tokens = []
        self._ends = ends

    def accept(self, token):
        self.tokens.append(token)
        return token in self._ends


class Case(NamedTuple):
    """One pipeline and what it is asked, run after run.

    Attributes:
        path: The checkpoint; where it has ``{rank}``, each rank its own.
        settings: Of ``Settings``.
        runs: Lists of arguments of ``TokenRequest``.
        lag: 1: tokens are read a step late, as from a GPU. None: as the device is.
    """

    path: str
    settings: dict[str, Any]
    runs: list[list[tuple]]
    lag: int | None = None


class Outcome(NamedTuple):
    """What rank 0 got.

    Attributes:
        tokens: Of each run, of each request.
        order: Of each run, which request took a token, one after the other.
        hops: As ``Pipeline.hops``, from the start.
        layers: Of each rank.
        modes: Of each rank's slots: persistent or not, and whether every step is a replay.
    """

    tokens: list[list[list[int]]]
    order: list[list[int]]
    hops: list[Sent]
    layers: list[range]
    modes: list[set[tuple[bool, bool]]]


def run_cases(
    cases: list[Case], tp: int = 1, device: str = "cpu", sums: str | None = None
) -> list[Outcome]:
    """Run all in one world."""
    with join_world(tp=tp, device=device, sums=sums) as world:
        return [run_case(world, case) for case in cases]


def run_case(world: World, case: Case) -> Outcome:
    checkpoint = Checkpoint(case.path.format(rank=world.rank))
    # Rank 0's settings are those of all.
    settings = Settings(**case.settings) if world.rank == 0 else None
    pipeline = Pipeline(checkpoint, world, settings)
    tokens, order = [], []
    if world.rank == 0:
        engine = pipeline._engine
        if case.lag is not None:
            for reader in engine._readers:
                reader.lag = case.lag
        for run in case.runs:
            requests = [TokenRequest(*arguments) for arguments in run]
            order.append(list(engine.run(requests)))
            tokens.append([request.tokens for request in requests])
        pipeline.stop()
    else:
        assert pipeline.serve()
    parts = [part for slot in pipeline._rank._slots for part in slot._parts]
    modes = {(part.is_persistent, part.is_recorded) for part in parts}
    layers = pipeline.shard.layers
    return Outcome(tokens, order, pipeline.hops(), world.gather(layers), world.gather(modes))


def give_up_and_go_on(path: str, settings: dict[str, Any], run: list[tuple]) -> list[list[int]]:
    """The tokens of a run after another that was left in the middle."""
    with join_world() as world:
        pipeline = Pipeline(Checkpoint(path), world, Settings(**settings))
        if world.rank:
            return [[int(pipeline.serve())]]
        engine = pipeline._engine
        left = engine.run([TokenRequest(*arguments) for arguments in run])
        for _ in range(4):
            next(left)
        requests = [TokenRequest(*arguments) for arguments in run]
        for _ in engine.run(requests):
            pass
        try:
            next(left)
        except RuntimeError as error:
            requests[0].tokens.append(str(error))
        next(engine.run([TokenRequest(*arguments) for arguments in run]))
        requests[1].tokens.append(f"{len(engine._not_collected)} on their way")
        pipeline.stop()
        requests[1].tokens.append(f"{len(engine._not_collected)} on their way")
        return [request.tokens for request in requests]


def fail(path: str, settings: dict[str, Any]) -> bool:
    """Whether a rank's ``serve`` says that all went well after rank 0 failed in the middle."""
    with join_world() as world:
        pipeline = Pipeline(Checkpoint(path), world, Settings(**settings))
        if world.rank:
            return pipeline.serve()
        next(pipeline._engine.run([TokenRequest([1, 2, 3], 9)]))
        pipeline.stop(is_failure=True)
        return True


def error_of(path: str, settings: dict[str, Any], tp: int = 1) -> str:
    """What making the pipeline raises."""
    with join_world(tp=tp) as world:
        try:
            Pipeline(Checkpoint(path), world, Settings(**settings) if world.rank == 0 else None)
        except ValueError as error:
            return str(error)
        return "none"


def run_in_graphs(case: Case, tp: int) -> tuple[list, int, list[bool]]:
    """As ``run_case``, as if this were a GPU and the sums over ranks could be captured.

    Returns:
        Tokens of the first run, how many graphs were recorded, and whether each slot has its own:
        before the world ends, and when its groups do.
    """
    with pytest.MonkeyPatch.context() as patch:
        made = pretend_to_capture(patch)
        patch.setattr(TensorParallel, "is_capturable", True)
        with join_world(tp=tp) as world:
            pipeline = Pipeline(Checkpoint(case.path), world, Settings(**case.settings))
            requests = [TokenRequest(*arguments) for arguments in case.runs[0]]
            if world.rank == 0:
                for _ in pipeline._engine.run(requests):
                    pass
                pipeline.stop()
            else:
                assert pipeline.serve()
            parts = [part for slot in pipeline._rank._slots for part in slot._parts]
            recorded = [part.is_recorded for part in parts]
            destroy = dist.destroy_process_group

            def end_groups():
                recorded.extend(part.is_recorded for part in parts)
                destroy()

            patch.setattr(dist, "destroy_process_group", end_groups)
    return [request.tokens for request in requests], len(made), recorded
