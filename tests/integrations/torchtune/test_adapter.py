"""accelerate and undo: the same model, as accurate as torchtune's, in place and back."""

import copy
import gc
import importlib
import sys
import weakref

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import modules
from torchtune.generation import generate
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_1._component_builders import llama3_1
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import delete_kv_caches, disable_kv_cache, local_kv_cache

import decoder_reference as reference
from fastshard.integrations.torchtune import accelerate, config_of, undo
from fastshard.integrations.torchtune.attention import Attention
from fastshard.integrations.torchtune.layers import FeedForward, Layer, RMSNorm
from helpers import assert_as_accurate

SIZES = {"vocab_size": 96, "num_layers": 3, "embed_dim": 64, "intermediate_dim": 80}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "max_seq_len": 3000, "norm_eps": 0.01}
BUILDERS = {
    "llama2": lambda: llama2(**SIZES, **HEADS),
    "llama3.1": lambda: llama3_1(**SIZES, **HEADS, scale_factor=8),
    "llama3.2": lambda: llama3_2(**SIZES, **HEADS),  # tied
    "mistral": lambda: mistral(**SIZES, **HEADS),
    "qwen2": lambda: qwen2(**SIZES, **HEADS),  # biases
    "qwen2 tied": lambda: qwen2(**SIZES, **HEADS, tie_word_embeddings=True),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, some ulps of values below 10


def build(name: str = "llama3.1", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # as torchtune's recipes: the RoPE cache stays float32
    try:
        model = BUILDERS[name]().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.load_state_dict(reference.random_state(model))
    return model


def both(name: str = "llama3.1", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """An accelerated model, and one of the same weights that is not."""
    model = build(name, dtype)
    return accelerate(copy.deepcopy(model)), model


def tokens(b: int, s: int) -> Tensor:
    return torch.randint(1, 96, (b, s), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILDERS)
def test_as_accurate_as_torchtune(name, dtype):
    ours, theirs = both(name, dtype)
    assert all(type(layer) is Layer for layer in ours.layers)
    parts = [*ours.modules()]
    for kind, count in ((Attention, 3), (FeedForward, 3), (RMSNorm, 7)):
        assert sum(type(part) is kind for part in parts) == count
    x, state, config = tokens(2, 9), theirs.state_dict(), config_of(theirs)
    bias = torch.zeros(2, 9, 9)
    allowed = torch.rand(2, 9, 9) < 0.5
    allowed |= torch.eye(9, dtype=torch.bool)  # torchtune gives NaN to who may see nothing
    positions = torch.randint(3000, (2, 9))
    calls = [
        ({}, {}),
        ({"mask": allowed, "input_pos": positions}, {"positions": positions}),
    ]
    for call, of in calls:
        of["bias"] = bias.masked_fill(~call.get("mask", torch.ones(9, 9).tril().bool()), -torch.inf)
        golden = reference.hidden_states(state, config, x, range(3), **of)
        golden = reference.logits(state, config, golden)
        assert_as_accurate(ours(x, **call), golden, theirs(x, **call))


def test_state_dict_stays_and_loads():
    ours, theirs = both("qwen2")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ours.parameters()}
    assert sum(held.values()) == sum(p.numel() * 4 for p in theirs.parameters())  # once each
    other, before = reference.random_state(theirs), theirs(tokens(2, 9))
    for model in (ours, theirs):
        model.load_state_dict(other)
    torch.testing.assert_close(ours(tokens(2, 9)), theirs(tokens(2, 9)), **CLOSE)
    assert not torch.allclose(ours(tokens(2, 9)), before)
    ours.layers[1].attn.k_proj.weight.zero_()
    ours.layers[1].mlp.w3.weight.zero_()
    assert not torch.allclose(ours(tokens(2, 9)), theirs(tokens(2, 9)))


def test_undo_gives_the_model_back():
    model = build("qwen2")
    before, parts = model(tokens(2, 9)), dict(model.named_modules())
    assert undo(model) is model  # nothing to undo
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        assert accelerate(model) is model
        accelerated = dict(model.named_modules())
        assert accelerate(model) is model  # a second time changes nothing
        assert all(part is accelerated[path] for path, part in model.named_modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert undo(model) is model
        assert all(part is parts[path] for path, part in model.named_modules())
        assert torch.equal(model(tokens(2, 9)), before)
        assert all(p is q for p, q in zip(model.parameters(), trained, strict=True))
        assert all(p.requires_grad for p in trained)


def test_undo_keeps_what_was_done_meanwhile():
    ours, theirs = both()
    for model in (ours, theirs):
        model.load_state_dict({n: v + 0.1 for n, v in model.state_dict().items()})
        model.bfloat16().train()
    undo(ours)
    assert ours.layers[0].attn.training
    assert torch.equal(ours(tokens(2, 9)), theirs(tokens(2, 9)))


def test_a_copy_stands_alone():
    ours, theirs = both()
    twin, expected = copy.deepcopy(ours), theirs(tokens(2, 9))
    ours.load_state_dict({name: 0 * value for name, value in ours.state_dict().items()})
    torch.testing.assert_close(twin(tokens(2, 9)), expected, **CLOSE)
    assert torch.equal(undo(twin)(tokens(2, 9)), expected)
    assert type(ours.layers[0]) is Layer


def test_a_model_without_memory():
    state = build("llama3.1").state_dict()
    expected = build("llama3.1")(tokens(2, 9))
    with torch.device("meta"):
        model = BUILDERS["llama3.1"]().eval()
    accelerate(model)
    model.to_empty(device="cpu").load_state_dict(state)
    torch.testing.assert_close(model(tokens(2, 9)), expected)
    for part in undo(model).modules():  # as torchtune's recipes do
        if hasattr(part, "rope_init"):
            part.rope_init()
    assert torch.equal(model(tokens(2, 9)), expected)


def test_the_rope_table_is_float32_and_as_long_as_the_cache():
    model = build("qwen2")
    rope = model.layers[0].attn.pos_embeddings
    rope.build_rope_cache(5000)
    far = torch.arange(4000, 4009)
    golden = model(tokens(2, 9), input_pos=far)
    rope.bfloat16()  # the cache loses its angles, and torchtune its accuracy
    spoiled = model(tokens(2, 9), input_pos=far)
    accelerate(model)
    tables = {layer.attn.rope for layer in model.layers}
    assert len(tables) == 1
    assert tables.pop().max_seq_len == 5000
    torch.testing.assert_close(model(tokens(2, 9), input_pos=far), golden, **CLOSE)
    assert not torch.allclose(spoiled, golden, **CLOSE)


PROMPTS = {
    "one": tokens(1, 7)[0],
    "two": tokens(2, 7),
    "padded": torch.cat([tokens(2, 7).triu(-3)[:, :3] * torch.tensor([[0], [1]]), tokens(2, 7)], 1),
    "two of one token": tokens(2, 1),
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("cached", ["no", "before", "after"])
@pytest.mark.parametrize("name", ["llama3.1", "qwen2"])
def test_generate_gives_the_same_tokens(name, cached, prompt):
    theirs = build(name)
    ours = copy.deepcopy(theirs)
    rows = 1 if prompt == "one" else 2
    setup = {"dtype": torch.float32, "decoder_max_seq_len": 20}
    if cached == "before":
        ours.setup_caches(rows, **setup)
    accelerate(ours)
    if cached == "after":
        ours.setup_caches(rows, **setup)
    if cached != "no":
        theirs.setup_caches(rows, **setup)
    for seed, top_k in enumerate((None, 5)):  # twice: the second prompt must not see the first
        results = []
        for model in (ours, theirs):
            settings = {"rng": torch.Generator().manual_seed(seed), "top_k": top_k}
            results.append(
                generate(model, PROMPTS[prompt] + 0, max_generated_tokens=9, **settings, pad_id=0)
            )
            if cached != "no":
                assert model.layers[0].attn.kv_cache.size == PROMPTS[prompt].shape[-1] + 8
                model.reset_caches()
        (out, logits), (expected, expected_logits) = results
        assert torch.equal(out, expected)
        torch.testing.assert_close(logits, expected_logits, **CLOSE)


def step(model: nn.Module, start: int, end: int, slots: int = 12) -> Tensor:
    """Logits of tokens start to end - 1, causal."""
    mask = torch.ones(1, slots, slots, dtype=torch.bool).tril()[:, start:end]
    return model(tokens(2, 9)[:, start:end], mask=mask, input_pos=torch.arange(start, end))


def test_caches_stay_through_accelerate_and_undo():
    theirs = build()
    theirs.setup_caches(2, torch.float32, decoder_max_seq_len=12)
    ours = copy.deepcopy(theirs)
    switches = [lambda model: model, accelerate, undo, accelerate]
    for switch, start, end in zip(switches, (0, 4, 5, 6), (4, 5, 6, 9), strict=True):
        switch(ours)
        assert ours.caches_are_enabled()
        torch.testing.assert_close(step(ours, start, end), step(theirs, start, end), **CLOSE)
        cache, expected = (model.layers[1].attn.kv_cache for model in (ours, theirs))
        assert isinstance(cache, modules.KVCache)
        assert cache.size == end
        torch.testing.assert_close(cache.k_cache, expected.k_cache, **CLOSE)
    with pytest.raises(ValueError, match="9 of its 12 slots are used, got 4 tokens more"):
        ours(tokens(2, 4), mask=torch.ones(1, 4, 12).bool(), input_pos=torch.arange(4))
    ours.reset_caches()
    assert cache.size == 0
    assert not cache.k_cache.any()


def test_contexts_of_caches():
    ours, theirs = both()
    for model in (ours, theirs):
        with local_kv_cache(
            model,
            batch_size=2,
            device=torch.device("cpu"),
            dtype=torch.float32,
            decoder_max_seq_len=12,
        ):
            assert model.caches_are_enabled()
            step(model, 0, 4)
            assert model.layers[0].attn.kv_cache.size == 4
        assert not model.caches_are_setup()
        model.setup_caches(2, torch.float32, decoder_max_seq_len=12)
        step(model, 0, 4)
    with disable_kv_cache(ours), disable_kv_cache(theirs):
        assert not ours.caches_are_enabled()
        out = ours(tokens(2, 9))  # torchtune drops the causal rule then
        torch.testing.assert_close(out, theirs(tokens(2, 9)), **CLOSE)
    torch.testing.assert_close(step(ours, 4, 9), step(theirs, 4, 9), **CLOSE)
    delete_kv_caches(ours)
    assert not ours.caches_are_setup()
    assert undo(ours).layers[0].attn.kv_cache is None
    torch.testing.assert_close(ours(tokens(2, 9)), build()(tokens(2, 9)), **CLOSE)


def test_deleted_caches_are_freed():
    model = build()
    model.setup_caches(2, torch.float32, decoder_max_seq_len=12)
    accelerate(model)
    keys = weakref.ref(model.layers[0].attn.kv_cache.k_cache)
    delete_kv_caches(model)
    gc.collect()
    assert keys() is None


class Recorder(TorchDispatchMode):
    """Remembers the calls of ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))


def test_a_decode_step_is_few_ops_and_reads_no_more_slots_than_the_mask():
    ours, theirs = both()
    for model in (ours, theirs):
        model.setup_caches(2, torch.float32, decoder_max_seq_len=12)
        step(model, 0, 4)
    for layer in ours.layers:  # what no token wrote is not read
        layer.attn.kv_cache.k_cache[:, :, 5:] = torch.nan
        layer.attn.kv_cache.v_cache[:, :, 5:] = torch.nan
    with Recorder() as recorder:
        out = step(ours, 4, 5)
    torch.testing.assert_close(out, step(theirs, 4, 5), **CLOSE)
    names = [name for name, _ in recorder.calls]
    a_layer = ("rms_norm", "linear", "rope_append", "attention", "linear", "add_rms_norm")
    expected = [f"fastshard.{name}.default" for name in (*a_layer, "fused_mlp")] * 3
    assert [n for n in names if n.startswith("fastshard.")] == [
        *expected,
        "fastshard.rms_norm.default",
    ]
    assert names.count("aten.any.dim") == 1  # where the mask ends is found once
    weights = {layer.attn.packed_weight.data_ptr() for layer in ours.layers}
    read = {args[1].data_ptr() for name, args in recorder.calls if name.endswith("linear.default")}
    assert weights <= read


def test_compiled_decode_steps_do_not_recompile():
    ours, theirs = both()
    for model in (ours, theirs):
        model.setup_caches(2, torch.float32, decoder_max_seq_len=12)
        step(model, 0, 4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for start in range(4, 9):
        out = step(compiled, start, start + 1)
        torch.testing.assert_close(out, step(theirs, start, start + 1), **CLOSE)
    assert counter.frame_count == 1
    assert ours.layers[0].attn.kv_cache.size == 9
    with pytest.raises(ValueError, match="9 of its 12 slots are used, got 4 tokens more"):
        ours(tokens(2, 4), mask=torch.ones(1, 4, 12).bool(), input_pos=torch.arange(4))


def lora() -> nn.Module:
    model = lora_qwen2(["q_proj"], **SIZES, **HEADS, lora_rank=2, lora_alpha=1)
    for layer in model.layers:
        nn.init.normal_(layer.attn.q_proj.lora_b.weight)
    return model


class OtherNorm(modules.RMSNorm):
    pass


def changed(**parts) -> nn.Module:
    """A model whose second layer has other parts, each as ``part(old)``."""
    model = build("qwen2")
    for path, part in parts.items():
        owner, _, name = path.replace("__", ".").rpartition(".")
        module = model.layers[1].get_submodule(owner)
        setattr(module, name, part(getattr(module, name)))
    return model


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: out + 1)
    return module


def biased(old: nn.Linear) -> nn.Linear:
    return nn.Linear(old.in_features, old.out_features)


class OtherLinear(nn.Linear):
    """As layers for quantisation-aware training are: with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class OtherTensor(torch.Tensor):
    pass


def with_other_tensor(old: nn.Linear) -> nn.Linear:
    old.weight = nn.Parameter(old.weight.detach().as_subclass(OtherTensor))
    return old


def tied(model: nn.Module) -> nn.Module:
    model.layers[2].mlp = model.layers[1].mlp
    return model


LEFT = {
    "lora": (lora, r"layers\.0\.attn and 2 more \(q_proj is a LoRALinear\)"),
    "gemma norm": (
        lambda: changed(sa_norm=lambda old: GemmaRMSNorm(64)),
        r"layers\.1\.sa_norm \(a GemmaRMSNorm is none of torchtune's own modules\)",
    ),
    "subclass": (
        lambda: changed(mlp_norm=lambda old: OtherNorm(64)),
        r"layers\.1\.mlp_norm \(a OtherNorm is none of",
    ),
    "activation": (
        lambda: changed(mlp__activation=lambda old: nn.GELU()),
        r"layers\.1\.mlp \(its activation is GELU\)",
    ),
    "mlp bias": (lambda: changed(mlp__w2=biased), r"layers\.1\.mlp \(it has biases\)"),
    "no w3": (lambda: changed(mlp__w3=lambda old: None), r"layers\.1\.mlp \(it has no w3\)"),
    "one bias": (
        lambda: changed(attn__k_proj=lambda old: nn.Linear(64, 32, bias=False)),
        r"layers\.1\.attn \(k_proj has not the inputs or the bias of q_proj\)",
    ),
    "rope": (
        lambda: changed(attn__pos_embeddings=lambda old: Phi3RotaryPositionalEmbeddings(16)),
        r"layers\.1\.attn \(its pos_embeddings are Phi3RotaryPositionalEmbeddings\)",
    ),
    "hook": (
        lambda: changed(attn__output_proj=with_hook),
        r"layers\.1\.attn \(hooks would not be called\)",
    ),
    "subclass of a linear layer": (
        lambda: changed(mlp__w2=lambda old: OtherLinear(80, 64, bias=False)),
        r"layers\.1\.mlp \(w2 is a OtherLinear\)",
    ),
    "another tensor": (
        lambda: changed(mlp__w1=with_other_tensor),
        r"layers\.1\.mlp \(w1\.weight is a OtherTensor\)",
    ),
    "dtype": (
        lambda: changed(attn=lambda old: old.double()),
        r"layers\.1\.attn \(q_proj\.weight is torch\.float64\)",
    ),
    "several places": (
        lambda: tied(build()),
        r"layers\.1\.mlp and 1 more \(its weights have several places in the model\)",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_the_ops_cannot_compute_is_left_and_named(name):
    make, text = LEFT[name]
    model = make().eval()
    expected = None if name == "dtype" else model(tokens(2, 9))  # which torchtune cannot run either
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(RuntimeWarning, match=f"^left to torchtune: {text}"):
        accelerate(model)
    assert {type(part) for part in model.modules()} >= {RMSNorm}  # the others are replaced
    if expected is not None:
        torch.testing.assert_close(model(tokens(2, 9)), expected, **CLOSE)
        assert torch.equal(undo(model)(tokens(2, 9)), expected)
    for key, value in undo(model).state_dict().items():
        assert torch.equal(value, state[key])


def test_norms_of_an_attention_are_replaced_too():
    norm = {"attn__q_norm": lambda old: modules.RMSNorm(16, 0.1)}
    model = changed(**norm, attn__k_norm=norm["attn__q_norm"])
    parts, expected = dict(model.named_modules()), model(tokens(2, 9))
    accelerate(model)
    assert type(model.layers[1].attn.q_norm) is type(model.layers[1].attn.k_norm) is RMSNorm
    torch.testing.assert_close(model(tokens(2, 9)), expected, **CLOSE)
    model.layers[1].attn.q_norm.scale.zero_()
    undo(model)
    assert all(part is parts[path] for path, part in model.named_modules())
    assert not model.layers[1].attn.q_norm.scale.any()


def test_a_norm_is_rounded_once():
    theirs = modules.RMSNorm(64, 0.1)
    nn.init.normal_(theirs.scale, 1.0)
    ours, x = RMSNorm(theirs.bfloat16()), torch.randn(500, 64).bfloat16()
    # Sums in another order move one of 2^16 roundings of float32 to bfloat16; a rounding before the
    # scale is multiplied would move every fourth.
    assert (ours(x) != theirs(x)).float().mean() < 0.001
    assert (ours.add(x, 0 * x)[0] != theirs(x)).float().mean() < 0.001


def test_a_norm_of_another_dtype_than_its_scale():
    theirs = modules.RMSNorm(64, 0.1)
    nn.init.normal_(theirs.scale, 1.0)
    ours = RMSNorm(theirs)
    x, y = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(ours(x), theirs(x))
    normed, total = ours.add(x, y)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, theirs(x + y))


def test_a_hook_of_a_layer_is_called():
    model = build()
    expected = model(tokens(2, 9))
    seen = []
    model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    accelerate(model)
    torch.testing.assert_close(model(tokens(2, 9)), expected, **CLOSE)
    assert len(seen) == 1
    assert type(model.layers[1].attn) is Attention


def test_models_without_anything_to_replace():
    with pytest.raises(ValueError, match=r"compute, got Linear: it has none of them"):
        accelerate(nn.Linear(2, 2))
    model = build().double()
    text = (
        r"got TransformerDecoder: layers\.0\.attn and 2 more \(q_proj\.weight is torch\.float64\)"
    )
    with pytest.raises(ValueError, match=text):
        accelerate(model)
    assert undo(model) is model


def test_without_torchtune_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtune", None)
    monkeypatch.delitem(sys.modules, "fastshard.integrations.torchtune")
    text = r"needs torchtune \(.*\): pip install 'fastshard\[torchtune\]'"
    with pytest.raises(ImportError, match=text):
        importlib.import_module("fastshard.integrations.torchtune")


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = build()
    expected, parts = model(tokens(2, 9)), dict(model.named_modules())
    made = []

    def fail(self, theirs):
        made.append(self)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FeedForward, "__init__", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        accelerate(model)
    assert made
    assert all(part is parts[path] for path, part in model.named_modules())
    assert torch.equal(model(tokens(2, 9)), expected)
    assert all(p.requires_grad for p in model.parameters())
