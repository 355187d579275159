"""One rank of ``bench ranks``, a process of its own: rank 0 writes what it has measured as JSON.

Of a few layers, or on a CPU, of a folder with a checkpoint:

    torchrun --nproc-per-node 2 fastshard/bench/measured_rank.py FOLDER [--tp 2] [--device cpu]

Layers are cut so that stages read about as many bytes for a token: these GPUs are alike. Steps are
made as ``FASTSHARD_DECODE`` says.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastshard.bench.timing import Timing
from fastshard.checkpoint import Checkpoint
from fastshard.decode import MODES, capture, check_mode
from fastshard.dist import (
    SUM_WAYS,
    Steps,
    TensorParallel,
    Watch,
    World,
    connect,
    join_world,
    smallest_largest_share,
    torchrun_store,
)
from fastshard.environment import launched_rank
from fastshard.loading import TextModel, load
from fastshard.models import ModelConfig, model_bytes
from fastshard.pipeline import Pipeline, Settings, TextRequest
from fastshard.sampling import Sampling
from fastshard.text import Continuation
from fastshard.token_loop import read_behind, token_steps

PROMPT_TOKENS = 128
NEW_TOKENS = 129
ROUNDS = 5
NUM_TRANSFERS = 64  # round trips, or sums, between two looks at the clock
TIMEOUT = 120  # seconds; loading the kernels may take most of them


def measure(
    folder: str,
    world: World,
    dtype: torch.dtype,
    *,
    decode: str | None = None,
    batches: Sequence[int] = (),
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    steps: Steps | None = None,
) -> dict | None:
    """Generate on this rank; returns what rank 0 has seen.

    Args:
        folder: A checkpoint; it needs no tokenizer.
        world: This rank among the others, all of which must call this.
        dtype: Of the weights.
        decode: Mode; None: as ``FASTSHARD_DECODE`` says.
        batches: Rows to decode at once, in a world of one.
        new_tokens: After each prompt.
        rounds: Times that each is generated.
        steps: To be told what this rank is at.
    """
    steps = steps or Steps()
    checkpoint = Checkpoint(folder)
    context, in_flight = PROMPT_TOKENS + new_tokens, 2 * world.num_stages
    prompts = torch.randint(
        1,
        checkpoint.config.vocab_size,
        (max(in_flight, *batches, 1), PROMPT_TOKENS),
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    rates: dict[str, float] = {}
    if batches:
        steps.begin("decoding batches", is_patient=True)
        model = load(folder, device=world.device, dtype=dtype, max_generated_tokens=new_tokens)
        for batch in batches:
            rates[str(batch)] = _batch_rate(model, prompts[:batch], new_tokens, rounds)
        del model  # a GPU may not hold the weights twice
        gc.collect()
    layers = even_layers(checkpoint.config, world.num_stages, dtype, context)
    settings = Settings(context, dtype, in_flight, layers, mode=check_mode(decode))
    pipeline = Pipeline(checkpoint, world, settings, steps=steps)
    hidden = torch.zeros((1, checkpoint.config.hidden_size), dtype=dtype, device=world.device)
    if world.rank > 0:
        pipeline.serve()
        pipeline.hops()
        _transfers(world, hidden, rounds, steps)
        return None
    _generate(pipeline, prompts[:in_flight], new_tokens)  # what is set up on first calls
    streams = [_generate(pipeline, prompts[:1], new_tokens) for _ in range(rounds)]
    flights = [_generate(pipeline, prompts[:in_flight], new_tokens) for _ in range(rounds)]
    pipeline.stop()
    hops = pipeline.hops()
    ranks = world.tensor_parallel
    return _transfers(world, hidden, rounds, steps) | {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "nccl": world.uses_nccl,
        "decode": settings.mode,
        "sums": "group" if ranks is None or ranks.one_shot is None else "one_shot",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": new_tokens,
        "tokens": streams[-1][0].tokens,
        "stream": asdict(Timing.of([request.us_a_token for (request,) in streams])),
        "in_flight": {
            "requests": in_flight,
            "tokens_per_second": statistics.median(map(_rate, flights)),
        },
        "batches": rates,
        "layers": [len(part) for part in layers],
        "hops": len(hops),
        "hop_bytes": hops[0].num_bytes / hops[0].num_tokens if hops else None,
    }


def even_layers(
    config: ModelConfig, num_stages: int, dtype: torch.dtype, context: int
) -> tuple[range, ...]:
    """The cut whose largest stage reads least for a token: of the embedding that is one row."""
    sizes = replace(model_bytes(config, dtype, context), embedding=0)
    return tuple(smallest_largest_share(sizes, [1] * num_stages))


def _transfers(world: World, hidden: torch.Tensor, rounds: int, steps: Steps) -> dict:
    """Microseconds of what ranks tell each other, with nothing else to do; all must call it.

    Args:
        hidden: ``[1, hidden_size]``, of one token.

    Returns:
        transfer_us: Of a hop, one of those that take a hidden state to the last stage and a token
            back to the first; None where there is one stage.
        sum_us: Of a sum over the ranks of a stage; None where they are one.
    """
    steps.begin("measuring the transfers")
    ranks = world.tensor_parallel
    trip_us = _time(_round_trips(world, hidden), world.device, rounds)
    sum_us = _time(_sums(ranks, hidden), world.device, rounds)
    return {"transfer_us": trip_us and trip_us / world.num_stages, "sum_us": sum_us}


def _round_trips(world: World, hidden: torch.Tensor) -> Callable[[], None] | None:
    hops = connect(world)
    if hops is None:
        return None
    token = torch.zeros(1, dtype=torch.int64, device=world.device)

    def run() -> None:
        for _ in range(NUM_TRANSFERS):
            if not world.is_first_stage:
                hops.forward.receive(hidden)
            if world.is_last_stage:
                hops.back.send(token, num_tokens=1, max_on_their_way=1)
            else:
                hops.forward.send(hidden, num_tokens=1, max_on_their_way=1)
            if world.is_first_stage:
                hops.back.receive(token)
        for hop in hops:
            hop.finish()

    return run


def _sums(ranks: TensorParallel | None, hidden: torch.Tensor) -> Callable[[], None] | None:
    """In a graph, where it can hold them, as a step is one."""
    if ranks is None:
        return None

    def run() -> None:
        for _ in range(NUM_TRANSFERS):
            ranks.add_up(hidden)

    run()
    return capture(run, hidden.device) if ranks.is_capturable else run


def _time(run: Callable[[], None] | None, device: torch.device, rounds: int) -> float | None:
    """Microseconds of one transfer of a run, the median; the first run does not count."""
    if run is None:
        return None
    samples = []
    for _ in range(1 + rounds):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append((time.perf_counter() - begin) * 1e6 / NUM_TRANSFERS)
    return statistics.median(samples[1:])


class _Timed(TextRequest):
    """A request that notes when each of its tokens was read, and has no text."""

    def __init__(self, prompt: Sequence[int], new_tokens: int):
        text = Continuation(lambda tokens: "", prompt, (), [])
        super().__init__(prompt, new_tokens, Sampling(), text)
        self.tokens: list[int] = []
        self.seconds: list[float] = []

    def accept(self, token: int) -> bool:
        self.tokens.append(token)
        self.seconds.append(time.perf_counter())
        return super().accept(token)

    @property
    def us_a_token(self) -> float:
        """From its first token to its last."""
        return (self.seconds[-1] - self.seconds[0]) * 1e6 / (len(self.seconds) - 1)


def _generate(
    pipeline: Pipeline, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[_Timed]:
    requests = [_Timed(prompt, new_tokens) for prompt in prompts]
    for _ in pipeline.generate_many(requests):
        pass
    return requests


def _rate(requests: Sequence[_Timed]) -> float:
    """Tokens a second while all of the requests were in flight."""
    begin = max(request.seconds[0] for request in requests)
    end = min(request.seconds[-1] for request in requests)
    count = sum(begin < at <= end for request in requests for at in request.seconds)
    return count / (end - begin)


def _batch_rate(
    model: TextModel, prompts: Sequence[Sequence[int]], new_tokens: int, rounds: int
) -> float:
    """Tokens a second of all rows of one batch together, the prompts not counted."""
    samples = []
    for _ in range(1 + rounds):
        steps = read_behind(token_steps(model, prompts, new_tokens, Sampling()))
        seconds = [time.perf_counter() for _ in steps]
        samples.append(len(prompts) * (new_tokens - 1) / (seconds[-1] - seconds[0]))
    return statistics.median(samples[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--sums", choices=SUM_WAYS, default="group", help="how they add up")
    parser.add_argument("--decode", choices=MODES, help="default: as FASTSHARD_DECODE says")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="rows, of one rank")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="S", help="of a hang")
    args = parser.parse_args()
    launched, store = launched_rank(), torchrun_store()
    with Watch(store, launched.rank, launched.size, timeout=args.timeout) as watch:
        watch.steps.begin("connecting")
        settings = {"tp": args.tp, "device": args.device, "sums": args.sums}
        with join_world(**settings, store=store) as world:
            result = measure(
                args.folder,
                world,
                getattr(torch, args.dtype),
                decode=args.decode,
                batches=args.batch,
                new_tokens=args.new_tokens,
                rounds=args.rounds,
                steps=watch.steps,
            )
        if result is not None and args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
