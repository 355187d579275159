"""KVCache: slots, counting, and what does not fit."""

import math

import pytest
import torch
from torchtune.modules import KVCache as TorchtuneKVCache

from fastshard import ops
from fastshard.nn import KVCache


def build(batch_size=2, max_seq_len=8) -> KVCache:
    return KVCache(batch_size, max_seq_len, 3, 16, torch.float32)


def test_steps_count_on():
    cache = build()
    step = cache.next_step(2, 5)
    assert cache.size == 0, "asking changes nothing"
    assert step.slots.tolist() == [0, 1, 2, 3, 4]
    assert step.kv_lengths is None, "a new prompt has these tokens alone"
    assert step.overflow is cache.overflow
    cache.advance(2, 5)
    step = cache.next_step(1, 2)
    assert (cache.size, step.slots.tolist(), step.kv_lengths.tolist()) == (5, [5, 6], [7])
    assert cache.next_step(2, 1).kv_lengths.tolist() == [6, 6]
    step = cache.next_step(2, 3, start=0)
    assert (step.slots.tolist(), step.kv_lengths) == ([0, 1, 2], None)
    cache.reset()
    assert cache.next_step(2, 8).slots.tolist() == list(range(8))


def test_a_token_costs_no_memory():
    cache = build()
    cache.advance(1, 3)
    first, second = cache.next_step(1, 1), cache.next_step(1, 2)
    storages = {t.untyped_storage().data_ptr() for s in (first, second) for t in s[:2]}
    assert len(storages) == 1


def test_what_does_not_fit_is_named_and_changes_nothing():
    cache = build()
    cache.advance(1, 6)
    with pytest.raises(ValueError, match="6 of its 8 slots are used, got 3 tokens more"):
        cache.next_step(1, 3)
    with pytest.raises(ValueError, match="0 of its 8 slots are used, got 9 tokens more"):
        cache.next_step(1, 9, start=0)
    with pytest.raises(ValueError, match="batch must be at most the cache's 2, got 3"):
        cache.next_step(3, 1)
    with pytest.raises(ValueError, match="at most the 1 of the cached prompt, got 2"):
        cache.next_step(2, 1)
    assert cache.size == 6
    assert cache.next_step(2, 8, start=0).slots.numel() == 8  # a new prompt may


def test_updates_as_torchtune():
    ours, theirs = build(), TorchtuneKVCache(2, 8, 3, 16, torch.float32)
    ours.k_cache.zero_()
    ours.v_cache.zero_()
    for s in (3, 1, 4):
        k, v = torch.randn(2, 2, 3, s, 16).unbind(0)
        for actual, golden in zip(ours.update(k, v), theirs.update(k, v), strict=True):
            assert torch.equal(actual, golden)
        assert ours.size == theirs.size
    with pytest.raises(ValueError, match="8 of its 8 slots are used, got 4 tokens more"):
        ours.update(k, v)


def test_an_out_of_range_write_is_suppressed_and_raises_when_asked():
    cache = build()
    cache.k_cache.fill_(math.nan)
    cache.v_cache.fill_(math.nan)
    q = torch.randn(1, 2, 3, 16)
    slots, positions = torch.tensor([0, 8]), torch.tensor([0, 1])
    table = torch.ones(4, 8, 2)
    ops.rope_append(
        q, q, q, table, positions, cache.k_cache, cache.v_cache, slots, cache.overflow,
        interleaved=True,
    )  # fmt: skip
    assert cache.k_cache[0, :, 0].isfinite().all()
    assert cache.k_cache[0, :, 1:].isnan().all()
    with pytest.raises(ValueError, match="a token was out of range and is not in the cache"):
        cache.raise_on_overflow()
    cache.reset()
    cache.raise_on_overflow()


def test_it_moves_and_casts_with_its_module():
    cache = build()
    before = cache.next_step(1, 1)
    cache.half()
    assert cache.k_cache.dtype == torch.float16
    assert cache.overflow.dtype == torch.int32
    assert cache.next_step(1, 1).slots.tolist() == before.slots.tolist()
    assert cache.state_dict() == {}


def test_made_in_inference_mode_it_works_outside():
    with torch.inference_mode():
        cache = build()
        step = cache.next_step(1, 1)
    assert not any(tensor.is_inference() for tensor in (step.slots, step.overflow))
    k = torch.randn(1, 3, 1, 16)
    cache.update(k, k)
    assert torch.equal(cache.k_cache[0, :, 0], k[0, :, 0])
