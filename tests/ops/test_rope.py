"""apply_rope and rope_append: every device against float64, the cache, and the overflow flag."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from fastshard import ops
from helpers import (
    CUDA_ONLY,
    KERNELS_ONLY,
    assert_as_accurate,
    assert_compiles_once,
    assert_gradients_as_accurate,
    assert_ignores_autocast,
    assert_refuses_gradients,
    assert_replays_in_a_graph,
    cuda_kernel_names,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAX_POSITIONS = 40
STYLES = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
DIMS = pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [
        *[(128, 128), (64, 32), (96, 96), (256, 256)],  # whole vectors
        *[(80, 20), (24, 24), (10, 10)],  # a half that is not
        *[(7, 4), (16, 0)],  # odd, none
        (262, 262),  # more elements than a block has threads
    ],
)


def make_table(rotary_dim: int, device: torch.device, max_positions: int = MAX_POSITIONS) -> Tensor:
    """As a model makes it, with a base so small that every pair turns visibly."""
    inverse = 20.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1))
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)


def rotate(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Plain rope in the dtype of ``x``: complex numbers' product, written out."""
    out = x.clone()
    rotary_dim = 2 * table.shape[1]
    cos, sin = table.to(x.dtype)[positions][:, :, None].unbind(-1)
    if interleaved:
        first, second = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
        out[..., 0:rotary_dim:2] = first * cos - second * sin
        out[..., 1:rotary_dim:2] = second * cos + first * sin
    else:
        first, second = x[..., :rotary_dim].chunk(2, dim=-1)
        out[..., :rotary_dim] = torch.cat(
            (first * cos - second * sin, second * cos + first * sin), dim=-1
        )
    return out


