"""Generation: token by token equals full recompute, streams, batches, chains, and their limits."""

import pytest
import torch
from tiny_checkpoints import write_byte_checkpoint

import fastshard
from fastshard import Shard, ShardChain, generate_batch
from fastshard.generate import TextStream
from fastshard.sampling import Sampling
from fastshard.token_loop import read_behind

SAMPLED = {"temperature": 1.2, "top_k": 60, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model of 258 tokens, one a byte: its text is noise, but every byte counts."""
    path = tmp_path_factory.mktemp("bytes")
    write_byte_checkpoint(path, chat_template="{{ messages[0].content | upper }}:")
    return path


@pytest.fixture(scope="module")
def model(path):
    return fastshard.load(path, device="cpu")


def load_chain(path, *ends):
    starts = [0, *(end + 1 for end in ends[:-1])]
    return ShardChain(
        [
            fastshard.load(path, shard=Shard("tiny", a, b, 3), device="cpu")
            for a, b in zip(starts, ends, strict=True)
        ]
    )


def recompute(path, prompt, num_tokens, sampling):
    """The tokens that a model without a cache gives, the whole text anew for each."""
    model = fastshard.load(path, device="cpu", use_cache=False)
    tokens = list(prompt)
    for step in range(num_tokens):
        _, logits = model.generate(torch.tensor([tokens]))
        tokens.append(sampling.choose(logits[:, -1], torch.tensor(step)).item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(**SAMPLED)])
@pytest.mark.parametrize("ends", [(2,), (0, 2), (0, 1, 2)])
def test_token_by_token_equals_full_recompute(path, ends, sampling):
    prompt = [40, 41, 42, 43, 44]
    expected = recompute(path, prompt, 30, sampling)
    chain = load_chain(path, *ends)
    actual = generate_batch(chain, [prompt], max_new_tokens=30, sampling=sampling)
    assert actual == [expected]
    assert len(set(expected)) > 2


def test_rows_of_a_batch_are_as_if_alone(model):
    prompts = [[40, 41, 42], [43], [44, 45, 46, 47, 48, 49, 50]]
    together = generate_batch(model, prompts, max_new_tokens=20)
    alone = [generate_batch(model, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("ends", [(2,), (0, 2)])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 8])
def test_a_prompt_in_chunks(path, ends, chunk_size, monkeypatch):
    """Rows whose padding fills whole chunks too; the cache is made once."""
    prompts = [[40, 41, 42], [43], [44, 45, 46, 47, 48, 49, 50]]
    expected = generate_batch(load_chain(path, *ends), prompts, max_new_tokens=20)
    chain, lengths = load_chain(path, *ends), []
    for shard in chain.models:
        shard.max_generated_tokens = 0
    generate = chain.generate
    monkeypatch.setattr(
        chain,
        "generate",
        lambda tokens, **rest: (lengths.append(tokens.shape[1]), generate(tokens, **rest))[1],
    )
    settings = {"max_new_tokens": 20, "prefill_chunk_size": chunk_size}
    assert generate_batch(chain, prompts, **settings, decode="eager") == expected
    assert lengths[: -(-7 // chunk_size)] == [chunk_size] * (7 // chunk_size) + (
        [7 % chunk_size] if 7 % chunk_size else []
    )
    assert chain.models[0].model.any_cache.max_seq_len == 27


def test_a_stream_in_chunks(model):
    expected = "".join(model.stream("abcdefg", max_new_tokens=9))
    assert "".join(model.stream("abcdefg", max_new_tokens=9, prefill_chunk_size=2)) == expected


def test_rows_of_a_batch_end_where_their_own_end_token_is(model):
    prompts = [[40, 41, 42], [43], [44, 45]]
    free = generate_batch(model, prompts, max_new_tokens=20)
    ends = {free[0][4], free[1][7]}
    for row, whole in zip(
        generate_batch(model, prompts, max_new_tokens=20, eos_tokens=ends), free, strict=True
    ):
        stop = next((i + 1 for i, token in enumerate(whole) if token in ends), 20)
        assert row == whole[:stop]


def test_a_batch_of_ended_rows_takes_no_more_steps(path, monkeypatch):
    model = fastshard.load(path, device="cpu")
    calls = []
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda *args, **settings: (calls.append(1), generate(*args, **settings))[1],
    )
    generate_batch(model, [[40, 41]], max_new_tokens=20, eos_tokens=range(258))
    assert len(calls) == 1


@pytest.mark.large
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_tokens_are_read_in_order_and_on_a_gpu_one_step_late(count, device):
    launched = []

    def steps():
        for i in range(count):
            launched.append(i)
            yield torch.tensor([i, 10 * i], device=device)

    lag = 1 if device.type == "cuda" else 0
    for i, tokens in enumerate(read_behind(steps())):
        assert tokens == [i, 10 * i]
        assert len(launched) == min(i + 1 + lag, count)
    assert len(launched) == count


def test_stream_gives_the_text_of_the_tokens(model):
    stream = model.stream("Grüße", max_new_tokens=40, **SAMPLED)
    assert isinstance(stream, TextStream)
    pieces = list(stream)
    tokens = model.tokenizer.encode("Grüße")
    (expected,) = generate_batch(model, [tokens], max_new_tokens=40, sampling=Sampling(**SAMPLED))
    assert "".join(pieces) == model.tokenizer.decode(expected)
    assert (stream.num_prompt_tokens, stream.num_tokens) == (7, 40)
    assert stream.prefill_seconds > 0
    assert stream.decode_seconds > 0


def test_same_seed_same_text(model):
    texts = ["".join(model.stream("ab", max_new_tokens=20, **SAMPLED)) for _ in range(2)]
    other = "".join(model.stream("ab", max_new_tokens=20, **(SAMPLED | {"seed": 4})))
    assert texts[0] == texts[1] != other


def test_a_prompt_knows_nothing_of_the_one_before(path, model):
    list(model.stream("something else that is longer", max_new_tokens=9))
    fresh = fastshard.load(path, device="cpu")
    again = "".join(model.stream("ab", max_new_tokens=20))
    assert again == "".join(fresh.stream("ab", max_new_tokens=20))


def test_stop_strings_across_tokens(model):
    whole = "".join(model.stream("ab", max_new_tokens=40, **SAMPLED))
    stop = whole[10:13]  # three tokens or more
    stream = model.stream("ab", max_new_tokens=40, stop=[stop, "never there"], **SAMPLED)
    assert "".join(stream) == whole[: whole.index(stop)]
    assert stream.num_tokens < 40
    assert "".join(model.stream("ab", max_new_tokens=40, stop=stop, **SAMPLED)) == whole[:10]


def test_what_may_begin_a_stop_string_is_text_at_the_end(model):
    whole = "".join(model.stream("ab", max_new_tokens=20, **SAMPLED))
    stop = whole[-1] + "never"
    assert "".join(model.stream("ab", max_new_tokens=20, stop=stop, **SAMPLED)) == whole


def test_a_decoder_that_strips_the_start_sees_the_prompt(model, monkeypatch):
    """As Llama 2's, which takes a space away from the first token that it gets."""
    whole = "".join(model.stream("ab", max_new_tokens=20, **SAMPLED))
    decode = model.tokenizer.decode
    monkeypatch.setattr(model.tokenizer, "decode", lambda tokens: decode(tokens)[1:])
    assert "".join(model.stream("ab", max_new_tokens=20, **SAMPLED)) == whole


def test_end_token_ends_the_text_and_is_not_in_it(path, tmp_path):
    import shutil

    copy = shutil.copytree(path, tmp_path / "copy")
    model = fastshard.load(copy, device="cpu")
    (tokens,) = generate_batch(model, [model.tokenizer.encode("ab")], max_new_tokens=12)
    end = tokens[6]
    (copy / "generation_config.json").write_text(f'{{"eos_token_id": [{end}, 257]}}')
    stream = fastshard.load(copy, device="cpu").stream("ab", max_new_tokens=12)
    assert "".join(stream) == model.tokenizer.decode(tokens[: tokens.index(end)])
    assert stream.num_tokens == tokens.index(end) + 1


def test_sampling_defaults_are_the_checkpoints(path, tmp_path):
    import shutil

    copy = shutil.copytree(path, tmp_path / "copy")
    greedy = "".join(fastshard.load(copy, device="cpu").stream("ab", max_new_tokens=20))
    (copy / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 1.2, "top_k": 60, "top_p": 0.95}'
    )
    model = fastshard.load(copy, device="cpu")
    sampled = "".join(model.stream("ab", max_new_tokens=20, seed=3))
    assert sampled == "".join(model.stream("ab", max_new_tokens=20, **SAMPLED)) != greedy
    assert "".join(model.stream("ab", max_new_tokens=20, temperature=0)) == greedy


