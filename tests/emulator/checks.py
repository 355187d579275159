"""Small checks of the emulated kernels against the CPU references, for mutants to fail.

Each runs under several schedules, on one multiprocessor where it does not say otherwise: blocks
have more than one tile to do.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from emulator import runtime
from fastshard import ops

SEEDS = ["", "1", "2", "3", "4", "5"]  # of FASTSHARD_EMULATOR_SEED
Results = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Check:
    """A call to compare with and without emulator.

    Attributes:
        sources: The kernel sources that it runs, a pattern in csrc.
        prepare: Makes inputs and returns the call.
        num_sms: Of the emulated device.
    """

    sources: str
    prepare: Callable[[], Callable[[], Results]]
    num_sms: int


CHECKS: dict[str, Check] = {}


def check(sources: str, num_sms: int = 1):
    """Register the decorated function as a `Check`, by its name."""

    def register(prepare: Callable[[], Callable[[], Results]]):
        assert prepare.__name__ not in CHECKS
        CHECKS[prepare.__name__] = Check(sources, prepare, num_sms)
        return prepare

    return register


def inside_nan(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random values, each row of them followed by NaN."""
    padded = torch.full((*shape[:-1], shape[-1] + 64), float("nan"), dtype=dtype)
    padded[..., : shape[-1]] = torch.randn(shape) * scale
    return padded[..., : shape[-1]]


