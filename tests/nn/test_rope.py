"""RotaryEmbedding: frequencies of transformers and torchtune, and a table that stays float32."""

import copy

import pytest
import torch
import transformers
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastshard.nn import RopeScaling, RotaryEmbedding, rope_frequencies

CPU = torch.device("cpu")


@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
@pytest.mark.parametrize("old_context", [64, 8192])
def test_llama3_frequencies_equal_those_of_transformers(old_context, factor):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": old_context,
    }
    config = transformers.LlamaConfig(
        head_dim=128, max_position_embeddings=10**6, rope_parameters=rope
    )
    golden, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    actual = rope_frequencies(128, 5e5, RopeScaling("llama3", factor, 1.5, 5.0, old_context))
    assert len({*(actual / rope_frequencies(128, 5e5)).tolist()}) > 2  # kept, blended, divided
    torch.testing.assert_close(actual, golden, rtol=2e-7, atol=0)  # 2 ulps


def test_linear_frequencies():
    plain = rope_frequencies(16, 1e4)
    assert torch.equal(rope_frequencies(16, 1e4, RopeScaling("linear", 4.0)), plain / 4)


THEIRS = {
    "plain": (RotaryPositionalEmbeddings, {"interleaved": True}),
    "llama3": (Llama3ScaledRoPE, {"interleaved": True, "scaling": RopeScaling()}),
    "qwen2": (Qwen2RotaryPositionalEmbeddings, {"interleaved": False}),
}


@pytest.mark.parametrize(("theirs", "keys"), THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("pos_dims", [None, 0, 1, 2])
def test_rotates_as_torchtune(pos_dims, theirs, keys):
    torch.manual_seed(0)
    s = 1 if pos_dims == 0 else 5
    x = torch.randn(3, s, 2, 16)
    shape = {0: (), 1: (s,), 2: (3, s)}
    positions = None if pos_dims is None else torch.randint(0, 999, shape[pos_dims])
    ours = RotaryEmbedding(16, 1000, 10000, **keys)
    golden = theirs(16, 1000, 10000)(x, input_pos=positions)
    # A cosine one ulp apart, and two products: 3 ulps of values up to 4.
    torch.testing.assert_close(ours(x, input_pos=positions), golden, rtol=0, atol=2e-6)


def test_one_row_of_positions_serves_every_row():
    rope = RotaryEmbedding(16, 100)
    x, positions = torch.randn(3, 5, 2, 16), torch.randint(0, 100, (1, 5))
    assert torch.equal(rope(x, input_pos=positions), rope(x, input_pos=positions[0]))
    assert torch.equal(rope(x, input_pos=positions.int()), rope(x, input_pos=positions))


def test_partial_rotation_leaves_the_rest():
    rope = RotaryEmbedding(8, 100, interleaved=False)
    x = torch.randn(1, 5, 2, 16)
    out = rope(x)
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert torch.equal(out[..., :8], rope(x[..., :8]))


@pytest.mark.parametrize(
    "change",
    [
        lambda rope: rope.half(),
        lambda rope: rope.to(torch.bfloat16),
        lambda rope: rope.to_empty(device="cpu"),
        lambda rope: rope.to("meta").to_empty(device="cpu"),
        lambda rope: torch.nn.Sequential(rope).to("cpu", torch.float16)[0],
        copy.deepcopy,
    ],
)
def test_the_table_survives(change):
    expected = RotaryEmbedding(16, 1000).table(CPU).clone()
    rope = change(RotaryEmbedding(16, 1000))
    assert rope._table is not None, "built before the first forward"
    assert rope.table(CPU).dtype == torch.float32
    assert torch.equal(rope.table(CPU), expected)
    assert rope.state_dict() == {}


def test_a_meta_build_is_finished_at_first_use():
    expected = RotaryEmbedding(16, 1000)
    with torch.device("meta"):
        rope = RotaryEmbedding(16, 1000)
    x = torch.randn(1, 3, 2, 16)
    with torch.inference_mode():
        assert torch.equal(rope(x), expected(x))
    assert not rope.table(CPU).is_inference()


def test_a_meta_build_is_finished_by_to_empty():
    rope = RotaryEmbedding(16, 1000, device="meta")
    assert rope._table is None
    rope.to_empty(device="cpu")
    assert torch.equal(rope._table, RotaryEmbedding(16, 1000)._table)


def test_default_dtype_and_device_do_not_reach_the_table():
    torch.set_default_dtype(torch.float64)
    try:
        rope = RotaryEmbedding(16, 1000)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rope.table(CPU), RotaryEmbedding(16, 1000).table(CPU))


def test_rejects_other_positions():
    rope, x = RotaryEmbedding(16, 100), torch.randn(2, 5, 2, 16)
    with pytest.raises(ValueError, match=r"input_pos must have shape \[2, 5\] or \[5\], got \[4\]"):
        rope(x, input_pos=torch.arange(4))
    with pytest.raises(ValueError, match=r"input_pos must have shape \[2, 5\] or \[5\], got \[\]"):
        rope(x, input_pos=torch.tensor(3))
    with pytest.raises(TypeError, match=r"input_pos must be int64 or int32, got torch\.float32"):
        rope(x, input_pos=torch.arange(5.0))
