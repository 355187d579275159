"""Attention ops: every device against the full float64 score matrix, and what must not be read."""

import math
import sys

import pytest
import torch
from torch import Tensor

from fastshard import ops
from helpers import (
    CUDA_ONLY,
    KERNELS_ONLY,
    assert_as_accurate,
    assert_compiles_once,
    assert_ignores_autocast,
    assert_refuses_gradients,
    assert_replays_in_a_graph,
    cuda_kernel_names,
)

DTYPES = [torch.float16, torch.bfloat16]
NAN = float("nan")
NO_ROPE = (None, None, False)  # of the raw ops
large = pytest.mark.large


def visible_keys(
    b, s_q, s_kv, *, mask=None, causal=False, kv_lengths=None, first_key=None, window=None
) -> Tensor:
    """The visibility rule written out key by key: bool ``[b, s_q, s_kv]``."""
    visible = torch.zeros(b, s_q, s_kv, dtype=torch.bool)
    if mask is not None:
        keep = mask.cpu() if mask.dtype == torch.bool else mask.cpu() > -math.inf
    for row in range(b):
        length = s_kv if kv_lengths is None else min(int(kv_lengths[row]), s_kv)
        first = 0 if first_key is None else max(int(first_key[row]), 0)
        for i in range(s_q):
            index = length - s_q + i
            begin = first if window is None else max(first, index - window + 1)
            end = min(length, index + 1) if causal else length
            if mask is not None:
                end = min(end, mask.shape[2])
            if begin >= end:
                continue
            visible[row, i, begin:end] = True
            if mask is not None:
                visible[row, i, begin:end] &= keep[row % mask.shape[0], i, begin:end]
    return visible


def full_matrix(q, k, v, visible, *, mask=None, softcap=None, softmax_scale=None) -> Tensor:
    """Attention by the s x S matrix, eagerly in q's dtype: float64 makes it the golden result."""
    group = q.shape[2] // k.shape[2]
    valid = visible.any(1)[:, :, None, None]  # a key that nobody sees may be NaN
    k, v = (torch.where(valid, t, 0).repeat_interleave(group, 2) for t in (k, v))
    scale = softmax_scale or 1 / math.sqrt(q.shape[3])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        bias = torch.zeros(mask.shape[0], *visible.shape[1:], dtype=q.dtype, device=q.device)
        shared = min(mask.shape[2], bias.shape[2])
        bias[..., :shared] = mask[..., :shared].to(q.dtype)
        scores = scores + bias[:, None]
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    weights = torch.softmax(scores, -1).masked_fill(~visible.any(-1)[:, None, :, None], 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def make_qkv(device, dtype, *, b=1, s_q=16, s_kv=16, num_kv_heads=1, group=1, head_dim=64):
    """Random q, k, v. Scores of standard deviation 2, so that the softmax is far from uniform."""
    q = 2 * torch.randn(b, s_q, num_kv_heads * group, head_dim, device=device)
    k = torch.randn(b, s_kv, num_kv_heads, head_dim, device=device)
    v = torch.randn(b, s_kv, num_kv_heads, head_dim, device=device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check(q, k, v, *, softcap=None, softmax_scale=None, **rules) -> Tensor:
    """Hold ops.attention to the float64 golden result; return what it gave."""
    visible = visible_keys(q.shape[0], q.shape[1], k.shape[1], **rules).to(q.device)
    scores = {"mask": rules.get("mask"), "softcap": softcap, "softmax_scale": softmax_scale}
    actual = ops.attention(q, k, v, softcap=softcap, softmax_scale=softmax_scale, **rules)
    assert actual.is_contiguous()
    golden = full_matrix(q.double(), k.double(), v.double(), visible, **scores)
    assert_as_accurate(actual, golden, full_matrix(q, k, v, visible, **scores))
    nothing = ~visible.any(-1)
    assert not actual[nothing].any(), "a query with nothing to attend to must give zeros"
    return actual


# Every template (64, 96, 128, 256), and head dims padded up to each.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 8, 72, 80, 104, 120, 136, 248])
def test_head_dims(head_dim, causal, dtype, device):
    q, k, v = make_qkv(device, dtype, s_q=9, s_kv=70, group=2, head_dim=head_dim)
    check(q, k, v, causal=causal)
    check(q[:, :2], k, v, causal=causal)


BORDERS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_kv", [*BORDERS, 513])
@pytest.mark.parametrize("s_q", [1, 17, 64, 65, 257])
def test_tile_borders(s_q, s_kv, causal, device):
    """Causal with s_q > s_kv leaves the first queries with nothing."""
    check(*make_qkv(device, torch.float16, s_q=s_q, s_kv=s_kv), causal=causal)


@pytest.mark.parametrize("s_q", [1, 3, 20])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16, 17])
def test_groups(group, s_q, device):
    q, k, v = make_qkv(device, torch.bfloat16, s_q=s_q, s_kv=40, num_kv_heads=2, group=group)
    check(q, k, v, causal=True)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 3, 40])
def test_key_bounds(s_q, causal, integer, device):
    """NaN lies in every key before first_key and from kv_lengths on."""
    lengths, first = [0, 1, 70, 96, 33, 200], [0, 0, 67, -5, 40, 1]
    q, k, v = make_qkv(device, torch.float16, b=6, s_q=s_q, s_kv=96, num_kv_heads=2, group=3)
    for row in range(6):
        for tensor in (k, v):
            tensor[row, lengths[row] :] = NAN
            tensor[row, : max(first[row], 0)] = NAN
    kv_lengths = torch.tensor(lengths, dtype=integer, device=device)
    first_key = torch.tensor(first, dtype=integer, device=device)
    check(q, k, v, causal=causal, kv_lengths=kv_lengths, first_key=first_key)
    check(q[:2], k[:2], v[:2], causal=causal, kv_lengths=kv_lengths[:2])


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_strided_lengths(integer, device):
    q, k, v = make_qkv(device, torch.float16, b=3, s_q=1, s_kv=80)
    pairs = torch.tensor([[50, 3], [60, 4], [80, 0]], dtype=integer, device=device)
    check(q, k, v, kv_lengths=pairs[:, 0], first_key=pairs[:, 1])
    check(q, k, v, kv_lengths=pairs[:1, 0].expand(3))


