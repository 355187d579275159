"""What came out of verifying a kernel of the archive, and where it is kept.

A verdict is one JSON file in ``archive/verdicts`` of the cache folder, written whole or not at all.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from urllib.parse import quote

from fastshard.environment import cache_dir
from fastshard.files import replace_text

VERIFIED = "verified"
INCOMPLETE = "incomplete row"
NOT_COMPILED = "did not compile"
REFERENCE_FAILED = "reference fails"
VACUOUS = "nothing to get wrong"
CRASHED = "crashed"
HUNG = "hung"
TOO_MUCH_MEMORY = "took too much memory"
REFUSED = "raised an error"
OUT_OF_BOUNDS = "wrote out of bounds"
EDITED_INPUTS = "edited its inputs"
NOT_WRITTEN = "returned memory it did not write"
SHARED_MEMORY = "returned memory that is not its own"
UNORDERED = "ran outside the stream"
STALE = "returned an earlier answer"
WRONG = "wrong"
INACCURATE = "less accurate than PyTorch"
ONE_SHAPE = "right only at the published shape"
TOO_FAST = "too fast to be true"
VERDICTS = {
    VERIFIED: "right by every rule, and timed",
    INCOMPLETE: "a column that is needed is null",
    NOT_COMPILED: "the compiler failed, or was stopped",
    REFERENCE_FAILED: "the row's own PyTorch code does not run, so there is nothing to compare to",
    VACUOUS: "the reference gives one answer whatever the inputs are",
    CRASHED: "its process ended",
    HUNG: "it did not answer in time, and was killed",
    TOO_MUCH_MEMORY: "it was killed at the limit of resident memory",
    REFUSED: "it raised an error at the published shape",
    OUT_OF_BOUNDS: "bytes beside a buffer changed",
    EDITED_INPUTS: "arguments changed that the reference leaves alone",
    NOT_WRITTEN: "the poison of fresh memory is in its answer",
    SHARED_MEMORY: "its answer lies in an argument, or in the answer of another call",
    UNORDERED: "it reads before the current stream has written, or writes after",
    STALE: "its answer is that of an earlier call",
    WRONG: "its answer is not the reference's",
    INACCURATE: "its error is rounding, but more than twice that of eager PyTorch",
    ONE_SHAPE: "at another shape its answer is wrong, or it raises an error",
    TOO_FAST: "its time is below the physical limit, or not what a clock outside sees",
}
"""Every verdict -> what it says."""


@dataclass(frozen=True)
class Verdict:
    """Of one kernel on one machine.

    Attributes:
        id: Of the row.
        verdict: A key of ``VERDICTS``.
        reason: What was seen, with numbers; empty where verified.
        op_name: As the archive has it.
        kernel_name: See ``op_name``.
        code_sha256: Of the CUDA code that was verified; empty where there was none.
        claimed: Speed-up as published, by ``native`` and ``compile``; None where null.
        times: dtype -> ``candidate``, ``eager``, ``compile``, ``ours`` -> median microseconds. A
            verdict that is not ``verified`` may have times too; they mean nothing.
        notes: What was left out, and why: a dtype, a peer, a kind of isolation.
        environment: Device, torch and CUDA versions, compiler, isolation.
    """

    id: str
    verdict: str
    reason: str = ""
    op_name: str | None = None
    kernel_name: str | None = None
    code_sha256: str = ""
    claimed: Mapping[str, float | None] = field(default_factory=dict)
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "notes", tuple(self.notes))
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")

    @property
    def is_verified(self) -> bool:
        return self.verdict == VERIFIED

    def speedup(self, peer: str = "eager", dtype: str = "float32") -> float | None:
        """Over a peer of ``times``; None where it is not verified, or was not timed."""
        times = self.times.get(dtype, {})
        if not self.is_verified or "candidate" not in times or peer not in times:
            return None
        return times[peer] / times["candidate"]


def verdicts_dir() -> Path:
    """Where verdicts are kept."""
    return cache_dir() / "archive" / "verdicts"


def path_of(identity: str) -> Path:
    """The file of a row's verdict: of this name whatever a foreign data set calls its rows."""
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    readable = quote(identity, safe="").replace(".", "%2E")[:120]
    return verdicts_dir() / f"{readable}-{digest}.json"


def save(verdict: Verdict) -> Path:
    """Keep a verdict, in the place of an earlier one of the same row."""
    path = path_of(verdict.id)
    replace_text(path, json.dumps(asdict(verdict), indent=2) + "\n")
    return path


def load(identity: str) -> Verdict | None:
    """The verdict of a row; None where there is none.

    Raises:
        ValueError: the file is none of a verdict.
    """
    path = path_of(identity)
    return _read(path) if path.exists() else None


def load_all() -> list[Verdict]:
    """Every verdict that is kept, by ID.

    Raises:
        ValueError: a file is none of a verdict.
    """
    found = (_read(path) for path in verdicts_dir().glob("*.json") if path.name[0] != ".")
    return sorted(found, key=lambda verdict: verdict.id)


def _read(path: Path) -> Verdict:
    try:
        values = json.loads(path.read_text())
        known = {name.name for name in fields(Verdict)}
        return Verdict(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no verdict of fastshard archive verify: {error}") from None
