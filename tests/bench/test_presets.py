"""Presets against what torchtune builds for the same published models."""

import pytest
import torch
from torchtune.models.llama2 import llama2_7b
from torchtune.models.llama3_1 import llama3_1_8b
from torchtune.models.llama3_2 import llama3_2_1b
from torchtune.models.mistral import mistral_7b
from torchtune.models.qwen2_5 import qwen2_5_0_5b, qwen2_5_7b_base

from fastshard import GeneralMHA, Shard
from fastshard.bench.presets import PRESETS, preset
from fastshard.nn.rope import RopeScaling

# preset -> torchtune's builder, parameters as the model card counts them, rope_base
PUBLISHED = {
    "llama-3.2-1b": (llama3_2_1b, 1_235_814_400, 500_000),
    "llama-3.1-8b": (llama3_1_8b, 8_030_261_248, 500_000),
    "llama-2-7b": (llama2_7b, 6_738_415_616, 10_000),
    "qwen2.5-0.5b": (qwen2_5_0_5b, 494_032_768, 1_000_000),
    "qwen2.5-7b": (qwen2_5_7b_base, 7_615_616_512, 1_000_000),
    "mistral-7b": (mistral_7b, 7_241_732_096, 10_000),
}


@pytest.mark.parametrize("name", PRESETS)
def test_is_the_published_model(name):
    builder, num_parameters, rope_base = PUBLISHED[name]
    config = preset(name)
    shard = Shard(name, 0, config.num_layers - 1, config.num_layers)
    with torch.device("meta"):
        theirs = builder()
    ours = GeneralMHA(config, shard, device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert sum(weight.numel() for weight in ours.values()) == num_parameters
    attention = theirs.layers[0].attn
    heads = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == heads
    assert config.norm_eps == theirs.norm.eps
    assert config.max_seq_len == theirs.max_seq_len
    assert config.rope_base == rope_base == attention.pos_embeddings.base


def test_llama3_scaling():
    assert preset("llama-3.1-8b").rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert preset("llama-3.2-1b").rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def test_mistral_has_its_window():
    config = preset("mistral-7b", num_layers=3)
    assert (config.sliding_window, config.windowed_layers) == (4096, (0, 1, 2))


def test_cuts_layers_and_context():
    config = preset("qwen2.5-7b", num_layers=2, max_seq_len=100)
    assert (config.num_layers, config.max_seq_len, config.hidden_size) == (2, 100, 3584)


@pytest.mark.parametrize(
    ("name", "cuts", "message"),
    [
        ("llama", {}, "model must be one of llama-3.2-1b, .*, got 'llama'"),
        ("llama-3.2-1b", {"num_layers": 17}, "num_layers of llama-3.2-1b must be 1 to 16, got 17"),
        ("llama-2-7b", {"max_seq_len": 4097}, "max_seq_len of llama-2-7b must be 1 to 4096"),
    ],
)
def test_refuses_what_no_preset_is(name, cuts, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **cuts)
