"""What won is timed once more; what does not win again gives way to the next best."""

import pytest

from fastshard.ops.variants import Entry
from fastshard.tune.confirm import Confirmed, confirm
from fastshard.tune.problem import Measurement, Problem, rejected
from fastshard.tune.search import Found

PROBLEM = Problem("rms_norm", "bfloat16", (4, 4096))
MENU = ("128x4", "512x1", "256x2")
OUTSIDE = "192x3"


def timed(us) -> Measurement:
    """Beside 10 us of ``auto``."""
    return Measurement(us, us, us, 10.0, 1.0, 1e-3, None, 1.0)


class Again:
    """Confirms with these times."""

    def __init__(self, **times):
        self.asked, self._times = [], times

    def confirm(self, problem, variant):
        assert problem == PROBLEM
        self.asked.append(variant)
        found = self._times["v" + variant]
        return found if isinstance(found, Measurement) else timed(found)


def entry(variant):
    return Entry(PROBLEM.op, PROBLEM.dtype, PROBLEM.shape, variant)


def run(first: dict, **again):
    found, lines = Found(PROBLEM, {name: timed(us) for name, us in first.items()}), []
    measurer = Again(**again)
    return confirm(found, measurer, lines.append), measurer.asked, lines


def test_the_fastest_wins_again():
    confirmed, asked, lines = run({"128x4": 9.0, "512x1": 8.0}, v512x1=8.2)
    assert confirmed[1:] == (entry("512x1"), None)
    assert (asked, lines) == (["512x1"], [])


def test_the_next_best_is_tried():
    confirmed, asked, lines = run({"128x4": 9.0, "512x1": 8.0}, v512x1=9.9, v128x4=9.7)
    assert confirmed[1:] == (entry("128x4"), None)
    assert asked == ["512x1", "128x4"]
    assert lines == [f"{PROBLEM}: 512x1 was not confirmed: 0.990 of auto's time"]
    assert confirmed.found.measured["512x1"].reason == "not confirmed: 0.990 of auto's time"


def test_nothing_that_fails_or_gains_too_little_is_kept():
    times = {"v512x1": rejected("hangs", 1.0), "v128x4": 9.81}
    confirmed, asked, lines = run({"128x4": 9.0, "512x1": 8.0, "256x2": 9.9}, **times)
    assert confirmed[1:] == (None, None)
    assert asked == ["512x1", "128x4"]  # 256x2 gains too little at first
    assert lines[0].endswith("512x1 was not confirmed: hangs")


@pytest.mark.parametrize(("again", "is_kept"), [(7.9, False), (7.8, True)])
def test_an_addition_must_beat_the_menu_again(again, is_kept):
    confirmed, asked, _ = run({"128x4": 8.0, OUTSIDE: 7.0}, v128x4=8.0, v192x3=again)
    assert asked == ["128x4", OUTSIDE]
    expected = entry(OUTSIDE) if is_kept else None
    assert confirmed == Confirmed(confirmed.found, entry("128x4"), expected)
