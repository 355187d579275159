"""What a rank says of itself to the others: which process it is, and how far it has come."""

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path

_PROC = Path("/proc")
_STATES = {
    "T": ", which is stopped",
    "t": ", which a debugger stopped",
    "D": ", which waits in the kernel",
}


@dataclass(frozen=True)
class Process:
    """A process by its id, which others on its machine can look up.

    Attributes:
        machine: Equal for two processes that see each other's ids.
        host: Name of the machine, for messages.
        started: Start time, so that another process with the same id is not taken for this one.
    """

    machine: str
    host: str
    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """A living process of this machine."""
        found = _stat(pid)
        if found is None:
            raise ValueError(f"pid must be of a living process, got {pid}")
        return cls(_machine(), socket.gethostname(), pid, found[1])

    def is_here(self) -> bool:
        """Whether this machine could see the process."""
        return self.machine == _machine()

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False where it is of another machine."""
        if not self.is_here():
            return False
        found = _stat(self.pid)
        return found is None or found[1] != self.started or found[0] in "ZX"

    def can_act(self) -> bool:
        """Whether the process is of this machine, and neither gone nor stopped."""
        found = _stat(self.pid) if self.is_here() else None
        return found is not None and found[1] == self.started and found[0] not in "ZXTt"

    def __str__(self) -> str:
        found = _stat(self.pid) if self.is_here() else None
        return f"pid {self.pid} on {self.host}{_STATES.get(found[0], '') if found else ''}"


@dataclass(frozen=True)
class RankRecord:
    """How far a rank has come.

    Attributes:
        launcher: Id of the process that started it.
        layers: Like "8-11"; empty until the rank knows.
        beat: Counts the records of a rank.
        step: Number of the phase: each rank goes through the same ones in the same order.
        doing: The phase, completes "while".
        by_commands: In this phase there is work only while a command is unfinished.
        is_patient: The phase may take any time.
        issued: Commands that rank 0 gave so far.
        finished: Commands that this rank finished so far.
        awaits: The rank waits for what the last one computes.
        idle: Seconds since the rank last moved on.
        where: Where the rank's main thread is, if it has been idle for long.
        left: The rank has done all that it had to do.
    """

    rank: int
    process: Process
    launcher: int
    layers: str = ""
    beat: int = 0
    step: int = 0
    doing: str = "starting"
    by_commands: bool = False
    is_patient: bool = False
    issued: int = 0
    finished: int = 0
    awaits: bool = False
    idle: float = 0.0
    where: str = ""
    left: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "RankRecord":
        record = cls(**json.loads(text))
        return replace(record, process=Process(**record.process))


def _machine() -> str:
    """Boot and process id namespace: two containers of one host are two machines."""
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process (proc(5), fields 3 and 22); None: there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
