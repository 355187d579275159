"""A study on disk: every measurement of a device, kept as it is made and played back."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import inf
from pathlib import Path

from fastshard.files import replace_text
from fastshard.tune.problem import SIZES, Measurement, Measurer, Problem, rejected

FORMAT = 1
UNKNOWN = "not in the study"
"""Why what was never measured may not be chosen."""

_Key = tuple[Problem, str, bool]  # the last: whether it was a confirmation


class Study:
    """Measurements by problem and variant; those of confirmations apart.

    Attributes:
        device: Name of the device that they were made on.
        fastshard: Version whose variants these are.
    """

    def __init__(self, device: str, fastshard: str):
        self.device, self.fastshard = device, fastshard
        self._known: dict[_Key, Measurement] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(
        self, problem: Problem, variant: str, *, is_confirmed: bool = False
    ) -> Measurement | None:
        """What is known, or None."""
        return self._known.get((problem, variant, is_confirmed))

    def keep(
        self,
        problem: Problem,
        variant: str,
        measurement: Measurement,
        *,
        is_confirmed: bool = False,
    ) -> None:
        """Know this from now on."""
        self._known[problem, variant, is_confirmed] = measurement

    def variants(self, problem: Problem) -> list[str]:
        """Variants of a problem that were measured, in the order of measuring."""
        return [name for of, name, confirmed in self._known if of == problem and not confirmed]

    def write(self, path: Path) -> None:
        """Write everything, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        entries = [
            {**asdict(problem), "variant": variant, "is_confirmed": confirmed, **asdict(found)}
            for (problem, variant, confirmed), found in self._known.items()
        ]
        content = {"format": FORMAT, "device": self.device, "fastshard": self.fastshard}
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        replace_text(path, f'{json.dumps(content)[:-1]}, "measurements": [\n{lines}\n]}}\n')


def read(path: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: it is none, or one of another version of fastshard.
        OSError: it cannot be read.
    """
    installed = version("fastshard")
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        if content["fastshard"] != installed:
            raise ValueError(f"it is of fastshard {content['fastshard']}, not {installed}")
        if not isinstance(content["device"], str):
            raise ValueError(f"its device is {content['device']}, no name")
        study = Study(content["device"], installed)
        for entry in content["measurements"]:
            entry["shape"] = tuple(entry["shape"])
            problem = Problem(*(entry.pop(name) for name in ("op", "dtype", "shape")))
            if not _is_problem(problem):
                raise ValueError(f"{problem} is no problem")
            key = {"variant": entry.pop("variant"), "is_confirmed": entry.pop("is_confirmed")}
            found = Measurement(**entry)
            if not _is_measured(found):
                raise ValueError(f"{problem} {key['variant']} has neither times nor a reason")
            study.keep(problem, measurement=found, **key)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ValueError(f"{path} must be a study of fastshard tune: {reason}") from None
    return study


def _is_problem(problem: Problem) -> bool:
    sizes = SIZES.get(problem.op, ())
    are_sizes = all(type(size) is int and size > 0 for size in problem.shape)
    return len(sizes) == len(problem.shape) > 0 and are_sizes and isinstance(problem.dtype, str)


def _is_measured(found: Measurement) -> bool:
    """Whether a search can go on with it."""
    times = (found.us, found.p20, found.p80, found.auto_us, found.limit_us)
    is_timed = all(isinstance(us, int | float) and 0 < us < inf for us in times)
    is_rejected = found.us is None and isinstance(found.reason, str)
    return (is_timed or is_rejected) and isinstance(found.seconds, int | float)


class Replay:
    """A measurer that only plays back: what was never measured may not be chosen."""

    def __init__(self, study: Study):
        self._study = study
        self.device = study.device

    def __call__(self, problem: Problem, variants: Sequence[str]) -> list[Measurement]:
        return [self._found(problem, name, is_confirmed=False) for name in variants]

    def confirm(self, problem: Problem, variant: str) -> Measurement:
        """The recorded confirmation, else the first measurement."""
        return self._found(problem, variant, is_confirmed=True)

    def _found(self, problem: Problem, variant: str, *, is_confirmed: bool) -> Measurement:
        found = self._study.get(problem, variant, is_confirmed=is_confirmed)
        found = found or self._study.get(problem, variant)
        return found or rejected(UNKNOWN, 0.0)


class Recorder:
    """A measurer that asks another one for what its study does not know, and keeps that on disk.

    Attributes:
        study: Grows.
    """

    def __init__(self, measurer: Measurer, study: Study, path: Path | None):
        self._measurer, self._path = measurer, path
        self.study, self.device = study, study.device

    def __call__(self, problem: Problem, variants: Sequence[str]) -> list[Measurement]:
        unknown = [name for name in variants if self.study.get(problem, name) is None]
        if unknown:
            for name, found in zip(unknown, self._measurer(problem, unknown), strict=True):
                self.study.keep(problem, name, found)
            self._write()
        return [self.study.get(problem, name) for name in variants]

    def confirm(self, problem: Problem, variant: str) -> Measurement:
        """Measured anew, whatever is known."""
        found = self._measurer.confirm(problem, variant)
        self.study.keep(problem, variant, found, is_confirmed=True)
        self._write()
        return found

    def _write(self) -> None:
        if self._path is not None:
            self.study.write(self._path)
