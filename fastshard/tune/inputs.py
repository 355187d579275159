"""Random inputs of a problem, the raw op with a variant on them, and the answer in float64.

Outputs are compared on a sample of their elements, so that a float64 answer of long prompts and
large vocabularies costs little on cards that are slow at float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastshard import ops
from fastshard.bench.norm import EPS, NORMS
from fastshard.bench.prefill_attention import golden as attention_golden
from fastshard.tune.problem import Problem

SAMPLED_ROWS = 64
SAMPLED_COLUMNS = 4096

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """Some sets of inputs of one problem, all of the same shapes.

    Attributes:
        call: The raw op, of the index of a set and a variant.
        plain: Eager PyTorch on the first set in the dtype: the sampled elements.
        golden: The same in float64.
        sample: The sampled elements of what ``call`` gave.
        num_bytes: Least global memory traffic of one call.
        flops: Of one call.
    """

    call: Callable[[int, str], Outputs]
    plain: Callable[[], Tensor]
    golden: Callable[[], Tensor]
    sample: Callable[[Outputs], Tensor]
    num_bytes: int
    flops: int


def least_bytes(problem: Problem) -> int:
    """Least traffic of a call, without making inputs of it."""
    return make(problem, torch.device("meta"), 1, 0).num_bytes


def make(problem: Problem, device: torch.device, sets: int, seed: int) -> Inputs:
    """Make inputs, normally distributed.

    Args:
        problem: Whose sizes they have.
        device: Where they are.
        sets: How many of those tensors that a call reads most of.
        seed: Other seeds make other inputs.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, device=device, dtype=dtype)
        return values.normal_(std=scale, generator=generator)

    return _MAKERS[problem.op](problem, sets, randn)


def _rows(size: int, device: torch.device) -> Tensor:
    """Indices of rows that are sampled: spread evenly, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, SAMPLED_ROWS), device=device).round().long()


def _together(outputs: Outputs) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else torch.stack(outputs)


def _norm(problem: Problem, sets: int, randn: Callable[..., Tensor]) -> Inputs:
    rows, hidden_size = problem.shape
    x, residual = randn(sets, rows, hidden_size), randn(sets, rows, hidden_size)
    weight, bias = randn(hidden_size) + 1, randn(hidden_size)
    norm, raw = NORMS[problem.op], getattr(torch.ops.fastshard, problem.op).default
    is_rms, adds = "rms" in problem.op, problem.op.startswith("add_")
    vectors = (weight, EPS, False) if is_rms else (weight, bias, EPS)
    sampled = _rows(rows, x.device)

    def call(i: int, variant: str) -> Outputs:
        return raw(*((x[i], residual[i]) if adds else (x[i],)), *vectors, variant)

    def plain(of: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        inputs = (x[0][sampled], residual[0][sampled], weight, bias)
        return _together(norm.plain(*map(of, inputs)))

    cost = norm.cost(x[0], residual[0], weight, bias)
    return Inputs(
        call=call,
        plain=plain,
        golden=lambda: plain(Tensor.double),
        sample=lambda outputs: _together(outputs)[..., sampled, :],
        num_bytes=cost.bytes,
        flops=cost.flops,
    )


def _fused_mlp(problem: Problem, sets: int, randn: Callable[..., Tensor]) -> Inputs:
    rows, hidden_size, intermediate_size = problem.shape
    x = randn(sets, rows, hidden_size)
    gate_up = randn(sets, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5)
    down = randn(sets, hidden_size, intermediate_size, scale=intermediate_size**-0.5)
    raw, sampled = torch.ops.fastshard.fused_mlp.default, _rows(rows, x.device)

    def plain(of: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        taken, (gate, up) = of(x[0][sampled]), (of(gate_up[0, i::2]) for i in range(2))
        gates, ups = taken @ gate.T, taken @ up.T
        return (F.silu(gates) * ups) @ of(down[0]).T

    cost = ops.COSTS["fused_mlp"](x[0], gate_up[0], down[0], "silu", None)
    return Inputs(
        call=lambda i, variant: raw(x[i], gate_up[i], down[i], "silu", None, variant),
        plain=plain,
        golden=lambda: plain(Tensor.double),
        sample=lambda out: out[sampled],
        num_bytes=cost.bytes,
        flops=cost.flops,
    )


def _linear(problem: Problem, sets: int, randn: Callable[..., Tensor]) -> Inputs:
    rows, in_features, out_features = problem.shape
    x = randn(sets, rows, in_features)
    weight = randn(sets, out_features, in_features, scale=in_features**-0.5)
    raw = torch.ops.fastshard.linear.default
    columns = slice(0, out_features, -(-out_features // SAMPLED_COLUMNS))
    rest = (None, None, 0.0, False, None)  # no bias, no norm, no residual

    def plain(of: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        return F.linear(of(x[0]), of(weight[0, columns]))

    cost = ops.COSTS["linear"](x[0], weight[0], *rest)
    return Inputs(
        call=lambda i, variant: raw(x[i], weight[i], *rest, variant),
        plain=plain,
        golden=lambda: plain(Tensor.double),
        sample=lambda out: out[:, columns],
        num_bytes=cost.bytes,
        flops=cost.flops,
    )


def _attention(problem: Problem, sets: int, randn: Callable[..., Tensor]) -> Inputs:
    batch, s_q, s_kv, num_heads, num_kv_heads, head_dim = problem.shape
    is_cached = problem.op == "cached_attention"
    if is_cached:
        q = randn(sets, batch, s_q, num_heads, head_dim)
        k, v = (randn(sets, batch, num_kv_heads, s_kv, head_dim).transpose(2, 3) for _ in range(2))
        lengths = torch.full((batch,), s_kv, device=q.device)
    else:  # as one product gives them
        heads = (num_heads, num_kv_heads, num_kv_heads)
        q, k, v = randn(sets, batch, s_q, sum(heads), head_dim).split(heads, dim=3)
        lengths = None
    rules = (None, True, lengths, None, None, None, head_dim**-0.5)
    raw, sampled = torch.ops.fastshard.attention.default, _rows(s_q, q.device)

    def golden() -> Tensor:
        # Queries stand at the end of the keys: as many before them that nobody samples.
        queries = F.pad(q[0], (0, 0, 0, 0, s_kv - s_q, 0))
        return attention_golden(queries, k[0], v[0], None, True, sampled + s_kv - s_q)

    def plain() -> Tensor:
        visible = torch.arange(s_kv, device=q.device) <= (sampled + s_kv - s_q)[:, None]
        keys, values = (t[0].transpose(1, 2) for t in (k, v))
        queries = q[0][:, sampled].transpose(1, 2)
        group = num_heads // num_kv_heads
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
        scores = (queries @ keys.mT * head_dim**-0.5).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2)

    cost = ops.COSTS["attention"](q[0], k[0], v[0], *rules)
    return Inputs(
        call=lambda i, variant: raw(q[i], k[i], v[i], *rules, None, None, False, variant),
        plain=plain,
        golden=golden,
        sample=lambda out: out[:, sampled],
        num_bytes=cost.bytes,
        flops=cost.flops,
    )


_MAKERS = {
    **dict.fromkeys(NORMS, _norm),
    "fused_mlp": _fused_mlp,
    "linear": _linear,
    "attention": _attention,
    "cached_attention": _attention,
}
