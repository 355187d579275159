"""config_of: torchtune's builders as configs of shards that load torchtune's state dicts."""

import dataclasses

import pytest
import torch
from torch import nn
from torchtune import modules
from torchtune.models import llama2, llama3, llama3_1, llama3_2, mistral, qwen2, qwen2_5
from torchtune.models.gemma.rms_norm import GemmaRMSNorm

import decoder_reference as reference
from fastshard import GeneralMHA, Shard
from fastshard.integrations.torchtune import accelerate, config_of

TINY = {
    "vocab_size": 96,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 80,
    "max_seq_len": 200,
    "norm_eps": 0.01,
}
TINY_BUILDERS = {
    "llama3.1": llama3_1._component_builders.llama3_1,
    "llama3.2": llama3_2._component_builders.llama3_2,
    "mistral": mistral.mistral,
    "qwen2": qwen2.qwen2,
}
# vocab, hidden, intermediate, layers, heads, kv heads, head_dim, positions, base, factor, tied
BUILDERS = {
    llama2.llama2_7b: (32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e4, None, False),
    llama2.llama2_13b: (32000, 5120, 13824, 40, 40, 40, 128, 4096, 1e4, None, False),
    llama3.llama3_8b: (128256, 4096, 14336, 32, 32, 8, 128, 8192, 5e5, None, False),
    llama3_1.llama3_1_8b: (128256, 4096, 14336, 32, 32, 8, 128, 131072, 5e5, 8, False),
    llama3_2.llama3_2_1b: (128256, 2048, 8192, 16, 32, 8, 64, 131072, 5e5, 32, True),
    llama3_2.llama3_2_3b: (128256, 3072, 8192, 28, 24, 8, 128, 131072, 5e5, 32, True),
    mistral.mistral_7b: (32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e4, None, False),
    qwen2.qwen2_0_5b: (151936, 896, 4864, 24, 14, 2, 64, 32768, 1e6, None, True),
    qwen2.qwen2_1_5b: (151936, 1536, 8960, 28, 12, 2, 128, 32768, 1e6, None, True),
    qwen2.qwen2_7b: (152064, 3584, 18944, 28, 28, 4, 128, 32768, 1e6, None, False),
    qwen2_5.qwen2_5_0_5b: (151936, 896, 4864, 24, 14, 2, 64, 32768, 1e6, None, True),
    qwen2_5.qwen2_5_3b: (151936, 2048, 11008, 36, 16, 2, 128, 32768, 1e6, None, True),
    qwen2_5.qwen2_5_7b_instruct: (152064, 3584, 18944, 28, 28, 4, 128, 32768, 1e6, None, False),
}


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_builders(builder):
    config = config_of(builder)
    sizes = [getattr(config, f.name) for f in dataclasses.fields(config)]
    is_qwen = builder.__name__.startswith("qwen")
    *expected, base, factor, is_tied = BUILDERS[builder]
    vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, positions = expected
    assert sizes[0] == ("qwen2" if is_qwen else "llama")
    assert sizes[1:9] == [vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, positions]
    assert (config.rope_base, config.tie_word_embeddings) == (base, is_tied)
    assert (config.rope_interleaved, config.qkv_bias) == (not is_qwen, is_qwen)
    assert (config.rope_scaling and config.rope_scaling.factor) == factor
    assert config.norm_eps == (1e-6 if is_qwen else 1e-5)
    assert (config.output_bias, config.qk_norm, config.windowed_layers) == (False, False, ())


@pytest.mark.parametrize("is_accelerated", [False, True])
@pytest.mark.parametrize("name", TINY_BUILDERS)
def test_shards_load_the_state_dict(name, is_accelerated):
    torch.manual_seed(0)
    model = TINY_BUILDERS[name](**TINY).eval()
    model.load_state_dict(reference.random_state(model))
    tokens = torch.randint(96, (2, 9))
    with torch.no_grad():
        expected = model(tokens)
    if is_accelerated:
        accelerate(model)
    config, state, h = config_of(model), model.state_dict(), None
    for start, end in ((0, 0), (1, 2)):
        shard = GeneralMHA(config, Shard("tiny", start, end, 3))
        shard.load_state_dict({name: state[name] for name in shard.state_dict()})
        h = shard(tokens) if h is None else shard(hidden_state=h)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)


def changed(change) -> nn.Module:
    model = qwen2.qwen2(**TINY)
    change(model)
    return model


def set_q_norm(model):
    model.layers[1].attn.q_norm = modules.RMSNorm(16)


def set_rope(model):
    model.layers[1].attn.pos_embeddings = None


def set_base(model):
    model.layers[1].attn.pos_embeddings = modules.RotaryPositionalEmbeddings(16, 200)


def set_activation(model):
    model.layers[1].mlp.activation = nn.GELU()


def set_norm(model):
    model.layers[1].sa_norm = GemmaRMSNorm(64)


def set_eps(model):
    model.layers[1].sa_norm.eps = 0.5


def set_last_eps(model):
    model.norm.eps = 0.5


def set_output(model):
    model.output = nn.Linear(64, 96)


def set_classes(model):
    model.output = nn.Linear(64, 2, bias=False)


def set_layer(model):
    model.layers[1] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_q_norm, r"layers\.1\.attn must have no q_norm, which torchtune has after RoPE"),
        (set_rope, r"layers\.1\.attn must have pos_embeddings, got None"),
        (set_base, r"layers\.1 must be like layers\.0, \{.*'qwen2'.*\}, got \{.*'llama'"),
        (set_activation, r"layers\.1\.mlp must be what fastshard can compute: its activation is"),
        (set_norm, r"layers\.1\.sa_norm must be .*: a GemmaRMSNorm is none of torchtune's own"),
        (set_eps, r"layers\.1 must have one eps, got 0\.5 and 0\.01"),
        (set_last_eps, r"norm must be an RMSNorm like those of layers\.0, got RMSNorm"),
        (set_output, r"output must be a Linear without bias, or tied .*, got Linear"),
        (set_classes, r"output must have the shape of tok_embeddings, \[96, 64\], got \[2, 64\]"),
        (set_layer, r"layers\.1 must be a TransformerSelfAttentionLayer, got Identity"),
    ],
)
def test_decoders_that_fastshard_has_not(change, text):
    with pytest.raises(ValueError, match=text):
        config_of(changed(change))


def test_a_builder_is_called_without_memory():
    built = []

    def builder():
        built.append(qwen2.qwen2(**TINY))
        return built[0]

    assert config_of(builder) == config_of(qwen2.qwen2(**TINY))
    assert all(parameter.is_meta for parameter in built[0].parameters())


def test_what_is_no_decoder():
    text = "model must be or build a torchtune TransformerDecoder, got Linear"
    with pytest.raises(ValueError, match=text):
        config_of(lambda: nn.Linear(2, 2))
