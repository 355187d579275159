"""What the measuring process does on the GPU: runs variants, compares them, times them.

Correctness comes before time, and every variant before the right answer is computed: what a kernel
leaves unwritten is then not the answer of another by chance but NaN, with which all free memory was
filled. Whether a variant may be chosen is judged by ``measure`` from what is seen here.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch

from fastshard.bench.limits import Limits
from fastshard.bench.timing import GraphRun, Stopwatch, cold_sets, relative_error
from fastshard.ops.variants import COUNTS, key_shape, use_tables
from fastshard.tune import inputs, instances
from fastshard.tune.problem import AUTO, Problem

Message = dict

POISON_BYTES = 256 * 2**20
SMALL_BYTES = 2**20  # tensors up to this size are in a pool of their own
LARGE_READ = 2**30  # bytes, of which the device reads at its best rate


def observe(request: Message) -> Iterator[Message]:
    """Answer ``{op, dtype, shape, variants, seed, libraries}``, the last by variant.

    Yields:
        ``{begins: variant}`` before a variant runs; for each ``{variant, errors, preparation_us}``
        or ``{variant, failure}``; then ``{timings: {variant: [us, p20, p80]}, limit_us}``, in which
        ``AUTO`` is too. A pair of ``errors`` is ours and eager PyTorch's.
    """
    use_tables([])  # AUTO is what the heuristics choose
    problem = Problem(request["op"], request["dtype"], tuple(request["shape"]))
    device = torch.device("cuda", torch.cuda.current_device())
    names = [AUTO, *(name for name in request["variants"] if name != AUTO)]
    checked: dict[str, list[list[float]]] = {name: [] for name in names}
    preparations: dict[str, list[float]] = {name: [] for name in names}
    for number, each in enumerate([problem, *neighbours(problem)]):
        made = inputs.make(each, device, 1, request["seed"] + number)
        outputs = {}
        for name in list(checked):
            yield {"begins": name}
            try:
                if name in request["libraries"]:
                    library = Path(request["libraries"][name])
                    instances.load(problem.op, problem.dtype, name, library)
                seconds = [_seconds(made, name) for _ in range(3 if number == 0 else 2)]
                poison(device)
                outputs[name] = sampled(made, made.call(0, name))
                torch.cuda.synchronize()
            except (RuntimeError, OSError) as error:  # any failure of a variant is an answer
                text = " ".join(str(error).split())[:200]
                yield {"variant": name, "failure": text}
                if "CUDA error" in text:
                    raise  # nothing runs in this process any more
                del checked[name]
                continue
            if number > 0 and each.shape != problem.shape:
                preparations[name].append((seconds[0] - seconds[1]) * 1e6)
        golden = made.golden()
        eager = relative_error(made.plain(), golden)
        for name, output in outputs.items():
            checked[name].append([relative_error(output, golden), eager])
        del made, golden, outputs
    for name, errors in checked.items():
        spent = min(preparations[name], default=0.0)
        yield {"variant": name, "errors": _finite(errors), "preparation_us": spent}
    correct = [name for name, errors in checked.items() if all(is_accurate(*e) for e in errors)]
    if AUTO in correct:
        yield {"begins": "timing"}
        yield _time(problem, device, correct, request["seed"])


def is_accurate(error: float, eager_error: float) -> bool:
    """Whether a result errs at most twice as much as eager PyTorch's; NaN does not."""
    return error <= 2 * eager_error


def neighbours(problem: Problem) -> list[Problem]:
    """Two problems that share the entry: with the counts one less, and just above half of them.

    Where a bucket holds no other count, the problem itself, for other inputs.
    """
    found = []
    for change in (lambda n: n - 1, lambda n: n // 2 + 1):
        counts = COUNTS.get(problem.op, 1)
        shape = list(problem.shape)
        first = 1 if counts > 1 else 0  # the batch stays
        for at in range(first, counts):
            if shape[at] > 2:
                shape[at] = change(shape[at])
        if problem.op == "cached_attention":
            shape[1] = problem.shape[1]  # some queries over other caches
        same = key_shape(problem.op, shape) == key_shape(problem.op, problem.shape)
        found.append(Problem(problem.op, problem.dtype, tuple(shape) if same else problem.shape))
    return found


def poison(device: torch.device) -> None:
    """Leave NaN of every floating dtype in the memory that the next tensors get."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    # The allocator has a pool for small tensors and one for others, and gives what is left between
    # the tensors of a pool before it takes new memory.
    sizes = [*_free_between_tensors(device), POISON_BYTES, *[SMALL_BYTES // 2] * 16]
    filled = [
        torch.full((size // 4,), -1, dtype=torch.int32, device=device)
        for size in sorted(sizes, reverse=True)
    ]
    del filled


def _free_between_tensors(device: torch.device) -> list[int]:
    """Bytes of tensors that together take all that is free beside those that live."""
    stream = torch.cuda.current_stream(device)
    sizes = []
    for segment in torch.cuda.memory_snapshot():
        owner = segment["device"], segment["stream"]
        is_ours = owner == (stream.device_index, stream.cuda_stream)
        if not is_ours or tuple(segment["segment_pool_id"]) != (0, 0):  # a CUDA graph's
            continue
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                continue
            if segment["segment_type"] == "large":
                sizes.append(block["size"])
            else:
                whole, rest = divmod(block["size"], SMALL_BYTES)
                sizes += [SMALL_BYTES] * whole + [rest] * (rest > 0)
    return sizes


def sampled(made: inputs.Inputs, outputs: inputs.Outputs) -> torch.Tensor:
    """The sample of the outputs in float64: NaN where any of them is, sampled or not."""
    each = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    is_finite = all(out.isfinite().all() for out in each)
    sample = made.sample(outputs).double()
    return sample if is_finite else torch.full_like(sample, math.nan)


def _seconds(made: inputs.Inputs, variant: str) -> float:
    begin = time.perf_counter()
    made.call(0, variant)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _finite(errors: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """JSON has no NaN."""
    return [[e if math.isfinite(e) else None for e in pair] for pair in errors]


@cache
def _tools(device: torch.device) -> tuple[Stopwatch, Limits]:
    quick = Stopwatch(device, rounds=8, seconds=0.15, warmup_seconds=0.01)
    timed = Stopwatch(device, rounds=21, seconds=0.5, warmup_seconds=0.02)
    return timed, Limits(device, quick)


def _time(problem: Problem, device: torch.device, names: Sequence[str], seed: int) -> Message:
    stopwatch, limits = _tools(device)
    sets, calls = cold_sets(inputs.least_bytes(problem), stopwatch.l2_bytes)
    made = inputs.make(problem, device, sets, seed)
    runs = {name: GraphRun(lambda i, name=name: made.call(i % sets, name), calls) for name in names}
    timings = stopwatch.measure(runs)
    gbps = max(limits.copy_gbps, limits.read(LARGE_READ).gbps)
    tflops = max(limits.matmul_tflops, limits.mma_tflops or 0.0)
    limit_us = max(made.num_bytes / gbps / 1e3, made.flops / tflops / 1e6)
    return {
        "timings": {name: [t.us, t.p20, t.p80] for name, t in timings.items()},
        "limit_us": limit_us,
    }