@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("s_q", [1, 70])
def test_window(s_q, window, device):
    q, k, v = make_qkv(device, torch.bfloat16, b=2, s_q=s_q, s_kv=150, group=2)
    kv_lengths = torch.tensor([150, 100], device=device)
    first_key = torch.tensor([0, 60], device=device)
    check(q, k, v, causal=True, window=window)
    check(q, k, v, causal=True, window=window, kv_lengths=kv_lengths, first_key=first_key)


@pytest.mark.parametrize("s_q", [1, 20])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_and_scale(softcap, s_q, device):
    q, k, v = make_qkv(device, torch.float16, s_q=s_q, s_kv=70, group=2)
    check(q, k, v, causal=True, softcap=softcap, softmax_scale=0.5)
    check(q, k, v, softmax_scale=0.01)


def make_mask(b, s_q, num_keys, dtype, device) -> Tensor:
    """Distinct along every axis; query 1 sees nothing at all, query 2 only the last key."""
    keep = torch.rand(b, s_q, num_keys, device=device) < 0.6
    keep[:, 1] = False
    keep[:, 2] = torch.arange(num_keys, device=device) == num_keys - 1
    if dtype == torch.bool:
        return keep
    # Multiples of 1/8 up to 4: exact in every dtype.
    values = torch.randint(-32, 33, keep.shape, device=device) / 8
    return values.masked_fill(~keep, -math.inf).to(dtype)


