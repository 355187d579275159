"""ShardInferenceState: rings of shards by it give the whole model's tokens; every refusal.

Between two shards the state goes through its bytes, the hidden state as it is.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import FAMILIES, SIZES, make_reference

import fastshard
from fastshard import Shard, ShardedGeneralModel, ShardInferenceState
from helpers import CUDA_ONLY

NUM_LAYERS = 4
CUTS = [(), (1,), (3,), (1, 3), (1, 2, 3)]  # shards of 1 to 4 layers begin there
PROMPTS = [[5, 40, 3, 3, 61, 17, 2], [9, 12, 30]]  # mistral's window is 5 tokens
NUM_TOKENS = 12
# Logits of size 1 to 10: float32 sums of at most 80 products, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def write(family: str, path: Path) -> Path:
    """A checkpoint of four layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "num_hidden_layers", NUM_LAYERS)
        make_reference(family).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp(request.param))


def load_ring(path, cut: Sequence[int] = (), **settings) -> list[ShardedGeneralModel]:
    bounds = itertools.pairwise([0, *cut, NUM_LAYERS])
    shards = [Shard("tiny", start, end - 1, NUM_LAYERS) for start, end in bounds]
    return [fastshard.load(path, shard=shard, device="cpu", **settings) for shard in shards]


def go_round(state: ShardInferenceState, ring: list[ShardedGeneralModel], **settings):
    """One round: each shard has nothing but what came to it. Returns the last one's."""
    hidden = logits = None
    for model in ring:
        data = state.to_bytes()
        received = None if hidden is None else hidden.clone()
        state = ShardInferenceState.from_bytes(data)
        hidden, logits = state.run(model, received, **settings)
    assert hidden is None
    return logits, state


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(padding)


def greedy(ring, state, num_tokens=NUM_TOKENS, follow=ShardInferenceState.advance):
    """(tokens of each row, the bytes of each round's state)"""
    columns, sizes = [], []
    for _ in range(num_tokens):
        logits, state = go_round(state, ring)
        assert logits.shape[1] == 1
        sizes.append(len(state.to_bytes()))
        columns.append(logits[:, -1].argmax(-1))
        state = follow(state, columns[-1][:, None])
    return torch.stack(columns, 1).tolist(), sizes


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "padded"])
def test_a_ring_gives_the_tokens_of_the_whole_model(path, cut, prompts):
    (whole,) = load_ring(path)
    expected = fastshard.generate_batch(whole, prompts, max_new_tokens=NUM_TOKENS)
    assert len({token for row in expected for token in row}) > 2
    tokens, first_key = padded(prompts)
    actual, sizes = greedy(load_ring(path, cut), ShardInferenceState(tokens, 0, first_key))
    assert actual == expected
    b = len(prompts)
    with_padding = 2 * b if b > 1 else 0
    assert sizes[0] == 20 + 2 * tokens.numel() + with_padding
    assert set(sizes[1:]) == {20 + 2 * b + with_padding}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "padded"])
def test_a_ring_without_caches(path, prompts):
    (whole,) = load_ring(path)
    expected = fastshard.generate_batch(whole, prompts, max_new_tokens=5)
    tokens, first_key = padded(prompts)
    state = ShardInferenceState(tokens, 0, first_key)
    ring = load_ring(path, (2,), use_cache=False)
    actual, sizes = greedy(ring, state, 5, ShardInferenceState.append)
    assert actual == expected
    assert sizes == [sizes[0] + 2 * len(prompts) * i for i in range(5)]  # all tokens, each time


def test_a_prompt_in_pieces(path):
    (whole,) = load_ring(path)
    expected = fastshard.generate_batch(whole, PROMPTS, max_new_tokens=4)
    ring = load_ring(path, (1, 2))
    tokens, first_key = padded(PROMPTS)
    state = ShardInferenceState(tokens[:, :3], 0, first_key)
    for i in (3, 5):
        _, state = go_round(state, ring)
        state = state.advance(tokens[:, i : i + 2])
    assert state.curr_pos == 5
    assert greedy(ring, state, 4)[0] == expected


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("llama"))


TOKENS = torch.tensor([[5, 40, 3], [9, 12, 30]])


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_of_ones_own_go_round_and_count_on(llama, use_cache):
    positions = torch.tensor([[4, 9, 2], [0, 1, 20]])
    ring = load_ring(llama, (2,), use_cache=use_cache)
    state = ShardInferenceState(TOKENS, 0, None, positions)
    for _ in range(3):
        logits, state = go_round(state, ring)
        follow = state.advance if use_cache else state.append
        state = follow(logits[:, -1].argmax(-1)[:, None])
    (whole,) = load_ring(llama, use_cache=False)
    tokens = TOKENS
    for i in range(3):
        later = torch.cat([positions, torch.tensor([[3], [21]]) + torch.arange(i)], 1)
        _, expected = whole.generate(tokens, input_pos=later[:, : 3 + i], num_logits=1)
        tokens = torch.cat([tokens, expected[:, -1].argmax(-1)[:, None]], 1)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert state.tokens.tolist() == (tokens[:, -1:] if use_cache else tokens).tolist()
    assert state.input_pos[:, -1].tolist() == [5, 23]


