"""``bench ranks``: what one model does on several GPUs of this host, beside what it does on one.

For each way to cut the model torchrun starts the ranks, which load a random checkpoint and run the
pipeline of ``fastshard.pipeline``, see ``fastshard.bench.measured_rank``: one prompt, then two a
stage in turns. Ranks that share layers do so in each of ``SHARED_WAYS``. On one GPU the prompts of
the larger runs are also decoded as one batch. Tokens are greedy, and those of one prompt are
compared with one GPU's.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastshard.bench import processes
from fastshard.bench.case import Settings
from fastshard.bench.checkpoints import write_checkpoint
from fastshard.bench.presets import PRESETS
from fastshard.dist import SUM_WAYS

MODEL = "llama-3.1-8b"
SIZES = (2, 4, 8)
SHARED_WAYS = (("group", None), ("one_shot", "graph"), ("one_shot", "persistent"))
"""How ranks that share layers add up, and decode; None: as ``FASTSHARD_DECODE`` says."""
TIMEOUT = 240  # seconds of one run of torchrun; a rank that hangs ends it before
_RANK = Path(__file__).with_name("measured_rank.py")


def run(
    settings: Settings,
    device: str = "cuda",
    sizes: Sequence[int] | None = None,
    words: Sequence[str] = (),
) -> Iterator[dict]:
    """Measure the models asked for, by default the 8B one, on one and several GPUs: plain values.

    Args:
        sizes: Ranks, by default the settings', else 2, 4 and 8 as far as there are GPUs.
        words: More arguments of each rank, for every run.
    """
    if sizes is None:
        there = torch.cuda.device_count()
        sizes = settings.ranks or [size for size in SIZES if size <= there]
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
                shared = SHARED_WAYS if device == "cuda" else SHARED_WAYS[:1]
                for tp, way in [(1, SHARED_WAYS[0]), *((size, way) for way in shared)]:
                    found = _ranks(folder, size, tp, device, settings.dtype, words, *way)
                    yield {"model": name} | _beside(one, found)


def text(result: dict) -> str:
    """One line, aligned with those of the other benchmarks."""
    size, tp = result["ranks"], result.get("tp", 1)
    in_launch = result.get("decode") == "persistent"
    shared = f"tp {tp}, {'persistent' if in_launch else result['sums']}" if tp > 1 else "pipeline"
    way = "one GPU" if size == 1 else f"{size} GPUs, {shared}"
    case = f"{'ranks':<10} {way:<24} {result['model']:<32}"
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
        line += f", {result['transfer_us']:.1f} us by itself"
    if tp > 1:
        line += f"; a sum {result['sum_us']:.1f} us by itself"
    return f"{line}; {result['same_tokens']} of {result['new_tokens']} tokens the same"


def _ranks(
    folder: str,
    size: int,
    tp: int,
    device: str,
    dtype: torch.dtype,
    words: Sequence[str] = (),
    sums: str = SUM_WAYS[0],
    decode: str | None = None,
) -> dict:
    """What rank 0 of ``size`` measures; ``words`` are more arguments of each."""
    asked = {"ranks": size, "tp": tp, "sums": sums, "decode": decode}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1"]  # else torchrun looks the host up, which may fail
    command += [f"--nproc-per-node={size}", str(_RANK), folder, "--tp", str(tp), "--sums", sums]
    command += ["--device", device, "--dtype", str(dtype).removeprefix("torch.")]
    if decode is not None:
        command += ["--decode", decode]
    return asked | processes.result_of([*command, *words], TIMEOUT)


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
