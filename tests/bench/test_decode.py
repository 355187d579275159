"""Bytes and operations of a decode step by hand; our modes compute what the peers compute."""

import dataclasses
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from fastshard.bench import decode
from fastshard.bench.case import Unavailable
from fastshard.bench.decode import Generating, decode_bytes, decode_flops, own_step, random_model
from fastshard.bench.plain_decoder import PlainDecoder
from fastshard.bench.presets import preset
from fastshard.decode.shard_step import ShardStep


def test_bytes_of_the_1b_model():
    # 1,235,814,400 parameters, all read (the head is tied), the token's row once more;
    # 16 layers x 2 x 8 heads x 64 x 1024 keys; 128,256 float32 logits
    weights = 2 * (1_235_814_400 + 2048)
    assert decode_bytes(preset("llama-3.2-1b"), 1, 1024, 2) == weights + 33_554_432 + 513_024


def test_bytes_of_a_batch_of_the_8b_model():
    # 8,030,261,248 parameters less the embedding of 128,256 x 4096, of which 8 rows are read
    weights = 2 * (8_030_261_248 - 525_336_576 + 8 * 4096)
    keys = 8 * 32 * 2 * 8 * 128 * 4096 * 2
    logits = 8 * 128_256 * 4
    assert decode_bytes(preset("llama-3.1-8b"), 8, 4096, 2) == weights + keys + logits


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "llama-2-7b"])
def test_bytes_are_those_of_the_weights(name):
    config = dataclasses.replace(preset(name), num_layers=2)
    with torch.device("meta"):
        model = random_model(config, 1, 8, torch.device("meta"), torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    keys = 2 * 2 * 100 * config.num_kv_heads * config.head_dim
    expected = 2 * (weights - embedding + config.hidden_size + keys) + 4 * config.vocab_size
    assert decode_bytes(config, 1, 100, 2) == expected


def test_flops_of_the_1b_model():
    # matrices: 1,235,814,400 parameters less 33 norms of 2048; scores and values: 4 x 2048 x keys
    matrices = 2 * (1_235_814_400 - 33 * 2048)
    attention = 16 * 4 * 2048 * 1024
    assert decode_flops(preset("llama-3.2-1b"), 1, 1024) == matrices + attention
    assert decode_flops(preset("llama-3.2-1b"), 8, 1024) == 8 * (matrices + attention)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = preset("qwen2.5-0.5b", num_layers=2, max_seq_len=19)
    config = dataclasses.replace(config, vocab_size=300, intermediate_size=64)
    return random_model(config, 2, 19, torch.device("cpu"), torch.float32)


TOKENS = torch.tensor([3, 299])


@pytest.mark.parametrize("mode", ["persistent", "graph", "eager"])
@torch.no_grad()
def test_our_step_is_the_peers_step(model, mode):
    expected = PlainDecoder(model.model, 2, 16)(TOKENS, torch.tensor([15]))
    step = own_step(model, mode, 2, 16)
    torch.testing.assert_close(step(TOKENS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step(TOKENS), expected, rtol=1e-4, atol=1e-4)  # at the same slot


def test_a_captured_step_is_held_with_its_buffers(model, monkeypatch):
    class Graph:  # as much of a CUDA graph as there is without a GPU
        replays = 0

        def replay(self):
            self.replays += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    slots = torch.full((2,), 15)
    shard_step = ShardStep(model, slots, slots, slots + 1, None)
    held = weakref.ref(shard_step)
    captured = decode.Captured(shard_step.persistent, 2, torch.device("cpu"))
    del shard_step
    gc.collect()
    assert held() is not None
    captured(TOKENS)
    assert captured.graph.replays == 1
    assert captured.tokens.tolist() == TOKENS.tolist()
    del captured
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("mode", ["persistent", "eager"])
@torch.no_grad()
def test_generating_goes_on_and_starts_again(model, mode):
    plain, tokens, expected = PlainDecoder(model.model, 2, 19), TOKENS, []
    for slot in range(15, 19):
        tokens = plain(tokens, torch.tensor([slot])).argmax(-1)
        expected.append(tokens.tolist())
    other = Generating(model, TOKENS, 16, "eager")
    generating = Generating(model, TOKENS, 16, mode)
    chosen = []
    for _ in range(8):
        other(0)  # counts in the same caches
        chosen.append(generating(0).tolist())
    assert chosen == expected * 2


def test_a_step_in_another_mode_is_not_timed(model):
    with pytest.warns(RuntimeWarning, match="a CUDA graph needs a GPU"):
        generating = Generating(model, TOKENS, 16, "graph")
    with pytest.raises(Unavailable, match="it fell back to eager"):
        generating(0)
