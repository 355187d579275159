"""What the system says of processes, from outside of them: their tree, memory and time."""

import os
from contextlib import suppress


def tree_of(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            children.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for one in found:  # grows
        found += children.get(one, [])
    return found


def resident(pid: int) -> int:
    """Bytes in memory of a process; 0 when it has ended."""
    fields = _stat(pid)
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def processor_seconds(pid: int) -> float:
    """That a process and all below it, with those that ended, have taken of the processors."""
    ticks = sum(sum(map(int, _stat(one)[11:15])) for one in tree_of(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Of /proc/PID/stat what follows the name; nothing when it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()
    return []
