"""Cases of ``ops.decode_step``: its arguments from sizes, and the step in plain PyTorch."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastshard import ops

EPS = 0.01  # large: a norm that drops it must fail


@dataclass(frozen=True)
class Case:
    """Sizes of a shard and a batch. ``slots`` has an entry a row; ``windows`` an entry a layer."""

    slots: tuple[int, ...] = (9, 4)
    first_key: tuple[int, ...] | None = None
    windows: tuple[int, ...] = (0, 0)
    part: str = "whole"
    hidden_size: int = 72
    intermediate_size: int = 152
    vocab_size: int = 83
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 0  # 0: head_dim
    max_seq_len: int = 12
    is_tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    weight_in_fp32: bool = True
    rope_interleaved: bool = False
    activation: str = "silu"


def make(case: Case, dtype: torch.dtype, device: torch.device) -> dict:
    """Arguments of ``ops.decode_step``. Cache slots that the step must not read hold NaN."""
    b, hidden, d = len(case.slots), case.hidden_size, case.head_dim
    q_rows = case.num_heads * d
    qkv_rows = q_rows + 2 * case.num_kv_heads * d
    is_first, is_last = case.part in ("whole", "first"), case.part in ("whole", "last")
    layers = range(len(case.windows))

    def matrix(rows, columns):
        return (torch.randn(rows, columns) * columns**-0.5).to(device, dtype)

    def scale(size):
        return (1 + 0.3 * torch.randn(size)).to(device, dtype)

    def each(make_one, present=True):
        return [make_one() for _ in layers] if present else []

    embedding = (torch.randn(case.vocab_size, hidden)).to(device, dtype) if is_first else None
    head = None
    if is_last:
        head = embedding if case.is_tied else matrix(case.vocab_size, hidden)
    weights = ops.DecodeWeights(
        sa_norm=each(lambda: scale(hidden)),
        qkv_weight=each(lambda: matrix(qkv_rows, hidden)),
        output_weight=each(lambda: matrix(hidden, q_rows)),
        mlp_norm=each(lambda: scale(hidden)),
        gate_up_weight=each(lambda: matrix(2 * case.intermediate_size, hidden)),
        down_weight=each(lambda: matrix(hidden, case.intermediate_size)),
        qkv_bias=each(lambda: scale(qkv_rows) - 1, case.qkv_bias),
        output_bias=each(lambda: scale(hidden) - 1, case.output_bias),
        q_norm=each(lambda: scale(d), case.qk_norm),
        k_norm=each(lambda: scale(d), case.qk_norm),
        embedding=embedding,
        norm=scale(hidden) if is_last else None,
        head=head,
    )
    first_key = case.first_key or (0,) * b

    def cache():
        values = torch.full((b + 1, case.num_kv_heads, case.max_seq_len, d), math.nan)
        for row, (start, slot) in enumerate(zip(first_key, case.slots, strict=True)):
            if 0 <= slot < case.max_seq_len:
                values[row, :, start:slot] = torch.randn(case.num_kv_heads, slot - start, d)
        return values.to(device, dtype)

    slots = torch.tensor(case.slots, device=device)
    out = (b, case.vocab_size if is_last else hidden)
    return {
        "x": torch.randint(case.vocab_size, (b,)).to(device) if is_first else matrix(b, hidden) * 8,
        "weights": weights,
        "k_cache": each(cache),
        "v_cache": each(cache),
        "rope_table": rope_table(case.rotary_dim or d, 40).to(device),
        "positions": (slots * 3 + 1) % 40,  # need not follow the slots
        "slots": slots,
        "first_key": None if case.first_key is None else torch.tensor(first_key, device=device),
        "overflow": torch.zeros(1, dtype=torch.int32, device=device),
        "workspace": ops.new_decode_workspace(weights, b, num_heads=case.num_heads),
        "out": torch.full(out, math.nan, device=device, dtype=torch.float32 if is_last else dtype),
        "num_heads": case.num_heads,
        "norm_eps": EPS,
        "weight_in_fp32": case.weight_in_fp32,
        "rope_interleaved": case.rope_interleaved,
        "activation": case.activation,
        "windows": list(case.windows),
    }


def rope_table(rotary_dim: int, max_positions: int) -> Tensor:
    """As a model makes it, with a base so small that every pair turns visibly."""
    inverse = 20.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def cast(given: dict, dtype: torch.dtype, device: torch.device | str | None = None) -> dict:
    """A copy with every floating-point tensor in ``dtype``, the RoPE table too."""

    def convert(value):
        if isinstance(value, Tensor):
            value = value.to(device or value.device, copy=True)
            return value.to(dtype) if value.is_floating_point() else value
        return [convert(v) for v in value] if isinstance(value, list) else value

    fields = dataclasses.asdict(given["weights"], dict_factory=dict)
    weights = ops.DecodeWeights(**{name: convert(value) for name, value in fields.items()})
    return {name: convert(value) for name, value in given.items()} | {"weights": weights}


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * scale


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """x [n, d] by table [rotary_dim // 2, 2]."""
    cos, sin = table.unbind(-1)
    half, out = len(cos), x.clone()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out


ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


def plain(given: dict) -> Tensor:
    """The step in plain PyTorch, row by row, in the dtype of the weights; writes the caches."""
    w, rows = given["weights"], []
    num_heads = given["num_heads"]
    for row, slot in enumerate(given["slots"].tolist()):
        x = given["x"][row] if w.embedding is None else w.embedding[given["x"][row]]
        start = 0 if given["first_key"] is None else given["first_key"][row].item()
        table = given["rope_table"][given["positions"][row]]
        for i in range(len(w.sa_norm)):
            k_cache, v_cache = given["k_cache"][i][row], given["v_cache"][i][row]  # [h_kv, S, d]
            num_kv_heads, _, d = k_cache.shape
            qkv = w.qkv_weight[i] @ rms_norm(x, w.sa_norm[i])
            if w.qkv_bias:
                qkv = qkv + w.qkv_bias[i]
            q, k, v = qkv.view(-1, d).split((num_heads, num_kv_heads, num_kv_heads))
            if w.q_norm:
                q, k = rms_norm(q, w.q_norm[i]), rms_norm(k, w.k_norm[i])
            q, k = (rotate(t, table, given["rope_interleaved"]) for t in (q, k))
            k_cache[:, slot], v_cache[:, slot] = k, v
            window = given["windows"][i]
            first = max(start, slot + 1 - window) if window else start
            keys, values = k_cache[:, first : slot + 1], v_cache[:, first : slot + 1]
            q = q.view(num_kv_heads, -1, d)
            heads = ((q @ keys.mT) / math.sqrt(d)).softmax(-1) @ values
            attended = w.output_weight[i] @ heads.reshape(-1)
            x = x + (attended + w.output_bias[i] if w.output_bias else attended)
            gate, up = (w.gate_up_weight[i] @ rms_norm(x, w.mlp_norm[i])).view(-1, 2).unbind(-1)
            x = x + w.down_weight[i] @ (ACTIVATIONS[given["activation"]](gate) * up)
        rows.append(x if w.head is None else w.head @ rms_norm(x, w.norm))
    return torch.stack(rows)