def test_num_logits_and_the_dict_on_the_way(llama):
    (whole,) = load_ring(llama)
    _, expected = whole.generate(TOKENS)
    state = ShardInferenceState.from_dict(ShardInferenceState(TOKENS).to_dict())
    for num_logits, kept in ((None, 3), (2, 2), (1, 1)):
        logits, _ = go_round(state, load_ring(llama, (2,)), num_logits=num_logits)
        torch.testing.assert_close(logits, expected[:, -kept:], **CLOSE)


def test_one_state_for_one_sequence():
    """What says nothing is left out, and what the caller writes later does not come in."""
    tokens = TOKENS.clone()
    state = ShardInferenceState(tokens.int(), 4, torch.tensor([0, 0]), torch.arange(4, 7))
    assert state.first_key is None
    assert state.input_pos is None
    assert state == ShardInferenceState(tokens, 4)
    shifted = torch.tensor([[4, 5, 6], [0, 0, 1]])
    left = ShardInferenceState(tokens, 4, torch.tensor([0, 5]), shifted)
    assert left.input_pos is None
    assert left == ShardInferenceState(tokens, 4, torch.tensor([0, 5]))
    different = [
        ShardInferenceState(tokens, 5),
        ShardInferenceState(tokens + 1, 4),
        ShardInferenceState(tokens[:1], 4),
        ShardInferenceState(tokens, 4, torch.tensor([0, 1])),
        ShardInferenceState(tokens, 4, None, torch.arange(5, 8)),
        "state",
    ]
    assert all(state != other for other in different)
    kept = ShardInferenceState(tokens, 4)
    tokens[0, 0] = 71
    assert kept == state


def test_advance_and_append():
    state = ShardInferenceState(TOKENS, 4, torch.tensor([0, 1]))
    step = state.advance(torch.tensor([[7], [8]], dtype=torch.int32))
    assert step == ShardInferenceState(torch.tensor([[7], [8]]), 7, torch.tensor([0, 1]))
    assert step.tokens.dtype == torch.int64
    state = ShardInferenceState(TOKENS, 0, torch.tensor([0, 1]))
    longer = state.append(torch.tensor([[7, 8], [9, 1]]))
    tokens = torch.tensor([[5, 40, 3, 7, 8], [9, 12, 30, 9, 1]])
    assert longer == ShardInferenceState(tokens, 0, torch.tensor([0, 1]))


@CUDA_ONLY
def test_a_state_is_on_the_host_and_runs_where_the_shard_is(device):
    first, last = (
        fastshard.load(shard=Shard("demo", start, end, 5), device=device)
        for start, end in ((0, 1), (2, 4))
    )
    tokens, first_key = TOKENS.to(device), torch.tensor([0, 1], device=device)
    state = ShardInferenceState(tokens, 0, first_key, torch.arange(1, 4, device=device))
    kept = (state.tokens, state.first_key, state.input_pos)
    assert {x.device for x in kept} == {torch.device("cpu")}
    hidden, _ = state.run(first)
    _, logits = state.run(last, hidden.cpu())
    call = {"first_key": first_key, "input_pos": torch.arange(1, 4, device=device)}
    expected, _ = first.generate(tokens, **call)
    _, expected = last.generate(hidden_state=expected, num_logits=1, **call)
    assert torch.equal(logits, expected)


