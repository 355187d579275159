"""What a shard needs and how to cut a model: arithmetic against built models and brute force."""

import itertools
import re

import pytest
import torch
from tiny_checkpoints import FAMILIES, make_reference

import fastshard
from fastshard import ModelConfig, Shard, ShardedGeneralModel, loading
from fastshard.checkpoint import check_fit, even_split, fit, model_bytes, split_that_fits
from fastshard.checkpoint.fit import ModelBytes


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    monkeypatch.setattr(fit, "_WORKSPACE_BYTES", 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_are_those_of_the_built_model(family, dtype):
    config = ModelConfig.from_dict(make_reference(family).config.to_dict())
    sizes = model_bytes(config, dtype, context=10)
    cache_bytes = 2 * config.num_kv_heads * config.head_dim * 10 * dtype.itemsize
    for start, end in [(0, 2), (0, 0), (1, 1), (1, 2)]:
        model = ShardedGeneralModel(config, Shard("tiny", start, end, 3), "meta", dtype)
        weights = sum(t.numel() * dtype.itemsize for t in model.model.state_dict().values())
        assert sizes.of(start, end + 1, 3) == weights + (end + 1 - start) * cache_bytes


def test_cache_is_no_longer_than_the_context():
    config = ModelConfig.from_dict(make_reference("llama").config.to_dict())
    assert model_bytes(config, torch.float16, 64) == model_bytes(config, torch.float16, 10**9)


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [(5, 1, [5]), (5, 2, [3, 2]), (8, 3, [3, 3, 2]), (4, 4, [1, 1, 1, 1])],
)
def test_even_split(num_layers, count, expected):
    parts = even_split(num_layers, count)
    assert [len(part) for part in parts] == expected
    assert [i for part in parts for i in part] == list(range(num_layers))


@pytest.mark.parametrize("count", [0, 6])
def test_even_split_out_of_range_raises(count):
    with pytest.raises(ValueError, match=f"shards must be 1 to the model's 5 layers, got {count}"):
        even_split(5, count)


def smallest_split(sizes, num_layers, available):
    """Brute force: how many shards are needed at least, None where no number is enough."""
    for count in range(1, num_layers + 1):
        for cut in itertools.combinations(range(1, num_layers), count - 1):
            bounds = [0, *cut, num_layers]
            if all(sizes.of(a, b, num_layers) <= available for a, b in itertools.pairwise(bounds)):
                return count
    return None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", [(0, 0), (3, 5), (25, 0), (0, 17), (40, 40)])
@pytest.mark.parametrize("available", [9, 10, 11, 20, 29, 30, 34, 45, 50, 64, 71, 100, 150, 200])
def test_split_is_the_smallest_that_fits(tied, ends, available):
    sizes = ModelBytes(embedding=ends[0], layer=10, head=ends[1], tied=tied)
    for num_layers in (1, 2, 5, 8):
        parts = split_that_fits(sizes, num_layers, available)
        expected = smallest_split(sizes, num_layers, available)
        assert (parts and len(parts)) == expected
        if parts:
            assert [i for part in parts for i in part] == list(range(num_layers))
            assert all(sizes.of(p.start, p.stop, num_layers) <= available for p in parts)


def needs(monkeypatch, path, available, **settings):
    monkeypatch.setattr(loading, "available_bytes", lambda device: available)
    with pytest.raises(RuntimeError) as caught:
        fastshard.load(path, device="cpu", **settings)
    return str(caught.value)


def test_a_model_that_does_not_fit_raises(tmp_path, monkeypatch):
    """The advice is true: each shard that it names loads with just this much memory."""
    make_reference("llama").save_pretrained(tmp_path)
    config = ModelConfig.from_dict(make_reference("llama").config.to_dict())
    available = model_bytes(config, torch.float32, 16).of(0, 2, 3) - 1
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
        match=r"needs 15\.08 GiB on cuda:0, which has 9\.50 GiB free; 2 shards on devices like "
        r"this would fit: layers 0-15,16-31",
    ):
        check_fit(config, [shard], torch.device("cuda:0"), torch.bfloat16, 1024, int(9.5 * 2**30))
