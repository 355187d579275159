"""What won is timed once more: in a fresh process, with other inputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from fastshard.ops.variants import Entry
from fastshard.tune.problem import Measurer
from fastshard.tune.search import MIN_GAIN, Found


class Confirmed(NamedTuple):
    """What a problem gives after its confirmations.

    Attributes:
        found: The problem, and what was measured of it.
        entry: For the table: the fastest variant of the menu that won again; None where ``AUTO``
            stays.
        addition: What the menu should have: a variant outside it that beat all that it has again.
    """

    found: Found
    entry: Entry | None
    addition: Entry | None


def confirm(found: Found, measurer: Measurer, say: Callable[[str], None]) -> Confirmed:
    """Time the winners of ``found`` once more; where one does not win again, the next best.

    Args:
        found: Is told which measurements were not confirmed.
        measurer: Measures.
        say: Is given a line for each that was not confirmed.
    """
    entry = _first_confirmed(found, lambda: found.winner, 1.0, measurer, say)
    to_beat = found.best_of_menu[1]
    addition = _first_confirmed(found, lambda: found.addition, to_beat, measurer, say)
    return Confirmed(found, entry, addition)


def _first_confirmed(
    found: Found,
    candidate: Callable[[], str | None],
    to_beat: float,
    measurer: Measurer,
    say: Callable[[str], None],
) -> Entry | None:
    """The entry of the first candidate that wins again by ``MIN_GAIN`` over ``to_beat``."""
    problem = found.problem
    while (variant := candidate()) is not None:
        again = measurer.confirm(problem, variant)
        if again.ratio <= to_beat * (1 - MIN_GAIN):
            return Entry(problem.op, problem.dtype, problem.shape, variant)
        why = again.reason or f"{again.ratio:.3f} of auto's time"
        say(f"{problem}: {variant} was not confirmed: {why}")
        found.measured[variant] = replace(again, us=None, reason=f"not confirmed: {why}")
    return None
