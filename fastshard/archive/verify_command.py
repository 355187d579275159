"""``fastshard archive verify``: consent, what the sandbox lacks, then one verdict after another."""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from fastshard.archive import catalog, sandbox, source, verdict
from fastshard.archive.schema import Row
from fastshard.archive.trial import Settings
from fastshard.archive.verify import Verifier

Say = Callable[[str], None]


def run(
    ids: Sequence[str],
    *,
    op: str | None = None,
    level: int | None = None,
    min_speedup: float | None = None,
    trusts_code: bool,
    without_network_isolation: bool = False,
    device: str | None = None,
    timeout: float = 120.0,
    memory_gb: float = 32.0,
    compiles: bool = True,
    jobs: int = 1,
    again: bool = False,
    seed: int = 0,
    say: Say = print,
) -> int:
    """Verify rows, and keep a verdict of each; returns the exit status.

    Args:
        ids: Of rows, or their beginnings; or none, and filters.
        op: Filter of ``catalog.select``, like ``level`` and ``min_speedup``.
        level: See ``op``.
        min_speedup: See ``op``.
        trusts_code: Consent to compiling and running foreign code on this machine.
        without_network_isolation: Consent to run it where the network cannot be taken away.
        device: Like ``cuda:0``; by default the GPU where there is one, else the CPU.
        timeout: Seconds without a sign of life after which a kernel hangs.
        memory_gb: Resident, of each process.
        compiles: Whether ``torch.compile`` is timed too.
        jobs: How many sources are compiled ahead, while a kernel is tried; on a CPU, which that
            would disturb, none are.
        again: Whether rows that have a verdict of the same code on the same device are verified.
        seed: Of the inputs.
        say: Is given each line.

    Raises:
        ValueError: no consent, or no rows are chosen.
        RuntimeError: no compiler, no GPU for CUDA code, or no isolation from the network.
    """
    if not trusts_code:
        raise ValueError(
            "archive verify compiles and runs foreign native code, which nobody has read, on this "
            "machine: nothing was compiled or run; read it by archive show, and pass "
            "--i-trust-this-code"
        )
    if not ids and op is level is min_speedup is None:
        raise ValueError("archive verify needs an ID, --op, --level or --min-speedup")
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = Settings(
        on,
        _isolation(without_network_isolation, say),
        timeout=timeout,
        resident_bytes=int(memory_gb * 10**9),
        compiles=compiles,
        seed=seed,
    )
    archive = source.load()
    listed = source.rows(archive)
    chosen = [catalog.find_id(listed, text) for text in ids]
    if not ids:
        found = catalog.select(listed, op=op, level=level, min_speedup=min_speedup)
        chosen = [row.id for row in found]
    verifier = Verifier(settings)
    ahead = jobs if on.type == "cuda" else 0
    waiting: deque[tuple[Row, Future]] = deque()

    def verify_next() -> None:
        row, built = waiting.popleft()
        found = verifier.judge(row, built.result())
        verdict.save(found)
        say(line(found))

    for identity in chosen:
        row = source.whole_row(archive, identity)
        if not again and _is_known(row, verifier.device_name):
            say(f"{catalog.plain(identity)}: has a verdict; --again verifies it again")
            continue
        waiting.append((row, _in_thread(verifier.build, row)))
        if len(waiting) > ahead:
            verify_next()
    while waiting:
        verify_next()
    say(f"{len(chosen)} kernels; fastshard archive report compares claims and verdicts")
    return 0


def line(found: verdict.Verdict) -> str:
    """A verdict in one line, its foreign texts made plain."""
    said = [f"{found.id}: {found.verdict}"]
    if found.reason:
        said.append(found.reason)
    for dtype, times in found.times.items():
        if found.is_verified:
            us = ", ".join(f"{name} {value:.4g} us" for name, value in times.items())
            said.append(f"{dtype}: {us}")
    return catalog.plain(" ".join("; ".join([*said, *found.notes]).split()))


def _in_thread(function: Callable[[Row], object], row: Row) -> Future:
    """Call it in a thread that no interrupted program waits for: with it ends its compiler."""
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(function(row))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _isolation(without_network: bool, say: Say) -> list[str]:
    """The kinds of isolation that there are; says which there are not."""
    missing = sandbox.missing_parts()
    if "network" in missing and not without_network:
        raise RuntimeError(
            "foreign code would have the network, which this machine does not let be taken away "
            f"({missing['network']}): nothing was compiled or run; pass "
            "--without-network-isolation to run it so"
        )
    for part, reason in missing.items():
        say(f"warning: no isolation of {part}: {reason}")
    return sandbox.allowed_parts()


def _is_known(row: Row, device: str) -> bool:
    """Whether there is a verdict of a row's code on a device."""
    found = verdict.load(row.id)
    code = row.cuda_code or ""
    digest = code and hashlib.sha256(code.encode()).hexdigest()
    return (
        found is not None
        and found.code_sha256 == digest
        and found.environment.get("device") == device
    )
