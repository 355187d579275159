"""``bench mlp``: the gated MLP of a few rows; ``bench prefill`` takes its case for many."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastshard import ops
from fastshard.bench import torchtune_peer
from fastshard.bench.case import Bench, Call, Case, Problem, Variant
from fastshard.bench.presets import preset

SHAPES = ((1, 4096, 14336), (1, 2048, 8192), (16, 4096, 14336))
"""``(rows, hidden_size, intermediate_size)``."""


def problems(bench: Bench) -> Iterator[Problem]:
    """The goal shapes, or those of the models asked for."""
    models, batches = bench.settings.models, bench.settings.batches
    sizes = list(dict.fromkeys(shape[1:] for shape in SHAPES))
    if models is not None:
        sizes = [(config.hidden_size, config.intermediate_size) for config in map(preset, models)]
    shapes = SHAPES
    if models is not None or batches is not None:
        shapes = [(rows, *size) for size in sizes for rows in batches or (1, 16)]
    for rows, hidden_size, intermediate_size in shapes:
        shape = f"{rows} x {hidden_size}, intermediate {intermediate_size}"
        make = partial(case, bench, shape, rows, hidden_size, intermediate_size)
        yield Problem("mlp", shape, lambda make=make: [make()])


def _plain_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``x`` ``[rows, hidden_size]``; the rows of ``gate_up`` are all of gate, then all of up."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def case(
    bench: Bench,
    shape: str,
    rows: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    name: str = "mlp",
    limit: str = "read",
) -> Case:
    """The MLP of ``rows`` rows, as a line of the benchmark ``name``, held to ``limit``."""
    item = bench.settings.dtype.itemsize
    sets, make_run = bench.cold_graphs(3 * hidden_size * intermediate_size * item)
    x = bench.randn(sets, rows, hidden_size)
    gate_up = bench.randn(sets, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5)
    down = bench.randn(sets, hidden_size, intermediate_size, scale=intermediate_size**-0.5)
    interleaved = torch.stack(gate_up.chunk(2, 1), dim=2).flatten(1, 2)  # gate 0, up 0, gate 1
    cost = ops.COSTS["fused_mlp"](x[0], gate_up[0], down[0], "silu", None)

    def compiled(**settings) -> Call:
        function = bench.compiled(_plain_mlp, **settings)
        return lambda i: function(x[i], gate_up[i], down[i])

    def torchtune() -> Call:
        modules = [torchtune_peer.feed_forward(*of) for of in zip(gate_up, down, strict=True)]
        return lambda i: modules[i](x[i])

    peers = {
        "eager": lambda: lambda i: _plain_mlp(x[i], gate_up[i], down[i]),
        "compile": compiled,
        "autotune": lambda: compiled(mode="max-autotune-no-cudagraphs"),
        "torchtune": torchtune,
    }
    variants = [
        Variant(
            "fastshard",
            lambda: lambda i: ops.fused_mlp(x[i], interleaved[i], down[i]),
            is_peer=False,
        )
    ]
    if limit == "mma":
        # Our products, also where the op leaves them to PyTorch.
        raw = torch.ops.fastshard.fused_mlp.default
        variants.append(
            Variant(
                "fastshard tiles",
                lambda: lambda i: raw(x[i], interleaved[i], down[i], "silu", None, "tiles"),
                is_peer=False,
            )
        )
    return Case(
        name=name,
        shape=shape,
        dtype=bench.settings.dtype,
        num_bytes=cost.bytes,
        flops=cost.flops,
        golden=lambda: _plain_mlp(*(t[0].double() for t in (x, gate_up, down))),
        variants=[*variants, *bench.peers(peers)],
        make_run=make_run,
        limit=limit,
    )
