"""What a model takes, counted: against the modules that are built."""

import pytest
import torch
from tiny_checkpoints import FAMILIES, make_reference

from fastshard import ModelConfig, Shard, ShardedGeneralModel
from fastshard.models import model_bytes

CUTS = [(0, 2), (0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]


def tiny_config(family):
    return ModelConfig.from_dict(make_reference(family).config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_are_those_of_the_built_model(family, dtype):
    """Weights, every layer's cache (with a window too), and the RoPE table of each shard."""
    config = tiny_config(family)
    sizes = model_bytes(config, dtype, context=10, batch=3)
    for start, end in CUTS:
        layers = range(start, end + 1)
        model = ShardedGeneralModel(config, Shard("tiny", start, end, 3), "cpu", dtype)
        model.model.setup_caches(3, dtype, decoder_max_seq_len=10)
        weights = sum(weight.nbytes for weight in model.model.state_dict().values())
        caches = [layer.attn.kv_cache for layer in model.model.layers.values()]
        (rope,) = {layer.attn.pos_embeddings for layer in model.model.layers.values()}
        table = rope.table(torch.device("cpu")).nbytes
        assert sizes.weights(layers) == weights
        assert sizes.caches(layers) == sum(c.k_cache.nbytes + c.v_cache.nbytes for c in caches)
        assert sizes.table == table
        assert sizes.needed(layers) == weights + sizes.caches(layers) + table


def test_cache_is_no_longer_than_the_context():
    config = tiny_config("llama")
    assert model_bytes(config, torch.float16, 64) == model_bytes(config, torch.float16, 10**9)
    assert model_bytes(config, torch.float16, 63) != model_bytes(config, torch.float16, 64)