def fenced(x: Tensor) -> Tensor:
    """A copy of `x` that ends where a page begins that nobody may access."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return flat.view(x.shape).copy_(x)


@check("norm/*.cu")
def norm():
    x, weight = inside_nan(3, 600, dtype=torch.float16), inside_nan(600, dtype=torch.float16)
    x += torch.linspace(0, 9, 600)  # parts of a row have other means than the row
    return lambda: (ops.rms_norm(x, weight, 0.1), ops.layer_norm(x, weight, None, 0.1))


@check("activation/*.cu")
def act_and_mul():
    gate_up = inside_nan(3, 2 * 132, dtype=torch.float16)
    other = inside_nan(3, 2 * 9, dtype=torch.float16)
    return lambda: (ops.act_and_mul(gate_up, activation="gelu"), ops.silu_and_mul(other))


@check("sample/*.cu")
def sample():
    """Lists of all warps, digits to select, draws to repeat; ties just above what can be listed."""
    logits = torch.full((12, 364), 99.0, dtype=torch.float16)[:, :300].normal_()
    ties = torch.cat((torch.zeros(4097), -torch.ones(400)))[torch.randperm(4497)][None]
    step = torch.tensor(3)
    return lambda: (
        ops.sample(logits, step, temperature=0.0),
        ops.sample(logits, step, temperature=9.0, top_k=100),
        ops.sample(logits, step, temperature=3.0, top_k=100, top_p=0.6, min_p=0.1),
        ops.sample(logits, step, temperature=3.0, top_p=0.3),
        ops.sample(ties, step, top_k=500, top_p=0.9),
    )


@check("gemv/*.cu")
def linear():
    """Many rows: more tiles than blocks, a ragged last one; activations of one chunk, and of three.

    Few: several groups of tiles, a ragged last tile and chunk; registers for all of x, and not.
    """
    x = inside_nan(12, 2136, dtype=torch.bfloat16)
    weight = inside_nan(140, 2136, dtype=torch.bfloat16, scale=2136**-0.5)
    norm_weight = inside_nan(2136, dtype=torch.bfloat16)
    long_x = inside_nan(3, 4232, dtype=torch.bfloat16)
    long_weight = inside_nan(68, 4232, dtype=torch.bfloat16, scale=4232**-0.5)
    residual = inside_nan(3, 68, dtype=torch.bfloat16)
    return lambda: (
        ops.linear(x[:, :600], weight[:, :600]),
        ops.linear(x, weight, norm_weight=norm_weight, norm_eps=0.1),
        ops.linear(x[:8], weight, norm_weight=norm_weight, norm_eps=0.1),
        ops.linear(long_x, long_weight, residual=residual),
    )


@check("mlp/*.cu", num_sms=4)
def fused_mlp():
    """Few rows: several tiles of gate_up a block, three launches. Many: down in parts."""
    first, second, third = (inside_nan(3, 136, dtype=torch.float16) for _ in range(3))
    gate_up_weight = inside_nan(2 * 40, 136, dtype=torch.float16, scale=136**-0.5)
    down_weight = inside_nan(136, 40, dtype=torch.float16, scale=40**-0.5)
    residual = inside_nan(3, 136, dtype=torch.float16)
    rows = inside_nan(12, 24, dtype=torch.float16)
    long_gate_up_weight = inside_nan(2 * 4104, 24, dtype=torch.float16, scale=24**-0.5)
    long_down_weight = inside_nan(24, 4104, dtype=torch.float16, scale=4104**-0.5)
    return lambda: (
        *(
            ops.fused_mlp(x, gate_up_weight, down_weight, residual=residual)
            for x in (first, second, third)
        ),
        ops.fused_mlp(rows, long_gate_up_weight, long_down_weight, residual=rows),
    )


@check("mlp/tiled_mlp.cu")
def tiled_mlp():
    """Several tiles a block, all ragged; more stages than the ring holds, the last one ragged."""
    x = inside_nan(150, 200, dtype=torch.float16)
    gate_up_weight = inside_nan(2 * 88, 200, dtype=torch.float16, scale=200**-0.5)
    down_weight = inside_nan(200, 88, dtype=torch.float16, scale=88**-0.5)
    arguments = x, gate_up_weight, down_weight, "silu", inside_nan(150, 200, dtype=torch.float16)
    variants = ("tiles_128x256", "tiles_128x128", "tiles_64x128", "tiles_fp16_accumulation")
    return lambda: tuple(torch.ops.fastshard.fused_mlp.default(*arguments, v) for v in variants)


@check("attention/attention_64.cu")
def attention():
    """Several tiles, the last ragged, NaN in the cache: prefill; and few rows, their keys split."""
    q = torch.randn(1, 150, 4, 64, dtype=torch.float16)
    k, v = torch.randn(2, 1, 600, 2, 64, dtype=torch.float16)
    # Scores that grow, in some of the rows of a warp.
    q[..., 0] = torch.arange(150)[:, None] % 16 == 3
    k[:, 64:, :, 0] += 300
    k[:, 573:], v[:, 573:] = float("nan"), float("nan")
    prompt, lengths = torch.tensor([150]), torch.tensor([573])
    keep = torch.rand(1, 70, 112) < 0.5
    mask = fenced(keep)[..., :109]
    additive = fenced((8 * torch.rand(1, 70, 112)).half().masked_fill(~keep, -torch.inf))[..., :109]
    return lambda: (
        ops.attention(q, k, v, causal=True, kv_lengths=prompt),
        ops.attention(q[:, :70], k, v, causal=True, kv_lengths=prompt, softcap=5.0),
        ops.attention(q[:, :70], k[:, :109], v[:, :109], mask=mask),
        ops.attention(q[:, :70], k[:, :109], v[:, :109], mask=additive),
        ops.attention_layer_norm(
            q[:, :1], k[:, :, :1], v[:, :, :1], causal=True, kv_lengths=lengths
        ),
    )


@check("attention/attention_64.cu")
def attention_rope():
    """Two tiles of queries, the last ragged; rotated whole and in part, in both kinds of pairs."""
    q = torch.randn(2, 75, 4, 64, dtype=torch.float16)
    k, v = torch.randn(2, 2, 40, 2, 64, dtype=torch.float16)
    angles = 7 * torch.rand(90, 32)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    tables = {num_pairs: fenced(table[:, :num_pairs]) for num_pairs in (32, 24)}
    positions = fenced(torch.randint(90, (2 * 150 - 1,))).as_strided((2, 75), (150, 2))
    positions[:, 3], positions[:, 70] = -1, 90
    inside = [i for i in range(75) if i not in (3, 70)]

    def call(interleaved: bool, num_pairs: int) -> tuple[Tensor, Tensor]:
        rope = {"rope_table": tables[num_pairs], "rope_positions": positions}
        out = ops.attention(q, k, v, softmax_scale=1.0, **rope, rope_interleaved=interleaved)
        return out[:, inside], out[:, [3, 70]].isnan()

    return lambda: (*call(False, 32), *call(False, 24), *call(True, 32), *call(True, 24))


@check("attention/decode_attention.cu")
def decode_attention():
    """Keys split over blocks, the last tile ragged, NaN in the cache; several tiles a warp."""
    q = torch.randn(1, 3, 4, 96, dtype=torch.float16)
    k, v = torch.randn(2, 1, 600, 1, 96, dtype=torch.float16)
    k[:, 573:], v[:, 573:] = float("nan"), float("nan")
    lengths, mask = torch.tensor([573]), torch.rand(1, 3, 600) < 0.5
    return lambda: (
        ops.attention(q[:, :1], k, v, causal=True, kv_lengths=lengths),
        ops.attention(q, k, v, causal=True, kv_lengths=lengths, window=300),
        ops.attention(q, k, v, mask=mask, kv_lengths=lengths),
        ops.attention(q, k[:, 560:], v[:, 560:], causal=True, kv_lengths=lengths - 560),
    )


@check("rope/*.cu")
def rope_append():
    """A slot and a position out of range: neither may write."""
    q, k, v = (inside_nan(1, 3, 2, 64, dtype=torch.float16) for _ in range(3))
    table = torch.randn(9, 32, 2)[:8]
    positions, slots = torch.tensor([[1, 8, 2]]), torch.tensor([[4, 1, 5]])

    def call() -> tuple[Tensor, ...]:
        k_cache, v_cache, _ = torch.zeros(3, 1, 2, 5, 64, dtype=torch.float16)
        overflow = torch.zeros(1, dtype=torch.int32)
        rest = (table, positions, k_cache, v_cache, slots, overflow)
        return ops.rope_append(q, k, v, *rest, interleaved=False), k_cache, v_cache, overflow

    return call


def half_matrix(*shape: int) -> Tensor:
    return fenced((torch.randn(shape) * shape[-1] ** -0.5).half())


def norm_weight(size: int) -> Tensor:
    return fenced((1 + 0.3 * torch.randn(size)).half())


@check("decode/step.cu", num_sms=5)
def decode_step():
    """Two steps of two layers, and of one: their flags differ by the count of steps alone.

    Down in two parts, a head whose keys are shared out to two blocks.
    """
    hidden, intermediate, d, slots = 136, 4104, 64, torch.tensor([300])
    layers = {
        "sa_norm": [norm_weight(hidden) for _ in range(2)],
        "qkv_weight": [half_matrix(6 * d, hidden) for _ in range(2)],
        "output_weight": [half_matrix(hidden, 2 * d) for _ in range(2)],
        "mlp_norm": [norm_weight(hidden) for _ in range(2)],
        "gate_up_weight": [half_matrix(2 * intermediate, hidden) for _ in range(2)],
        "down_weight": [half_matrix(hidden, intermediate) for _ in range(2)],
        "q_norm": [norm_weight(d) for _ in range(2)],
        "k_norm": [norm_weight(d) for _ in range(2)],
    }
    inputs, caches = half_matrix(2, 1, hidden) * 8, torch.randn(2, 2, 1, 2, 320, d).half()
    caches[:, :, :, :, 301:] = float("nan")
    caches[1, :, :, :, 298] *= 100  # the first step's last old value: seen twice, it shows
    table = torch.randn(320, d // 2, 2)

    def steps(num_layers: int) -> list[Tensor]:
        weights = ops.DecodeWeights(**{name: each[:num_layers] for name, each in layers.items()})
        workspace = ops.new_decode_workspace(weights, 1, num_heads=2)
        k_cache, v_cache = (cache.clone().unbind() for cache in caches[:, :num_layers])
        outs = [torch.full((1, hidden), float("nan")).half() for _ in inputs]
        for i, out in enumerate(outs):
            ops.decode_step(
                inputs[i],
                weights,
                k_cache=k_cache,
                v_cache=v_cache,
                rope_table=table,
                positions=slots - 1 + i,
                slots=slots - 1 + i,
                overflow=torch.zeros(1, dtype=torch.int32),
                workspace=workspace,
                out=out,
                num_heads=2,
                norm_eps=0.1,
                rope_interleaved=True,
            )
        return [*outs, *(cache[:, :, 299:301] for cache in (*k_cache, *v_cache))]

    return lambda: (*steps(2), *steps(1))


@check("decode/step.cu")
def decode_tokens():
    """Eight tokens on one block: rows longer than a slice, a ragged last tile of the head."""
    hidden, intermediate, d, vocab, slots = 4104, 8, 64, 131, torch.arange(8) + 3
    weights = ops.DecodeWeights(
        sa_norm=[norm_weight(hidden)],
        qkv_weight=[half_matrix(3 * d, hidden)],
        output_weight=[half_matrix(hidden, d)],
        mlp_norm=[norm_weight(hidden)],
        gate_up_weight=[half_matrix(2 * intermediate, hidden)],
        down_weight=[half_matrix(hidden, intermediate)],
        embedding=half_matrix(vocab, hidden) * 64,
        norm=norm_weight(hidden),
        head=half_matrix(vocab, hidden),
    )
    caches, table = torch.randn(2, 8, 1, 12, d).half(), torch.randn(12, d // 2, 2)

    def call() -> tuple[Tensor, ...]:
        k_cache, v_cache = caches.clone()
        out = fenced(torch.full((8, vocab), float("nan")))
        ops.decode_step(
            slots * 5,
            weights,
            k_cache=[k_cache],
            v_cache=[v_cache],
            rope_table=table,
            positions=slots,
            slots=slots,
            overflow=torch.zeros(1, dtype=torch.int32),
            workspace=ops.new_decode_workspace(weights, 8, num_heads=1),
            out=out,
            num_heads=1,
            norm_eps=0.1,
            rope_interleaved=False,
        )
        return out.half(), k_cache, v_cache

    return call


def disagreement(actual: Tensor, expected: Tensor) -> str | None:
    """What is wrong with `actual`; a rounding or two of the dtype is not."""
    if not actual.isfinite().all():
        return "not finite"
    if not actual.is_floating_point():
        return None if torch.equal(actual, expected) else "differs"
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = 8 * torch.finfo(actual.dtype).eps * expected.double().abs().max().item()
    return None if error <= allowed else f"error {error:.2e} > {allowed:.2e}"


def run_check(name: str, kernels: dict[str, Callable]) -> str | None:
    """What the emulated kernels do wrong, under the first schedule under which they do."""
    torch.manual_seed(0)
    call = CHECKS[name].prepare()

    def results() -> tuple[Tensor, ...]:
        result = call()
        return (result,) if isinstance(result, Tensor) else result

    def missing(op: str) -> None:
        raise KeyError(f"csrc has no kernel of {op}")

    expected = results()
    os.environ["FASTSHARD_EMULATOR_SMS"] = str(CHECKS[name].num_sms)
    for seed in SEEDS:
        os.environ["FASTSHARD_EMULATOR_SEED"] = seed
        try:
            with runtime.emulated(kernels, missing):
                actual = results()
        except RuntimeError as error:
            if not str(error).startswith("emulator: "):
                raise
            return f"{name}, seed {seed!r}: {error}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            if problem := disagreement(a, e):
                return f"{name}, seed {seed!r}, result {i}: {problem}"
    return None


def report(library: str, names: Sequence[str], to: Connection) -> None:
    """Send what is wrong with each named check: the body of a process, which a mutant may crash."""
    kernels = runtime.load(Path(library))
    to.send([problem for name in names if (problem := run_check(name, kernels))])
