"""Arguments of the command line: the parser, and types whose errors name the rule and the value."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

DTYPES = ("float32", "float16", "bfloat16")
PLOT_FORMATS = "as PNG or SVG by its name (needs matplotlib: the extra bench)"

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Errors in one line.

    Attributes:
        wraps: Whether the words behind ``--`` are another command, for completion.
    """

    wraps = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def argument(
    rule: str, choices: Sequence[str] = ()
) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
    """Make a converter's ``ValueError`` name the rule and the value.

    Args:
        rule: Completes "must be".
        choices: Words that a shell may complete to, the result's attribute ``choices``.
    """

    def decorate(convert: Callable[[str], T]) -> Callable[[str], T]:
        def checked(text: str) -> T:
            try:
                return convert(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}") from None

        checked.choices = tuple(choices)
        return checked

    return decorate


@argument("a positive integer")
def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


@argument("an integer of at least 0")
def whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


@argument("a finite number of at least 0")
def number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


@argument("positive sizes in GB, like 24,24,16")
def gigabytes(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < value < math.inf for value in values):
        raise ValueError
    return values


def _parse_seconds(text: str) -> float:
    value = float(text.rstrip("sm")) * {"m": 60}.get(text[-1:], 1)
    if not 0 <= value < math.inf or text[-2:].isalpha():
        raise ValueError
    return value


@argument("a time like 90s or 5m")
def seconds(text: str) -> float:
    return _parse_seconds(text)


@argument("a time of at least 5s, like 90s or 5m")
def timeout(text: str) -> float:
    value = _parse_seconds(text)
    if value < 5:
        raise ValueError
    return value


@argument("ranges of layers with both ends, like 0-3,4-7")
def layers(text: str) -> list[range]:
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts]
    if not all(ranges):
        raise ValueError
    return ranges
