"""Steps: what this rank is at, told by its work as it goes, read by the thread that watches."""

import os
import sys
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fastshard.dist.rank_record import Process, RankRecord

_PACKAGE = Path(__file__).parents[1]


class Event(Protocol):
    """The part of ``torch.cuda.Event`` that says whether the device has come so far."""

    def query(self) -> bool: ...


class Steps:
    """The phases that this rank goes through, and the commands that it finishes.

    All methods but ``snapshot`` are the work's; none of them waits or reads a clock.

    Args:
        record: The rank before it begins; None for a process that nobody watches.

    Attributes:
        awaits: Set while this rank waits for what the last rank computes.
        changed: Set where there is something new that the others should read at once.
    """

    def __init__(self, record: RankRecord | None = None):
        self.awaits = False
        self.changed = threading.Event()
        self._record = record or RankRecord(0, Process.of(os.getpid()), os.getppid())
        self._issued = self._finished = self._moves = 0
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._worker = threading.get_ident()
        self._beat = 0
        self._seen_moves, self._moved = -1, 0.0

    @property
    def layers(self) -> str:
        """Like "8-11"; empty until ``hold``."""
        return self._record.layers

    def hold(self, layers: range) -> None:
        """Say which layers this rank holds."""
        self._record = replace(self._record, layers=f"{layers.start}-{layers.stop - 1}")
        self.changed.set()

    def begin(self, doing: str, *, by_commands: bool = False, is_patient: bool = False) -> None:
        """Begin a phase; every rank begins the same ones in the same order.

        A rank that waits for others must have begun a later phase than they, else it is taken for
        the one that they wait for.

        Args:
            doing: Completes "while".
            by_commands: There is work only while a command is unfinished.
            is_patient: It may take any time, like a download.
        """
        self._record = replace(
            self._record,
            step=self._record.step + 1,
            doing=doing,
            by_commands=by_commands,
            is_patient=is_patient,
        )
        self._moves += 1
        self.changed.set()

    def advance(self) -> None:
        """Say that the work goes on."""
        self._moves += 1

    def issue(self) -> None:
        """Count a command that this rank gives to all; rank 0 only."""
        self._issued += 1
        self._moves += 1

    def finish(self, event: Event | None = None) -> None:
        """Count a command as finished, once its event is done where there is one."""
        if event is None:
            self._finished += 1
            self._moves += 1
            return
        with self._lock:
            self._events.append(event)
        self._settle()

    def leave(self) -> None:
        """Say that all is done."""
        self._record = replace(self._record, left=True)
        self.changed.set()

    def snapshot(self, now: float, *, slow_after: float) -> RankRecord:
        """The record of ``now``; another beat than the last.

        Args:
            slow_after: Seconds without a move after which it is looked up where the work is. Only
                then are events asked from this thread too: it would break a capture of a graph.
        """
        if now - self._moved >= slow_after:
            self._settle()
        if self._seen_moves != self._moves:
            self._seen_moves, self._moved = self._moves, now
        idle = now - self._moved
        self._beat += 1
        return replace(
            self._record,
            beat=self._beat,
            issued=self._issued,
            finished=self._finished,
            awaits=self.awaits,
            idle=idle,
            where=_where(self._worker) if idle >= slow_after else "",
        )

    def _settle(self) -> None:
        with self._lock:
            while self._events and self._events[0].query():
                self._events.popleft()
                self._finished += 1
                self._moves += 1


def _where(thread: int) -> str:
    """File, line and function of fastshard that a thread is in; else its innermost."""
    frame = innermost = sys._current_frames().get(thread)
    while frame is not None and _PACKAGE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
