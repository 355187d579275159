"""``bench linear``: a linear layer of a few rows, which streams its weights once."""

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F

from fastshard import ops
from fastshard.bench.case import Bench, Call, Case, Problem, Variant
from fastshard.bench.presets import preset

SHAPES = ((4096, 4096), (16384, 4096), (128256, 2048))
"""``(out_features, in_features)``: 32 MiB, 128 MiB and 525 MB of 16-bit weights."""
ROWS = (1, 8, 16)


def problems(bench: Bench) -> Iterator[Problem]:
    """The goal shapes, or every layer of the models asked for."""
    shapes = SHAPES
    if bench.settings.models is not None:
        shapes = [shape for name in bench.settings.models for shape in _shapes_of(name)]
    for out_features, in_features in shapes:
        for rows in bench.settings.batches or ROWS:
            shape = f"{rows} x {in_features} -> {out_features}"
            make = partial(_case, bench, shape, rows, out_features, in_features)
            yield Problem("linear", shape, lambda make=make: [make()])


def _shapes_of(name: str) -> list[tuple[int, int]]:
    """q|k|v, the attention's output, and the head."""
    config = preset(name)
    q_rows = config.num_heads * config.head_dim
    qkv_rows = q_rows + 2 * config.num_kv_heads * config.head_dim
    hidden_size = config.hidden_size
    return [(qkv_rows, hidden_size), (hidden_size, q_rows), (config.vocab_size, hidden_size)]


def _case(bench: Bench, shape: str, rows: int, out_features: int, in_features: int) -> Case:
    item = bench.settings.dtype.itemsize
    sets, make_run = bench.cold_graphs(out_features * in_features * item)
    x = bench.randn(sets, rows, in_features)
    weight = bench.randn(sets, out_features, in_features, scale=in_features**-0.5)
    cost = ops.COSTS["linear"](x[0], weight[0], None, None, 0.0, False, None)

    def autotuned() -> Call:
        function = bench.compiled(F.linear, mode="max-autotune-no-cudagraphs")
        return lambda i: function(x[i], weight[i])

    peers = {
        "eager": lambda: lambda i: F.linear(x[i], weight[i]),
        "autotune": autotuned,  # compiled without it, it is the same call of the same library
    }
    return Case(
        name="linear",
        shape=shape,
        dtype=bench.settings.dtype,
        num_bytes=cost.bytes,
        flops=cost.flops,
        golden=lambda: F.linear(x[0].double(), weight[0].double()),
        variants=[
            Variant("fastshard", lambda: lambda i: ops.linear(x[i], weight[i]), is_peer=False),
            *bench.peers(peers),
        ],
        make_run=make_run,
    )