def test_chat_puts_the_prompt_into_the_template(model):
    plain = "".join(model.stream("ABC:", max_new_tokens=10))
    assert "".join(model.stream("abc", max_new_tokens=10, chat=True)) == plain
    messages = [{"role": "user", "content": "abc"}]
    assert "".join(model.stream(messages, max_new_tokens=10, chat=True)) == plain


def test_text_ends_where_the_context_is_full(path, model):
    stream = model.stream("a" * 60, max_new_tokens=1000)
    list(stream)
    assert stream.num_tokens == 4
    assert "".join(model.stream("a" * 60, max_new_tokens=4)) == "".join(
        model.stream("a" * 60, max_new_tokens=5)
    )


def test_a_text_whose_model_got_another_prompt_raises(model):
    """Both prompts have the same length, so that no count would tell."""
    first, second = model.stream("ab"), model.stream("cd")
    next(first)
    next(second)
    with pytest.raises(
        RuntimeError, match="the text cannot go on: its model was given another prompt"
    ):
        list(first)
    assert len(list(second)) > 2


def test_a_model_without_cache_raises(path):
    model = fastshard.load(path, device="cpu", use_cache=False)
    with pytest.raises(ValueError, match="use_cache must be True for a model that generates text"):
        model.stream("a")
    with pytest.raises(ValueError, match="use_cache must be True for a model that generates text"):
        generate_batch(model, [[1]])


