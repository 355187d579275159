"""Watch: ends a run of many processes when one of them dies, hangs or raises, and says which.

In every rank a thread writes a record of its progress to the store of the run and reads those of
the others. Whoever first knows why the run cannot go on puts a verdict there, and all ranks end by
it. The thread ends its process itself: the main thread may be inside a call that never returns.
"""

import os
import signal
import sys
import threading
import time
import traceback
from types import TracebackType

import torch.distributed as dist

from fastshard.dist.causes import (
    count_oom_kills,
    describe,
    is_device_fault,
    is_expected,
    is_lost_connection,
)
from fastshard.dist.ending import end_together, end_without_store, tell_launcher
from fastshard.dist.rank_record import Process, RankRecord
from fastshard.dist.signals import Signals
from fastshard.dist.steps import Steps
from fastshard.dist.verdict import Pulses, RunError, Verdict, of_death, of_hang, of_silence
from fastshard.environment import launch_attempt

_GRACE_SECONDS = 3.0  # for a better explanation than "my connection was closed"
_ENDING_SECONDS = 5.0  # at most, from a verdict to the end of the last rank
_UNWIND_SECONDS = 0.5  # for the main thread to tidy up its terminal
_GONE_SECONDS = 1.0  # from a closed socket to the end of the process that had it
_POLL_SECONDS = 0.02  # where all wait for each other
_LONGEST_PAUSE = 2.0  # between two beats of a process that runs
_VERDICT, _GONE = "verdict", "gone"  # keys of the store


