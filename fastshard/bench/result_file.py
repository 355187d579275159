"""Read back what ``fastshard bench --json`` wrote."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from fastshard.bench.report import Line
from fastshard.bench.timing import Timing


@dataclass(frozen=True)
class ResultFile:
    """A run's measured lines, and where they were measured.

    Attributes:
        path: As it was asked for.
        command: Words of the command line.
        environment: Of ``report.describe_environment``.
        limits: Of ``Limits.describe``.
        lines: In the order in which they ran.
    """

    path: Path
    command: list[str]
    environment: dict
    limits: dict
    lines: list[Line]


def read(path: Path) -> ResultFile:
    """Read a result file.

    Raises:
        ValueError: it is no result of ``fastshard bench --json``.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        content = _parse(data)
        for key, kind in (("environment", dict), ("limits", dict), ("lines", list)):
            if not isinstance(content.get(key), kind):
                raise ValueError(f"{key} is missing")
        lines = [_line(number, values) for number, values in enumerate(content["lines"], 1)]
    except ValueError as error:
        raise ValueError(f"{path} must be a result of fastshard bench --json: {error}") from None
    command = content.get("command")
    command = [str(word) for word in command] if isinstance(command, list) else []
    return ResultFile(path, command, content["environment"], content["limits"], lines)


def _parse(data: bytes) -> dict:
    try:
        content = json.loads(data)
    except ValueError as error:  # of its decoding too
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def _line(number: int, values: object) -> Line:
    """The line as it was measured; what is derived is derived again."""
    if not isinstance(values, dict) or not isinstance(values.get("timing"), dict):
        raise ValueError(f"line {number} has no timing")
    for key in ("case", "variant", "shape", "dtype"):
        if not isinstance(values.get(key), str):
            raise ValueError(f"line {number} has no {key}")
    timing = values["timing"]
    counts = ("num_bytes", "flops", "limit_us")
    for found, keys in ((timing, ("us", "p20", "p80", "n")), (values, counts)):
        for key in keys:
            if not _is_positive(found.get(key)):
                raise ValueError(f"{key} of line {number} must be positive, got {found.get(key)}")
    names = {field.name for field in fields(Line)} & values.keys()
    known = {name: values[name] for name in names}
    known["timing"] = Timing(**{key: timing[key] for key in ("us", "p20", "p80", "n")})
    if known.get("error") is None:  # JSON has no NaN
        known["error"] = math.nan
    try:
        return Line(**known)
    except TypeError as error:
        raise ValueError(f"line {number}: {error}") from None


def _is_positive(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf
