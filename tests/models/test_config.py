"""ModelConfig: exo's keys, Hugging Face's files of four families, and what is refused."""

import pytest
import transformers

from fastshard import ModelConfig
from fastshard.nn import RopeScaling

EXO = {
    "vocab_size": 320,
    "embed_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 24,
    "max_seq_len": 128,
    "rope_base": 20000,
    "rope_scaling_factor": 1.0,
    "intermediate_dim": 96,
    "num_layers": 6,
    "norm_eps": 1e-5,
    "attn_dropout": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def from_transformers(config_class, **keys) -> ModelConfig:
    return ModelConfig.from_dict(config_class(**{**SIZES, **keys}).to_dict())


def test_exo_keys():
    config = ModelConfig.from_dict(EXO)
    assert config == ModelConfig(
        model_type="generic",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        max_seq_len=128,
        norm_eps=1e-5,
        rope_base=20000,
        attn_dropout=0.1,
    )
    assert config.rotary_dim == 24
    assert hash(config) == hash(ModelConfig.from_dict(EXO))


def test_exo_rope_factor_is_the_one_given():
    assert ModelConfig.from_dict(EXO).rope_scaling is None
    scaling = ModelConfig.from_dict(EXO | {"rope_scaling_factor": 8.0}).rope_scaling
    assert scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    scaling = ModelConfig.from_dict(EXO | {"rope_scaling_factor": 32, "rope_scaling": LLAMA3})
    assert scaling.rope_scaling == RopeScaling("llama3", 16.0, 2.0, 5.0, 64)
    none = ModelConfig.from_dict(EXO | {"rope_scaling_factor": 32, "rope_scaling": None})
    assert none.rope_scaling is None


@pytest.mark.parametrize(
    ("model_id", "family", "bias", "tied"),
    [
        ("llama", "llama", False, False),
        ("llama-3.2-1b", "llama", False, True),
        ("llama-3.2-3b-instruct", "llama", False, True),
        ("llama-3.1-8b", "llama", False, False),
        ("qwen-2.5-0.5b", "qwen2", True, True),
        ("Qwen2.5-7B-Instruct", "qwen2", True, False),
        ("qwen3-4b", "qwen3", False, True),
        ("Qwen3-8B", "qwen3", False, False),
        ("mistral-7b", "mistral", False, False),
        ("unknown", "generic", False, False),
    ],
)
def test_exo_dict_gets_the_defaults_of_the_family_in_its_id(model_id, family, bias, tied):
    config = ModelConfig.from_dict(EXO, model_id)
    assert (config.model_type, config.qkv_bias) == (family, bias)
    assert config.tie_word_embeddings == tied
    assert config.rope_interleaved == (not family.startswith("qwen"))
    assert config.qk_norm == (family == "qwen3")
    assert not config.output_bias


def test_flags_of_the_config_win_over_the_id():
    flags = {"tie_word_embeddings": False, "attn_bias": False, "model_type": "qwen2"}
    config = ModelConfig.from_dict(EXO | flags, "llama-3.2-1b")
    assert config.model_type == "qwen2"
    assert not config.tie_word_embeddings
    assert not config.qkv_bias
    flags = {"tie_word_embeddings": True, "attn_bias": True}
    config = ModelConfig.from_dict(EXO | flags, "llama-3.1-8b")
    assert config.tie_word_embeddings
    assert config.qkv_bias
    assert not config.output_bias


def test_a_hugging_face_config_is_never_guessed_from_the_id():
    config = transformers.LlamaConfig(**SIZES).to_dict()
    del config["tie_word_embeddings"]
    config = ModelConfig.from_dict(config, "qwen-llama-3.2-1b")
    assert (config.model_type, config.tie_word_embeddings) == ("llama", False)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_hugging_face_families(attention_bias):
    llama = from_transformers(transformers.LlamaConfig, attention_bias=attention_bias)
    assert (llama.model_type, llama.rope_interleaved, llama.qk_norm) == ("llama", True, False)
    assert (llama.qkv_bias, llama.output_bias) == (attention_bias, attention_bias)
    assert (llama.hidden_size, llama.head_dim, llama.num_layers) == (64, 24, 4)
    assert llama.max_seq_len == 128
    qwen2 = from_transformers(transformers.Qwen2Config, tie_word_embeddings=True)
    assert (qwen2.model_type, qwen2.rope_interleaved, qwen2.qk_norm) == ("qwen2", False, False)
    assert (qwen2.qkv_bias, qwen2.output_bias) == (True, False)
    assert qwen2.tie_word_embeddings
    qwen3 = from_transformers(transformers.Qwen3Config, attention_bias=attention_bias)
    assert (qwen3.model_type, qwen3.rope_interleaved, qwen3.qk_norm) == ("qwen3", False, True)
    assert (qwen3.qkv_bias, qwen3.output_bias) == (attention_bias, attention_bias)
    mistral = from_transformers(transformers.MistralConfig)
    assert (mistral.model_type, mistral.rope_interleaved, mistral.qkv_bias) == (
        "mistral",
        True,
        False,
    )


def test_sliding_windows():
    mistral = from_transformers(transformers.MistralConfig, sliding_window=7)
    assert [mistral.window(layer) for layer in range(4)] == [7, 7, 7, 7]
    mistral = from_transformers(transformers.MistralConfig, sliding_window=None)
    assert mistral.windowed_layers == ()
    keys = {"sliding_window": 7, "max_window_layers": 3}
    qwen = from_transformers(transformers.Qwen2Config, use_sliding_window=True, **keys)
    assert [qwen.window(layer) for layer in range(4)] == [None, None, None, 7]
    qwen = from_transformers(transformers.Qwen2Config, use_sliding_window=False, **keys)
    assert qwen.windowed_layers == ()
    without_types = SIZES | keys | {"model_type": "qwen2", "use_sliding_window": True}
    assert ModelConfig.from_dict(without_types).windowed_layers == (3,)


def test_rope_of_old_and_new_files():
    rope = {"rope_theta": 500000.0, **LLAMA3}
    new = from_transformers(transformers.LlamaConfig, rope_parameters=rope)
    sizes = SIZES | {"model_type": "llama"}
    old = ModelConfig.from_dict(sizes | {"rope_theta": 500000.0, "rope_scaling": LLAMA3})
    assert new == old
    assert new.rope_base == 500000.0
    assert new.rope_scaling == RopeScaling("llama3", 16.0, 2.0, 5.0, 64)
    linear = ModelConfig.from_dict(sizes | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear.rope_scaling == RopeScaling("linear", 4.0)
    partial = ModelConfig.from_dict(sizes | {"head_dim": 32, "partial_rotary_factor": 0.5})
    assert partial.rotary_dim == 16


def test_missing_keys_are_all_named_as_the_config_spells_them():
    exo = {key: EXO[key] for key in EXO if key not in ("num_heads", "norm_eps")}
    with pytest.raises(ValueError, match="config must have num_heads, norm_eps, got only attn_d"):
        ModelConfig.from_dict(exo)
    sizes = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
    with pytest.raises(ValueError, match="config must have num_key_value_heads, got only"):
        ModelConfig.from_dict(sizes | {"model_type": "mistral"})
    assert ModelConfig.from_dict(sizes | {"model_type": "llama"}).num_kv_heads == 4
    with pytest.raises(ValueError, match="type llama3 must have low_freq_factor, high_freq_factor"):
        ModelConfig.from_dict(EXO | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0,
                                     "original_max_position_embeddings": 64}})  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads=3, got 4"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"head_dim": 20}, "head_dim must be a multiple of 8 up to 256, got 20"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"num_layers": 2.5}, r"num_layers must be a positive integer, got 2\.5"),
        ({"norm_eps": -1.0}, r"norm_eps must be positive, got -1\.0"),
        ({"attn_dropout": 2.0}, r"attn_dropout must be in \[0, 1\], got 2\.0"),
        ({"hidden_act": "swiglu"}, "hidden_act must be one of silu, .*got 'swiglu'"),
        ({"mlp_bias": True}, "mlp_bias must be false, got True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral.*got 'gemma'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be default, linear or llama3"),
        ({"rope_scaling_factor": 0.0}, r"factor must be positive, got 0\.0"),
    ],
)
def test_rejects_what_the_decoder_cannot_compute(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(EXO | keys)


def test_a_hugging_face_config_must_say_its_family():
    with pytest.raises(ValueError, match=r"model_type must be one of .* got None"):
        ModelConfig.from_dict(SIZES)
