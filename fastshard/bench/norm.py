"""``bench norm``: RMSNorm and LayerNorm, of x and of x + residual."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastshard import ops
from fastshard.bench import torchtune_peer
from fastshard.bench.case import Bench, Call, Case, Problem, Variant
from fastshard.bench.presets import preset

SHAPES = ((16384, 4096), (64, 4096), (1, 4096), (65536, 128), (4096, 16384))
"""``(rows, hidden_size)``; 65536 x 128 are the heads of 2048 tokens."""
EPS = 1e-5

Outputs = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm as ours and as PyTorch has it, both of (x, residual, weight, bias).

    Attributes:
        ours: Our call.
        plain: PyTorch's; in float64 the golden.
        cost: Of our op.
    """

    ours: Callable[..., Outputs]
    plain: Callable[..., Outputs]
    cost: Callable[..., ops.Cost]


def _rms_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    new_residual = x + residual
    return F.rms_norm(new_residual, weight.shape, weight, EPS), new_residual


def _layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    new_residual = x + residual
    return F.layer_norm(new_residual, weight.shape, weight, bias, EPS), new_residual


NORMS = {
    "rms_norm": Norm(
        lambda x, r, w, b: ops.rms_norm(x, w, EPS),
        _rms_norm,
        lambda x, r, w, b: ops.COSTS["rms_norm"](x, w, EPS, False),
    ),
    "add_rms_norm": Norm(
        lambda x, r, w, b: ops.add_rms_norm(x, r, w, EPS),
        _add_rms_norm,
        lambda x, r, w, b: ops.COSTS["add_rms_norm"](x, r, w, EPS, False),
    ),
    "layer_norm": Norm(
        lambda x, r, w, b: ops.layer_norm(x, w, b, EPS),
        _layer_norm,
        lambda x, r, w, b: ops.COSTS["layer_norm"](x, w, b, EPS),
    ),
    "add_layer_norm": Norm(
        lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, EPS),
        _add_layer_norm,
        lambda x, r, w, b: ops.COSTS["add_layer_norm"](x, r, w, b, EPS),
    ),
}


def problems(bench: Bench) -> Iterator[Problem]:
    """The goal shapes, or the rows and the models' hidden sizes asked for.

    One row comes twice: cold as all others, and in the L2, as a decode step finds it.
    """
    models, batches = bench.settings.models, bench.settings.batches
    shapes = SHAPES
    if models is not None or batches is not None:
        sizes = (4096,) if models is None else tuple(preset(name).hidden_size for name in models)
        shapes = tuple(itertools.product(batches or (1, 16384), sizes))
    for name, (rows, hidden_size) in itertools.product(NORMS, shapes):
        for is_cold in (True, False) if rows == 1 else (True,):
            shape = f"{name} {rows} x {hidden_size}{'' if is_cold else ', in L2'}"
            make = partial(_case, bench, shape, NORMS[name], rows, hidden_size, is_cold)
            yield Problem("norm", shape, lambda make=make: [make()])


def _case(bench: Bench, shape: str, norm: Norm, rows: int, hidden_size: int, is_cold: bool) -> Case:
    vectors = bench.randn(hidden_size) + 1, bench.randn(hidden_size)
    one = torch.empty(rows, hidden_size, dtype=bench.settings.dtype, device="meta")
    cost = norm.cost(one, one, *(vector.to("meta") for vector in vectors))
    sets, make_run = bench.cold_graphs(cost.bytes)
    if not is_cold:
        sets, make_run = 1, bench.hot_graph
    x, residual = bench.randn(sets, rows, hidden_size), bench.randn(sets, rows, hidden_size)

    def call_of(function: Callable[..., Outputs]) -> Call:
        return lambda i: function(x[i], residual[i], *vectors)

    peers = {
        "eager": lambda: call_of(norm.plain),
        "compile": lambda: call_of(bench.compiled(norm.plain)),
    }
    if norm is NORMS["rms_norm"]:
        peers["torchtune"] = lambda: call_of(_torchtune_norm(vectors[0]))
    return Case(
        name="norm",
        shape=shape,
        dtype=bench.settings.dtype,
        num_bytes=cost.bytes,
        flops=cost.flops,
        golden=lambda: _together(
            norm.plain(x[0].double(), residual[0].double(), *(v.double() for v in vectors))
        ),
        variants=[
            Variant("fastshard", lambda: call_of(norm.ours), is_peer=False),
            *bench.peers(peers),
        ],
        make_run=make_run,
        compared=_together,
        limit="copy",
    )


def _torchtune_norm(weight: Tensor) -> Callable[..., Outputs]:
    module = torchtune_peer.rms_norm(weight, EPS)
    return lambda x, r, w, b: module(x)


def _together(outputs: Outputs) -> Tensor:
    """All outputs as one tensor."""
    return outputs if isinstance(outputs, Tensor) else torch.stack(outputs)
