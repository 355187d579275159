"""ShardedGeneralModel.generate: slicing, shards, caches, padding, and every wrong argument."""

import math

import pytest
import torch
from torch import Tensor

import decoder_reference as reference
from fastshard import ModelConfig, Shard, ShardedGeneralModel
from helpers import CUDA_ONLY

CONFIG = {
    "vocab_size": 96,
    "embed_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 24,
    "max_seq_len": 32,
    "rope_base": 10000,
    "rope_scaling_factor": 1.0,
    "intermediate_dim": 80,
    "num_layers": 3,
    "norm_eps": 0.01,
    "attn_dropout": 0.0,
}
# Norms, softmax and sums of up to 80 products in another order: some ulps of values of size 1-10.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
S = 11


def build(start=0, end=2, model_id="llama", state=None, **keys) -> ShardedGeneralModel:
    model = ShardedGeneralModel(CONFIG, Shard(model_id, start, end, 3), None, torch.float32, **keys)
    if state is not None:
        model.model.load_state_dict({name: state[name] for name in model.model.state_dict()})
    return model


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return reference.random_state(build().model)


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(0, CONFIG["vocab_size"], (2, S))


def golden(state, tokens, bias=None, positions=None) -> Tensor:
    config = ModelConfig.from_dict(CONFIG, "llama")
    x = reference.hidden_states(state, config, tokens, range(3), bias=bias, positions=positions)
    return reference.logits(state, config, x)


