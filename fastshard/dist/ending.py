"""How the ranks of a run that failed end together: one message a launcher, and nobody left."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist

from fastshard.dist.rank_record import RankRecord
from fastshard.dist.verdict import Verdict
from fastshard.environment import launcher_error_file

_POLL_SECONDS = 0.02
_SPEAK_SECONDS = 1.0  # for the first rank of a launcher to say it
_HEAR_SECONDS = 2.0  # for all ranks to hear of it


def end_together(
    store: dist.Store, me: RankRecord, ranks: Sequence[RankRecord], verdict: Verdict
) -> None:
    """Say why the run ends, wait until all have heard of it, and kill who cannot.

    On each terminal, that is for the ranks of one launcher, the first that can speaks. A rank of
    this machine that does not hear, because it is stopped or stuck, is killed: its launcher would
    wait for it.

    Args:
        me: This rank.
        ranks: All that are known, this one included.
    """
    is_first = is_first_here(me, ranks)
    others = [r for r in ranks if r.rank != me.rank]
    said = verdict.is_quiet
    try:
        store.set(_heard(me.rank), "1")
        if not said:
            key = f"said {_terminal(me)}"
            if not is_first:
                _wait(lambda: store.check([key]), _SPEAK_SECONDS)
            if store.add(key, 1) == 1:
                say(verdict)
            said = True
        # Of another machine the rank at fault may be dead, which cannot be seen from here.
        awaited = [r for r in others if r.rank != verdict.rank or r.process.is_here()]
        _wait(lambda: not _deaf(store, awaited), _HEAR_SECONDS)
        for record in _deaf(store, others):
            kill(record)
    except dist.DistError:  # the store has ended with its host
        end_without_store(me, ranks, replace(verdict, is_quiet=said))


def end_without_store(me: RankRecord, ranks: Sequence[RankRecord], verdict: Verdict) -> None:
    """As ``end_together``, where each launcher's ranks are on their own.

    All must find by themselves that the run ends. The first of them stays until the others are
    gone: while it is there, they know that they are not the first.
    """
    if not is_first_here(me, ranks):
        return
    if not verdict.is_quiet:
        say(verdict)
    others = [record for record in _near(me, ranks) if record.rank != me.rank]
    _wait(lambda: all(record.process.is_gone() for record in others), _HEAR_SECONDS)
    for record in others:
        kill(record)


def is_first_here(me: RankRecord, ranks: Sequence[RankRecord]) -> bool:
    """Whether no rank before this one can write to the same terminal."""
    return not any(r.rank < me.rank and r.process.can_act() for r in _near(me, ranks))


def say(verdict: Verdict) -> None:
    """Write the message to stderr, past the buffers of a main thread that may be stuck."""
    os.write(2, f"fastshard: error: {verdict}\n".encode())


def kill(record: RankRecord) -> None:
    """End a rank that does not end itself, where it is of this machine."""
    if record.process.is_here() and not record.process.is_gone():
        try:
            os.kill(record.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            return


def tell_launcher(verdict: Verdict) -> None:
    """Write the cause where torchrun looks for it, so that its own report shows it."""
    path = launcher_error_file()
    if path is not None:
        path.write_text(json.dumps({"message": str(verdict), "timestamp": int(time.time())}))


def _deaf(store: dist.Store, ranks: Sequence[RankRecord]) -> list[RankRecord]:
    alive = [record for record in ranks if not record.process.is_gone()]
    return [record for record in alive if not store.check([_heard(record.rank)])]


def _near(me: RankRecord, ranks: Sequence[RankRecord]) -> list[RankRecord]:
    return [record for record in ranks if _terminal(record) == _terminal(me)]


def _heard(rank: int) -> str:
    return f"heard {rank}"


def _terminal(record: RankRecord) -> str:
    return f"{record.process.machine} {record.launcher}"


def _wait(is_done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_done() and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