MASK_DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("mask_batch", [1, 2])
@pytest.mark.parametrize("s_q", [3, 40])
def test_mask(s_q, mask_batch, dtype, device):
    q, k, v = make_qkv(device, torch.float16, b=2, s_q=s_q, s_kv=70, num_kv_heads=2, group=2)
    mask = make_mask(mask_batch, s_q, 70, dtype, device)
    actual = check(q, k, v, mask=mask)
    assert not actual[:, 1].any()
    wide = torch.cat([mask, torch.ones_like(mask)], 2)  # keys that do not exist
    assert torch.equal(ops.attention(q, k, v, mask=wide), actual)
    check(q, k, v, mask=mask, softcap=5.0, first_key=torch.tensor([3, 0], device=device))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_strided_mask(dtype, device):
    q, k, v = make_qkv(device, torch.float16, b=2, s_q=5, s_kv=70)
    mask = make_mask(2, 5, 70, dtype, device)
    expected = ops.attention(q, k, v, mask=mask)
    by_key_first = mask.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(ops.attention(q, k, v, mask=by_key_first), expected)
    keys = mask[:1, :1].expand(2, 5, 70)
    check(q, k, v, mask=keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s_q", [2, 30])
def test_lowest_finite_mask_attends_evenly(s_q, dtype, device):
    """Hugging Face hides keys by the lowest number: a row of nothing else is a plain mean."""
    q, k, v = make_qkv(device, torch.bfloat16, s_q=s_q, s_kv=64)
    mask = torch.full((1, s_q, 64), torch.finfo(dtype).min, dtype=dtype, device=device)
    mean = v.double().mean(1, keepdim=True).expand(1, s_q, 1, 64)
    # The weights 1/64 are exact; the rounding of the result is half an ulp of at most 1.
    torch.testing.assert_close(ops.attention(q, k, v, mask=mask).double(), mean, rtol=0, atol=2**-8)


@pytest.mark.parametrize("s_q", [1, 2, 30])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cached(head_dim, s_q, device):
    """A cache with more rows than the batch, NaN in every slot past the lengths."""
    lengths = [s_q, 37, 100, 64]
    q, k, v = make_qkv(
        device, torch.bfloat16, b=4, s_q=s_q, s_kv=100, num_kv_heads=2, group=4, head_dim=head_dim
    )
    k_cache, v_cache = (
        torch.full((6, 2, 128, head_dim), NAN, dtype=q.dtype, device=device) for _ in "kv"
    )
    for row, length in enumerate(lengths):
        k_cache[row, :, :length] = k[row, :length].transpose(0, 1)
        v_cache[row, :, :length] = v[row, :length].transpose(0, 1)
    kv_lengths = torch.tensor(lengths, device=device)
    actual = ops.cached_attention(q, k_cache, v_cache, kv_lengths)
    visible = visible_keys(4, s_q, 100, causal=True, kv_lengths=kv_lengths).to(device)
    golden = full_matrix(q.double(), k.double(), v.double(), visible)
    assert_as_accurate(actual, golden, full_matrix(q, k, v, visible))

    # A mask shorter than the cache replaces the causal rule, and hides the slots it does not reach.
    mask = torch.rand(1, s_q, 90, device=device) < 0.7
    actual = ops.cached_attention(q, k_cache, v_cache, kv_lengths, mask=mask)
    visible = visible_keys(4, s_q, 100, mask=mask, kv_lengths=kv_lengths).to(device)
    golden = full_matrix(q.double(), k.double(), v.double(), visible)
    assert_as_accurate(actual, golden, full_matrix(q, k, v, visible))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("s_q", [2, 10])
def test_long_cache(s_q, layer_norm, head_dim, device):
    """Long enough for its keys to be split over blocks; rows far shorter than the cache."""
    rows = [0, 1, 65, 2100 - 3]
    q, k, v = make_qkv(device, torch.float16, b=4, s_q=s_q, s_kv=2100, group=3, head_dim=head_dim)
    for row, length in enumerate(rows):
        k[row, length:], v[row, length:] = NAN, NAN
    kv_lengths = torch.tensor(rows, device=device)
    if not layer_norm:
        check(q, k, v, causal=True, kv_lengths=kv_lengths)
        check(q, k, v, causal=True, kv_lengths=kv_lengths, window=300)
    else:
        check_layer_norm(q, k, v, causal=True, kv_lengths=kv_lengths)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_as_many_splits_as_there_can_be(layer_norm, device):
    q, k, v = make_qkv(device, torch.float16, s_q=1, s_kv=40000)
    (check_layer_norm if layer_norm else check)(q, k, v)


# The decode kernel: up to 16 rows (query tokens x query heads of a group) a key/value head.
DECODE_HEAD_DIMS = [64, 96, 128]
ROWS = [(1, 1), (1, 8), (8, 1), (3, 3), (1, 9), (1, 16), (4, 4), (16, 1), (5, 3), (1, 17), (17, 1)]


@pytest.mark.parametrize("head_dim", DECODE_HEAD_DIMS)
@pytest.mark.parametrize(("s_q", "group"), ROWS)
def test_decode_rows(s_q, group, head_dim, device):
    shape = {"b": 2, "s_q": s_q, "s_kv": 50, "num_kv_heads": 2, "group": group}
    q, k, v = make_qkv(device, torch.bfloat16, head_dim=head_dim, **shape)
    check(q, k, v, causal=True, kv_lengths=torch.tensor([50, 21], device=device))


@pytest.mark.parametrize("head_dim", DECODE_HEAD_DIMS)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 400])
def test_decode_lengths(length, head_dim, device):
    """Both sides of a tile of keys, and of what a block takes at a time; NaN past the lengths."""
    shape = {"b": 3, "s_q": 1, "s_kv": 400, "group": 4}
    q, k, v = make_qkv(device, torch.float16, head_dim=head_dim, **shape)
    lengths = [length, 400 - length, 1]
    for row, end in enumerate(lengths):
        k[row, end:], v[row, end:] = NAN, NAN
    kv_lengths = torch.tensor(lengths, device=device)
    check(q, k, v, causal=True, kv_lengths=kv_lengths)
    first_key = torch.tensor([length // 2, 30, 0], device=device)
    check(q, k, v, causal=True, kv_lengths=kv_lengths, first_key=first_key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize(("s_q", "group"), [(3, 2), (3, 5)])
def test_decode_rules(s_q, group, head_dim, dtype, device):
    """What the other tests hold head_dim 64 to, with the lengths of a cache."""
    shape = {"b": 2, "s_q": s_q, "s_kv": 300, "num_kv_heads": 2, "group": group}
    q, k, v = make_qkv(device, dtype, head_dim=head_dim, **shape)
    k[1, 141:], v[1, 141:] = NAN, NAN
    bounds = {"kv_lengths": torch.tensor([300, 141], device=device)}
    check(q, k, v, **bounds)
    check(q, k, v, causal=True, window=37, **bounds)
    check(q, k, v, causal=True, softcap=3.0, **bounds)
    for mask_dtype in (torch.bool, torch.float16):
        mask = make_mask(2, s_q, 280, mask_dtype, device)
        check(q, k, v, mask=mask, first_key=torch.tensor([0, 9], device=device), **bounds)


def test_decode_leaves_no_trace(device):
    """Launches of one stream share a workspace: what one leaves in it must not reach the next."""
    cases = []
    for s_kv, s_q, head_dim in [(1500, 1, 128), (700, 4, 64), (140, 2, 96), (1500, 1, 128)]:
        cases.append(
            make_qkv(device, torch.float16, s_q=s_q, s_kv=s_kv, group=4, head_dim=head_dim)
        )
    expected = [check(*case, causal=True) for case in cases]
    for case, before in zip(cases, expected, strict=True):
        assert torch.equal(ops.attention(*case, causal=True), before)


def heads_to_fill(device) -> int:
    """Key/value heads whose rows fill the device with the tiles of the prefill kernel."""
    if torch.device(device).type != "cuda":
        return 5  # the emulated device has 4 multiprocessors
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count + 1


# A warp of the prefill kernel has 32 rows, a block 128; or 16 and 64.
PREFILL_ROWS = [17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
PREFILL = [(rows, head_dim) for head_dim in (64, 128) for rows in PREFILL_ROWS]
PREFILL += [(129, 96), (129, 120), (65, 256), (65, 200)]


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize(("s_q", "head_dim"), PREFILL)
def test_prefill_rows(s_q, head_dim, fills, device):
    """NaN lies in every key before first_key and from kv_lengths on."""
    heads = heads_to_fill(device) if fills else 1
    q, k, v = make_qkv(
        device, torch.bfloat16, s_q=s_q, s_kv=s_q + 40, num_kv_heads=heads, head_dim=head_dim
    )
    check(q, k, v, causal=True)
    length, first = s_q + 21, 11
    for tensor in (k, v):
        tensor[:, length:], tensor[:, :first] = NAN, NAN
    bounds = {
        "kv_lengths": torch.tensor([length], device=device),
        "first_key": torch.tensor([first], device=device),
    }
    check(q, k, v, causal=True, window=50, **bounds)
    check_layer_norm(q, k, v, **bounds)


# Whether a row of the mask starts where a vector of its kernel may, and keys are neighbours.
MASK_LAYOUTS = {
    "whole": lambda keep: keep,
    "odd_rows": lambda keep: keep[..., :121].contiguous(),
    "half_a_vector": lambda keep: torch.cat([keep[..., :4], keep], 2)[..., 4:],
    "by_key": lambda keep: keep.transpose(1, 2).contiguous().transpose(1, 2),
    "every_other_key": lambda keep: keep.repeat_interleave(2, 2)[..., ::2],
    "same_for_all": lambda keep: keep[:1].expand(2, -1, -1),
}


@pytest.mark.parametrize("layout", MASK_LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_prefill_mask(head_dim, layout, device):
    """Keys that end in the middle of a vector of the mask."""
    heads = heads_to_fill(device)
    shape = {"b": 2, "s_q": 65, "s_kv": 121, "num_kv_heads": heads, "head_dim": head_dim}
    q, k, v = make_qkv(device, torch.float16, **shape)
    keep = make_mask(2, 65, 128, torch.bool, device)
    mask = MASK_LAYOUTS[layout](keep)
    check(q, k, v, mask=mask)
    check(q, k, v, mask=mask, first_key=torch.tensor([3, 50], device=device))
    additive = MASK_LAYOUTS[layout](make_mask(2, 65, 128, torch.float16, device))
    check(q, k, v, mask=additive)
    check(q, k, v, mask=additive, first_key=torch.tensor([3, 50], device=device))
    check(q, k, v, mask=additive.float())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_mask_of_a_long_cache(head_dim, device):
    """Long enough for the keys of a prefill to be split over blocks."""
    q, k, v = make_qkv(device, torch.float16, s_q=20, s_kv=2080, head_dim=head_dim)
    for dtype in (torch.bool, torch.float16):
        check(q, k, v, mask=make_mask(1, 20, 2080, dtype, device))


# The kernels leave the origin of the exponent where it is while no score is 2^8 past it.
STEPS = {"above": 20.0, "below": 6.0, "at": 8.0, "slow": 0.5, "falling": -6.0}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_growing_scores(head_dim, fills, step, device):
    """Scores that grow by a power of 2 every 16 keys, each row of queries at its own rate."""
    heads = heads_to_fill(device) if fills else 1
    shape = {"s_q": 40, "s_kv": 200, "num_kv_heads": heads, "head_dim": head_dim}
    q, k, v = make_qkv(device, torch.float16, **shape)
    q[..., 0], q[..., 1] = 1, torch.linspace(0, 1, 40, device=device)[None, :, None].half()
    growth = STEPS[step] * math.log(2) * (torch.arange(200, device=device) // 16)
    k *= 0.1
    k[..., 0] = growth[None, :, None].half() / 2
    k[..., 1] = growth[None, :, None].half() / 2
    check(q, k, v, softmax_scale=1.0)
    check(q, k, v, softmax_scale=1.0, causal=True)


@large
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_long_prefill(head_dim, device):
    q, k, v = make_qkv(device, torch.bfloat16, s_q=700, s_kv=1100, group=3, head_dim=head_dim)
    check(q, k, v, causal=True)


def make_table(max_positions, num_pairs, device) -> Tensor:
    """Angles of random frequencies, none of them special."""
    angles = torch.outer(torch.arange(max_positions), torch.rand(num_pairs) + 0.1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)


def check_rope(q, k, v, num_pairs, positions, *, interleaved, layer_norm=False, **rules) -> None:
    """Attention that rotates is attention after apply_rope, bit by bit."""
    table = make_table(64, num_pairs, q.device)
    rotated = ops.apply_rope(q, table, positions, interleaved=interleaved)
    function = ops.attention_layer_norm if layer_norm else ops.attention
    rope = {"rope_table": table, "rope_positions": positions, "rope_interleaved": interleaved}
    actual, expected = function(q, k, v, **rules, **rope), function(rotated, k, v, **rules)
    assert not torch.equal(expected, function(q, k, v, **rules))
    assert torch.equal(actual, expected)


# Rotated elements: all, a part, and parts that are no whole vectors or none of their halves.
ROPE = [(64, 32), (64, 24), (64, 8), (64, 4), (64, 12), (64, 3), (96, 48), (128, 64), (128, 56)]
ROPE += [(256, 128), (256, 72), (72, 32), (8, 4), (104, 52), (248, 120)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "num_pairs"), ROPE)
@pytest.mark.parametrize("s_q", [1, 5, 37])
def test_rope(s_q, head_dim, num_pairs, interleaved, device):
    sizes = {"b": 2, "s_q": s_q, "s_kv": 50, "num_kv_heads": 2, "group": 3, "head_dim": head_dim}
    q, k, v = make_qkv(device, torch.float16, **sizes)
    positions = torch.randint(64, (2, s_q), device=device)
    positions[0, 0] = 63
    check_rope(q, k, v, num_pairs, positions, interleaved=interleaved, causal=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_rope_beside_other_rules(group, interleaved, device):
    sizes = {"b": 2, "s_q": 33, "s_kv": 80, "num_kv_heads": 2, "group": group, "head_dim": 128}
    q, k, v = make_qkv(device, torch.bfloat16, **sizes)
    positions = torch.arange(20, 53, device=device)  # one row for both
    rule = {"interleaved": interleaved}
    lengths = torch.tensor([80, 41], device=device)
    check_rope(q, k, v, 64, positions, **rule, layer_norm=True)
    check_rope(q, k, v, 64, positions, **rule, causal=True, kv_lengths=lengths, window=9)
    mask = make_mask(2, 33, 80, torch.bool, device)
    check_rope(q, k, v, 64, positions, **rule, mask=mask, softcap=5.0)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    check_rope(strided, k, v, 64, positions, **rule, mask=mask.float())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("s_q", [2, 40])
def test_rope_outside_of_the_table_gives_nan(s_q, interleaved, device):
    q, k, v = make_qkv(device, torch.float16, s_q=s_q, s_kv=40, group=2)
    table = make_table(64, 32, device)
    positions = torch.arange(s_q, device=device)
    positions[0], positions[-1] = -1, 64
    rope = {"rope_table": table, "rope_positions": positions, "rope_interleaved": interleaved}
    out = ops.attention(q, k, v, **rope)
    assert out[:, [0, -1]].isnan().all()
    assert out[:, 1:-1].isfinite().all()


@CUDA_ONLY
@pytest.mark.parametrize("num_pairs", [32, 12])
def test_rope_in_the_kernel(num_pairs, device):
    q, k, v = make_qkv(device, torch.float16, s_q=70, s_kv=70)
    table, positions = make_table(70, num_pairs, device), torch.arange(70, device=device)
    rope = {"rope_table": table, "rope_positions": positions}
    names = cuda_kernel_names(lambda: ops.attention(q, k, v, **rope))
    assert any("rope_kernel" in name for name in names) == (num_pairs == 12)  # no whole vectors


def test_rejects_wrong_rope(device):
    q, k, v = make_qkv(device, torch.float16, s_q=3)
    table, positions = make_table(8, 32, device), torch.arange(3, device=device)
    for wrong in ({"rope_table": table}, {"rope_positions": positions}):
        with pytest.raises(
            ValueError, match="rope_table and rope_positions must be given together"
        ):
            ops.attention(q, k, v, **wrong)
    for wrong, error, message in (
        ((table[:, :, :1], positions), ValueError, r"rope_table must be a contiguous"),
        ((make_table(8, 33, device), positions), ValueError, "rope_table must rotate at most"),
        ((table.double(), positions), TypeError, "rope_table must be torch.float32"),
        ((table, positions[:2]), ValueError, r"rope_positions must have shape \[1, 3\] or \[3\]"),
        ((table, positions.int()), TypeError, "rope_positions must be torch.int64"),
    ):
        with pytest.raises(error, match=message):
            ops.attention(q, k, v, rope_table=wrong[0], rope_positions=wrong[1])
    cache = k.transpose(1, 2).contiguous()
    with pytest.raises(ValueError, match="must be given together"):
        ops.cached_attention(q, cache, cache, torch.ones(1, device=device).int(), rope_table=table)
    with pytest.raises(ValueError, match="must be given together"):
        ops.attention_layer_norm(q, k, v, rope_table=table)


@pytest.mark.parametrize("s_q", [4, 40])
def test_nan_stays_in_its_row(s_q, device):
    """Rows share tiles, not results: a NaN in one query must show there, and nowhere else."""
    q, k, v = make_qkv(device, torch.float16, s_q=s_q, s_kv=70, group=3)
    expected = ops.attention(q, k, v, causal=True)
    q[:, 2, 1] = NAN
    actual = ops.attention(q, k, v, causal=True)
    assert actual[:, 2, 1].isnan().all()
    actual[:, 2, 1] = expected[:, 2, 1]
    assert torch.equal(actual, expected)


def test_strided_qkv(device):
    """Slices of one packed projection, poisoned around what may be read."""
    packed = torch.randn(2, 21, (4 + 2 * 2) * 64, device=device).half()
    q, k, v = (t.unflatten(-1, (-1, 64)) for t in packed.split([256, 128, 128], dim=-1))
    expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(ops.attention(q, k, v, causal=True), expected)
    check(q, k, v, causal=True)


def test_unaligned_and_permuted(device):
    q, k, v = make_qkv(device, torch.float16, b=2, s_q=5, s_kv=33, num_kv_heads=2, group=2)
    expected = ops.attention(q, k, v)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (q, k, v)]
    assert torch.equal(ops.attention(*shifted), expected)
    columns = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert torch.equal(ops.attention(*columns), expected)
    wide_elements = [torch.stack([t] * 8, -1)[..., 0] for t in (q, k, v)]
    assert torch.equal(ops.attention(*wide_elements), expected)
    odd_rows = [torch.cat([t, t[..., :4]], -1)[..., :64] for t in (q, k, v)]
    assert torch.equal(ops.attention(*odd_rows), expected)
    one_head = [t[:, :, :1].expand(2, -1, 2, 64) for t in (k, v)]
    check(q, *one_head)


@pytest.mark.parametrize(("b", "s_q", "s_kv"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(b, s_q, s_kv, device):
    q, k, v = make_qkv(device, torch.float16, b=b, s_q=s_q, s_kv=s_kv, group=2)
    out = ops.attention(q, k, v, causal=True)
    assert torch.equal(out, torch.zeros_like(q))


def check_layer_norm(q, k, v, *, eps=0.1, affine=True, **rules) -> Tensor:
    """eps is large against a variance below 1: a kernel that drops it must fail."""
    d = q.shape[3]
    weight, bias = torch.randn(2, d, device=q.device).to(q.dtype) if affine else (None, None)
    visible = visible_keys(q.shape[0], q.shape[1], k.shape[1], **rules).to(q.device)

    def normed(dtype):
        attended = full_matrix(q.to(dtype), k.to(dtype), v.to(dtype), visible)
        affine_to = (None if t is None else t.to(dtype) for t in (weight, bias))
        return torch.nn.functional.layer_norm(attended, (d,), *affine_to, eps)

    actual = ops.attention_layer_norm(q, k, v, weight, bias, eps, **rules)
    assert_as_accurate(actual, normed(torch.float64), normed(q.dtype))
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("s_q", [1, 33])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 8, 72, 200])
def test_layer_norm(head_dim, s_q, affine, dtype, device):
    q, k, v = make_qkv(device, dtype, s_q=s_q, s_kv=40, num_kv_heads=2, group=2, head_dim=head_dim)
    check_layer_norm(q, k, v, affine=affine, causal=True)


@pytest.mark.parametrize("s_q", [2, 20])
def test_layer_norm_of_nothing_is_bias(s_q, device):
    q, k, v = make_qkv(device, torch.float16, s_q=s_q, s_kv=16)
    weight, bias = torch.randn(2, 64, device=device).half()
    nothing = torch.zeros(1, s_q, 16, dtype=torch.bool, device=device)
    out = ops.attention_layer_norm(q, k, v, weight, bias, mask=nothing)
    assert torch.equal(out, bias.expand_as(out))


@pytest.mark.parametrize("has_mask", [False, True])
def test_float32_on_cpu(has_mask, monkeypatch):
    """Exact to float32's own rounding, however the queries are cut into blocks."""
    torch.manual_seed(0)
    q, k, v = make_qkv("cpu", torch.float32, b=2, s_q=37, s_kv=50, num_kv_heads=2, group=3)
    rules = {"kv_lengths": torch.tensor([50, 30]), "causal": not has_mask}
    if has_mask:
        rules["mask"] = make_mask(2, 37, 50, torch.float32, "cpu")
    visible = visible_keys(2, 37, 50, **rules)
    golden = full_matrix(q.double(), k.double(), v.double(), visible, mask=rules.get("mask"))
    for limit in (1 << 22, 2 * 12 * 50 * 5):  # at once, and ten queries at a time
        # by module name: the package's attribute of that name is the function
        monkeypatch.setattr(sys.modules["fastshard.ops.attention"], "REFERENCE_SCORES", limit)
        # 1e-5: scores up to 10 in magnitude carry 1e-6, the exponential passes that on.
        torch.testing.assert_close(
            ops.attention(q, k, v, **rules).double(), golden, rtol=0, atol=1e-5
        )


def tensors(device):
    q, k, v = make_qkv(device, torch.float16, b=2, s_q=3, s_kv=5, num_kv_heads=2, group=2)
    return {"q": q, "k": k, "v": v}


WRONG = {
    r"q must be \[b, s_q, num_qo_heads, head_dim\], got shape \[2, 3, 4\]": {"q": (2, 3, 4)},
    r"q must have a head_dim that is a multiple of 8 up to 256, got 60": {"q": (2, 3, 4, 60)},
    r"q must have a head_dim that is a multiple of 8 up to 256, got 264": {"q": (2, 3, 4, 264)},
    r"q must have a multiple of k's 2 heads, got 3 heads": {"q": (2, 3, 3, 64)},
    r"k must have .* the batch 2 and the head_dim 64 of q, got shape \[1, 5, 2, 64\]": {
        "k": (1, 5, 2, 64)
    },
    r"k must have .* the batch 2 and the head_dim 64 of q, got shape \[2, 5, 2, 72\]": {
        "k": (2, 5, 2, 72)
    },
    r"v must have the shape of k, got length 6 for 5": {"v": (2, 6, 2, 64)},
    r"mask must be \[1 or 2, 3, S\], got shape \[3, 3, 5\]": {"mask": (3, 3, 5)},
    r"mask must be \[1 or 2, 3, S\], got shape \[2, 4, 5\]": {"mask": (2, 4, 5)},
    r"mask must cover all 5 keys, got shape \[2, 3, 4\]": {"mask": (2, 3, 4)},
    r"causal must be False where a mask is given": {"mask": (2, 3, 5), "causal": True},
    r"kv_lengths must have shape \[2\], got \[3\]": {"kv_lengths": (3,)},
    r"first_key must have shape \[2\], got \[2, 1\]": {"first_key": (2, 1)},
    r"window must be at least 1, got 0": {"window": 0, "causal": True},
    r"window must be None without the causal rule, got 4": {"window": 4},
    r"softcap must be positive and finite, got 0.0": {"softcap": 0.0},
    r"softcap must be positive and finite, got nan": {"softcap": NAN},
    r"softmax_scale must be positive and finite, got -1.0": {"softmax_scale": -1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_rejects_wrong_values(message, device):
    arguments = tensors(device)
    for name, value in WRONG[message].items():
        if isinstance(value, tuple):
            integer = name in ("kv_lengths", "first_key")
            value = torch.ones(
                value, dtype=torch.int64 if integer else torch.float16, device=device
            )
        arguments[name] = value
    with pytest.raises(ValueError, match=message):
        ops.attention(**arguments)


def test_rejects_wrong_dtypes(device):
    arguments = tensors(device)
    for name in "qkv":
        with pytest.raises(TypeError, match=rf"{name} must be .*, got torch.float64"):
            ops.attention(**arguments | {name: arguments[name].double()})
    with pytest.raises(TypeError, match=r"kv_lengths must be int32 or int64, got torch.float32"):
        ops.attention(**arguments, kv_lengths=torch.ones(2, device=device))
    with pytest.raises(TypeError, match=r"mask must be bool or floating, got torch.int64"):
        ops.attention(**arguments, mask=torch.ones(2, 3, 5, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match=r"weight must be torch.float16, got torch.float32"):
        ops.attention_layer_norm(**arguments, weight=torch.ones(64, device=device))


def test_rejects_wrong_cache_and_weight(device):
    q, k, v = tensors(device).values()
    k_cache, v_cache = (t.transpose(1, 2).contiguous() for t in (k, v))
    lengths = torch.tensor([5, 5], device=device)
    with pytest.raises(
        ValueError, match=r"k_cache must be .* B at least the batch of q, got \[1, 2, 5, 64\]"
    ):
        ops.cached_attention(q, k_cache[:1], v_cache, lengths)
    with pytest.raises(
        ValueError, match=r"v_cache must have the shape of k_cache, got num_kv_heads 1 for 2"
    ):
        ops.cached_attention(q, k_cache, v_cache[:, :1], lengths)
    with pytest.raises(ValueError, match=r"bias must have shape \[64\], got \[63\]"):
        ops.attention_layer_norm(q, k, v, bias=torch.ones(63, device=device).half())


@CUDA_ONLY
def test_rejects_other_devices_and_float32(device):
    arguments = tensors(device)
    with pytest.raises(ValueError, match=r"v must be on cuda:0 like q, got cpu"):
        ops.attention(**arguments | {"v": arguments["v"].cpu()})
    with pytest.raises(ValueError, match=r"kv_lengths must be on cuda:0 like q, got cpu"):
        ops.attention(**arguments, kv_lengths=torch.tensor([5, 5]))
    with pytest.raises(
        TypeError, match=r"q must be float16 or bfloat16 on CUDA, got torch.float32"
    ):
        ops.attention(**{name: t.float() for name, t in arguments.items()})


def test_traces_without_a_graph_break(device):
    q, k, v = make_qkv(device, torch.float16, b=2, s_q=1, s_kv=40, group=2)
    k_cache, v_cache = k.transpose(1, 2), v.transpose(1, 2)
    lengths = torch.tensor([40, 7], device=device)

    def step(q, lengths):
        cached = ops.cached_attention(q * 2, k_cache, v_cache, lengths, window=20)
        return cached + ops.attention_layer_norm(q, k, v, causal=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, lengths), step(q, lengths))


def of_size(device, b, s_q, s_kv, dtype=torch.float16) -> dict:
    """Arguments of the three ops at once: q, k, v, lengths, a mask and rope."""
    q, k, v = make_qkv(device, dtype, b=b, s_q=s_q, s_kv=s_kv, num_kv_heads=2, group=2)
    return {
        "q": q,
        "k": k,
        "v": v,
        "lengths": torch.arange(b, device=device) + s_kv - b,
        "mask": torch.rand(b, s_q, s_kv, device=device) > 0.4,
        "table": make_table(s_kv, 32, device),
        "positions": torch.arange(s_q, device=device),
    }


def attend(q, k, v, lengths, mask, table, positions):
    k_cache, v_cache = k.transpose(1, 2), v.transpose(1, 2)
    rope = {"rope_table": table, "rope_positions": positions}
    return (
        ops.attention(q, k, v, mask=mask),
        ops.attention(q, k, v, causal=True, window=4, **rope),
        ops.cached_attention(q, k_cache, v_cache, lengths, first_key=lengths // 2, **rope),
        ops.cached_attention(q, k_cache, v_cache, lengths, mask=mask, softcap=9.0),
        ops.attention_layer_norm(q, k, v, causal=True),
    )


def test_compiles_once_for_all_sizes(device):
    sizes = [(3, 5, 20), (2, 4, 33), (5, 7, 70)]
    assert_compiles_once(attend, (of_size(device, *size) for size in sizes))


def test_ignores_autocast(device):
    assert_ignores_autocast(attend, of_size(device, 2, 5, 20))


def test_vmap_gives_what_a_loop_gives(device):
    q, k, v = (t.unflatten(0, (3, 2)) for t in make_qkv(device, torch.float16, b=6, s_q=3, s_kv=9))
    lengths = torch.tensor([[9, 4], [8, 2], [7, 5]], device=device)

    def step(q, k, lengths):
        return ops.cached_attention(q, k.transpose(1, 2), v[0].transpose(1, 2), lengths)

    expected = [step(*rows) for rows in zip(q, k, lengths, strict=True)]
    with torch.no_grad():
        assert torch.equal(torch.vmap(step)(q, k, lengths), torch.stack(expected))


def test_refuses_gradients(device):
    given = of_size(device, 2, 5, 20)
    q, k, v = (given[name] for name in "qkv")
    rope = {"rope_table": given["table"], "rope_positions": given["positions"]}
    mask = given["mask"].float().log()
    assert_refuses_gradients(ops.attention, {"q": q, "k": k, "v": v, "mask": mask, **rope})
    caches = {"k_cache": k.transpose(1, 2), "v_cache": v.transpose(1, 2)}
    cached = {"q": q, **caches, "kv_lengths": given["lengths"], "mask": mask, **rope}
    assert_refuses_gradients(ops.cached_attention, cached)
    weight, bias = torch.randn(2, 64, device=device).half()
    vectors = {"weight": weight, "bias": bias}
    normed = {"q": q, "k": k, "v": v, **vectors, "mask": mask, **rope}
    assert_refuses_gradients(ops.attention_layer_norm, normed)


def test_opcheck(device):
    q, k, v = make_qkv(device, torch.float16, b=2, s_q=3, s_kv=20, num_kv_heads=2, group=2)
    lengths = torch.tensor([20, 7], device=device)
    mask = torch.ones(1, 3, 20, dtype=torch.bool, device=device)
    rules = (None, True, lengths, lengths - 5, 6, 30.0, 0.125)
    weight, bias = torch.randn(2, 64, device=device).half()
    attention = torch.ops.fastshard.attention.default
    layer_norm = torch.ops.fastshard.attention_layer_norm.default
    rope = (make_table(20, 32, device), lengths[:, None].expand(2, 3) - 7, True)
    torch.library.opcheck(
        attention, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, *rules, *NO_ROPE)
    )
    torch.library.opcheck(attention, (q, k, v, mask, *([False] + 4 * [None]), 0.125, *NO_ROPE))
    torch.library.opcheck(attention, (q, k, v, *rules, *rope))
    torch.library.opcheck(layer_norm, (q, k, v, weight, bias, 1e-5, *rules, *NO_ROPE))
    torch.library.opcheck(layer_norm, (q, k, v, weight, bias, 1e-5, *rules, *rope))


# Prefill, decode in one block a row, and decode with split keys.
SHAPES = [{"s_q": 70, "s_kv": 70}, {"s_q": 1, "s_kv": 70}, {"s_q": 1, "s_kv": 4096}]


@CUDA_ONLY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replays_in_a_graph(shape, device):
    q, k, v = make_qkv(device, torch.float16, group=4, head_dim=128, **shape)
    k_cache, v_cache = (t.transpose(1, 2).contiguous() for t in (k, v))
    lengths = torch.tensor([shape["s_kv"] - 2], device=device)
    assert_replays_in_a_graph(lambda: ops.cached_attention(q, k_cache, v_cache, lengths), q)
    assert_replays_in_a_graph(lambda: ops.attention_layer_norm(q, k, v, causal=True), k)


@CUDA_ONLY
def test_graph_follows_the_lengths(device):
    """Lengths live on the device: one captured graph serves every length of the cache."""
    q, k, v = make_qkv(device, torch.float16, b=2, s_q=1, s_kv=4096, num_kv_heads=2, group=4)
    k_cache, v_cache = (t.transpose(1, 2).contiguous() for t in (k, v))
    lengths = torch.tensor([1, 2], device=device)
    ops.cached_attention(q, k_cache, v_cache, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.cached_attention(q, k_cache, v_cache, lengths)
    for new in ([5, 4096], [0, 777]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        assert torch.equal(captured, ops.cached_attention(q, k_cache, v_cache, lengths))
        visible = visible_keys(2, 1, 4096, kv_lengths=lengths).to(device)
        golden = full_matrix(q.double(), k.double(), v.double(), visible)
        assert_as_accurate(captured, golden, full_matrix(q, k, v, visible))


@CUDA_ONLY
def test_graphs_and_streams_side_by_side(device):
    """Graphs of one capture stream, replayed at the same time, and calls on other streams."""
    cases = []
    for length in (4096, 3000, 2000, 1000):
        q, k, v = make_qkv(device, torch.float16, s_q=1, s_kv=length, num_kv_heads=2, group=4)
        cases.append((q, k, v, ops.attention(q, k, v)))
    graphs, outputs = [], []
    for q, k, v, _ in cases[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append([ops.attention(q, k, v) for _ in range(8)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams[:2], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        results = []
        for (q, k, v, _), stream in zip(cases[2:], streams[2:], strict=True):
            with torch.cuda.stream(stream):
                results.append([ops.attention(q, k, v) for _ in range(8)])
        torch.cuda.synchronize()
        for (*_, expected), actual in zip(cases, [*outputs, *results], strict=True):
            assert all(torch.equal(out, expected) for out in actual)


@CUDA_ONLY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_our_kernels(shape, device):
    q, k, v = make_qkv(device, torch.float16, group=4, head_dim=128, **shape)
    general = ["fastshard::attention_kernel"]
    if shape["s_kv"] == 4096:
        general.append("fastshard::attention_combine_kernel")
    decode = ["fastshard::decode_attention_kernel"] if shape["s_q"] == 1 else general
    for call, expected in ((ops.attention, decode), (ops.attention_layer_norm, general)):
        names = cuda_kernel_names(lambda call=call: call(q, k, v))
        assert len(names) == len(expected)
        assert all(part in name for part, name in zip(expected, names, strict=True))


def raw_attention(
    q, k, v, variant, *, mask=None, causal=False, kv_lengths=None, softcap=None, rope=NO_ROPE
):
    rules = (mask, causal, kv_lengths, None, None, softcap, 1 / math.sqrt(q.shape[3]))
    return torch.ops.fastshard.attention.default(q, k, v, *rules, *rope, variant)


def check_variant(q, k, v, variant, *, softcap=None, **rules) -> None:
    visible = visible_keys(q.shape[0], q.shape[1], k.shape[1], **rules).to(q.device)
    scores = {"mask": rules.get("mask"), "softcap": softcap}
    actual = raw_attention(q, k, v, variant, softcap=softcap, **rules)
    golden = full_matrix(q.double(), k.double(), v.double(), visible, **scores)
    assert_as_accurate(actual, golden, full_matrix(q, k, v, visible, **scores))


TILES = ["few", "small", "prefill"]
VARIANTS = [*TILES, "few/1", "few/3", "small/2", "prefill/5", "small/128"]


@KERNELS_ONLY
@pytest.mark.parametrize("variant", [*VARIANTS, "decode", "decode/1", "decode/2", "decode/33"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_variants(head_dim, variant, device):
    sizes = {"b": 2, "s_q": 5, "s_kv": 300, "num_kv_heads": 2, "group": 3, "head_dim": head_dim}
    q, k, v = make_qkv(device, torch.float16, **sizes)
    check_variant(q, k, v, variant, causal=True)
    lengths = torch.tensor([300, 17], device=device)
    check_variant(q, k, v, variant, causal=True, kv_lengths=lengths)


@KERNELS_ONLY
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [72, 256])
def test_variants_of_many_rows(head_dim, variant, device):
    sizes = {"s_q": 70, "s_kv": 130, "group": 2, "head_dim": head_dim}
    check_variant(*make_qkv(device, torch.bfloat16, **sizes), variant, causal=True)


@KERNELS_ONLY
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_masks(variant, device):
    q, k, v = make_qkv(device, torch.float16, s_q=40, s_kv=96, group=2)
    for dtype in (torch.bool, torch.float32):
        check_variant(q, k, v, variant, mask=make_mask(1, 40, 96, dtype, device))
    check_variant(q, k, v, variant, softcap=3.0)


@KERNELS_ONLY
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_variants_rotate(head_dim, variant, interleaved, device):
    """80 is padded to 96; tiles of few rows rotate too where they are asked for."""
    sizes = {"b": 2, "s_q": 41, "s_kv": 50, "group": 2, "head_dim": head_dim}
    q, k, v = make_qkv(device, torch.bfloat16, **sizes)
    table = make_table(64, head_dim // 2, device)
    positions = torch.randint(64, (2, 41), device=device)
    rotated = ops.apply_rope(q, table, positions, interleaved=interleaved)
    actual = raw_attention(q, k, v, variant, rope=(table, positions, interleaved))
    assert torch.equal(actual, raw_attention(rotated, k, v, variant))


@pytest.mark.parametrize("sizes", [{"b": 0}, {"s_q": 0}, {"s_kv": 0}], ids=str)
def test_rope_of_nothing(sizes, device):
    q, k, v = make_qkv(device, torch.float16, **({"b": 2, "s_q": 40, "s_kv": 40} | sizes))
    table, positions = make_table(64, 32, device), torch.arange(q.shape[1], device=device)
    out = ops.attention(q, k, v, rope_table=table, rope_positions=positions)
    assert torch.equal(out, torch.zeros_like(q))


@CUDA_ONLY
def test_the_variant_of_the_library(device):
    q, k, v = make_qkv(device, torch.float16, s_q=70, s_kv=70, num_kv_heads=2, group=2)
    check_variant(q, k, v, "library", causal=True)
    names = cuda_kernel_names(lambda: raw_attention(q, k, v, "library", causal=True))
    assert not any("fastshard" in name for name in names)


@CUDA_ONLY
@pytest.mark.parametrize("variant", ["decode/2", *TILES])
def test_runs_the_variant(variant, device):
    configs = {"few": "<64, 1, 1, 4", "small": "<64, 4, 1, 1", "prefill": "<64, 4, 2, 1"}
    q, k, v = make_qkv(device, torch.float16, s_q=4, s_kv=70)
    names = cuda_kernel_names(lambda: raw_attention(q, k, v, variant))
    (name,) = [name for name in names if "attention_kernel" in name]
    assert configs.get(variant, "decode_attention_kernel") in name


WRONG_VARIANTS = ["", "fast", "auto/2", "library/2", "small/", "small/0", "small/129", "small/2x"]


@KERNELS_ONLY
@pytest.mark.parametrize("variant", WRONG_VARIANTS)
def test_rejects_unknown_variants(variant, device):
    q, k, v = make_qkv(device, torch.float16)
    with pytest.raises(RuntimeError, match=rf"attention: variant must be .*, got {variant}"):
        raw_attention(q, k, v, variant)


@KERNELS_ONLY
def test_rejects_variants_that_do_not_serve(device):
    q, k, v = make_qkv(device, torch.float16, s_q=17, s_kv=20)
    with pytest.raises(RuntimeError, match=r"variant decode takes .*, got head_dim 64 and 17"):
        raw_attention(q, k, v, "decode")
    q, k, v = make_qkv(device, torch.float16, head_dim=72)
    with pytest.raises(RuntimeError, match=r"variant decode/2 takes .*, got head_dim 72 and 16"):
        raw_attention(q, k, v, "decode/2")
    for rules in ({"causal": True, "softcap": 1.0}, {"kv_lengths": torch.ones(1).int().to(device)}):
        with pytest.raises(RuntimeError, match="variant library takes no mask, lengths"):
            raw_attention(q, k, v, "library", **rules)


@CUDA_ONLY
@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("causal", [False, True])
def test_a_long_plain_prompt_takes_the_faster_way(causal, scale, device):
    """From capability 9.0 on torch's own, by the rules of ours; with a window ours again."""
    q, k, v = make_qkv(device, torch.bfloat16, s_q=8192, s_kv=8192, num_kv_heads=8, group=8)
    rows = torch.arange(0, 8192, 455, device=device)
    visible = torch.ones(1, len(rows), 8192, dtype=torch.bool, device=device)
    if causal:
        visible &= torch.arange(8192, device=device) <= rows[:, None]
    outputs = []
    names = cuda_kernel_names(
        lambda: outputs.append(ops.attention(q, k, v, causal=causal, softmax_scale=scale))
    )
    is_ours = any("fastshard" in name for name in names)
    assert is_ours == (torch.cuda.get_device_capability(device) < (9, 0))
    assert outputs[0].is_contiguous()
    golden = full_matrix(q[:, rows].double(), k.double(), v.double(), visible, softmax_scale=scale)
    naive = full_matrix(q[:, rows], k, v, visible, softmax_scale=scale)
    assert_as_accurate(outputs[0][:, rows], golden, naive)
    names = cuda_kernel_names(lambda: ops.attention(q, k, v, causal=True, window=9000))
    assert all("fastshard" in name for name in names)
    names = cuda_kernel_names(lambda: ops.attention(q[:, :-8], k, v, causal=True))
    assert all("fastshard" in name for name in names), "torch aligns the causal rule elsewhere"


def test_cost():
    """A causal square of 4 has 10 of 16 pairs, a window of 2 leaves 7."""
    q, k, v = make_qkv("cpu", torch.float16, b=2, s_q=4, s_kv=4, group=2, head_dim=8)
    pairs = {"window": 7, "causal": 10, "full": 16}
    for name, count in pairs.items():
        rules = (None, name != "full", None, None, 2 if name == "window" else None, None, 1.0)
        expected = ops.Cost(bytes=2 * (2 * 128 + 2 * 64), flops=4 * 2 * 2 * 8 * count)
        assert ops.COSTS["attention"](q, k, v, *rules) == expected
    rope = (torch.empty(9, 4, 2), torch.empty(2, 4, dtype=torch.int64), False)
    expected = ops.Cost(expected.bytes + 8 * (8 + 32), expected.flops + 8 * 2 * 4 * 6)
    assert ops.COSTS["attention"](q, k, v, *rules, *rope) == expected