class Watch:
    """Watches over all ranks while its ``with`` block runs; leaves it when all ranks are through.

    An exception in the block ends the run, and so does a rank that dies, or that stands still for
    too long: one line on stderr names rank, layers and cause, and every rank exits with status 1,
    or after Ctrl-C quietly with 130. No such block is left but by the end of the process.

    Args:
        store: The store of the run; a clone of it is used.
        timeout: Seconds within which a run that hangs has ended.
        period: Seconds between two records.

    Attributes:
        steps: To be told what this rank is at.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, *, timeout: float, period: float = 0.5
    ):
        self._store = dist.PrefixStore(f"fastshard watch {launch_attempt()}", store.clone())
        self._period = period
        self._limit = max(timeout - _ENDING_SECONDS, timeout / 2)
        self._me = RankRecord(rank, Process.of(os.getpid()), os.getppid())
        self.steps = Steps(self._me)
        self._pulses = Pulses(size)
        self._oom_kills = count_oom_kills()
        self._error: BaseException | None = None
        self._doubted: float | None = None
        self._verdict: Verdict | None = None
        self._num_beats = 0
        self._wake = self.steps.changed
        self._unwound = threading.Event()
        self._over = threading.Event()
        self._signals = Signals()
        self._beats = threading.Thread(target=self._run, name="fastshard watch")
        self._guard = threading.Thread(target=self._run_guard, name="fastshard guard", daemon=True)

    def __enter__(self) -> "Watch":
        # Else threads of the NCCL groups, which come later, abort a rank whose neighbour has died,
        # or whose GPU reports an error: it would then be dead as well and say nothing.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
        self._signals.catch()
        self._beats.start()
        self._guard.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.protect_main()
        unexpected = isinstance(error, Exception) and not is_expected(error)
        if unexpected and self._verdict is None:
            traceback.print_exception(kind, error, trace)
        self._error = error
        self._wake.set()
        try:
            sys.stdout.flush()
        except OSError as unwritten:  # its reader is gone
            self._error = error or unwritten
        self._unwound.set()
        if self._error is None:
            self.steps.leave()
        self._beats.join()  # where the run failed, the process ends in there
        self._over.set()
        self._signals.wake()
        self._guard.join()
        self._signals.release()

    def _run(self) -> None:
        """The thread that talks with the store, which may take long to answer."""
        clock = _LivedTime()
        try:
            while self._beat(clock.now()):
                hurries = self._unwound.is_set() or self._doubted is not None
                self._wake.wait(_POLL_SECONDS if hurries else self._period)
                self._wake.clear()
            self._leave_last()
        except dist.DistError as error:
            if not self._me.left:
                self._end(self._without_store(error))
        except Exception as error:  # what a device says when it is asked, or a mistake in here
            if not is_expected(error):
                traceback.print_exc()
            self._end(self._publish(self._of_me(describe(error))))

    def _beat(self, now: float) -> bool:
        """Write, read and judge; False where all ranks have left."""
        self._listen(now)
        self._num_beats += 1
        verdict = self._published_verdict() or self._find_verdict(now)
        if verdict is not None:
            self._end(self._publish(verdict))
        return not self._pulses.all_left()

    def _listen(self, now: float) -> None:
        self._me = self.steps.snapshot(now, slow_after=self._limit / 2)
        self._store.set(_record(self._me.rank), self._me.to_json())
        known = self._pulses.records
        there = [
            _record(rank)
            for rank in range(self._pulses.size)
            if rank in known or self._store.check([_record(rank)])
        ]
        self._pulses.hear(map(RankRecord.from_json, self._store.multi_get(there)), now)

    def _leave_last(self) -> None:
        """Rank 0 may keep the store: it waits until no other needs it."""
        if self._me.rank:
            self._store.add(_GONE, 1)
            return
        end = time.monotonic() + _ENDING_SECONDS
        while self._store.add(_GONE, 0) < self._pulses.size - 1 and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _find_verdict(self, now: float) -> Verdict | None:
        """What this rank knows first, of itself or of another."""
        own = self._of_own_end()
        if own is not None:
            return own
        if self._pulses.dead():
            # It may have left, or said why it ends, after the records were read.
            self._listen(now)
            known = self._published_verdict() or self._of_dead()
            if known is not None:
                return known
        doubt = self._doubt()
        if doubt is None:
            return of_hang(self._pulses, now, self._limit)
        if self._doubted is None:
            self._doubted = now
        if now - self._doubted < _GRACE_SECONDS:
            return None
        return of_silence(self._pulses, now, _GRACE_SECONDS) or doubt

    def _of_own_end(self) -> Verdict | None:
        """How this rank's own work ended, if that is no other rank's fault."""
        error = self._error
        if signal.SIGINT in self._signals.seen or isinstance(error, KeyboardInterrupt):
            return Verdict("interrupted", status=130, is_quiet=True)
        if isinstance(error, BrokenPipeError):  # the reader of stdout has had enough
            return Verdict("stdout was closed", is_quiet=True)
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
            return Verdict("exit", status=status, is_quiet=True)
        if isinstance(error, RunError):
            return Verdict(describe(error))
        if error is None or is_lost_connection(error) or is_device_fault(error):
            return None
        return self._of_me(describe(error))

    def _doubt(self) -> Verdict | None:
        """What may be the fault of another rank, of which nothing is known yet."""
        if self._error is not None and is_lost_connection(self._error):
            return self._of_me(f"lost its connection to another rank, {describe(self._error)}")
        if self._error is not None and is_device_fault(self._error):
            return self._of_me(describe(self._error))
        if os.getppid() != self._me.launcher:
            return self._of_me(f"its launcher (pid {self._me.launcher}) has ended")
        if signal.SIGTERM in self._signals.seen:
            return self._of_me("ended from outside, by SIGTERM", status=143)
        return None

    def _of_me(self, cause: str, status: int = 1) -> Verdict:
        return Verdict(cause, self._me.rank, self.steps.layers, status)

    def _of_dead(self) -> Verdict | None:
        dead = self._pulses.dead()
        if not dead:
            return None
        kills = count_oom_kills() > self._oom_kills
        memory = "; the kernel has killed a process here for want of memory" if kills else ""
        return of_death(dead[0], memory)

    def _published_verdict(self) -> Verdict | None:
        known = self._store.check([_VERDICT])
        return Verdict.from_json(self._store.get(_VERDICT)) if known else None

    def _publish(self, verdict: Verdict) -> Verdict:
        """The verdict of the run: this one, if no rank was faster."""
        return Verdict.from_json(self._store.compare_set(_VERDICT, "", verdict.to_json()))

    def _without_store(self, error: dist.DistError) -> Verdict:
        """What is to blame where the store has gone."""
        if self._verdict is not None:
            return self._verdict
        end = time.monotonic() + _GONE_SECONDS
        while time.monotonic() < end:
            known = self._of_own_end() or self._of_dead() or self._doubt()
            if known is not None:
                return known
            time.sleep(_POLL_SECONDS)
        return self._of_me(f"the store of the run has gone, {describe(error)}")

    def _end(self, verdict: Verdict) -> None:
        """End this process; never returns."""
        self._verdict = verdict
        self._signals.interrupt_main()
        self._unwound.wait(_UNWIND_SECONDS)
        if verdict.rank == self._me.rank and not verdict.is_quiet:
            tell_launcher(verdict)
        end_together(self._store, self._me, list(self._pulses.records.values()), verdict)
        os._exit(verdict.status)

    def _run_guard(self) -> None:
        """The thread that sees signals at once, and ends the process where the store hangs."""
        clock = _LivedTime()
        num_beats, last = 0, 0.0
        while not self._over.is_set():
            self._signals.wait(self._period)
            if self._signals.seen:
                self._wake.set()
            now = clock.now()
            if num_beats != self._num_beats:
                num_beats, last = self._num_beats, now
            hurries = bool(self._signals.seen) or self._verdict is not None
            if now - last >= (_ENDING_SECONDS if hurries else self._limit):
                self._give_up(now - last)

    def _give_up(self, seconds: float) -> None:
        """End this process without the store."""
        verdict = self._verdict or self._of_own_end()
        if verdict is None:
            cause = f"the store of the run has not answered for {seconds:.0f} s"
            verdict = self._of_me(cause)
            end_without_store(self._me, list(self._pulses.records.values()), verdict)
        os._exit(verdict.status)


class _LivedTime:
    """Seconds that this process has run, without those for which it was stopped."""

    def __init__(self) -> None:
        self._lived = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._lived += min(self._last - last, _LONGEST_PAUSE)
        return self._lived


def _record(rank: int) -> str:
    return f"rank {rank}"