def test_more_new_tokens_than_the_cache_was_made_for(path):
    small = fastshard.load(path, device="cpu", max_generated_tokens=2)
    large = fastshard.load(path, device="cpu")
    texts = ["".join(m.stream("ab", max_new_tokens=30)) for m in (small, large)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("length", [64, 65, 200])
def test_a_prompt_as_long_as_the_context_raises(model, length):
    with pytest.raises(
        ValueError, match=f"prompt must be shorter than the context of 64 tokens, got {length}"
    ):
        model.stream("a" * length)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "prompt must have at least one token, got none"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be at least 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ({"stop": ""}, r"stop must be non-empty strings, got \[''\]"),
    ],
)
def test_settings_out_of_range_raise_before_the_first_token(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.stream(**({"prompt": "a"} | settings))


def test_a_prompt_that_is_no_text_raises(model):
    with pytest.raises(TypeError, match="prompt must be a string without chat, got list"):
        model.stream([1, 2])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must have at least one prompt, got none"),
        ([[1], []], "prompt must have at least one token, got none"),
        ([[1], [1] * 64], "prompt must be shorter than the context of 64 tokens, got 64"),
        ([[1], [2, 258]], "prompt must hold tokens of 0 to 257, got 2 to 258"),
        ([[-1, 3]], "prompt must hold tokens of 0 to 257, got -1 to 3"),
    ],
)
def test_prompts_that_do_not_fit_raise(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(model, prompts)


def test_a_part_of_a_model_does_not_stream(path):
    part = fastshard.load(path, shard=Shard("tiny", 0, 1, 3), device="cpu")
    with pytest.raises(
        ValueError, match="stream needs all 3 layers, this shard holds layers 0-1: put all shards"
    ):
        part.stream("a")


def test_a_model_without_tokenizer_does_not_stream(path, tmp_path):
    import shutil

    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    model = fastshard.load(copy, device="cpu")
    assert model.generate(torch.tensor([[1, 2]]))[1].shape == (1, 2, 258)
    with pytest.raises(
        ValueError, match=r"stream needs a tokenizer, and the checkpoint has no tokenizer\.json"
    ):
        model.stream("a")


@pytest.mark.parametrize(
    ("spans", "found"),
    [
        ([(0, 1)], "0-1"),
        ([(1, 2)], "1-2"),
        ([(0, 1), (1, 2)], "0-1,1-2"),
        ([(1, 2), (0, 0)], "1-2,"),
    ],
)
def test_a_chain_with_holes_or_overlaps_raises(path, spans, found):
    parts = [fastshard.load(path, shard=Shard("tiny", a, b, 3), device="cpu") for a, b in spans]
    with pytest.raises(
        ValueError, match=f"shards must hold each of 3 layers once, in order, got layers {found}"
    ):
        ShardChain(parts)


def test_an_empty_chain_raises():
    with pytest.raises(ValueError, match="shards must hold each of"):
        ShardChain([])
