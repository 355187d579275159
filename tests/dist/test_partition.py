"""Cuts of a model over ranks, against brute force over all cuts, and against built models."""

import itertools
import math

import pytest
import torch
from tiny_checkpoints import FAMILIES, make_reference

from fastshard import ModelConfig, Shard, ShardedGeneralModel
from fastshard.bench.presets import preset
from fastshard.dist import (
    TensorParallel,
    check_cover,
    even_split,
    partition,
    plan,
    smallest_largest_share,
    split_that_fits,
)
from fastshard.models import ModelBytes

ENDS = [(0, 0), (3, 5), (25, 0), (0, 17), (40, 40)]
"""Bytes of the embedding and of the head, where a layer has 10."""


def all_cuts(num_layers, num_ranks):
    """Every way to give each rank at least one layer."""
    for cut in itertools.combinations(range(1, num_layers), num_ranks - 1):
        bounds = [0, *cut, num_layers]
        yield [range(a, b) for a, b in itertools.pairwise(bounds)]


def held(sizes, part):
    """Bytes of a shard, added up layer by layer."""
    total = sum(sizes.layer + sizes.cache for _ in part) + sizes.table
    if 0 in part:
        total += sizes.embedding
    if sizes.num_layers - 1 in part:
        total += sizes.head
        if 0 not in part:
            total += sizes.tied_head
    return total


