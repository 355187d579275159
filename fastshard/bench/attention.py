"""``bench attention``: one query token a row over a cache of keys."""

import itertools
import warnings
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastshard import ops
from fastshard.bench.case import Bench, Call, Case, Problem, Variant
from fastshard.bench.presets import preset

HEADS = (32, 8, 128)
"""``(num_qo_heads, num_kv_heads, head_dim)``."""
CONTEXTS = (1024, 4096, 32768)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def problems(bench: Bench) -> Iterator[Problem]:
    """The goal shapes, or the heads of the models asked for."""
    heads = [HEADS]
    if bench.settings.models is not None:
        configs = map(preset, bench.settings.models)
        heads = [(config.num_heads, config.num_kv_heads, config.head_dim) for config in configs]
    batches, contexts = bench.settings.batches or (1,), bench.settings.contexts or CONTEXTS
    for sizes, batch, context in itertools.product(heads, batches, contexts):
        shape = "b{} {}/{} d{} {} keys".format(batch, *sizes, context)
        make = partial(_case, bench, shape, batch, context, *sizes)
        yield Problem("attention", shape, lambda make=make: [make()])


def _case(
    bench: Bench,
    shape: str,
    batch: int,
    context: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Case:
    keys = batch * num_kv_heads * context * head_dim
    sets, make_run = bench.cold_graphs(2 * keys * bench.settings.dtype.itemsize)
    q = bench.randn(sets, batch, num_heads, head_dim)
    k, v = (bench.randn(sets, batch, num_kv_heads, context, head_dim) for _ in range(2))
    lengths = torch.full((batch,), context, device=bench.device)
    rules = (None, True, None, None, None, None, 0.0)
    slots_last = (tensor[0].transpose(1, 2) for tensor in (k, v))
    cost = ops.COSTS["attention"](q[0][:, None], *slots_last, *rules)

    def ours(i: int) -> Tensor:
        return ops.cached_attention(q[i][:, None], k[i], v[i], lengths)[:, 0]

    def fastest(calls: list[Call]) -> Call:
        """Of those that run; raises what the last one raised where none does."""
        runs = {}
        for call in calls:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # why a backend refuses: so does its error
                    call(0)
                runs[call] = make_run(call)
            except RuntimeError as failure:
                error = failure
        if not runs:
            raise error
        times = bench.stopwatch.measure(runs, rounds=5)
        return min(times, key=lambda call: times[call].us)

    def sdpa(name: str) -> Variant:
        return Variant(f"sdpa {name}", lambda: fastest(_sdpa(q, k, v, BACKENDS[name])))

    return Case(
        name="attention",
        shape=shape,
        dtype=bench.settings.dtype,
        num_bytes=cost.bytes,
        flops=cost.flops,
        golden=lambda: _golden(q[0], k[0], v[0]),
        variants=[
            Variant("fastshard", lambda: ours, is_peer=False),
            *(sdpa(name) for name in BACKENDS if "sdpa" in bench.settings.peers),
        ],
        make_run=make_run,
        baseline="sdpa math",
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> list[Call]:
    """PyTorch's backend on the heads as they are, and with a group's heads as rows of one query.

    The second reads a key once for all heads of its group, on backends that do not do so anyway.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]

    def by_heads(i: int) -> Tensor:
        with sdpa_kernel(backend):
            grouped = num_heads != num_kv_heads
            out = F.scaled_dot_product_attention(q[i][:, :, None], k[i], v[i], enable_gqa=grouped)
        return out[:, :, 0]

    def by_rows(i: int) -> Tensor:
        with sdpa_kernel(backend):
            rows = q[i].unflatten(1, (num_kv_heads, -1))
            return F.scaled_dot_product_attention(rows, k[i], v[i]).flatten(1, 2)

    return [by_heads, by_rows]


def _golden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q`` ``[b, num_heads, d]`` over all keys, in float64."""
    rows = q.double().unflatten(1, (k.shape[1], -1))
    weights = (rows @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v.double()).flatten(1, 2)
