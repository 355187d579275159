"""The process between fastshard and foreign code: takes rights away, then runs one command.

``python -I -S jail.py JSON COMMAND ...``, started by ``sandbox``; it imports the standard library
alone, since it runs before anything is trusted. The JSON holds

- ``parts``: which kinds of isolation to set up, of ``PARTS``. One that fails is an error.
- ``limits``: name of a limit in ``resource`` -> value.
- ``hidden``: folders that become empty ones; ``visible``: what of them is put back, read-only;
  ``writable``: the only folders that keep their contents and can be written to.

It ends as the command does, by the same status or signal, and with ``FAILED`` where a part could
not be set up. When the command has ended, so has every process that it left behind.
"""

import ctypes
import json
import os
import resource
import signal
import sys

PARTS = ("network", "processes", "files")
FAILED = 125
"""Status: stderr says what could not be set up."""

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_FLAGS = {"network": _NEWNET, "processes": _NEWPID | _NEWIPC | _NEWNS, "files": _NEWNS}
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_AT_RECURSIVE, _MOUNT_SETATTR = 0x8000, 442
_PDEATHSIG, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 24, 36, 38
_DEVICES = ("null", "zero", "full", "random", "urandom")
_TMPFS = "size=25%,mode=1777"
_SETTINGS = ("sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi", "asound", "driver")
"""Of /proc: what is not of a process."""

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def main(plan: dict, command: list[str]) -> int:
    for name, value in plan["limits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    parts = plan["parts"]
    _end_with_parent()
    _check(_libc.prctl(_SUBREAPER, 1, 0, 0, 0), "become the parent of orphans")
    if not parts:
        return _run(command, lambda: None)
    _enter_namespaces(parts)
    if "processes" not in parts:
        return _run(command, lambda: _prepare(plan))
    # The first process of a namespace: when it ends, the kernel kills all others of it. Of those
    # none can see or signal what is outside.
    first = os.fork()
    if first == 0:
        status = FAILED
        try:
            _end_with_parent()
            status = _run(command, lambda: _prepare(plan))
        except OSError as error:
            _say(error)
        os._exit(status)
    return _status(os.waitpid(first, 0)[1])


def _enter_namespaces(parts: list[str]) -> None:
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWUSER
    for part in parts:
        flags |= _FLAGS[part]
    _check(_libc.unshare(flags), f"leave the namespaces of {', '.join(parts)}")
    for name, text in (("setgroups", "deny"), ("uid_map", uid), ("gid_map", gid)):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(f"{text} {text} 1" if name != "setgroups" else text)


def _prepare(plan: dict) -> None:
    """In the command's process: what it sees of the machine, and that it stays so."""
    if "files" in plan["parts"] or "processes" in plan["parts"]:
        _mount(None, "/", None, _REC | _PRIVATE)
    if "files" in plan["parts"]:
        _hide(plan)
    if "processes" in plan["parts"]:
        _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    if "files" in plan["parts"] or "processes" in plan["parts"]:
        _protect_settings()
    _drop_capabilities()


def _hide(plan: dict) -> None:
    """Make everything read-only but ``writable``, and ``hidden`` folders empty."""
    kept = [*plan["visible"], *plan["writable"]]
    kept = [path for path in kept if os.path.exists(path)]
    devices = [f"/dev/{name}" for name in os.listdir("/dev") if _is_needed(name)]
    handles = {path: os.open(path, os.O_PATH) for path in [*kept, *devices]}
    folders = [path for path in ["/dev", *plan["hidden"]] if os.path.isdir(path)]
    for folder in folders:
        _mount("none", folder, "tmpfs", _NOSUID, _TMPFS)
    os.mkdir("/dev/shm", 0o1777)
    for path, handle in handles.items():
        is_below = any(path.startswith(folder + "/") for folder in folders)
        if is_below and not os.path.exists(path):
            if os.path.isdir(f"/proc/self/fd/{handle}"):
                os.makedirs(path)
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        if is_below or path in plan["writable"]:
            _mount(f"/proc/self/fd/{handle}", path, None, _BIND | _REC)
        os.close(handle)
    _mount("none", "/dev/shm", "tmpfs", _NOSUID | _NODEV, _TMPFS)
    _set_attributes("/", _AT_RECURSIVE, _MountAttr(set=_RDONLY | _NOSUID))
    for path in ["/dev/shm", *(f for f in folders if f in plan["scratch"]), *plan["writable"]]:
        _set_attributes(path, 0, _MountAttr(clear=_RDONLY))


def _protect_settings() -> None:
    """Make the kernel's settings read-only, which a user 0 could write, and no more of /proc.

    CUDA's driver does not start where a process cannot name its own threads there.
    """
    _set_attributes("/proc", 0, _MountAttr(clear=_RDONLY))
    for path in (f"/proc/{name}" for name in _SETTINGS):
        if os.path.exists(path):
            _mount(path, path, None, _BIND | _REC)
            _set_attributes(path, _AT_RECURSIVE, _MountAttr(set=_RDONLY | _NOSUID))


def _is_needed(device: str) -> bool:
    return device in _DEVICES or device.startswith("nvidia")


def _set_attributes(path: str, flags: int, attributes: _MountAttr) -> None:
    done = _libc.syscall(
        _MOUNT_SETATTR,
        -100,
        path.encode(),
        flags,
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _check(done, f"change how {path} is mounted")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str = ""
) -> None:
    def text(value: str | None) -> bytes | None:
        return value if value is None else value.encode()

    done = _libc.mount(text(source), target.encode(), text(kind), flags, options.encode())
    _check(done, f"mount {kind or 'a folder'} on {target}")


def _drop_capabilities() -> None:
    """Let no mount be undone: what is executed next has no rights, and gains none."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for number in range(last + 1):  # executing a program gives a user 0 all that is left of these
        _check(_libc.prctl(_CAPBSET_DROP, number, 0, 0, 0), "drop capabilities")
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "keep programs from gaining rights")


def _run(command: list[str], prepare) -> int:
    """The status of the command, after which every process that it left is ended."""
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            _end_with_parent()
            folder = os.getcwd()
            prepare()
            os.chdir(folder)  # as it is mounted by then
            os.execvp(command[0], command)
        except OSError as error:
            _say(error)
        os._exit(status)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            break
    _end_descendants()
    return _status(status)


def _end_with_parent() -> None:
    """Be killed when the process dies that started this one, however it dies."""
    _check(_libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "end with its parent")


def _end_descendants() -> None:
    """Kill what the command left, which this process, its closest subreaper, has inherited.

    In a namespace of its own the kernel does it when this process ends.
    """
    if os.getpid() == 1:
        return
    while True:
        left = [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_child(name)]
        if not left:
            return
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _is_child(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[1] == str(os.getpid())
    except OSError:  # it has ended
        return False


def _status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _check(done: int, what: str) -> None:
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {what}: {os.strerror(number)}")


def _say(error: OSError) -> None:
    os.write(2, f"sandbox: {error.strerror or error}\n".encode())


def _end(status: int) -> None:
    number = status - 128
    if number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(status)


if __name__ == "__main__":
    try:
        _end(main(json.loads(sys.argv[1]), sys.argv[2:]))
    except OSError as failure:
        _say(failure)
        sys.exit(FAILED)
