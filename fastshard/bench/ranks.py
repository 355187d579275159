"""``bench ranks``: what one model does on several GPUs of this host, beside what it does on one.

For each way to cut the model torchrun starts the ranks, which load a random checkpoint and run the
pipeline of ``fastshard.pipeline``: one prompt, then two a stage in turns. On one GPU the prompts of
the larger runs are also decoded as one batch. Tokens are greedy, and those of one prompt are
compared with one GPU's.

Of a few layers, or on a CPU, of a folder with a checkpoint:

    torchrun --nproc-per-node 2 fastshard/bench/ranks.py FOLDER [--tp 2] [--device cpu]
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastshard.bench import processes
from fastshard.bench.case import Settings as BenchSettings
from fastshard.bench.checkpoints import write_checkpoint
from fastshard.bench.presets import PRESETS
from fastshard.bench.timing import Timing
from fastshard.checkpoint import Checkpoint
from fastshard.dist import World, join_world
from fastshard.loading import TextModel, load
from fastshard.pipeline import Pipeline, Settings, TextRequest
from fastshard.sampling import Sampling
from fastshard.text import Continuation
from fastshard.token_loop import read_behind, token_steps

MODEL = "llama-3.1-8b"
SIZES = (2, 4, 8)
PROMPT_TOKENS = 128
NEW_TOKENS = 129
ROUNDS = 5
TIMEOUT = 600  # seconds of one run of torchrun


def run(
    settings: BenchSettings,
    device: str = "cuda",
    sizes: Sequence[int] | None = None,
    words: Sequence[str] = (),
) -> Iterator[dict]:
    """Measure the models asked for, by default the 8B one, on one and several GPUs: plain values.

    Args:
        sizes: Ranks, by default 2, 4 and 8, as far as there are GPUs.
        words: More arguments of ``main``, for every run.
    """
    if sizes is None:
        sizes = [size for size in SIZES if size <= torch.cuda.device_count()]
    for name in settings.models or (MODEL,):
        if not sizes:
            yield {"model": name, "ranks": 1, "error": "there is one GPU, nothing to share"}
            continue
        config = PRESETS[name]
        if settings.num_layers is not None:
            config = config | {"num_hidden_layers": settings.num_layers}
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config)
            batches = [2 * size for size in sizes]
            more = ["--batch", *map(str, batches), *words]
            one = _ranks(folder, 1, 1, device, settings.dtype, more)
            yield {"model": name} | one
            for size in sizes:
                for tp in (1, size):
                    found = _ranks(folder, size, tp, device, settings.dtype, words)
                    yield {"model": name} | _beside(one, found)


def text(result: dict) -> str:
    """One line, aligned with those of the other benchmarks."""
    size, tp = result["ranks"], result.get("tp", 1)
    way = "one GPU" if size == 1 else f"{size} GPUs, {f'tp {tp}' if tp > 1 else 'pipeline'}"
    case = f"{'ranks':<10} {way:<20} {result['model']:<36}"
    if "error" in result:
        return f"{case} none: {result['error']}"
    stream, flight = result["stream"], result["in_flight"]
    line = (
        f"{case} {result['dtype']:<8} one prompt {1e6 / stream['us']:.1f} tokens/s, "
        f"p20-p80 {stream['p20'] / 1e3:.3f}-{stream['p80'] / 1e3:.3f} ms a token"
    )
    if size == 1:
        return line + "".join(
            f"; batch of {batch} {rate:.1f}" for batch, rate in result["batches"].items()
        )
    line += (
        f" ({result['times_one']:.2f}x of one GPU's); "
        f"{flight['requests']} prompts {flight['tokens_per_second']:.1f} tokens/s "
        f"({result['in_flight_times_one']:.2f}x)"
    )
    if result["hops"]:
        hop_us = result["hop_us"]
        line += f"; a hop {result['hop_bytes']:g} bytes, {hop_us:+.1f} us"
    return f"{line}; {result['same_tokens']} of {result['new_tokens']} tokens the same"


def _ranks(
    folder: str, size: int, tp: int, device: str, dtype: torch.dtype, words: Sequence[str] = ()
) -> dict:
    """What rank 0 of ``size`` measures; ``words`` are more arguments of ``main``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={size}", __file__, folder, "--tp", str(tp)]
    command += ["--device", device, "--dtype", str(dtype).removeprefix("torch.")]
    return {"ranks": size, "tp": tp} | processes.result_of([*command, *words], TIMEOUT)


def _beside(one: dict, found: dict) -> dict:
    """A run on several GPUs, with what it is beside the one on one."""
    if "error" in found or "error" in one:
        return found
    one_us, us = one["stream"]["us"], found["stream"]["us"]
    same = 0
    while same < len(one["tokens"]) and one["tokens"][same] == found["tokens"][same]:
        same += 1
    return found | {
        "times_one": one_us / us,
        "in_flight_times_one": found["in_flight"]["tokens_per_second"] * one_us / 1e6,
        "hop_us": (us - one_us) / found["hops"] if found["hops"] else None,
        "same_tokens": same,
    }


def measure(
    folder: str,
    world: World,
    dtype: torch.dtype,
    *,
    batches: Sequence[int] = (),
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
) -> dict | None:
    """Generate on this rank; returns what rank 0 has seen.

    Args:
        folder: A checkpoint; it needs no tokenizer.
        world: This rank among the others, all of which must call this.
        dtype: Of the weights.
        batches: Rows to decode at once, in a world of one.
        new_tokens: After each prompt.
        rounds: Times that each is generated.
    """
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
        model = load(folder, device=world.device, dtype=dtype, max_generated_tokens=new_tokens)
        for batch in batches:
            rates[str(batch)] = _batch_rate(model, prompts[:batch], new_tokens, rounds)
        del model  # a GPU may not hold the weights twice
        gc.collect()
    settings = Settings(context=context, dtype=dtype, in_flight=in_flight)
    pipeline = Pipeline(checkpoint, world, settings)
    if world.rank > 0:
        pipeline.serve()
        pipeline.hops()
        return None
    _generate(pipeline, prompts[:in_flight], new_tokens)  # what is set up on first calls
    streams = [_generate(pipeline, prompts[:1], new_tokens) for _ in range(rounds)]
    flights = [_generate(pipeline, prompts[:in_flight], new_tokens) for _ in range(rounds)]
    pipeline.stop()
    hops = pipeline.hops()
    return {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "nccl": world.uses_nccl,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": new_tokens,
        "tokens": streams[-1][0].tokens,
        "stream": asdict(Timing.of([request.us_a_token for (request,) in streams])),
        "in_flight": {
            "requests": in_flight,
            "tokens_per_second": statistics.median(map(_rate, flights)),
        },
        "batches": rates,
        "hops": len(hops),
        "hop_bytes": hops[0].num_bytes / hops[0].num_tokens if hops else None,
    }


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
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="rows, of one rank")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    with join_world(tp=args.tp, device=args.device) as world:
        result = measure(
            args.folder,
            world,
            getattr(torch, args.dtype),
            batches=args.batch,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
        )
    if result is not None and args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
