"""KVCache: torchtune's, counted on the host too, and right whoever moves the position."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import modules

from fastshard.integrations.torchtune.kv_cache import KVCache


def build(kind=KVCache, rows=2, slots=8):
    return kind(rows, slots, 2, 16, torch.float32)


class Reads(TorchDispatchMode):
    """Counts values that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_counts_without_reading_the_device():
    cache = build()
    cache.next_slots(2, 3)
    cache.advance(3)
    with Reads() as reads:
        for held in (3, 4):
            assert cache.next_slots(2, 1).data_ptr() == cache.cache_pos.data_ptr()
            cache.advance(1)
            with pytest.raises(ValueError, match=f"{held + 1} of its 8 slots are used, got 9"):
                cache.next_slots(2, 9)
        cache.cache_pos -= 2
        cache.assume(3)
        with pytest.raises(ValueError, match="3 of its 8 slots are used, got 6 tokens more"):
            cache.next_slots(2, 6)
        cache.next_slots(2, 2)
        cache.advance(2)
    assert reads.count == 0
    assert cache.size == 5
    assert cache.next_slots(2, 2).tolist() == [5, 6]


def move(cache, position):
    cache.cache_pos += position - cache.size


def replace(cache, position):
    cache.cache_pos = torch.arange(8) + position


def update(cache, position):
    values = torch.zeros(2, 2, position - cache.size, 16)
    cache.update(values, values)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [move, replace, update])
def test_a_position_that_others_change_counts(change, inference):
    with torch.inference_mode(inference):
        cache = build()
        cache.next_slots(2, 3)
        cache.advance(3)
    with torch.inference_mode(inference):
        change(cache, 6)
        text = "6 of its 8 slots are used, got 3 tokens more"
        with pytest.raises(ValueError, match=text):
            cache.next_slots(2, 3)
        assert cache.next_slots(2, 2).tolist() == [6, 7]
    cache.next_slots(2, 2)  # tensors of later calls need not be of inference mode


def test_over_shares_the_tensors():
    theirs = build(modules.KVCache)
    values = torch.randn(2, 2, 3, 16)
    theirs.update(values, values)
    own = KVCache.over(theirs)
    assert own.size == 3
    assert own.k_cache is theirs.k_cache
    assert own.next_slots(2, 1).tolist() == [3]
    with torch.inference_mode():
        own = KVCache.over(build(modules.KVCache))  # whose versions are not counted
        own.next_slots(2, 1)
        own.advance(1)
        own.cache_pos.add_(7)
        with pytest.raises(ValueError, match="8 of its 8 slots are used, got 1 tokens more"):
            own.next_slots(2, 1)


def test_reset_tells_of_tokens_that_were_out_of_range():
    cache = build()
    cache.advance(3)
    cache.k_cache.fill_(1)
    cache.overflow.fill_(1)
    text = "positions of the RoPE table, and slots below 8: a token was out of range and is not in"
    with pytest.raises(ValueError, match=text):
        cache.reset()
    assert not cache.k_cache.any()
    assert cache.next_slots(2, 1).tolist() == [0]
    cache.reset()