I64 = torch.zeros(2, 3, dtype=torch.int64)
WRONG = {
    "list": ({"tokens": [[1]]}, TypeError, "tokens must be a tensor, got list"),
    "floats": ({"tokens": torch.zeros(2, 3)}, TypeError,
               r"tokens must be int64 or int32, got torch\.float32"),
    "[s]": ({"tokens": I64[0]}, ValueError, r"tokens must be \[b, s\] of at least one, got \[3\]"),
    "none": ({"tokens": I64[:, :0]}, ValueError, r"\[b, s\] of at least one, got \[2, 0\]"),
    "token < 0": ({"tokens": I64 - 1}, ValueError, r"tokens must be in \[0, 2147483648\), got -1"),
    "token": ({"tokens": I64 + 2**31}, ValueError, r"tokens must be in .*, got 2147483648"),
    "curr_pos": ({"curr_pos": -1}, ValueError, r"curr_pos must be in \[0, 2147483645\], got -1"),
    "curr_pos, end": ({"curr_pos": 2**31 - 2}, ValueError, r"2147483645\], got 2147483646"),
    "curr_pos 1.0": ({"curr_pos": 1.0}, TypeError, r"curr_pos must be an integer, got 1\.0"),
    "curr_pos True": ({"curr_pos": True}, TypeError, "curr_pos must be an integer, got True"),
    "first_key": ({"first_key": I64[0]}, ValueError,
                  r"first_key must have shape \[2\], got \[3\]"),
    "first_key bool": ({"first_key": I64[:, 0] > 0}, TypeError,
                       r"first_key must be int64 or int32, got torch\.bool"),
    "first_key < 0": ({"first_key": I64[:, 0] - 1}, ValueError, "first_key must be in .*, got -1"),
    "input_pos": ({"input_pos": torch.arange(4)}, ValueError,
                  r"input_pos must have shape \[2, 3\] or \[3\], got \[4\]"),
    "input_pos list": ({"input_pos": [0, 1, 2]}, TypeError, "input_pos must be a tensor, got list"),
    "input_pos < 0": ({"input_pos": I64 - 3}, ValueError, "input_pos must be in .*, got -3"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(keys, error, message):
    with pytest.raises(error, match=message):
        ShardInferenceState(**{"tokens": I64, **keys})


@pytest.mark.parametrize("follow", ["advance", "append"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (I64[:1], ValueError, r"tokens must be \[2, s\], got \[1, 3\]"),
        (I64[:, 0], ValueError, r"tokens must be \[2, s\], got \[2\]"),
        ([[1], [2]], TypeError, "tokens must be a tensor, got list"),
        (I64 > 0, TypeError, r"tokens must be int64 or int32, got torch\.bool"),
        (I64 - 1, ValueError, r"tokens must be in \[0, 2147483648\), got -1"),
    ],
)
def test_wrong_tokens_that_follow_are_named(follow, tokens, error, message):
    with pytest.raises(error, match=message):
        getattr(ShardInferenceState(TOKENS), follow)(tokens)


def test_no_tokens_cannot_follow():
    with pytest.raises(ValueError, match=r"\[b, s\] of at least one, got \[2, 0\]"):
        ShardInferenceState(TOKENS).advance(I64[:, :0])


def test_what_does_not_fit_the_model_is_named_and_changes_nothing(llama):
    first, last = load_ring(llama, (2,))
    hidden, _ = ShardInferenceState(TOKENS).run(first)
    wrong = [
        ({"tokens": TOKENS + 60}, r"tokens must be in \[0, 72\), got 100"),
        ({"first_key": torch.tensor([0, 64])}, r"first_key must be in \[0, 64\), got 64"),
        ({"input_pos": torch.arange(62, 65)}, r"input_pos must be in \[0, 64\), got 64"),
        ({"curr_pos": 2}, "curr_pos must be 0 or the 3 tokens cached, got 2"),
    ]
    last.generate(hidden_state=hidden)
    for model, given in ((first, None), (last, hidden)):
        for keys, message in wrong:
            with pytest.raises(ValueError, match=f"^{message}$"):
                ShardInferenceState(**{"tokens": TOKENS} | keys).run(model, given)
    shapes = r"^hidden_state must be of the state's tokens, \[2, 3\], got \[2, 2, 48\]$"
    with pytest.raises(ValueError, match=shapes):
        ShardInferenceState(TOKENS).run(last, hidden[:, :2])
    with pytest.raises(ValueError, match="hidden_state must be given to layers 2 to 3, got none"):
        ShardInferenceState(TOKENS).run(last)
    with pytest.raises(ValueError, match="no hidden_state must be given to layers 0 to 1"):
        ShardInferenceState(TOKENS).run(first, hidden)
    with pytest.raises(TypeError, match=r"hidden_state must be torch\.float32, got torch\.float16"):
        ShardInferenceState(TOKENS).run(last, hidden.half())
    step = ShardInferenceState(TOKENS).advance(torch.tensor([[7], [8]]))
    (whole,) = load_ring(llama)
    whole.generate(TOKENS)
    _, expected = whole.generate(torch.tensor([[7], [8]]), curr_pos=3)
    assert torch.equal(step.run(last, step.run(first)[0])[1], expected)


def test_a_step_of_a_shard_without_a_cache_is_refused(llama):
    """Two tokens at place 1 would pass for the whole sequence."""
    (model,) = load_ring(llama, use_cache=False)
    message = "^curr_pos must be 0 for a shard without a cache, which runs over all .*, got 1$"
    with pytest.raises(ValueError, match=message):
        ShardInferenceState(TOKENS[:, :2], 1).run(model)
    model.model.setup_caches(2, torch.float32)  # a cache all the same
    model.generate(TOKENS[:, :1])
    assert ShardInferenceState(TOKENS[:, 1:], 1).run(model)[1].shape == (2, 1, 72)
