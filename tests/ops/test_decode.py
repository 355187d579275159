"""decode_step: a whole shard's step against float64, its caches, its flag and its errors."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from decode_cases import Case, cast, make, plain
from torch import Tensor

from fastshard import ops
from helpers import (
    CPU_ONLY,
    CUDA_ONLY,
    assert_as_accurate,
    assert_compiles_once,
    assert_ignores_autocast,
    assert_refuses_gradients,
    assert_replays_in_a_graph,
    cuda_kernel_names,
)

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
LISTS = (
    *("sa_norm", "qkv_weight", "output_weight", "mlp_norm", "gate_up_weight", "down_weight"),
    *("qkv_bias", "output_bias", "q_norm", "k_norm"),
)


def check(given: dict) -> None:
    """Run the step and hold its output and what it wrote to the error rule."""
    golden_given, naive_given = (
        cast(given, torch.float64),
        given | {name: [cache.clone() for cache in given[name]] for name in ("k_cache", "v_cache")},
    )
    naive_given["rope_table"] = given["rope_table"].to(given["weights"].sa_norm[0].dtype)
    golden, naive = plain(golden_given), plain(naive_given)
    ops.decode_step(**given)
    out = given["out"]
    assert_as_accurate(out, golden, naive.to(out.dtype))
    row = torch.arange(len(out), device=out.device)
    for name in ("k_cache", "v_cache"):
        for actual, expected, by_torch in zip(
            given[name], golden_given[name], naive_given[name], strict=True
        ):
            written = [cache[row, :, given["slots"]] for cache in (actual, expected, by_torch)]
            assert_as_accurate(*written)
    assert given["overflow"].item() == 0


CASES = {
    "plain": Case(),
    "one-token": Case(slots=(0,)),
    "full-cache": Case(slots=(11, 0, 11)),
    "interleaved": Case(rope_interleaved=True),
    "weight-in-dtype": Case(weight_in_fp32=False),
    "qkv-bias": Case(qkv_bias=True),
    "all-biases": Case(qkv_bias=True, output_bias=True),
    "qk-norm": Case(qk_norm=True, head_dim=128, num_heads=2, num_kv_heads=1),
    "qk-norm-bias-interleaved": Case(qk_norm=True, qkv_bias=True, rope_interleaved=True),
    "tied": Case(is_tied=True),
    "first": Case(part="first"),
    "middle": Case(part="middle"),
    "last": Case(part="last"),
    "single-layer": Case(windows=(0,)),
    "single-middle-layer": Case(part="middle", windows=(0,)),
    "head-dim-96": Case(head_dim=96, num_heads=2, num_kv_heads=1),
    "head-dim-128": Case(head_dim=128, num_heads=2, num_kv_heads=2),
    "head-dim-128-group-8": Case(head_dim=128, num_heads=8, num_kv_heads=1),
    "part-of-a-head-rotates": Case(rotary_dim=40, rope_interleaved=True),
    "group-1": Case(num_heads=3, num_kv_heads=3),
    "group-7": Case(num_heads=7, num_kv_heads=1),
    "group-8": Case(num_heads=16, num_kv_heads=2),
    "windows": Case(slots=(9, 4, 0), windows=(3, 0, 20)),
    "first-key": Case(slots=(9, 4, 7), first_key=(5, 0, 7)),
    "first-key-and-window": Case(slots=(9, 9, 9), first_key=(5, 0, 8), windows=(3, 2)),
    "sizes-8": Case(hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1),
    "sizes-odd": Case(hidden_size=216, intermediate_size=296, vocab_size=131),
    "head-of-odd-rows-in-chunks": Case(
        part="last", windows=(0,), num_heads=1, num_kv_heads=1, hidden_size=2056, vocab_size=83
    ),
    "gelu": Case(activation="gelu"),
    "gelu-tanh": Case(activation="gelu_tanh"),
    "relu": Case(activation="relu"),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@HALVES
@EVERY_CASE
def test_matches_float64(case, dtype, device):
    check(make(case, dtype, device))


@CPU_ONLY
@EVERY_CASE
def test_matches_float64_in_float32(case, device):
    check(make(case, torch.float32, device))


@HALVES
@pytest.mark.parametrize("batch", range(1, 9))
def test_every_batch(batch, dtype, device):
    slots = (0, 11, 3, 7, 1, 10, 5, 8)[:batch]
    check(make(Case(slots=slots), dtype, device))


@HALVES
@pytest.mark.parametrize("slot", [63, 64, 200, pytest.param(5000, marks=pytest.mark.large)])
def test_long_contexts(slot, dtype, device):
    """Rows of very different lengths in one batch; 1 layer, so that the attention's error shows."""
    case = Case(slots=(slot, 0, slot // 2), windows=(0,), max_seq_len=slot + 3, part="middle")
    check(make(case, dtype, device))


@HALVES
@pytest.mark.large
def test_sizes_of_a_real_layer(dtype, device):
    """Qwen2.5 0.5B: nothing is a power of two."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "vocab_size": 3001}
    case = Case(num_heads=14, num_kv_heads=2, qkv_bias=True, is_tied=True, **sizes)
    check(make(case, dtype, device))


def test_steps_share_a_workspace(device):
    """Step after step, as a text is made: the workspace serves the next launch as it was left."""
    given = make(Case(slots=(1, 3, 2)), torch.float16, device)
    for token in range(6):
        given["x"] = (given["x"] * 7 + token) % 83
        check(given)
        given["slots"] += 1
        given["positions"] += 1


def test_the_batch_may_change_from_step_to_step(device):
    """Rows end, and others begin, over one workspace."""
    whole = make(Case(slots=(1, 3, 2, 5), vocab_size=84), torch.float16, device)
    for rows in (slice(0, 4), slice(1, 2), slice(0, 3), slice(2, 4), slice(0, 4)):
        given = dict(whole)
        for name in ("x", "slots", "positions", "out"):
            given[name] = whole[name][rows]
        for name in ("k_cache", "v_cache"):
            given[name] = [cache[rows] for cache in whole[name]]
        check(given)
        given["slots"] += 1  # of these rows


@pytest.mark.parametrize("part", ["whole", "middle"])
def test_a_batch_of_fewer_rows_than_the_workspace_was_made_for(part, device):
    given = make(Case(slots=(5,), part=part), torch.float16, device)
    given["workspace"] = ops.new_decode_workspace(given["weights"], 8, num_heads=4)
    check(given)


def test_writes_one_slot_a_row_and_no_other(device):
    given = make(Case(slots=(9, 0), first_key=(2, 0)), torch.float16, device)
    expected = {name: [cache.clone() for cache in given[name]] for name in ("k_cache", "v_cache")}
    inputs = cast({name: given[name] for name in ("x", "weights", "positions", "slots")},
                  torch.float16)  # fmt: skip
    ops.decode_step(**given)
    for name, caches in expected.items():
        for cache, actual in zip(caches, given[name], strict=True):
            for row, slot in enumerate((9, 0)):
                assert actual[row, :, slot].isfinite().all()
                cache[row, :, slot] = actual[row, :, slot]
            torch.testing.assert_close(actual, cache, rtol=0, atol=0, equal_nan=True)
    for name in ("x", "positions", "slots"):
        assert torch.equal(given[name], inputs[name])
    for name in LISTS:
        pairs = zip(getattr(given["weights"], name), getattr(inputs["weights"], name), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("wrong", [-1, 12, 2**40, -(2**40)])
@pytest.mark.parametrize("which", ["slots", "positions"])
@pytest.mark.parametrize("part", ["whole", "middle"])
def test_a_row_out_of_range_is_suppressed(part, which, wrong, device):
    given = make(Case(slots=(9, 4, 7), part=part), torch.float16, device)
    given["rope_table"] = given["rope_table"][:12].contiguous()
    given["positions"] = given["slots"].clone()
    before = {name: [cache.clone() for cache in given[name]] for name in ("k_cache", "v_cache")}
    golden_given = cast(given, torch.float64)
    golden, naive = plain(golden_given), plain(cast(given, torch.float16))
    given[which][1] = wrong
    ops.decode_step(**given)
    assert given["overflow"].item() == 1
    for row in (0, 2):
        assert_as_accurate(given["out"][row], golden[row], naive[row].to(given["out"].dtype))
    for name, caches in before.items():
        for i, cache in enumerate(caches):
            torch.testing.assert_close(given[name][i][1], cache[1], rtol=0, atol=0, equal_nan=True)
            for row, slot in ((0, 9), (2, 7)):
                expected = golden_given[name][i][row, :, slot]
                torch.testing.assert_close(
                    given[name][i][row, :, slot].double(), expected, rtol=2**-6, atol=2**-6
                )


@pytest.mark.parametrize("wrong", [-1, 83, 2**40, -(2**40)])
def test_a_token_outside_the_vocabulary_reads_as_the_first(wrong, device):
    given = make(Case(slots=(9, 4, 7)), torch.float16, device)
    given["x"][1] = 0
    twin = cast(given, torch.float16) | {"rope_table": given["rope_table"]}
    twin["out"] = given["out"].clone()
    ops.decode_step(**twin)
    assert twin["overflow"].item() == 0
    given["x"][1] = wrong
    ops.decode_step(**given)
    assert given["overflow"].item() == 1
    assert torch.equal(given["out"], twin["out"])


@HALVES
def test_the_norms_round_as_they_are_told(dtype, device):
    """Both styles are as accurate; they differ by where the norms of q and k round."""
    outs = []
    for weight_in_fp32 in (False, True):
        torch.manual_seed(0)
        case = Case(part="middle", qk_norm=True, weight_in_fp32=weight_in_fp32)
        given = make(case, dtype, device)
        ops.decode_step(**given)
        outs.append(given["out"])
    assert not torch.equal(*outs)


def test_the_flag_stays_set(device):
    given = make(Case(), torch.float16, device)
    given["overflow"].fill_(1)
    ops.decode_step(**given)
    assert given["overflow"].item() == 1  # the host clears it, when it has read it


def replaced(**changes):
    """A change of the weights: name -> function of the old value."""

    def change(given):
        old = given["weights"]
        new = {name: function(getattr(old, name)) for name, function in changes.items()}
        return {"weights": dataclasses.replace(old, **new)}

    return change


def edited(name, function):
    return lambda given: {name: function(given[name])}


def more_rows(given):
    """Twice the rows, but for the caches."""
    names = ("x", "positions", "slots", "out")
    workspace = ops.new_decode_workspace(given["weights"], 4, num_heads=4)
    return {name: torch.cat([given[name]] * 2) for name in names} | {"workspace": workspace}


def each(function):
    return lambda tensors: [tensors[0], *map(function, tensors[1:])]


WRONG = {
    "fewer layers": (replaced(mlp_norm=lambda t: t[:1]), ValueError,
                     "mlp_norm must have 2 tensors like sa_norm, got 1"),
    "no layer": (replaced(sa_norm=lambda t: []), ValueError,
                 "sa_norm must have 1 dimensions a layer, got no layer"),
    "fewer biases": (replaced(qkv_bias=lambda t: t[:1]), ValueError,
                     "qkv_bias must have 2 tensors like sa_norm, or none, got 1"),
    "half of qk norm": (replaced(k_norm=lambda t: ()), ValueError,
                        "q_norm and k_norm must be given together, got 2 and 0 tensors"),
    "no head": (replaced(head=lambda t: None), ValueError, "norm and head must be given together"),
    "no norm": (replaced(norm=lambda t: None), ValueError, "norm and head must be given together"),
    "int weights": (replaced(sa_norm=lambda t: [x.int() for x in t]), TypeError,
                    r"sa_norm\[0\] must be float32, float16 or bfloat16, got torch\.int32"),
    "mixed dtypes": (replaced(down_weight=each(Tensor.float)), TypeError,
                     r"down_weight\[1\] must be torch\.float16, got torch\.float32"),
    "embedding dtype": (replaced(embedding=Tensor.bfloat16), TypeError,
                        r"embedding must be torch\.float16, got torch\.bfloat16"),
    "weight device": (replaced(qkv_weight=each(lambda t: t.to("meta"))), ValueError,
                      r"qkv_weight\[1\] must be on \w+(:0)?, got meta"),
    "weight shape": (replaced(gate_up_weight=each(lambda t: t[:-2])), ValueError,
                     r"gate_up_weight\[1\] must be contiguous \[304, 72\], got shape \[302, 72\]"),
    "weight strides": (replaced(output_weight=each(lambda t: t.T.contiguous().T)), ValueError,
                       r"output_weight\[1\] must be .* got shape \[72, 256\] and strides \[1, 72"),
    "head shape": (replaced(head=lambda t: t[:, :64].contiguous()), ValueError,
                   r"head must be contiguous \[83, 72\], got shape \[83, 64\]"),
    "head rows": (replaced(head=lambda t: t[:80]), ValueError,
                  r"head must be contiguous \[83, 72\], got shape \[80, 72\]"),
    "alignment": (replaced(mlp_norm=each(lambda t: torch.cat([t, t])[4:76])), ValueError,
                  r"mlp_norm\[1\] must be 16-byte aligned, got one 8 bytes into its storage"),
    "num_heads": ({"num_heads": 3}, ValueError,
                  "num_heads must divide output_weight's 256 columns, got 3"),
    "qkv rows": (replaced(qkv_weight=lambda t: [x[:-64].contiguous() for x in t]), ValueError,
                 "qkv_weight must have 256 rows of q and two times whole heads of 64, got 448"),
    "windows": ({"windows": [0]}, ValueError, r"windows must be 2 of at least 0, got \[0\]"),
    "window < 0": ({"windows": [0, -1]}, ValueError, r"windows must be 2 of at least 0, got \[0, "),
    "activation": ({"activation": "tanh"}, ValueError,
                   "activation must be one of silu, gelu, gelu_tanh, relu, got 'tanh'"),
    "hidden for tokens": (edited("x", Tensor.half), TypeError,
                          r"x must be torch\.int64, got torch\.float16"),
    "tokens [b, 1]": (edited("x", lambda t: t[:, None]), ValueError,
                      r"x must be contiguous \[b\], got shape \[2, 1\]"),
    "no row": (edited("x", lambda t: t[:0]), ValueError, "batch must be 1 to 8, got 0"),
    "9 rows": (edited("x", lambda t: torch.cat([t] * 5)[:9]), ValueError,
               "batch must be 1 to 8, got 9"),
    "more rows than the cache": (more_rows, ValueError,
                                 "batch must be at most the caches' 3, got 4"),
    "fewer caches": (edited("v_cache", lambda t: t[:1]), ValueError,
                     "v_cache must have 2 tensors like sa_norm, got 1"),
    "cache shape": (edited("v_cache", each(lambda t: t[:, :, :8].contiguous())), ValueError,
                    r"v_cache\[1\] must be contiguous \[3, 2, 12, 64\], got shape \[3, 2, 8, 64\]"),
    "cache heads": (edited("k_cache", lambda t: [x[:, :1].contiguous() for x in t]), ValueError,
                    r"k_cache\[0\] must be contiguous \[B, 2, max_seq_len, 64\], got shape \[3, 1"),
    "cache dtype": (edited("k_cache", each(Tensor.float)), TypeError,
                    r"k_cache\[1\] must be torch\.float16, got torch\.float32"),
    "slots dtype": (edited("slots", Tensor.int), TypeError,
                    r"slots must be torch\.int64, got torch\.int32"),
    "slots shape": (edited("slots", lambda t: t[:1]), ValueError,
                    r"slots must be contiguous \[2\], got shape \[1\]"),
    "positions shape": (edited("positions", lambda t: t[:, None]), ValueError,
                        r"positions must be contiguous \[2\], got shape \[2, 1\]"),
    "first_key dtype": ({"first_key": torch.zeros(2)}, TypeError,
                        r"first_key must be torch\.int64, got torch\.float32"),
    "table dtype": (edited("rope_table", Tensor.half), TypeError,
                    r"rope_table must be torch\.float32, got torch\.float16"),
    "table shape": (edited("rope_table", lambda t: t[..., 0].contiguous()), ValueError,
                    r"rope_table must be contiguous \[max_positions, rotary_dim // 2, 2\], got sh"),
    "table width": (edited("rope_table", lambda t: t.repeat(1, 2, 1)), ValueError,
                    "rope_table must rotate at most head_dim = 64 elements, got rotary_dim 128"),
    "overflow": (edited("overflow", Tensor.long), TypeError,
                 r"overflow must be torch\.int32, got torch\.int64"),
    "workspace": (edited("workspace", lambda t: t[:-8]), ValueError,
                  r"workspace must have at least \d+ words for these sizes, got \d+"),
    "out dtype": (edited("out", Tensor.half), TypeError,
                  r"out must be torch\.float32, got torch\.float16"),
    "out shape": (edited("out", lambda t: t[:, :-1].contiguous()), ValueError,
                  r"out must be contiguous \[2, 83\], got shape \[2, 82\]"),
    "out strides": (edited("out", lambda t: t.T.contiguous().T), ValueError,
                    r"out must be contiguous \[2, 83\], got shape \[2, 83\] and strides \[1, 2\]"),
}  # fmt: skip


@CPU_ONLY
@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_and_nothing_is_written(change, error, message, device):
    given = make(Case(qkv_bias=True, qk_norm=True), torch.float16, device)
    caches = [cache.clone() for cache in (*given["k_cache"], *given["v_cache"])]
    with pytest.raises(error, match=message):
        ops.decode_step(**given | (change(given) if callable(change) else change))
    for actual, cache in zip((*given["k_cache"], *given["v_cache"]), caches, strict=True):
        torch.testing.assert_close(actual, cache, rtol=0, atol=0, equal_nan=True)
    assert given["out"].isnan().all()


@CPU_ONLY
def test_a_hidden_state_of_the_wrong_kind_is_named(device):
    given = make(Case(part="middle"), torch.float16, device)
    with pytest.raises(TypeError, match=r"x must be torch\.float16, got torch\.float32"):
        ops.decode_step(**given | {"x": given["x"].float()})
    with pytest.raises(ValueError, match=r"x must be contiguous \[b, 72\], got shape \[2, 64\]"):
        ops.decode_step(**given | {"x": given["x"][:, :64].contiguous()})
    with pytest.raises(TypeError, match=r"out must be torch\.float16, got torch\.float32"):
        ops.decode_step(**given | {"out": given["out"].float()})


SIZES = {
    "batch": 8,
    "hidden_size": 72,
    "intermediate_size": 152,
    "num_heads": 8,
    "num_kv_heads": 1,
    "head_dim": 96,
    "num_layers": 128,
    "activation": "silu",
}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"batch": 9}, "batch must be 1 to 8, got 9"),
        ({"num_layers": 129}, "num_layers must be 1 to 128, got 129"),
        ({"hidden_size": 76}, "hidden_size must be a positive multiple of 8, got 76"),
        ({"intermediate_size": 4}, "intermediate_size must be a positive multiple of 8, got 4"),
        ({"head_dim": 64}, None),
        ({"head_dim": 128}, None),
        ({"head_dim": 80}, "head_dim must be one of 64, 96, 128, got 80"),
        ({"num_heads": 9}, "num_heads must be 1 to 8 times the 1 key/value heads, got 9"),
        ({"num_kv_heads": 3}, "num_heads must be 1 to 8 times the 3 key/value heads, got 8"),
        ({"activation": "tanh"},
         "activation must be one of silu, gelu, gelu_tanh, relu, got 'tanh'"),
    ],
)  # fmt: skip
def test_refusal_names_the_rule(change, rule):
    assert ops.decode_step_refusal(**SIZES | change) == rule


def test_large_activations_do_not_overflow(device):
    """The residual and the norm's weights are both large: their product is above float16."""
    given = make(Case(part="last", windows=(0,)), torch.float16, device)
    given["x"].copy_(300 * torch.randn(given["x"].shape))
    given["x"][:, 3] = 8000
    given["weights"].norm.mul_(20)
    check(given)


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(8, 8), (4104, 8200), (896, 4864), (16392, 8)]
)
def test_a_workspace_is_as_large_as_the_kernel_asks(hidden_size, intermediate_size, device):
    case = Case(
        slots=(1,), hidden_size=hidden_size, intermediate_size=intermediate_size, windows=(0,)
    )
    given = make(replace(case, part="middle", num_heads=1, num_kv_heads=1), torch.float16, device)
    check(given)


