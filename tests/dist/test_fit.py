"""Whether shards fit on a device: the message, and that its advice is true."""

import re

import pytest
import torch
from tiny_checkpoints import make_reference

import fastshard
from fastshard import ModelConfig, Shard, loading
from fastshard.dist import TensorParallel, check_fit, fit
from fastshard.models import model_bytes


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    monkeypatch.setattr(fit, "WORKSPACE_BYTES", 0)


def needs(monkeypatch, path, available, **settings):
    monkeypatch.setattr(loading, "available_bytes", lambda device: available)
    with pytest.raises(RuntimeError) as caught:
        fastshard.load(path, device="cpu", **settings)
    return str(caught.value)


def test_a_model_that_does_not_fit_raises(tmp_path, monkeypatch):
    """The advice is true: each shard that it names loads with just this much memory."""
    make_reference("llama").save_pretrained(tmp_path)
    config = ModelConfig.from_dict(make_reference("llama").config.to_dict())
    available = model_bytes(config, torch.float32, 16).needed(range(2)) - 1
    message = needs(monkeypatch, tmp_path, available, max_generated_tokens=16)
    assert re.match(
        r"layers 0-2 of the model in torch\.float32 with a cache of 16 tokens needs 0\.00 GiB on "
        r"cpu, which has 0\.00 GiB free; 3 shards on devices like this would fit: "
        r"layers 0-0,1-1,2-2$",
        message,
    )
    for layer in range(3):
        fastshard.load(
            tmp_path, shard=Shard("tiny", layer, layer, 3), device="cpu", max_generated_tokens=16
        )


def test_a_rank_needs_room_for_its_part_alone(tmp_path, monkeypatch):
    make_reference("llama").save_pretrained(tmp_path)
    config = ModelConfig.from_dict(make_reference("llama").config.to_dict())
    needed = model_bytes(config, torch.float32, 16, tp=2).needed(range(3))
    settings = {"max_generated_tokens": 16, "tensor_parallel": TensorParallel(1, 2)}
    message = needs(monkeypatch, tmp_path, needed - 1, **settings)
    assert message.startswith("1/2 of layers 0-2 of the model in torch.float32 with a cache of 16")
    assert "2 shards on devices like this would fit: layers 0-" in message
    monkeypatch.setattr(loading, "available_bytes", lambda device: needed)
    fastshard.load(tmp_path, device="cpu", **settings)


def test_a_layer_that_does_not_fit_raises(tmp_path, monkeypatch):
    make_reference("llama").save_pretrained(tmp_path)
    message = needs(monkeypatch, tmp_path, 1000, shard=Shard("tiny", 1, 1, 3))
    assert message.endswith("free; not even one layer a device would fit")
    assert message.startswith("layers 1-1 of the model")


def test_sizes_are_named_in_gib():
    config = ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
        }
    )
    shard = Shard("llama-3.1-8b", 0, 31, 32)
    with pytest.raises(
        RuntimeError,
        match=r"needs 15\.15 GiB on cuda:0, which has 9\.50 GiB free; 2 shards on devices like "
        r"this would fit: layers 0-15,16-31",
    ):
        check_fit(config, [shard], torch.device("cuda:0"), torch.bfloat16, 1024, int(9.5 * 2**30))


def test_the_workspace_is_needed_once_a_device(monkeypatch):
    """Beside shards on one device once, and in the advice by each device."""
    config = ModelConfig.from_dict(make_reference("llama").config.to_dict())
    cpu = torch.device("cpu")
    sizes = model_bytes(config, torch.float32, 16)
    shards = [Shard("tiny", 0, 0, 3), Shard("tiny", 1, 2, 3)]
    monkeypatch.setattr(fit, "WORKSPACE_BYTES", sizes.layer)
    needed = sizes.layer + sum(sizes.needed(shard.layers) for shard in shards)
    check_fit(config, shards, cpu, torch.float32, 16, needed)
    with pytest.raises(RuntimeError, match=r"the whole model would fit as one shard$"):
        check_fit(config, shards, cpu, torch.float32, 16, needed - 1)
    whole = sizes.layer + sizes.needed(range(3))
    with pytest.raises(RuntimeError, match=r"would fit: layers 0-[01],[12]-2$"):
        check_fit(config, shards, cpu, torch.float32, 16, whole - 1)