def shares_of(sizes, cut, free, reserve):
    return [(held(sizes, part) + reserve) / bytes_ for part, bytes_ in zip(cut, free, strict=True)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(
    "free",
    [[100], [100, 100], [100, 10], [7, 100], [24, 24, 16], [1, 50, 3], [30, 10, 10, 45, 3]],
)
def test_the_largest_share_is_the_smallest_of_all_cuts(free, ends, tied):
    for num_layers, reserve in itertools.product(range(len(free), 9), (0, 13)):
        tied_head = tied * ends[0]
        sizes = ModelBytes(num_layers, ends[0], 8, ends[1], tied_head, cache=2, table=1)
        cut = smallest_largest_share(sizes, free, reserve)
        cuts = list(all_cuts(num_layers, len(free)))
        assert cut in cuts
        least = min(max(shares_of(sizes, other, free, reserve)) for other in cuts)
        assert max(shares_of(sizes, cut, free, reserve)) == least
        # Among the equals the most even.
        squares = [
            math.fsum(share * share for share in shares_of(sizes, other, free, reserve))
            for other in cuts
            if max(shares_of(sizes, other, free, reserve)) == least
        ]
        mine = math.fsum(share * share for share in shares_of(sizes, cut, free, reserve))
        assert mine == pytest.approx(min(squares), rel=1e-12)  # two orders of a few sums


def test_memory_weighs():
    """Layers go where the memory is; a large end takes the place of layers."""
    sizes = ModelBytes(12, embedding=0, layer=10, head=0, tied_head=0)
    assert [len(part) for part in smallest_largest_share(sizes, [60, 40, 20])] == [6, 4, 2]
    sizes = ModelBytes(12, embedding=40, layer=10, head=0, tied_head=0)
    assert [len(part) for part in smallest_largest_share(sizes, [80, 80])] == [4, 8]
    sizes = ModelBytes(12, embedding=30, layer=10, head=0, tied_head=30)
    assert [len(part) for part in smallest_largest_share(sizes, [80, 80, 80])] == [3, 6, 3]


def tiny_config(family):
    return ModelConfig.from_dict(make_reference(family).config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("free", [[1.0], [1.0, 1.0], [3.0, 1.0], [1.0, 2.0, 1.0]])
def test_models_take_the_shards_and_hold_what_was_counted(family, free):
    config = tiny_config(family)
    free = [round(weight * 2**20) for weight in free]
    settings = {"dtype": torch.bfloat16, "context": 16, "batch": 2}
    shards = partition(config, free, model_id="tiny", **settings)
    shares = plan(config, free, model_id="tiny", **settings)
    assert [share.shard for share in shares] == shards
    assert [layer for shard in shards for layer in shard.layers] == [0, 1, 2]
    for shard, share, free_bytes in zip(shards, shares, free, strict=True):
        model = ShardedGeneralModel(config, shard, "meta", torch.bfloat16)
        assert share.weight_bytes == sum(weight.nbytes for weight in model.model.parameters())
        model.model.setup_caches(2, torch.bfloat16, decoder_max_seq_len=16)
        caches = [layer.attn.kv_cache for layer in model.model.layers.values()]
        assert share.cache_bytes == sum(c.k_cache.nbytes + c.v_cache.nbytes for c in caches)
        assert (share.free_bytes, share.shard.model_id) == (free_bytes, "tiny")


def test_the_sum_over_the_ranks_is_the_model():
    """Of untied heads every byte once; of tied ones the embedding twice."""
    free = [24 * 10**9, 24 * 10**9, 16 * 10**9]
    settings = {"dtype": torch.bfloat16, "context": 4096}
    shares = plan(preset("llama-3.1-8b"), free, **settings)
    assert sum(share.weight_bytes for share in shares) == 2 * 8_030_261_248
    shares = plan(preset("llama-3.2-1b"), free, **settings)
    assert sum(share.weight_bytes for share in shares) == 2 * (1_235_814_400 + 128256 * 2048)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_that_share_layers_hold_what_was_counted(family, tp, stages):
    """Whichever part of the layers a rank has."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = ModelConfig.from_dict(make_reference(family, **heads).config.to_dict())
    settings = {"dtype": torch.bfloat16, "context": 16, "batch": 2}
    free = [10**6] * (stages * tp)
    shares = plan(config, free, tp=tp, **settings)
    starts = [share.shard.start_layer for share in shares]
    assert starts == [i for i in range(stages) for _ in range(tp)]
    assert partition(config, free, tp=tp, **settings) == [share.shard for share in shares]
    for share in shares:
        build = TensorParallel(share.rank % tp, tp).build
        model = build(config, share.shard, device="meta", dtype=torch.bfloat16)
        assert share.weight_bytes == sum(weight.nbytes for weight in model.parameters())
        model.setup_caches(2, torch.bfloat16, decoder_max_seq_len=16)
        caches = [layer.attn.kv_cache for layer in model.layers.values()]
        assert share.cache_bytes == sum(c.k_cache.nbytes + c.v_cache.nbytes for c in caches)


def test_the_smallest_of_the_ranks_that_share_layers_decides():
    config = tiny_config("llama")
    settings = {"dtype": torch.float16, "context": 8}
    even, uneven = [10**6, 10**6, 5 * 10**5, 5 * 10**5], [10**6, 10**7, 10**8, 5 * 10**5]
    expected = [share.shard for share in plan(config, even, tp=2, **settings)]
    shares = plan(config, uneven, tp=2, **settings)
    assert [share.shard for share in shares] == expected
    assert [share.free_bytes for share in shares] == uneven


def test_the_reserve_is_part_of_the_share():
    (share,) = plan(tiny_config("llama"), [10**6], dtype=torch.float16, context=8, reserve=400_000)
    parts = share.weight_bytes + share.cache_bytes + share.table_bytes
    assert share.needed_bytes == parts + 400_000
    assert share.share == (parts + 400_000) / 10**6


def test_fits_to_the_byte():
    config, settings = tiny_config("qwen2"), {"dtype": torch.float16, "context": 8}
    shares = plan(config, [10**6] * 3, reserve=1000, **settings)
    needed = [share.needed_bytes for share in shares]
    by_hand = {"layers": [range(0, 1), range(1, 2), range(2, 3)], "reserve": 1000, **settings}
    assert len(partition(config, needed, **by_hand)) == 3
    needed[1] -= 1
    with pytest.raises(
        ValueError,
        match=rf"the model does not fit: rank 1 needs {needed[1] + 1:,} bytes for layers 1-1 "
        rf"and has {needed[1]:,} free$",
    ):
        partition(config, needed, **by_hand)


def test_every_rank_that_does_not_fit_is_named():
    config, settings = tiny_config("llama"), {"dtype": torch.float16, "context": 8}
    with pytest.raises(
        ValueError,
        match=r"^the model does not fit: rank 0 needs [\d,]+ bytes for layers 0-0 and has 10 free; "
        r"rank 1 needs [\d,]+ bytes for layers 1-1 and has 11 free; rank 2 needs [\d,]+ bytes "
        r"for layers 2-2 and has 12 free$",
    ):
        partition(config, [10, 11, 12], **settings)
    assert [share.fits for share in plan(config, [10, 11, 12], **settings)] == [False] * 3


def test_layers_by_hand():
    config, settings = tiny_config("llama"), {"dtype": torch.float16, "context": 8}
    shards = partition(config, [10**6, 10**6], layers=[range(0, 1), range(1, 3)], **settings)
    assert shards == [Shard("", 0, 0, 3), Shard("", 1, 2, 3)]


@pytest.mark.parametrize(
    ("free", "changes", "message"),
    [
        ([10**6] * 4, {}, "ranks must be 1 to the model's 3 layers, got 4"),
        ([], {}, "ranks must be 1 to the model's 3 layers, got 0"),
        ([10**6, 0], {}, r"free bytes of every rank must be positive, got \[1000000, 0\]"),
        ([10**6], {"tp": 0}, "tp must be at least 1, got 0"),
        ([10**6] * 3, {"tp": 2}, "ranks must be a multiple of tp=2, got 3"),
        ([10**6] * 8, {"tp": 2}, "ranks must be 1 to the model's 3 layers times tp=2, got 8"),
        ([10**6] * 4, {"tp": 4}, "num_kv_heads must be a multiple of tp=4, got 2"),
        (
            [10**6] * 4,
            {"tp": 2, "layers": [range(0, 1), range(1, 2), range(2, 3)]},
            "layers must be one range for each of 2 times tp=2 ranks, got 0-0,1-1,2-2",
        ),
        ([10**6], {"context": 65}, "context must be 1 to max_seq_len=64, got 65"),
        ([10**6], {"context": 0}, "context must be 1 to max_seq_len=64, got 0"),
        ([10**6], {"batch": 0}, "batch must be at least 1, got 0"),
        ([10**6], {"reserve": -1}, "reserve must be at least 0 bytes, got -1"),
        (
            [10**6],
            {"layers": [range(0, 1), range(1, 3)]},
            "layers must be one range for each of 1 ranks, got 0-0,1-2",
        ),
        (
            [10**6] * 2,
            {"layers": [range(0, 1), range(2, 3)]},
            "layers must hold each of 0-2 once, in order, got 0-0,2-2",
        ),
    ],
)
def test_wrong_arguments_raise(free, changes, message):
    settings = {"dtype": torch.float16, "context": 8} | changes
    for function in (plan, partition):
        with pytest.raises(ValueError, match=f"^{message}$"):
            function(tiny_config("llama"), free, **settings)


@pytest.mark.parametrize(
    "layers", [[(0, 2), (3, 5)], [(0, 3), (2, 5)], [(2, 5), (0, 2)], [(0, 5), (5, 5)], [(0, 4)], []]
)
def test_layers_that_do_not_cover_raise(layers):
    text = ",".join(f"{a}-{b - 1}" for a, b in layers)
    with pytest.raises(
        ValueError, match=f"^layers must hold each of 0-4 once, in order, got {text}$"
    ):
        check_cover([range(*ends) for ends in layers], 5)


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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("available", [9, 10, 11, 20, 29, 30, 34, 45, 50, 64, 71, 100, 150, 200])
def test_split_is_the_smallest_that_fits(tied, ends, available):
    for num_layers, reserve in itertools.product((1, 2, 5, 8), (0, 9)):
        sizes = ModelBytes(num_layers, ends[0], 10, ends[1], tied_head=tied * ends[0])
        parts = split_that_fits(sizes, available, reserve)
        fitting = [
            count
            for count in range(1, num_layers + 1)
            for cut in all_cuts(num_layers, count)
            if all(held(sizes, part) + reserve <= available for part in cut)
        ]
        assert (parts and len(parts)) == (fitting[0] if fitting else None)
        if parts:
            check_cover(parts, num_layers)
            assert all(held(sizes, part) + reserve <= available for part in parts)