def test_workspace_is_zeros_of_the_documented_size(device):
    given = make(Case(slots=(1, 2, 3)), torch.float16, device)
    workspace = ops.new_decode_workspace(given["weights"], 3, num_heads=4)
    size = ops.decode_workspace_size(3, 72, 152, 8 * 64, 4, 64)
    assert (workspace.dtype, workspace.shape) == (torch.int32, (size,))
    assert workspace.device == given["x"].device
    assert not workspace.any()
    check(given | {"workspace": workspace})


def raw_arguments(given: dict) -> tuple:
    """In the order of the schema."""
    schema = torch.ops.fastshard.decode_step.default._schema
    weights, given = given["weights"], {"rank_sums": [], "rank": 0} | given
    return tuple(
        given[argument.name] if argument.name in given else getattr(weights, argument.name)
        for argument in schema.arguments
    )


@pytest.mark.parametrize("part", ["whole", "middle"])
def test_opcheck(part, device):
    case = Case(part=part, hidden_size=16, intermediate_size=8, first_key=(1, 0))
    given = make(case, torch.float16, device)
    for name in ("k_cache", "v_cache"):  # opcheck compares copies: NaN would not be equal
        given[name] = [cache.nan_to_num() for cache in given[name]]
    given["out"].zero_()
    torch.library.opcheck(torch.ops.fastshard.decode_step.default, raw_arguments(given))


