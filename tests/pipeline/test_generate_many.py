"""generate_many in one process: the texts of ``stream``, in order, in every decode mode."""

import warnings

import pytest
from recorded_graphs import pretend_to_capture
from tiny_checkpoints import write_byte_checkpoint

import fastshard
from fastshard import Shard, ShardChain
from fastshard.decode import static

PROMPTS = ["abcde", "x", "Grüße", "12"]
SAMPLED = {"temperature": 1.2, "top_k": 60, "top_p": 0.95, "seed": 3, "max_new_tokens": 12}
CAPTURED = pytest.mark.parametrize("mode", ["persistent", "graph"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    write_byte_checkpoint(path, chat_template="{{ messages[0].content | upper }}:")
    return path


@pytest.fixture(scope="module")
def model(path):
    return fastshard.load(path, device="cpu")


@pytest.fixture(scope="module")
def expected(model):
    """Each prompt alone, with the seed that it has among the others."""
    return [
        "".join(model.stream(prompt, **SAMPLED | {"seed": 3 + i}))
        for i, prompt in enumerate(PROMPTS)
    ]


def join(texts):
    whole = {}
    for index, piece in texts:
        whole[index] = whole.get(index, "") + piece
    return list(whole.values())


@pytest.mark.parametrize("in_flight", [1, 2, 3, 9])
def test_each_text_is_as_if_alone(model, expected, in_flight):
    texts = model.generate_many(PROMPTS, in_flight=in_flight, **SAMPLED)
    assert join(texts) == expected
    assert len(set(expected)) == len(expected)
    assert (texts.num_prompts, texts.num_ended) == (4, 4)
    assert (texts.num_prompt_tokens, texts.num_tokens) == (5 + 1 + 7 + 2, 48)
    assert 0 < texts.first_seconds < texts.seconds


def test_a_text_of_nothing_is_a_piece_of_nothing(path, model, tmp_path):
    model.generation_defaults = type(model.generation_defaults)(eos_tokens=tuple(range(258)))
    try:
        assert list(model.generate_many(["a", "b"])) == [(0, ""), (1, "")]
    finally:
        del model.generation_defaults


def test_stop_strings_end_their_text_alone(model):
    settings = {"max_new_tokens": 12, "in_flight": 2}
    whole = join(model.generate_many(PROMPTS, **settings))
    stop = whole[1][4:6]
    cut = join(model.generate_many(PROMPTS, stop=stop, **settings))
    assert cut == [text.split(stop)[0] for text in whole]
    assert cut != whole


def test_each_text_ends_where_its_own_context_is_full(model):
    prompts = ["a" * 60, "b" * 30]
    texts = model.generate_many(prompts, max_new_tokens=1000, in_flight=2)
    alone = ["".join(model.stream(prompt, max_new_tokens=1000)) for prompt in prompts]
    assert join(texts) == alone
    assert texts.num_tokens == 4 + 34


def test_chat_and_chunks(model):
    plain = join(model.generate_many(["AB:", "CDEF:"], max_new_tokens=5))
    settings = {"max_new_tokens": 5, "chat": True, "prefill_chunk_size": 2, "in_flight": 2}
    assert join(model.generate_many(["ab", "cdef"], **settings)) == plain


def test_the_models_own_cache_is_left_alone(model):
    whole = "".join(model.stream("ab", max_new_tokens=9))
    stream = model.stream("ab", max_new_tokens=9)
    pieces = [next(stream)]
    texts = model.generate_many(PROMPTS, max_new_tokens=4, in_flight=2)
    for _ in texts:
        pieces += [piece for piece in [next(stream, None)] if piece]
    assert "".join([*pieces, *stream]) == whole


def test_two_at_once_do_not_disturb_each_other(model, expected):
    one, other = (model.generate_many(PROMPTS, in_flight=2, **SAMPLED) for _ in range(2))
    pairs = list(zip(one, other, strict=True))
    assert join(first for first, _ in pairs) == join(second for _, second in pairs) == expected


@pytest.mark.parametrize("is_apart", [False, True])
@CAPTURED
def test_slots_are_captured_once_for_all_requests(mode, is_apart, path, expected, monkeypatch):
    """Each request with its own sampling; of three shards, on one device or several."""
    made = pretend_to_capture(monkeypatch)
    if is_apart:
        monkeypatch.setattr(
            "fastshard.pipeline.slot.by_device", lambda models: [[m] for m in models]
        )
    shards = [Shard("tiny", i, i, 3) for i in range(3)]
    chain = ShardChain([fastshard.load(path, shard=shard, device="cpu") for shard in shards])
    texts = chain.generate_many(PROMPTS, in_flight=2, decode=mode, **SAMPLED)
    num_captured = 2 * (3 if is_apart else 1)
    assert len(made) == num_captured  # before the first prompt
    monkeypatch.setattr(static.Part, "_launch", None)  # Python has no part in a step
    assert join(texts) == expected
    assert len(made) == num_captured


def test_persistent_on_a_cpu_is_the_reference_of_the_op(model, expected, monkeypatch):
    calls = []
    decode_step = fastshard.ops.decode_step
    monkeypatch.setattr(
        fastshard.ops,
        "decode_step",
        lambda *args, **keys: (calls.append(1), decode_step(*args, **keys))[1],
    )
    texts = model.generate_many(PROMPTS, in_flight=3, decode="persistent", **SAMPLED)
    assert join(texts) == expected
    assert len(calls) == 4 * 11


def test_a_launch_that_cannot_be_resident_falls_back_once(model, expected, monkeypatch):
    pretend_to_capture(monkeypatch)

    def refuse(*args, **keys):
        raise RuntimeError("decode_step: cannot be resident: 264 blocks are needed")

    monkeypatch.setattr(fastshard.ops, "decode_step", refuse)
    text = "^decode mode persistent is not possible, falling back to graph: decode_step: cannot be"
    with pytest.warns(RuntimeWarning, match=text) as said:
        texts = model.generate_many(PROMPTS, in_flight=3, decode="persistent", **SAMPLED)
    assert len(said) == 1
    assert join(texts) == expected


def test_a_mode_that_a_cpu_has_not_falls_back_with_one_warning(model, expected):
    text = "^decode mode graph is not possible, falling back to eager: a CUDA graph needs a GPU"
    with pytest.warns(RuntimeWarning, match=text) as said:
        texts = model.generate_many(PROMPTS, in_flight=3, decode="graph", **SAMPLED)
    assert len(said) == 1
    assert join(texts) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate_many(PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "message"),
    [
        ("abc", {}, TypeError, "prompts must be a list of prompts, got a string"),
        ([], {}, ValueError, "prompts must have at least one prompt, got none"),
        (["a", 5], {}, TypeError, "prompt must be a string without chat, got int"),
        (["a", ""], {}, ValueError, "prompt must have at least one token, got none"),
        (
            ["a", "b" * 64],
            {},
            ValueError,
            "prompt must be shorter than the context of 64 tokens, got 64",
        ),
        (["a"], {"in_flight": 0}, ValueError, "in_flight must be at least 1, got 0"),
        (["a"], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        (
            ["a"],
            {"prefill_chunk_size": 0},
            ValueError,
            "prefill_chunk_size must be at least 1, got 0",
        ),
        (["a"], {"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
        (["a"], {"stop": ""}, ValueError, r"stop must be non-empty strings, got \[''\]"),
        (
            ["a"],
            {"decode": "fast"},
            ValueError,
            "decode must be one of auto, persistent, graph, eager, got 'fast'",
        ),
    ],
)
def test_what_cannot_be_raises_before_a_prompt_runs(model, prompts, settings, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        model.generate_many(prompts, **settings)


def test_seeds_wrap_around(model):
    settings = {"temperature": 1.2, "max_new_tokens": 9}
    texts = join(model.generate_many(["ab", "ab"], seed=2**63 - 1, **settings))
    assert texts[1] == "".join(model.stream("ab", seed=0, **settings))


def test_a_shard_alone_has_no_text(path):
    shard = fastshard.load(path, shard=Shard("tiny", 0, 1, 3), device="cpu")
    with pytest.raises(
        ValueError, match="generate_many needs all 3 layers, this shard holds layers 0-1"
    ):
        shard.generate_many(["a"])


def test_no_tokenizer(path, tmp_path):
    import shutil

    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    model = fastshard.load(copy, device="cpu")
    message = "^generate_many needs a tokenizer, and the checkpoint has no tokenizer.json$"
    with pytest.raises(ValueError, match=message):
        model.generate_many(["a"])
