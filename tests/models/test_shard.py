"""Shard: inclusive ends, and what it refuses."""

import pytest

from fastshard import Shard


def test_both_ends_are_included():
    shard = Shard("m", 2, 5, 8)
    assert shard.get_layer_count() == 4
    assert list(shard.layers) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [(0, 7, True, True), (0, 6, True, False), (1, 7, False, True), (3, 3, False, False)],
)
def test_first_and_last(start, end, first, last):
    shard = Shard("m", start, end, 8)
    assert (shard.is_first_layer(), shard.is_last_layer()) == (first, last)


def test_dict_round_trip_and_hash():
    shard = Shard("m", 2, 5, 8)
    assert shard.to_dict() == {"model_id": "m", "start_layer": 2, "end_layer": 5, "n_layers": 8}
    assert Shard.from_dict(shard.to_dict()) == shard
    assert len({shard, Shard.from_dict(shard.to_dict())}) == 1


def test_overlaps_shares_a_layer_of_one_model():
    shard = Shard("m", 2, 5, 8)
    assert shard.overlaps(Shard("m", 5, 7, 8))  # the inclusive ends are shared
    assert shard.overlaps(Shard("m", 0, 2, 8))
    assert shard.overlaps(Shard("m", 3, 4, 8))
    assert not shard.overlaps(Shard("m", 6, 7, 8))
    assert not shard.overlaps(Shard("m", 0, 1, 8))
    assert not shard.overlaps(Shard("other", 2, 5, 8))


@pytest.mark.parametrize(("start", "end", "n"), [(-1, 0, 4), (2, 1, 4), (0, 4, 4), (0, 0, 0)])
def test_rejects_a_range_outside_the_model(start, end, n):
    rule = rf"0 <= start_layer <= end_layer < n_layers .*start_layer={start}, end_layer={end}"
    with pytest.raises(ValueError, match=rule):
        Shard("m", start, end, n)


def test_rejects_other_types_and_keys():
    with pytest.raises(TypeError, match=r"end_layer must be an integer, got 1\.0"):
        Shard("m", 0, 1.0, 4)
    with pytest.raises(TypeError, match="model_id must be a string, got None"):
        Shard(None, 0, 1, 4)
    with pytest.raises(ValueError, match=r"must have the keys .*got \['model_id', 'start'\]"):
        Shard.from_dict({"model_id": "m", "start": 0})
