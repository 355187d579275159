"""What an exception, or a machine short of memory, says of the cause."""

from pathlib import Path

import torch.distributed as dist

_VMSTAT = Path("/proc/vmstat")
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, MemoryError)


def describe(error: BaseException) -> str:
    """The error in one line, without a C++ stack."""
    text = str(error).split("\nException raised from ")[0]
    text = " ".join(text.split())
    if isinstance(error, _EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_expected(error: BaseException) -> bool:
    """Whether the message says enough; else the traceback is wanted."""
    return isinstance(error, _EXPECTED)


def is_lost_connection(error: BaseException) -> bool:
    """Whether it says only that another rank, or the store, does not answer.

    Gloo raises plain ``RuntimeError``, whose text begins with its source file.
    """
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("/gloo/" in text or "NCCL" in text)


def is_device_fault(error: BaseException) -> bool:
    """Whether a GPU stopped working, which may follow from the death of one that shared memory."""
    return isinstance(error, RuntimeError) and "CUDA error: " in str(error)


def count_oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since this machine started."""
    if not _VMSTAT.exists():
        return 0
    lines = _VMSTAT.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
