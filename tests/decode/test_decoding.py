"""Decoding: every mode gives eager's tokens and logits, keeps the counts, and falls back.

On the CPU ``graph`` runs with a stand-in for a CUDA graph, ``tests/recorded_graphs.py``.
"""

import warnings

import pytest
import torch
from recorded_graphs import pretend_to_capture
from tiny_checkpoints import (
    FAMILIES,
    SIZES,
    make_reference,
    write_byte_checkpoint,
)
from torch import Tensor

import fastshard
from fastshard import Shard, ShardChain, decode, generate_batch, ops
from fastshard.decode import static
from fastshard.sampling import Sampling
from helpers import CUDA_ONLY, assert_as_accurate

SAMPLED = Sampling(temperature=1.2, top_k=60, top_p=0.95, seed=3)
PROMPT = [40, 41, 42, 43, 44]
CAPTURED = pytest.mark.parametrize("mode", ["persistent", "graph"])


@pytest.fixture
def graphs(monkeypatch):
    """Pretend that the CPU is a GPU; holds the recordings made."""
    return pretend_to_capture(monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    write_byte_checkpoint(path)
    return path


@pytest.fixture
def model(path):
    return fastshard.load(path, device="cpu")


def load_chain(path, *ends):
    starts = [0, *(end + 1 for end in ends[:-1])]
    shards = [Shard("tiny", a, b, 3) for a, b in zip(starts, ends, strict=True)]
    return ShardChain([fastshard.load(path, shard=shard, device="cpu") for shard in shards])


@pytest.fixture
def calls(monkeypatch):
    """How often the op was called."""
    made = []
    decode_step = ops.decode_step
    monkeypatch.setattr(
        ops, "decode_step", lambda *args, **keys: (made.append(1), decode_step(*args, **keys))[1]
    )
    return made


@CAPTURED
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("ends", [(2,), (0, 2), (0, 1, 2)], ids=str)
def test_every_mode_gives_the_same_tokens(ends, sampling, mode, path, graphs):
    settings = {"max_new_tokens": 30, "sampling": sampling}
    (expected,) = generate_batch(load_chain(path, 2), [PROMPT], decode="eager", **settings)
    chain = load_chain(path, *ends)
    assert generate_batch(chain, [PROMPT], decode=mode, **settings) == [expected]
    assert len(set(expected)) > 2
    assert len(graphs) == 1  # of all shards together


@CAPTURED
def test_shards_on_several_devices(mode, path, monkeypatch, graphs):
    """One graph each; the stand-in for devices are shards that are kept apart."""
    monkeypatch.setattr(static, "by_device", lambda models: [[model] for model in models])
    prompts = [PROMPT, [7, 8]]
    settings = {"max_new_tokens": 20, "sampling": SAMPLED}
    expected = generate_batch(load_chain(path, 2), prompts, decode="eager", **settings)
    chain = load_chain(path, 0, 1, 2)
    assert generate_batch(chain, prompts, decode=mode, **settings) == expected
    assert len(graphs) == 3


def test_runs_of_shards_on_one_device_are_together():
    class On:
        def __init__(self, device):
            self.device = torch.device(device)

    models = [On(device) for device in ("cpu", "cpu", "meta", "cpu")]
    assert static.by_device(models) == [models[:2], models[2:3], models[3:]]


def test_persistent_on_a_cpu_calls_the_op(model, calls):
    expected = generate_batch(model, [PROMPT], max_new_tokens=12, decode="eager")
    assert calls == []
    assert generate_batch(model, [PROMPT], max_new_tokens=12, decode="persistent") == expected
    assert len(calls) == 11  # the first token is the prompt's


def test_auto_on_a_cpu_is_eager_and_says_nothing(model, calls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_batch(model, [PROMPT] * 9, max_new_tokens=3, decode="auto")
    assert calls == []


def test_the_variable_and_the_argument_choose(model, calls, monkeypatch):
    monkeypatch.setenv("FASTSHARD_DECODE", "persistent")
    generate_batch(model, [PROMPT], max_new_tokens=2, decode="eager")
    list(model.stream("a", max_new_tokens=2, decode="eager"))
    assert calls == []
    generate_batch(model, [PROMPT], max_new_tokens=2)
    assert len(calls) == 1
    list(model.stream("a", max_new_tokens=2))
    assert len(calls) == 2
    monkeypatch.delenv("FASTSHARD_DECODE")
    list(model.stream("a", max_new_tokens=2, decode="persistent"))
    assert len(calls) == 3


def test_an_unknown_mode_raises_before_the_prompt_runs(model):
    rule = "decode must be one of auto, persistent, graph, eager, got 'fast'"
    with pytest.raises(ValueError, match=rule):
        model.stream("a", decode="fast")
    with pytest.raises(ValueError, match=rule):
        generate_batch(model, [PROMPT], decode="fast")
    assert model.model.cache_size == 0


@CAPTURED
def test_only_the_first_two_steps_run_python(mode, model, graphs, monkeypatch):
    launches = []
    launch = static.Part._launch
    monkeypatch.setattr(static.Part, "_launch", lambda part: (launches.append(1), launch(part))[1])
    generate_batch(model, [PROMPT], max_new_tokens=20, decode=mode)
    assert len(launches) == 2  # as it is, and captured
    assert len(graphs) == 1


@CAPTURED
def test_padded_rows_are_as_if_alone(mode, model, graphs):
    prompts = [[40, 41, 42], [43], [44, 45, 46, 47, 48, 49, 50]]
    together = generate_batch(model, prompts, max_new_tokens=20, decode=mode)
    alone = [generate_batch(model, [p], max_new_tokens=20, decode="eager")[0] for p in prompts]
    assert together == alone


@CAPTURED
def test_prompts_in_a_row(mode, model, graphs):
    """Shorter, then more and longer than the cache was made for, then shorter again."""
    batches = [[PROMPT], [PROMPT * 4, [3]], [[7, 8]]]
    for prompts in batches:
        expected = generate_batch(model, prompts, max_new_tokens=9, decode="eager")
        assert generate_batch(model, prompts, max_new_tokens=9, decode=mode) == expected


@CAPTURED
def test_an_early_end_leaves_a_sound_model(mode, model, graphs):
    whole = "".join(model.stream("ab", max_new_tokens=30, decode="eager"))
    stream = model.stream("ab", max_new_tokens=30, stop=whole[8:11], decode=mode)
    assert "".join(stream) == whole[: whole.index(whole[8:11])]
    (tokens,) = generate_batch(model, [PROMPT], max_new_tokens=30, decode="eager")
    end = tokens[5]
    actual = generate_batch(model, [PROMPT], max_new_tokens=30, eos_tokens=[end], decode=mode)
    assert actual == [tokens[: tokens.index(end) + 1]]
    assert "".join(model.stream("ab", max_new_tokens=30, decode=mode)) == whole


def prefill(model, prompt=PROMPT):
    _, logits = model.generate(torch.tensor([prompt]), num_logits=1)
    return Sampling().choose(logits[:, -1], torch.zeros((), dtype=torch.int64))


def start(model, tokens, mode, num_held=5, **settings):  # the tokens of PROMPT
    settings = {"sampling": Sampling(), "mode": mode} | settings
    return decode.start_decoding(model, tokens, num_held=num_held, **settings)


@CAPTURED
def test_eager_goes_on_where_another_mode_stopped(mode, path, graphs):
    chain = load_chain(path, 0, 1, 2)
    (expected,) = generate_batch(chain, [PROMPT], max_new_tokens=13, decode="eager")
    tokens = [prefill(chain)]
    for count, part in enumerate(["eager", mode, "eager", mode]):
        decoding = start(chain, tokens[-1], part, num_held=len(PROMPT) + 3 * count)
        assert decoding.mode == part
        tokens += [decoding.step() for _ in range(3)]
    assert torch.cat(tokens).tolist() == expected
    for shard in chain.models:
        caches = [layer.attn.kv_cache for layer in shard.model.layers.values()]
        assert [cache.size for cache in caches] == [len(PROMPT) + 12] * len(caches)


@CAPTURED
def test_tokens_stay_as_they_are(mode, model, graphs):
    """They are read a step late."""
    decoding = start(model, prefill(model), mode, sampling=SAMPLED)
    steps = [decoding.step() for _ in range(8)]
    read = [step.tolist() for step in steps]
    decoding = start(model, prefill(model), "eager", sampling=SAMPLED)
    assert read == [decoding.step().tolist() for _ in range(8)]


@CAPTURED
def test_a_full_cache_raises_before_the_launch(mode, model, graphs):
    model.model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    decoding = start(model, prefill(model), mode)
    for _ in range(3):
        decoding.step()
    before = model.model.any_cache.k_cache.clone()
    with pytest.raises(ValueError, match="8 of its 8 slots are used, got 1 tokens more"):
        decoding.step()
    assert model.model.cache_size == 8
    assert torch.equal(model.model.any_cache.k_cache, before)
    model.model.raise_on_overflow()


@CAPTURED
def test_a_cache_that_holds_another_prompt_raises(mode, model, graphs):
    rule = "the text cannot go on: its model was given another prompt"
    decoding = start(model, prefill(model), mode)
    decoding.step()
    prefill(model)
    with pytest.raises(RuntimeError, match=rule):
        decoding.step()
    decoding = start(model, prefill(model), mode)
    model.model.setup_caches(1, torch.float32, decoder_max_seq_len=20)
    prefill(model)  # as many tokens as before, in another cache
    with pytest.raises(RuntimeError, match=rule):
        decoding.step()


@CAPTURED
def test_a_text_that_begins_in_inference_mode(mode, model, graphs):
    (expected,) = generate_batch(model, [PROMPT], max_new_tokens=9, decode="eager")
    with torch.inference_mode():
        first = prefill(model)
        decoding = start(model, first, mode)
        tokens = [first, *(decoding.step() for _ in range(4))]
    tokens += [decoding.step() for _ in range(2)]
    with torch.inference_mode():
        tokens += [decoding.step() for _ in range(2)]
    assert [int(token) for token in tokens] == expected


@CAPTURED
def test_weights_that_require_grad_leave_no_trace(mode, model, graphs):
    model.requires_grad_(True)
    needed = []

    class Spy(Sampling):
        def choose(self, logits, draw):
            needed.append(logits.requires_grad)
            return super().choose(logits, draw)

    decoding = start(model, prefill(model), mode, sampling=Spy())
    for _ in range(3):
        decoding.step()
    assert needed == [False, False]


@CAPTURED
def test_weights_are_read_anew_for_each_prompt(mode, path, model, graphs):
    generate_batch(model, [PROMPT], max_new_tokens=3, decode=mode)
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("w1.weight"):
            tensor.neg_()
    model.model.load_state_dict(state, assign=True)
    model.to(torch.bfloat16).to(torch.float32)  # other memory, other values
    model.model.setup_caches(1, torch.float32)
    expected = generate_batch(model, [PROMPT], max_new_tokens=9, decode="eager")
    assert generate_batch(model, [PROMPT], max_new_tokens=9, decode=mode) == expected
    fresh = fastshard.load(path, device="cpu")
    assert generate_batch(fresh, [PROMPT], max_new_tokens=9) != expected


def test_the_norms_round_as_the_layers_do(path):
    """Up to the first layer's cache, both run the same ops: the bits are equal."""
    model = fastshard.load(path, device="cpu", dtype=torch.bfloat16)
    written = []
    for mode in ("eager", "persistent"):
        start(model, prefill(model), mode).step()
        cache = model.model.any_cache
        written.append([cache.k_cache[:, :, 5].clone(), cache.v_cache[:, :, 5].clone()])
    assert torch.equal(written[0][0], written[1][0])
    assert torch.equal(written[0][1], written[1][1])


def test_weights_are_the_modules_own_memory(path):
    first, last = load_chain(path, 1, 2).models
    weights = decode.decode_weights(first.model)
    assert weights.embedding.data_ptr() == first.model.tok_embeddings.weight.data_ptr()
    for i, layer in enumerate(first.model.layers.values()):
        own = {
            "qkv_weight": layer.attn.packed_weight,
            "output_weight": layer.attn.output_proj.weight,
            "gate_up_weight": layer.mlp.packed_weight,
            "down_weight": layer.mlp.w2.weight,
        }
        for name, tensor in own.items():
            assert getattr(weights, name)[i].data_ptr() == tensor.data_ptr()
    assert weights.norm is weights.head is None
    weights = decode.decode_weights(last.model)
    assert weights.embedding is None
    assert weights.head.data_ptr() == last.model.output.weight.data_ptr()


# Falling back.


@pytest.mark.parametrize("mode", ["auto", "persistent"])
def test_what_the_op_does_not_take_falls_back_with_one_warning(mode, model, graphs, calls):
    prompts = [[i + 1, i + 2] for i in range(9)]
    expected = generate_batch(model, prompts, max_new_tokens=9, decode="eager")
    text = (
        "^decode mode persistent is not possible, falling back to graph: "
        "batch must be 1 to 8, got 9$"
    )
    with pytest.warns(RuntimeWarning, match=text) as said:
        assert generate_batch(model, prompts, max_new_tokens=9, decode=mode) == expected
    assert len(said) == 1
    assert calls == []
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("mode", "prompts", "reason"),
    [
        ("graph", [PROMPT], "graph .* to eager: a CUDA graph needs a GPU, got cpu"),
        ("persistent", [PROMPT] * 9, "persistent .* to eager: batch must be 1 to 8, got 9"),
    ],
)
def test_a_mode_that_a_cpu_has_not_falls_back_with_one_warning(mode, prompts, reason, model):
    expected = generate_batch(model, prompts, max_new_tokens=9, decode="eager")
    with pytest.warns(RuntimeWarning, match=f"^decode mode {reason}$") as said:
        assert generate_batch(model, prompts, max_new_tokens=9, decode=mode) == expected
    assert len(said) == 1


NOT_RESIDENT = "decode_step: cannot be resident: 264 blocks are needed, the device holds 132"


def refuse(monkeypatch, text, until=0):
    """Let the op fail as the kernel's launch does, after ``until`` calls."""
    decode_step, made = ops.decode_step, []

    def fail(*args, **keys):
        made.append(1)
        if len(made) > until:
            raise RuntimeError(text)
        decode_step(*args, **keys)

    monkeypatch.setattr(ops, "decode_step", fail)


@pytest.mark.parametrize("until", [0, 1])
@pytest.mark.parametrize("is_apart", [False, True])
@pytest.mark.parametrize("mode", ["auto", "persistent"])
def test_a_launch_that_cannot_be_resident_falls_back(
    mode, is_apart, until, path, graphs, monkeypatch
):
    """In the first or the second of three shards, on one device or several."""
    if is_apart:
        monkeypatch.setattr(static, "by_device", lambda models: [[model] for model in models])
    expected = generate_batch(load_chain(path, 2), [PROMPT], max_new_tokens=9, decode="eager")
    refuse(monkeypatch, NOT_RESIDENT, until)
    text = f"^decode mode persistent is not possible, falling back to graph: {NOT_RESIDENT}$"
    with pytest.warns(RuntimeWarning, match=text) as said:
        actual = generate_batch(load_chain(path, 0, 1, 2), [PROMPT], max_new_tokens=9, decode=mode)
    assert actual == expected
    assert len(said) == 1


def test_a_launch_that_cannot_be_resident_on_a_cpu_falls_back_to_eager(model, monkeypatch):
    expected = generate_batch(model, [PROMPT], max_new_tokens=9, decode="eager")
    refuse(monkeypatch, NOT_RESIDENT)
    with pytest.warns(RuntimeWarning, match=f"falling back to eager: {NOT_RESIDENT}$") as said:
        actual = generate_batch(model, [PROMPT], max_new_tokens=9, decode="persistent")
    assert actual == expected
    assert len(said) == 1
    decoding = start(model, prefill(model), "persistent")
    with pytest.warns(RuntimeWarning, match="falling back to eager"):
        decoding.step()
    assert decoding.mode == "eager"


def test_other_errors_are_not_swallowed(model, monkeypatch):
    refuse(monkeypatch, "CUDA error: out of memory")
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
        generate_batch(model, [PROMPT], max_new_tokens=9, decode="persistent")
    assert model.model.cache_size == len(PROMPT)  # the step was not counted


# Every family, by the error rule, on every device.


class Forced:
    """In place of a sampling: keeps each step's logits, and goes on with given tokens."""

    def __init__(self, tokens: Tensor, vocab_size: int):
        self.tokens = tokens  # [b, steps + 1], step i chooses tokens[:, i]
        self.logits = torch.empty(len(tokens), vocab_size, device=tokens.device)

    def choose(self, logits: Tensor, draw: Tensor) -> Tensor:
        self.logits.copy_(logits)
        return self.tokens.index_select(1, draw.view(1))[:, 0]


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES[request.param][2], "head_dim", 64)  # of those that the op takes
        make_reference(request.param).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "mode", ["persistent", *(pytest.param(m, marks=pytest.mark.large) for m in ("graph", "eager"))]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_logits_of_every_family(family, num_shards, dtype, mode, device, request):
    from transformers import AutoModelForCausalLM

    if mode == "graph" and device.type == "cpu":
        request.getfixturevalue("graphs")
    tokens = torch.randint(SIZES["vocab_size"], (2, 14))
    with torch.no_grad():
        golden, naive = (
            AutoModelForCausalLM.from_pretrained(family, dtype=kind)(tokens).logits
            for kind in (torch.float64, dtype)
        )
    cuts = {1: [(0, 2)], 3: [(0, 0), (1, 1), (2, 2)]}[num_shards]
    model = ShardChain(
        [
            fastshard.load(family, shard=Shard("m", a, b, 3), device=device, dtype=dtype)
            for a, b in cuts
        ]
    )
    tokens = tokens.to(device)
    model.generate(tokens[:, :6], num_logits=1)
    forced = Forced(tokens[:, 6:], SIZES["vocab_size"])
    decoding = start(model, tokens[:, 6].contiguous(), mode, num_held=6, sampling=forced)
    logits = []
    for _ in range(7):
        decoding.step()
        logits.append(forced.logits.cpu().clone())
    assert decoding.mode == mode
    actual = torch.stack(logits, 1)
    assert_as_accurate(actual, golden[:, 6:13], naive[:, 6:13].float())


@CUDA_ONLY
@CAPTURED
def test_a_step_neither_waits_nor_allocates(mode, device):
    model = fastshard.load(device=device)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]], device=device)
    _, logits = model.generate(prompt, num_logits=1)
    first = Sampling().choose(logits[:, -1], torch.zeros((), dtype=torch.int64, device=device))
    decoding = start(model, first, mode, num_held=3)
    decoding.step()
    decoding.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(20):
            decoding.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert decoding.mode == mode
