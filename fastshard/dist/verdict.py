"""Why a run ends: from what the ranks say of themselves to the rank at fault and the cause."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fastshard.dist.rank_record import RankRecord


class RunError(ValueError):
    """An error of the whole run, at which no single rank is at fault."""


@dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    Attributes:
        rank: The one at fault; None where it is no single rank.
        layers: That it holds; empty where it did not know yet.
        status: Exit status of every rank.
        is_quiet: Nothing is printed.
    """

    cause: str
    rank: int | None = None
    layers: str = ""
    status: int = 1
    is_quiet: bool = False

    def __str__(self) -> str:
        if self.rank is None:
            return self.cause
        layers = f" (layers {self.layers})" if self.layers else ""
        return f"rank {self.rank}{layers}: {self.cause}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Verdict":
        return cls(**json.loads(text))


class Pulses:
    """The last record of each rank, and when it came, by the clock of the one who listens.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int):
        self.size = size
        self.records: dict[int, RankRecord] = {}
        self._heard: dict[int, float] = {}

    def hear(self, records: Iterable[RankRecord], now: float) -> None:
        """Take note of records read at ``now`` seconds."""
        for record in records:
            known = self.records.get(record.rank)
            if known is None or known.beat != record.beat:
                self._heard[record.rank] = now
            self.records[record.rank] = record

    def silence(self, rank: int, now: float) -> float:
        """Seconds since the rank was last heard, or since 0 where it never was."""
        return now - self._heard.get(rank, 0.0)

    def all_left(self) -> bool:
        return len(self.records) == self.size and all(r.left for r in self.records.values())

    def dead(self) -> list[RankRecord]:
        """Ranks on this machine whose process has ended, though they have not left."""
        return [r for r in self.records.values() if not r.left and r.process.is_gone()]


def of_death(record: RankRecord, other_cause: str = "") -> Verdict:
    """The verdict on a rank whose process is gone."""
    cause = f"its process ({record.process}) died without a word: killed, or it crashed"
    return Verdict(cause + other_cause, record.rank, record.layers)


def of_silence(pulses: Pulses, now: float, at_least: float) -> Verdict | None:
    """The verdict on the rank that was not heard for the longest time, if for so many seconds."""
    ranks = [r for r in pulses.records.values() if not r.left]
    record = max(ranks, key=lambda r: pulses.silence(r.rank, now), default=None)
    if record is None or pulses.silence(record.rank, now) < at_least:
        return None
    seconds = pulses.silence(record.rank, now)
    cause = f"no sign of life for {seconds:.0f} s while {record.doing} ({record.process})"
    return Verdict(cause, record.rank, record.layers)


def of_hang(pulses: Pulses, now: float, limit: float) -> Verdict | None:
    """The verdict where a rank has not moved for ``limit`` seconds, though it has work to do.

    A rank that waits for another stands still too, and is not at fault. So it is the one that has
    come the least far; of those, the first in the order of the pipeline.
    """
    missing = sorted(set(range(pulses.size)) - set(pulses.records))
    if missing and now >= limit:
        return Verdict(f"did not start within {now:.0f} s", missing[0])
    last = _last_at_work(pulses)
    still = last is not None and _standstill(pulses, last, now) >= limit
    silent = of_silence(pulses, now, limit / 2 if still else limit)
    if silent is not None or not still:
        return silent
    counts = ""
    if last.by_commands:
        counts = f", {last.finished} of {_issued(pulses)} commands finished"
    where = f", at {last.where}" if last.where else ""
    seconds = _standstill(pulses, last, now)
    cause = f"no progress for {seconds:.0f} s while {last.doing}{counts}{where}"
    return Verdict(cause, last.rank, last.layers)


def _last_at_work(pulses: Pulses) -> RankRecord | None:
    """The rank that the others wait for: the one that has come the least far.

    Where all commands are finished, but what they gave has not come back to the first rank, it is
    the last one. None where there is nothing to do.
    """
    ranks = [record for record in pulses.records.values() if not record.left]
    last = min(ranks, key=lambda r: (r.step, r.finished, r.rank), default=None)
    if last is None or last.is_patient:
        return None
    if not last.by_commands or last.finished < _issued(pulses):
        return last
    awaited = any(record.awaits for record in ranks)
    return max(ranks, key=lambda r: r.rank) if awaited else None


def _issued(pulses: Pulses) -> int:
    return max(record.issued for record in pulses.records.values())


def _standstill(pulses: Pulses, record: RankRecord, now: float) -> float:
    return pulses.silence(record.rank, now) + record.idle
