"""Random checkpoints load as the model of their config; a start that fails is reported."""

import re

import pytest
import torch

import fastshard
from fastshard.bench import start
from fastshard.bench.case import Settings
from fastshard.bench.checkpoints import layer_shapes, write_checkpoint
from fastshard.bench.presets import PRESETS

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "mistral-7b"])
def test_a_random_checkpoint_loads(name, tmp_path):
    write_checkpoint(tmp_path, PRESETS[name] | TINY)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    model = fastshard.load(tmp_path, device="cpu")
    assert (model.config.num_layers, model.config.head_dim) == (2, 24)
    assert model.config.tie_word_embeddings == PRESETS[name]["tie_word_embeddings"]
    weights = model.model.state_dict().values()
    assert all(weight.unique().numel() > min(weight.numel(), 256) / 2 for weight in weights)


def test_a_layer_of_the_8b_model():
    shapes = layer_shapes(PRESETS["llama-3.1-8b"])
    # (8,030,261,248 parameters - 2 x 128,256 x 4096 - 4096) / 32 layers
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 218_112_000


def test_a_process_that_fails_gives_its_reason(monkeypatch):
    monkeypatch.setitem(start.PRESETS, "llama-3.2-1b", PRESETS["llama-3.2-1b"] | TINY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = list(start.run(Settings()))
    assert [result["run"] for result in results] == ["first run", "second run"]
    for result in results:
        assert "device cuda is not there" in result["error"]
        assert re.fullmatch(
            r"start +fastshard +llama-3.2-1b, \w+ run +none: fastshard: error: .*",
            start.text(result),
        )


def test_text_of_a_start():
    result = {"model": "llama-3.2-1b", "run": "first run", "seconds": 4.321, "code": "sm_86"}
    assert start.text(result).endswith(" 4.32 s to the first token, code sm_86")