def random_mask(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A causal mask with holes, ``[2, rows, columns]``, and what it adds to S x S scores."""
    torch.manual_seed(2)
    allowed = torch.rand(2, rows, columns) < 0.6
    allowed &= torch.ones(rows, columns, dtype=torch.bool).tril()
    square = allowed[:, :S, :S]
    return allowed, torch.zeros(square.shape).masked_fill(~square, -math.inf)


def test_prefill(state, tokens):
    hidden, logits = build(state=state).generate(tokens)
    assert hidden is None
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), golden(state, tokens), **CLOSE)


def test_float_ones_attend_everywhere(state, tokens):
    _, logits = build(state=state).generate(tokens, torch.ones(1, S, S), torch.arange(S)[None])
    torch.testing.assert_close(
        logits.double(), golden(state, tokens, torch.zeros(1, S, S)), **CLOSE
    )


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_steps_slice_the_whole_mask_and_input_pos(is_whole, use_cache, state, tokens):
    """Token by token, each call given the same whole tensors, as exo's engine does."""
    model = build(state=state, use_cache=use_cache, max_generated_tokens=32)
    rows, columns = (20, 32) if is_whole else (S, S)
    mask, bias = random_mask(rows, columns)
    positions = torch.randint(0, 32, (2, rows))
    expected = golden(state, tokens, bias, positions[:, :S])
    for _ in range(2):  # a second prompt starts over
        _, logits = model.generate(tokens[:, :5], mask, positions)
        torch.testing.assert_close(logits.double(), expected[:, :5], **CLOSE)
        for curr_pos in range(5, S):
            first = curr_pos if use_cache else 0
            fed = tokens[:, first : curr_pos + 1]
            _, logits = model.generate(fed, mask, positions, curr_pos=curr_pos)
            torch.testing.assert_close(logits.double(), expected[:, first : curr_pos + 1], **CLOSE)


def test_mask_and_input_pos_may_be_of_these_tokens_only(state, tokens):
    model = build(state=state, use_cache=True)
    mask, bias = random_mask(S, S)
    positions = torch.randint(0, 32, (2, S))
    expected = golden(state, tokens, bias, positions)
    model.generate(tokens[:, :6], mask[:, :6], positions[:, :6])
    rest = slice(6, S)  # a chunk of several tokens
    _, logits = model.generate(tokens[:, rest], mask[:, rest], positions[:, rest], curr_pos=6)
    torch.testing.assert_close(logits.double(), expected[:, rest], **CLOSE)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_id", ["llama", "qwen-2.5-7b", "qwen3-8b", "mistral-7b"])
def test_shards_in_turn_equal_the_whole(model_id, use_cache, tokens):
    whole = build(model_id=model_id, use_cache=use_cache)
    state = reference.random_state(whole.model)
    whole.model.load_state_dict(state)
    cuts = [(0, 0), (1, 1), (2, 2)]
    shards = [build(*cut, model_id=model_id, state=state, use_cache=use_cache) for cut in cuts]
    for start, end in [(0, 4), (4, 5), (5, 6)]:
        fed = tokens[:, start if use_cache else 0 : end]
        curr_pos = (start if use_cache else end - 1) if start else 0
        call = {"curr_pos": curr_pos}
        _, expected = whole.generate(fed, **call)
        hidden, logits = shards[0].generate(fed, **call)
        assert logits is None
        assert hidden.shape == (2, fed.shape[1], 64)
        hidden, logits = shards[1].generate(hidden_state=hidden, **call)
        # A ring may hand the tokens on, also to a last shard that holds the embedding as its head.
        hidden, logits = shards[2].generate(fed, hidden_state=hidden, **call)
        assert hidden is None
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("use_cache", [False, True])
def test_left_padded_rows_equal_unpadded_ones(use_cache, state, tokens):
    """Once with first_key, once with mask and positions as torchtune's helpers make them."""
    first_key = torch.tensor([4, 0])
    alone = [golden(state, tokens[:1, 4:]), golden(state, tokens[1:])]
    real = torch.arange(S) >= first_key[:, None]
    mask = real[:, None] & torch.ones(S, S, dtype=torch.bool).tril()
    positions = (real.cumsum(-1) - 1) * real
    for keys in ({"first_key": first_key}, {"mask": mask, "input_pos": positions}):
        model = build(state=state, use_cache=use_cache)
        if use_cache:
            parts = [model.generate(tokens[:, :7], **keys)[1]]
            for i in range(7, S):
                parts.append(model.generate(tokens[:, i : i + 1], curr_pos=i, **keys)[1])
            logits = torch.cat(parts, 1)
        else:
            _, logits = model.generate(tokens, **keys)
        torch.testing.assert_close(logits[:1, 4:].double(), alone[0], **CLOSE)
        torch.testing.assert_close(logits[1:].double(), alone[1], **CLOSE)


def test_padding_takes_no_positions(state, tokens):
    """Attention sees differences of positions only; the cached keys show the positions."""
    padded, alone = (build(state=state, use_cache=True) for _ in range(2))
    padded.generate(tokens, first_key=torch.tensor([4, 0]))
    alone.generate(tokens[:1, 4:])
    keys = padded.model.any_cache.k_cache[:1, :, 4:S]
    torch.testing.assert_close(keys, alone.model.any_cache.k_cache[:1, :, : S - 4], **CLOSE)


def test_num_logits_keeps_the_last(state, tokens):
    model = build(state=state)
    _, expected = model.generate(tokens)
    _, logits = model.generate(tokens, num_logits=2)
    torch.testing.assert_close(logits, expected[:, -2:], **CLOSE)


def test_the_cache_grows_for_a_prompt_that_does_not_fit(state, tokens):
    model = build(state=state, use_cache=True, max_generated_tokens=2)
    model.generate(tokens[:1, :3])
    assert model.model.any_cache.k_cache.shape == (1, 2, 5, 24)
    _, logits = model.generate(tokens)  # longer, and more rows
    assert model.model.any_cache.k_cache.shape == (2, 2, 13, 24)
    torch.testing.assert_close(logits.double(), golden(state, tokens), **CLOSE)
    kept = model.model.any_cache
    _, logits = model.generate(tokens[:1, :3])
    assert model.model.any_cache is kept
    torch.testing.assert_close(logits.double(), golden(state, tokens[:1, :3]), **CLOSE)


def test_a_cache_that_the_caller_made_is_kept(state, tokens):
    model = build(state=state, use_cache=True)
    model.model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    model.generate(tokens[:1, :6])
    with pytest.raises(ValueError, match="batch must be at most the cache's 1, got 2"):
        model.generate(tokens)
    with pytest.raises(ValueError, match="0 of its 8 slots are used, got 11 tokens more"):
        model.generate(tokens[:1])
    with pytest.raises(ValueError, match="6 of its 8 slots are used, got 3 tokens more"):
        model.generate(tokens[:1, :3], curr_pos=6)
    _, logits = model.generate(tokens[:1, 6:8], curr_pos=6)  # nothing was changed by the errors
    torch.testing.assert_close(logits.double(), golden(state, tokens[:1])[:, 6:8], **CLOSE)


def test_a_batch_may_shrink_but_not_grow_within_a_prompt(state, tokens):
    model = build(state=state, use_cache=True)
    model.generate(tokens[:, :5])
    _, logits = model.generate(tokens[:1, 5:6], curr_pos=5)
    torch.testing.assert_close(logits.double(), golden(state, tokens[:1])[:, 5:6], **CLOSE)
    with pytest.raises(ValueError, match="at most the 1 of the cached prompt, got 2"):
        model.generate(tokens[:, 6:7], curr_pos=6)


WRONG = {
    "no input": ({}, ValueError, "tokens and no hidden_state must be given .* got none of them"),
    "both": ({"tokens": 1, "hidden_state": 1}, ValueError, "got tokens and hidden_state"),
    "hidden": ({"hidden_state": torch.zeros(2, 3, 64)}, ValueError, "got hidden_state"),
    "float tokens": ({"tokens": torch.zeros(2, 3)}, TypeError, r"tokens must be int64 or int32"),
    "tokens [s]": ({"tokens": torch.ones(3).long()}, ValueError, r"tokens must be \[b, s\].*\[3\]"),
    "no tokens": ({"tokens": torch.ones(1, 0).long()}, ValueError, r"at least one, got \[1, 0\]"),
    "token 96": ({"tokens": torch.tensor([[0, 96]])}, ValueError, r"tokens must be in \[0, 96\), "
                 "got 96"),
    "token -1": ({"tokens": torch.tensor([[0, -1]])}, ValueError, "got -1"),
    "meta tokens": ({"tokens": torch.zeros(2, 3, device="meta").long()}, ValueError,
                    "tokens must be on cpu, got meta"),
    "mask [s, S]": ({"mask": torch.ones(S, S)}, ValueError, r"mask must be \[1 or 2, 11, S\]"),
    "mask rows": ({"mask": torch.ones(1, 7, S)}, ValueError, r"mask must have 11 rows, got shape"),
    "mask batch": ({"mask": torch.ones(3, S, S)}, ValueError, r"\[1 or 2, 11, S\], got shape \[3"),
    "mask columns": ({"mask": torch.ones(1, S, 10)}, ValueError, "mask must cover all 11 keys"),
    "mask dtype": ({"mask": torch.ones(1, S, S).int()}, TypeError, "mask must be bool or floating"),
    "mask device": ({"mask": torch.ones(1, S, S, device="meta")}, ValueError,
                    "mask must be on cpu, got meta"),
    "positions": ({"input_pos": torch.arange(22, 33)[None]}, ValueError,
                  r"input_pos must be in \[0, 32\), got 32"),
    "positions < 0": ({"input_pos": torch.arange(-1, 10)}, ValueError, r"\[0, 32\), got -1"),
    "positions rows": ({"input_pos": torch.arange(7)[None]}, ValueError,
                       r"input_pos must have 11 rows, got shape \[1, 7\]"),
    "positions batch": ({"input_pos": torch.zeros(3, S).long()}, ValueError,
                        r"input_pos must have shape \[2, 11\] or \[11\], got \[3, 11\]"),
    "positions dtype": ({"input_pos": torch.zeros(S)}, TypeError, "input_pos must be int64"),
    "first_key": ({"first_key": torch.zeros(3).long()}, ValueError,
                  r"first_key must have shape \[2\], got \[3\]"),
    "first_key dtype": ({"first_key": torch.zeros(2)}, TypeError,
                        r"first_key must be int64 or int32, got torch\.float32"),
    "first_key device": ({"first_key": torch.zeros(2, device="meta")}, ValueError,
                         "first_key must be on cpu, got meta"),
    "curr_pos": ({"curr_pos": -1}, ValueError, "curr_pos must be at least 0, got -1"),
    "num_logits": ({"num_logits": 0}, ValueError, "num_logits must be at least 1 or None, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("keys", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_and_changes_nothing(
    keys, error, message, use_cache, state, tokens
):
    model = build(state=state, use_cache=use_cache)
    model.generate(tokens[:, :5])
    if keys and "tokens" not in keys and "hidden_state" not in keys:
        keys = {"tokens": tokens, **keys}
    with pytest.raises(error, match=message):
        model.generate(**keys)
    if use_cache:
        _, logits = model.generate(tokens[:, 5:], curr_pos=5)
        torch.testing.assert_close(logits.double(), golden(state, tokens)[:, 5:], **CLOSE)


def test_a_wrong_hidden_state_is_named(state):
    model = build(1, 1, state=state)
    rule = r"hidden_state must be \[b, s, 64\], got \[1, 3, 63\]"
    with pytest.raises(ValueError, match=rule):
        model.generate(hidden_state=torch.zeros(1, 3, 63))
    with pytest.raises(TypeError, match=r"hidden_state must be torch\.float32, got torch\.float16"):
        model.generate(hidden_state=torch.zeros(1, 3, 64).half())
    with pytest.raises(ValueError, match="to layers 1 to 1, got tokens"):
        model.generate(torch.ones(1, 3).long())


def test_wrong_places_in_the_sequence_are_named(state, tokens):
    model = build(state=state)
    with pytest.raises(ValueError, match=r"all curr_pos \+ 1 = 6 tokens must be given, got 1"):
        model.generate(tokens[:, :1], curr_pos=5)
    with pytest.raises(ValueError, match="tokens must be at most max_seq_len=32, got 33"):
        model.generate(torch.zeros(1, 33).long())
    model = build(state=state, use_cache=True)
    with pytest.raises(ValueError, match="tokens must be at most max_seq_len=32 long, got 33"):
        model.generate(torch.zeros(1, 33).long())
    model.generate(tokens[:, :5])
    with pytest.raises(ValueError, match="curr_pos must be 0 or the 5 tokens cached, got 6"):
        model.generate(tokens[:, 6:7], curr_pos=6)


def test_a_compiled_decode_step_compiles_once(state, tokens):
    model = build(state=state, use_cache=True)
    model.generate(tokens[:, :5])
    model.model.compile(fullgraph=True, backend="aot_eager")
    expected = golden(state, tokens)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(5, S):
            _, logits = model.generate(tokens[:, i : i + 1], curr_pos=i)
            torch.testing.assert_close(logits.double(), expected[:, i : i + 1], **CLOSE)
    torch._dynamo.reset()


def test_a_compiled_prefill(state, tokens):
    model = build(state=state)
    model.model.compile(fullgraph=True, backend="aot_eager")
    _, logits = model.generate(tokens)
    torch.testing.assert_close(logits.double(), golden(state, tokens), **CLOSE)
    torch._dynamo.reset()


def test_an_out_of_range_write_surfaces_when_asked(state, tokens):
    """On a GPU positions are not read: the write is suppressed, and a flag set."""
    model = build(state=state, use_cache=True)
    model.generate(tokens[:, :5])
    step = model.model.next_step(2, 1)
    model.model(tokens[:, 5:6], step=step._replace(slots=torch.tensor([4000])))
    with pytest.raises(ValueError, match="a token was out of range and is not in the cache"):
        model.model.raise_on_overflow()
    model.generate(tokens)  # the next prompt starts clean
    model.model.raise_on_overflow()


@CUDA_ONLY
def test_decode_steps_replay_in_a_cuda_graph(device, tokens):
    torch.manual_seed(0)
    shard = Shard("llama", 0, 2, 3)
    sizes = {"head_dim": 64, "num_heads": 4}
    model = ShardedGeneralModel(CONFIG | sizes, shard, device, torch.float16, use_cache=True)
    tokens = tokens.to(device)
    model.generate(tokens[:, :5])
    eager = []
    for i in range(5, S):
        try:
            torch.cuda.set_sync_debug_mode("error")  # a step must not wait for the device
            eager.append(model.generate(tokens[:, i : i + 1], curr_pos=i)[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model.generate(tokens[:, :5])  # again, then the same steps from a graph
    token, step = tokens[:, 5:6].clone(), model.model.next_step(2, 1)
    step = step._replace(slots=step.slots.clone(), kv_lengths=step.kv_lengths.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model.model(token, step=step)  # writes slot 5, as the first replay does
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.model(token, step=step)
    for i, expected in zip(range(5, S), eager, strict=True):
        token.copy_(tokens[:, i : i + 1])
        step.slots.fill_(i)
        step.kv_lengths.fill_(i + 1)
        graph.replay()
        # The same kernels: at most a few float16 ulps, where one sums in the order of arrival.
        torch.testing.assert_close(logits, expected, rtol=0, atol=2**-8)
    model.model.raise_on_overflow()


@CUDA_ONLY
def test_an_out_of_range_position_on_cuda_raises_when_asked(device, tokens):
    shard = Shard("llama", 0, 2, 3)
    model = ShardedGeneralModel(
        CONFIG | {"head_dim": 64}, shard, device, torch.float16, use_cache=True
    )
    tokens = tokens.to(device)
    model.generate(tokens, input_pos=torch.arange(22, 33, device=device)[None])
    with pytest.raises(ValueError, match="a token was out of range and is not in the cache"):
        model.model.raise_on_overflow()
    model.generate(tokens)
    model.model.raise_on_overflow()