def packed_qkv(b, s, h, h_kv, d, dtype, device, offset=0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as slices of one packed projection; NaN around them shows a read past their ends."""
    width = (h + 2 * h_kv) * d
    packed = torch.full((b, s, width + 16), torch.nan, dtype=dtype, device=device)
    qkv = packed[..., offset : offset + width]
    qkv.normal_()
    q, k, v = qkv.split((h * d, h_kv * d, h_kv * d), dim=-1)
    return tuple(x.unflatten(-1, (-1, d)) for x in (q, k, v))


def make_caches(b, h_kv, max_seq_len, d, dtype, device) -> tuple[Tensor, Tensor]:
    """Two caches with a distinct value in every element (as far as the dtype tells them apart)."""
    return tuple(torch.randn(b, h_kv, max_seq_len, d, dtype=dtype, device=device) for _ in range(2))


@DIMS
@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_rope_matches_float64(head_dim, rotary_dim, interleaved, dtype, device):
    x = torch.randn(2, 5, 3, head_dim, dtype=dtype, device=device)
    table = make_table(rotary_dim, device)
    positions = torch.tensor([[0, 1, 2, 3, 39], [7, 3, 3, 20, 0]], device=device)
    actual = ops.apply_rope(x, table, positions, interleaved=interleaved)
    golden = rotate(x.double(), table, positions, interleaved)
    assert_as_accurate(actual, golden, rotate(x, table, positions, interleaved))
    assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])


@STYLES
@pytest.mark.parametrize("num_heads", [16, 17, 39])
def test_more_heads_than_a_block_covers(num_heads, interleaved, device):
    q, k, v = packed_qkv(2, 3, num_heads, 5, 128, torch.float32, device)
    table, positions = make_table(128, device), torch.tensor([5, 0, 2], device=device)
    caches = make_caches(2, 5, 3, 128, torch.float32, device)
    overflow = torch.zeros(1, dtype=torch.int32, device=device)
    slots = torch.arange(3, device=device)
    rotated_q = ops.rope_append(
        q, k, v, table, positions, *caches, slots, overflow, interleaved=interleaved
    )
    for x, actual in ((q, rotated_q), (k, caches[0].transpose(1, 2))):
        golden = rotate(x.double(), table, positions[None], interleaved)
        assert_as_accurate(actual, golden, rotate(x, table, positions[None], interleaved))
    assert torch.equal(caches[1].transpose(1, 2), v)


@STYLES
@pytest.mark.parametrize("b", [1, 2])
def test_positions_of_one_row_serve_all(b, interleaved, device):
    x, table = torch.randn(b, 4, 3, 64, device=device), make_table(64, device)
    positions = torch.tensor([3, 1, 4, 15], device=device)
    expected = ops.apply_rope(x, table, positions.repeat(b, 1), interleaved=interleaved)
    assert torch.equal(ops.apply_rope(x, table, positions, interleaved=interleaved), expected)


@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_apply_rope_of_any_strides(offset, dtype, interleaved, device):
    q, k, _ = packed_qkv(2, 5, 4, 2, 64, dtype, device, offset)
    table = make_table(64, device)
    positions = torch.arange(10, device=device).view(5, 2).T  # not contiguous either
    for x in (q, k, k[:, :, 1:], q.transpose(1, 2).contiguous().transpose(1, 2)):
        actual = ops.apply_rope(x, table, positions, interleaved=interleaved)
        assert actual.is_contiguous()
        expected = ops.apply_rope(
            x.clone(memory_format=torch.contiguous_format),
            table,
            positions.contiguous(),
            interleaved=interleaved,
        )
        assert torch.equal(actual, expected)


@STYLES
@pytest.mark.parametrize("position", [-1, MAX_POSITIONS, 2**40, -(2**40)])
def test_a_position_outside_the_table_gives_nan(position, interleaved, device):
    x, table = torch.randn(2, 3, 2, 16, device=device), make_table(8, device)
    positions = torch.tensor([[1, position, 2], [3, 4, 5]], device=device)
    out = ops.apply_rope(x, table, positions, interleaved=interleaved)
    assert out[0, 1].isnan().all()
    positions[0, 1] = 0
    expected = ops.apply_rope(x, table, positions, interleaved=interleaved)
    expected[0, 1] = torch.nan
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8, 2), (3, 0, 2)], ids=str)
def test_an_empty_table(shape, device):
    x = torch.randn(1, 2, 2, 16, device=device)
    table = torch.zeros(shape, device=device)
    out = ops.apply_rope(x, table, torch.tensor([0, 2], device=device), interleaved=True)
    expected = x.clone() if shape[0] else torch.full_like(x, torch.nan)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (2, 0, 2, 16), (2, 3, 0, 16)], ids=str)
def test_empty(shape, device):
    x, table = torch.randn(shape, device=device), make_table(16, device)
    positions = torch.zeros(shape[1], dtype=torch.int64, device=device)
    assert ops.apply_rope(x, table, positions, interleaved=False).shape == shape
    caches = make_caches(2, shape[2], 8, 16, torch.float32, device)
    copies = [cache.clone() for cache in caches]
    overflow = torch.zeros(1, dtype=torch.int32, device=device)
    arguments = (x, x, x, table, positions, *caches, positions, overflow)
    assert ops.rope_append(*arguments, interleaved=False).shape == shape
    assert all(torch.equal(*pair) for pair in zip(caches, copies, strict=True))
    assert overflow.item() == 0


@DIMS
@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_table", [True, False], ids=["rotated", "append_only"])
def test_append_writes_what_apply_rope_gives(
    has_table, dtype, interleaved, head_dim, rotary_dim, device
):
    b, s, h, h_kv, max_seq_len = 2, 3, 4, 2, 11
    q, k, v = packed_qkv(b, s, h, h_kv, head_dim, dtype, device)
    table = make_table(rotary_dim, device)
    positions = torch.tensor([[4, 5, 6], [0, 1, 39]], device=device)
    slots = torch.tensor([[0, 7, 10], [3, 2, 5]], device=device)  # need not follow the positions
    caches = make_caches(b + 1, h_kv, max_seq_len, head_dim, dtype, device)
    k_expected, v_expected = (cache.clone() for cache in caches)
    overflow = torch.zeros(1, dtype=torch.int32, device=device)

    def rotated(x):
        if not has_table:
            return x.contiguous()
        return ops.apply_rope(x, table, positions, interleaved=interleaved)

    for i in range(b):
        for j in range(s):
            k_expected[i, :, slots[i, j]] = rotated(k)[i, j]
            v_expected[i, :, slots[i, j]] = v[i, j]
    q_out = ops.rope_append(
        *(q, k, v, table if has_table else None, positions, *caches, slots, overflow),
        interleaved=interleaved,
    )
    assert q_out.is_contiguous()
    assert torch.equal(q_out, rotated(q))
    assert torch.equal(caches[0], k_expected)
    assert torch.equal(caches[1], v_expected)
    assert overflow.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_append_to_caches_of_any_strides(layout, dtype, device):
    q, k, v = packed_qkv(2, 3, 2, 2, 64, dtype, device)
    positions = torch.arange(3, device=device)
    table = make_table(64, device)
    overflow = torch.zeros(1, dtype=torch.int32, device=device)
    plain = make_caches(2, 2, 8, 64, dtype, device)
    if layout == "strided":
        other = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in plain]
    else:
        wide = [torch.zeros(2, 2, 8, 67, dtype=dtype, device=device) for _ in plain]
        other = [w[..., 1:65].copy_(cache) for w, cache in zip(wide, plain, strict=True)]
    for caches in (plain, other):
        ops.rope_append(
            q, k, v, table, positions, *caches, positions + 2, overflow, interleaved=False
        )
    assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))


@STYLES
@pytest.mark.parametrize("wrong", [-1, 11, 2**40, -(2**40)])
@pytest.mark.parametrize("which", ["slot", "position"])
def test_out_of_range_tokens_are_suppressed(which, wrong, interleaved, device):
    q, k, v = packed_qkv(2, 3, 4, 2, 16, torch.float32, device)
    table = make_table(8, device, max_positions=11)
    positions = torch.tensor([[0, 1, 2], [3, 4, 5]], device=device)
    slots = positions + 1
    caches = make_caches(2, 2, 11, 16, torch.float32, device)
    expected = [cache.clone() for cache in caches]
    overflow = torch.zeros(1, dtype=torch.int32, device=device)

    def append(caches):
        return ops.rope_append(
            q, k, v, table, positions, *caches, slots, overflow, interleaved=interleaved
        )

    q_expected = append(expected)
    assert overflow.item() == 0
    for cache, changed in zip(caches, expected, strict=True):
        changed[1, :, slots[1, 0]] = cache[1, :, slots[1, 0]]
    q_expected[1, 0] = 0
    {"slot": slots, "position": positions}[which][1, 0] = wrong
    q_out = append(caches)
    assert overflow.item() == 1
    assert torch.equal(q_out, q_expected)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_append_only_ignores_positions(device):
    q, k, v = packed_qkv(1, 2, 2, 2, 16, torch.float32, device)
    caches = make_caches(1, 2, 4, 16, torch.float32, device)
    overflow = torch.zeros(1, dtype=torch.int32, device=device)
    slots = torch.tensor([3, 1], device=device)
    q_out = ops.rope_append(q, k, v, None, slots - 100, *caches, slots, overflow, interleaved=False)
    assert torch.equal(q_out, q)
    assert torch.equal(caches[0][:, :, slots], k.transpose(1, 2))
    assert overflow.item() == 0


def test_overflow_flag_stays_set(device):
    q, k, v = packed_qkv(1, 1, 2, 2, 16, torch.float32, device)
    caches = make_caches(1, 2, 4, 16, torch.float32, device)
    overflow = torch.ones(1, dtype=torch.int32, device=device)
    slots = torch.tensor([0], device=device)
    ops.rope_append(q, k, v, None, slots, *caches, slots, overflow, interleaved=False)
    assert overflow.item() == 1  # the host clears it, when it has read it


def arguments(device) -> dict:
    q, k, v = packed_qkv(2, 3, 4, 2, 16, torch.float32, device)
    k_cache, v_cache = make_caches(3, 2, 8, 16, torch.float32, device)
    index = torch.arange(3, device=device)
    return {
        "q": q,
        "k": k,
        "v": v,
        "table": make_table(16, device),
        "positions": index,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": index.expand(2, 3),
        "overflow": torch.zeros(1, dtype=torch.int32, device=device),
    }


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda t: t[0], ValueError, r"q must be \[batch, seq_len, num_heads, head_dim\]"),
        ("q", lambda t: t.transpose(2, 3), ValueError, r"q must .* unit last stride, got shape"),
        ("q", lambda t: t.int(), TypeError, r"q must be float32, float16 or bfloat16, got torch.i"),
        ("k", lambda t: t.half(), TypeError, "k must be torch.float32, got torch.float16"),
        ("k", lambda t: t[:, :2], ValueError, r"k must have shape \[2, 3, 2, 16\], got \[2, 2, 2,"),
        ("k", lambda t: t[..., :8], ValueError, r"k must have shape .* got \[2, 3, 2, 8\]"),
        ("v", lambda t: t[:, :, :1], ValueError, r"v must have shape .* got \[2, 3, 1, 16\]"),
        ("v", lambda t: t.to("meta"), ValueError, r"v must be on \w+(:0)?, got meta"),
        ("table", lambda t: t.half(), TypeError, "table must be torch.float32, got torch.f"),
        ("table", lambda t: t[:, ::2], ValueError, r"table must be a contiguous \[max_positions"),
        (
            "table",
            lambda t: t[..., 0],
            ValueError,
            r"table must be a contiguous .* \[40, 8\]",
        ),
        ("table", lambda t: t.repeat(1, 2, 1), ValueError, "head_dim = 16 .* got rotary_dim 32"),
        ("table", lambda t: t.to("meta"), ValueError, r"table must be on \w+(:0)?, got meta"),
        ("positions", lambda t: t.int(), TypeError, "positions must be torch.int64, got torch.int"),
        ("positions", lambda t: t[:1], ValueError, r"positions must have shape \[2, 3\] or \[3\]"),
        ("slots", lambda t: t[:1], ValueError, r"slots must .* or \[3\], got \[1, 3\]"),
        ("slots", lambda t: t.to("meta"), ValueError, r"slots must be on \w+(:0)?, got meta"),
        ("k_cache", lambda t: t[:1], ValueError, r"k_cache must hold at least the 2 rows .* got 1"),
        ("k_cache", lambda t: t[0], ValueError, r"k_cache must be \[batch, num_kv_heads, max_seq"),
        (
            "k_cache",
            lambda t: t[:, :1],
            ValueError,
            r"k_cache must have shape \[3, 2, 8, 16\]",
        ),
        (
            "k_cache",
            lambda t: t.bfloat16(),
            TypeError,
            "k_cache must be torch.float32, got tor",
        ),
        ("v_cache", lambda t: t[:, :, :7], ValueError, r"v_cache must have shape \[3, 2, 8, 16\]"),
        ("v_cache", lambda t: t.mT, ValueError, "v_cache must .* unit last stride"),
        (
            "overflow",
            lambda t: t.long(),
            TypeError,
            "overflow must be torch.int32, got torch.i",
        ),
        ("overflow", lambda t: t[0], ValueError, r"overflow must have shape \[1\], got \[\]"),
    ],
)
def test_rejects_wrong_arguments(name, change, error, message, device):
    given = arguments(device)
    copies = {key: tensor.clone() for key, tensor in given.items()}
    given[name] = change(given[name])
    with pytest.raises(error, match=message):
        ops.rope_append(**given, interleaved=False)
    for key in ("k_cache", "v_cache", "overflow"):
        if key != name:
            assert torch.equal(given[key], copies[key])
    if name in ("table", "positions"):
        with pytest.raises(error, match=message):
            ops.apply_rope(copies["q"], given["table"], given["positions"], interleaved=False)


def test_apply_rope_rejects_wrong_x(device):
    given = arguments(device)
    for change, message in (
        (lambda t: t[0], r"x must be \[batch, seq_len, num_heads, head_dim\]"),
        (lambda t: t.transpose(2, 3), "x must .* unit last stride, got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.apply_rope(change(given["q"]), given["table"], given["positions"], interleaved=True)


@KERNELS_ONLY
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t[0], "q must have 4 dimensions"),
        ("k", lambda t: t[:, :2], "k and v must have the tokens and the head_dim of q"),
        ("v", lambda t: t[:, :, :1], "k and v must .* and the same heads"),
        ("v", lambda t: t.half(), "must have the device and dtype of q"),
        (
            "table",
            lambda t: t.repeat(1, 2, 1),
            "table must be a contiguous float32 .* head_dim / 2",
        ),
        ("table", lambda t: t.half(), "table must be a contiguous float32"),
        ("positions", lambda t: t[:, :2], r"positions and slots must be int64 \[2, 3\]"),
        ("slots", lambda t: t[:1], r"positions and slots must be int64 \[2, 3\]"),
        ("slots", lambda t: t.int(), r"positions and slots must be int64 \[2, 3\]"),
        ("k_cache", lambda t: t[:1], "k_cache and v_cache must be the same .batch of q or more"),
        ("v_cache", lambda t: t[:, :, :7], "k_cache and v_cache must be the same"),
        ("v_cache", lambda t: t.mT, "must have 4 dimensions and unit last stride"),
        ("overflow", lambda t: t[:0], r"overflow must be int32 \[1\]"),
    ],
)
def test_raw_op_guards_memory(name, change, message, device):
    given = arguments(device)
    given["positions"] = given["positions"].expand(2, 3)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastshard.rope_append.default(*given.values(), False)


@STYLES
def test_traces_without_a_graph_break(interleaved, device):
    def both(q, k, v, table, positions, k_cache, v_cache, slots, overflow):
        q = ops.apply_rope(q * 2, table, positions, interleaved=interleaved)
        return ops.rope_append(
            q, k, v, table, positions, k_cache, v_cache, slots, overflow, interleaved=interleaved
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    given = arguments(device)
    given["slots"] = given["slots"] + 6  # the last token overflows
    copies = {key: tensor.clone() for key, tensor in given.items()}
    assert torch.equal(compiled(**given), both(**copies))
    for key in ("k_cache", "v_cache", "overflow"):  # mutations survive functionalisation
        assert torch.equal(given[key], copies[key])
    assert given["overflow"].item() == 1


def rotate_and_append(q, k, v, table, positions, k_cache, v_cache, slots, overflow):
    """The append, and reads of the caches before and after it."""
    q = ops.apply_rope(q, table, positions, interleaved=True)
    before = k_cache.sum()
    q = ops.rope_append(
        q, k, v, table, positions, k_cache, v_cache, slots, overflow, interleaved=False
    )
    return q, before, k_cache * 2, v_cache.amax(), overflow + 1


def test_compiles_once_for_all_sizes(device):
    def sized(b, s, max_seq_len):
        q, k, v = packed_qkv(b, s, 6, 2, 16, torch.float16, device)
        k_cache, v_cache = make_caches(b + 1, 2, max_seq_len, 16, torch.float16, device)
        return {
            "q": q,
            "k": k,
            "v": v,
            "table": make_table(16, device),
            "positions": torch.arange(s, device=device) + max_seq_len // 2,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slots": torch.arange(s, device=device) + max_seq_len - s + (b == 2),
            "overflow": torch.zeros(1, dtype=torch.int32, device=device),
        }

    calls = [sized(3, 5, 12), sized(2, 4, 20), sized(5, 7, 31)]
    assert_compiles_once(rotate_and_append, calls)
    assert [call["overflow"].item() for call in calls] == [0, 1, 0]


def test_a_graph_knows_what_an_append_writes(device):
    """AOTAutograd sees a function without side effects, of the three tensors that it changes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    given = arguments(device)
    compiled = torch.compile(
        rotate_and_append, fullgraph=True, backend=aot_autograd(fw_compiler=backend)
    )
    with torch.no_grad():
        compiled(**given)
    (node,) = (n for n in graphs[0].graph.nodes if "auto_functionalized" in str(n.target))
    assert node.args == (torch.ops.fastshard.rope_append.default,)
    changed = node.kwargs["_all_bases"]
    assert [base.meta["val"].shape for base in changed] == [
        given[name].shape for name in ("k_cache", "v_cache", "overflow")
    ]


def test_ignores_autocast(device):
    assert_ignores_autocast(rotate_and_append, arguments(device))


@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (24, 10), (8, 0)])
def test_gradients(head_dim, rotary_dim, interleaved, dtype, device):
    given = {
        "x": torch.randn(2, 5, 3, head_dim, dtype=dtype, device=device),
        "table": make_table(rotary_dim, device),
        "positions": torch.tensor([[0, 1, 2, 3, 39], [7, 3, 3, 20, 0]], device=device),
    }

    def ours(x, table, positions):
        return ops.apply_rope(x, table, positions, interleaved=interleaved)

    def plain(x, table, positions):
        return rotate(x, table, positions, interleaved)

    assert_gradients_as_accurate(ours, plain, given, ["x"])
    if rotary_dim == 10 and dtype == torch.float32:
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert_gradients_as_accurate(compiled, plain, given, ["x"])