def test_compiles(device):
    given = make(Case(hidden_size=16), torch.float16, device)
    twin = cast(given, torch.float16) | {"rope_table": given["rope_table"]}
    twin["out"] = given["out"].clone()

    def step(given):
        ops.decode_step(**given)
        return given["out"] + 1

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(given)
    assert torch.equal(out, step(twin))
    for name in ("k_cache", "v_cache"):  # mutations survive functionalisation
        for actual, expected in zip(given[name], twin[name], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def decode_step(**given):
    """The op, and reads of what it wrote."""
    ops.decode_step(**given)
    return given["out"] + 1, given["k_cache"][-1] * 2, given["overflow"] + 1


def test_compiles_once_for_all_sizes(device):
    small = Case(hidden_size=16, intermediate_size=8)
    cases = [
        replace(small, slots=(9, 4, 3, 2, 1)),
        replace(small, slots=(7, 2, 20), max_seq_len=19),  # the last row overflows
        replace(small, slots=(30, 1), max_seq_len=41, vocab_size=90),
    ]
    calls = [make(case, torch.float16, device) for case in cases]
    assert_compiles_once(decode_step, calls)
    assert [call["overflow"].item() for call in calls] == [0, 1, 0]


def test_ignores_autocast(device):
    given = make(Case(hidden_size=16), torch.float16, device)
    assert_ignores_autocast(decode_step, given)


@pytest.mark.parametrize("part", ["whole", "middle"])
def test_refuses_gradients(part, device):
    case = Case(part=part, hidden_size=16, intermediate_size=8)
    given = make(case, torch.float16, device)
    assert_refuses_gradients(ops.decode_step, given)
    message = r"^decode_step is for inference only .* got down_weight\[1\] that requires grad"
    with pytest.raises(RuntimeError, match=message):
        ops.decode_step(**given | replaced(down_weight=each(Tensor.requires_grad_))(given))


def test_vmap_is_refused(device):
    given = make(Case(hidden_size=16, intermediate_size=8), torch.float16, device)

    def step(slots):
        ops.decode_step(**given | {"slots": slots})

    with pytest.raises(RuntimeError, match=r"decode_step does not run under torch\.vmap"):
        torch.vmap(step)(torch.stack([given["slots"]] * 2))


@CUDA_ONLY
@HALVES
@pytest.mark.parametrize("part", ["middle", "last"])
def test_replays_in_a_graph(part, dtype, device):
    given = make(Case(part=part), dtype, device)

    def step():
        ops.decode_step(**given)
        return given["out"].clone()

    assert_replays_in_a_graph(step, given["x"])


@CUDA_ONLY
def test_a_replay_reads_tokens_positions_and_slots(device):
    given = make(Case(slots=(3, 5)), torch.float16, device)
    ops.decode_step(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.decode_step(**given)
    for _ in range(4):
        given["slots"] += 1
        given["positions"] += 2
        given["x"].copy_((given["x"] + 5) % 83)
        golden, naive = plain(cast(given, torch.float64)), plain(cast(given, torch.float16))
        graph.replay()
        assert_as_accurate(given["out"], golden, naive.float())


@CUDA_ONLY
@pytest.mark.parametrize("part", ["whole", "middle"])
def test_runs_one_kernel_of_ours(part, device):
    given = make(Case(part=part), torch.float16, device)
    names = cuda_kernel_names(lambda: ops.decode_step(**given))
    assert len(names) == 1
    assert "fastshard::decode" in names[0]


@CUDA_ONLY
def test_float32_is_refused_on_a_gpu(device):
    with pytest.raises(TypeError, match=r"weights must be float16 or bfloat16 on CUDA, got torch"):
        ops.decode_step(**make(Case(), torch.float32, device))


@CUDA_ONLY
def test_runs_beside_a_kernel_that_holds_the_gpu(device):
    """A grid that waits for all its blocks must not deadlock with another stream's kernels."""
    given = make(Case(), torch.float16, device)
    golden, naive = plain(cast(given, torch.float64)), plain(cast(given, torch.float16))
    busy = torch.randn(4096, 4096, device=device)
    side = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            busy = busy @ busy / 64
        ops.decode_step(**given)
    torch.cuda.synchronize()
    assert_as_accurate(given["out"], golden, naive.float())


@CPU_ONLY
def test_cost(device):
    case = Case(slots=(9, 4, 2), first_key=(2, 0, 0), windows=(3, 0), is_tied=True)
    given = make(case, torch.float16, device)
    # keys: 3 + 3 + 3 in the windowed layer, 8 + 5 + 3 in the other
    layer = 72 * (512 + 256 + 3 * 152) + 2 * 72
    numel = 2 * layer + 72 + 83 * 72 + 3 * 72  # head once, a row of the embedding a token
    numel += 2 * 2 * 64 * (9 + 16 + 2 * 3)  # keys and values read and written
    cost = ops.COSTS["decode_step"](*raw_arguments(given))
    matrices = 2 * 72 * (512 + 256 + 3 * 152) + 83 * 72
    assert cost.bytes == 2 * numel + 4 * 3 * 83
    assert cost.flops == 2 * 3 * matrices + 4 * 256 * (9 + 16)
    given["slots"] = given["slots"].to("meta")  # values unknown: at most 3 and 12 keys a row
    bound = ops.COSTS["decode_step"](*raw_arguments(given))
    assert bound.bytes - cost.bytes == 2 * 2 * 2 * 64 * (3 * (3 + 12) - 25)