def test_a_table_has_no_gradient(device):
    x, table = torch.randn(1, 2, 3, 16, device=device), make_table(16, device).requires_grad_()
    with pytest.raises(RuntimeError, match="table must not require grad: apply_rope has a gradien"):
        ops.apply_rope(x, table, torch.arange(2, device=device), interleaved=False)
    with torch.no_grad():
        ops.apply_rope(x, table, torch.arange(2, device=device), interleaved=False)


@pytest.mark.parametrize("batched", ["q", "slots", "k_cache"])
def test_vmap_of_an_append_is_refused(batched, device):
    given = arguments(device)

    def append(x):
        return ops.rope_append(**given | {batched: x}, interleaved=False)

    with pytest.raises(RuntimeError, match=r"rope_append does not run under torch\.vmap"):
        torch.vmap(append)(torch.stack([given[batched]] * 2))


def test_rope_append_refuses_gradients(device):
    assert_refuses_gradients(ops.rope_append, arguments(device) | {"interleaved": False})


@STYLES
def test_opcheck(interleaved, device):
    given = arguments(device)
    positions = given["positions"].expand(2, 3)
    torch.library.opcheck(
        torch.ops.fastshard.apply_rope.default,
        (given["q"], given["table"], positions, interleaved),
    )
    given["positions"] = positions
    rope_append = torch.ops.fastshard.rope_append.default
    torch.library.opcheck(rope_append, (*given.values(), interleaved))
    given["table"] = None
    torch.library.opcheck(rope_append, (*given.values(), interleaved))


@CUDA_ONLY
@STYLES
def test_replays_in_a_graph(interleaved, device):
    given = arguments(device)
    q, table, positions = given["q"], given["table"], given["positions"]
    assert_replays_in_a_graph(
        lambda: ops.apply_rope(q, table, positions, interleaved=interleaved), q
    )

    def append():
        q_out = ops.rope_append(**given, interleaved=interleaved)
        return torch.cat([t.flatten() for t in (q_out, given["k_cache"], given["v_cache"])])

    for name in ("q", "k", "v"):
        assert_replays_in_a_graph(append, given[name])


@CUDA_ONLY
def test_a_replay_reads_positions_and_slots(device):
    given = arguments(device)
    given["slots"] = given["slots"].clone()
    ops.rope_append(**given, interleaved=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q_out = ops.rope_append(**given, interleaved=False)
    given["positions"] += 4
    given["slots"] += 4
    expected = {key: tensor.clone() for key, tensor in given.items()}
    graph.replay()
    assert torch.equal(q_out, ops.rope_append(**expected, interleaved=False))
    assert torch.equal(given["k_cache"], expected["k_cache"])


@CUDA_ONLY
@STYLES
def test_runs_one_kernel_of_ours(interleaved, device):
    given = arguments(device)
    q, table, positions = given["q"], given["table"], given["positions"]
    for call in (
        lambda: ops.apply_rope(q, table, positions, interleaved=interleaved),
        lambda: ops.rope_append(**given, interleaved=interleaved),
    ):
        names = cuda_kernel_names(call)
        assert len(names) == 1
        assert "fastshard::rope_kernel" in names[0]


def test_cost():
    given = arguments("cpu")  # 6 tokens; 4, 2 and 2 heads of 16 float32; 8 pairs
    x, table, index = given["q"], given["table"], given["positions"].expand(2, 3)
    cost = ops.COSTS["apply_rope"](x, table, index, False)
    assert cost == ops.Cost(bytes=2 * 6 * 64 * 4 + 6 * (8 + 64), flops=6 * 4 * 8 * 6)
    cost = ops.COSTS["rope_append"](*given.values(), False)
    assert cost == ops.Cost(bytes=2 * 6 * 128 * 4 + 6 * (16 + 64), flops=6 * 6 * 8 * 6)
    given["table"] = None
    cost = ops.COSTS["rope_append"](*given.values(), False)
    assert cost == ops.Cost(bytes=2 * 6 * 128 * 4 + 6 * 8, flops=0)
