"""What a distrusted process cannot do, tried by processes that try it."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fastshard.archive import jail, sandbox
from fastshard.archive.processes import tree_of
from fastshard.archive.sandbox import GIB, Limits, Sandbox, take_file

PARTS = sandbox.allowed_parts()
EVERYWHERE = pytest.mark.parametrize("parts", [[], PARTS], ids=["limits alone", "all parts"])
TIMEOUT = 120.0  # of what ends at once, on a machine that is busy


def needs(part: str):
    reason = sandbox.missing_parts().get(part)
    return pytest.mark.skipif(part not in PARTS, reason=f"no isolation of {part}: {reason}")


def run(folder: Path, code: str, *, parts=PARTS, limits=None, timeout=TIMEOUT, variables=None):
    box = Sandbox(folder, limits or Limits(), parts)
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]
    return box.run(command, timeout=timeout, variables=variables)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


@EVERYWHERE
def test_status_and_output_come_back(tmp_path, parts):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    ended = run(tmp_path, code, parts=parts)
    assert (ended.status, ended.is_late, ended.overstepped) == (7, False, None)
    assert sorted(ended.output.split()) == ["err", "out"]


@EVERYWHERE
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_ends_by_the_signal_of_its_command(tmp_path, parts, number):
    ended = run(tmp_path, f"import os; os.kill(os.getpid(), {int(number)})", parts=parts)
    assert ended.status == -number


@EVERYWHERE
def test_only_the_scratch_folder_keeps_what_is_written(tmp_path, parts):
    code = "import os; open('kept', 'w').write(os.environ['HOME'] + ' ' + os.environ['TMPDIR'])"
    assert run(tmp_path, code, parts=parts).status == 0
    assert (tmp_path / "kept").read_text() == f"{tmp_path}/home {tmp_path}/tmp"
    assert list((tmp_path / "home").iterdir()) == []


@needs("files")
def test_files_elsewhere_cannot_be_written_or_seen(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    home = Path.home()
    code = f"""
        import os
        def refused(action, *arguments):
            try:
                action(*arguments)
            except OSError as error:
                return error.strerror
            return "done"
        print(refused(open, {str(Path(__file__))!r}, "r+"))
        print(refused(os.utime, {str(Path(__file__))!r}))
        print(os.path.exists({str(secret)!r}), os.listdir("/run"), os.path.exists("/dev/sda"))
        print(set(os.listdir({str(home)!r})) - {{".pyenv", "{home.name}"}})
        print(refused(open, "/proc/sys/kernel/hostname", "w"))
        print(refused(open, "/sys/kernel/profiling", "w"))
    """
    lines = run(tmp_path / "box", code).output.splitlines()
    assert lines[:2] == ["Read-only file system"] * 2
    assert lines[2] == "False [] False"
    assert ".ssh" not in lines[3]
    assert all(line != "done" for line in lines[4:])
    assert len(lines) == 6


@needs("files")
@pytest.mark.parametrize("parts", [["files"], ["processes"], ["files", "processes"]], ids=str)
def test_settings_of_the_kernel_cannot_be_written_but_names_of_threads(tmp_path, parts):
    """Without the second CUDA's driver does not start: error 304."""
    code = """
        for path in ("sys/kernel/hostname", "sysrq-trigger", "irq/default_smp_affinity"):
            try:
                open(f"/proc/{path}", "r+")
                print(path)
            except OSError as error:
                print(error.errno)
        open("/proc/self/comm", "w").write("named")
        print(open("/proc/self/comm").read())
    """
    lines = run(tmp_path, code, parts=parts).output.splitlines()
    assert lines[0] == "30"  # a read-only file system
    assert set(lines[1:3]) <= {"30", "2"}  # or there is none
    assert lines[3] == "named"


@needs("files")
def test_a_mount_cannot_be_undone(tmp_path):
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.mount(b"none", b"/", None, 32 | 4096, None), ctypes.get_errno())  # rw again
        print(libc.umount2(b"/tmp", 2), ctypes.get_errno())
        # Nor with the rights of a namespace of its own: mounts of another stay as they are.
        if libc.unshare(0x10000000 | 0x20000) == 0:
            print(libc.umount2(b"/run", 2), libc.mount(b"none", b"/", None, 32 | 4096, None))
        else:
            print("-1 -1")
        print([line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")])
    """
    lines = run(tmp_path, code).output.splitlines()
    assert lines[:3] == ["-1 1", "-1 1", "-1 -1"]
    assert lines[3] in ("['0000000000000000']", "['000001ffffffffff']")


@needs("network")
def test_there_is_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0fastshard-test")
        unix.listen()
        code = f"""
            import socket
            for family, address in (
                (socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})),
                (socket.AF_UNIX, "\\0fastshard-test"),
            ):
                try:
                    socket.socket(family).connect(address)
                    print("connected")
                except OSError as error:
                    print(type(error).__name__)
        """
        assert "connected" not in run(tmp_path, code).output
        assert run(tmp_path, code, parts=[]).output.split() == ["connected", "connected"]


@needs("processes")
def test_no_other_process_is_in_sight(tmp_path):
    code = f"""
        import os
        print([name for name in os.listdir("/proc") if name.isdigit()])
        try:
            os.kill({os.getpid()}, 0)
            print("seen")
        except ProcessLookupError:
            print("unseen")
    """
    pids, other = run(tmp_path, code).output.splitlines()
    assert eval(pids) == ["1", "2"]
    assert other == "unseen"


DAEMON = """
    import os, time
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, b"x")
            time.sleep(1000)
        os._exit(0)
    os.read(read, 1)
    {then}
"""


def pid_of_daemon(process: sandbox.Process, count: int) -> list[int]:
    """All processes of a sandbox, when there are so many."""
    deadline = time.monotonic() + TIMEOUT
    while len(pids := tree_of(process.pid)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pids) >= count
    return pids


@EVERYWHERE
def test_what_it_forked_ends_with_it(tmp_path, parts):
    code = DAEMON.format(then="open('forked', 'w').close(); input()")
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]
    with Sandbox(tmp_path, Limits(), parts).start(command, stdin=-1) as process:
        pids = pid_of_daemon(process, 4 if "processes" in parts else 3)
        process.communicate(b"\n")
    assert process.returncode == 0
    assert all(ends(pid) for pid in pids)


@EVERYWHERE
def test_what_is_late_is_killed_with_all_it_forked(tmp_path, parts):
    code = DAEMON.format(then="time.sleep(1000)")
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]
    process = Sandbox(tmp_path, Limits(), parts).start(command)
    pids = pid_of_daemon(process, 4 if "processes" in parts else 3)
    process.kill()
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert all(ends(pid) for pid in pids)


def test_what_is_forked_while_it_is_killed_ends_too(tmp_path, monkeypatch):
    code = DAEMON.format(then="open('forked', 'w').close(); time.sleep(1000)")
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]
    process = Sandbox(tmp_path, Limits(), []).start(command)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "forked").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    jailed, *below = filter(is_running, tree_of(process.pid))
    started, daemon = sorted(below, key=lambda pid: os.getsid(pid) != jailed)
    looks = iter([[jailed, started]])  # the first look at the tree comes before the fork
    monkeypatch.setattr(sandbox, "tree_of", lambda pid: next(looks, None) or tree_of(pid))
    try:
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL
        assert ends(started)
        assert ends(daemon)
    finally:
        if is_running(daemon):
            os.kill(daemon, signal.SIGKILL)


@EVERYWHERE
def test_nothing_outlives_who_started_it(tmp_path, parts):
    code = f"""
        import time
        from pathlib import Path
        from fastshard.archive.sandbox import Limits, Sandbox
        process = Sandbox(Path({str(tmp_path)!r}), Limits(), {parts!r}).start(["sleep", "1000"])
        print(process.pid, flush=True)
        time.sleep(1000)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as starter:
        pid = int(starter.stdout.readline())
        count = 3 if "processes" in parts else 2
        deadline = time.monotonic() + TIMEOUT
        while len(pids := tree_of(pid)) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        starter.kill()
    assert len(pids) == count
    assert all(ends(pid) for pid in pids)


@EVERYWHERE
def test_a_time_limit(tmp_path, parts):
    ended = run(tmp_path, "import time; time.sleep(1000)", parts=parts, timeout=2)
    assert (ended.is_late, ended.status) == (True, -signal.SIGKILL)


@EVERYWHERE
def test_resident_memory_of_all_processes_is_watched(tmp_path, parts):
    code = """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                held = bytearray(100 << 20)
                time.sleep(1000)
        time.sleep(1000)
    """
    ended = run(tmp_path, code, parts=parts, limits=Limits(resident_bytes=GIB // 4))
    assert ended.overstepped == "more than 0.25 GiB of resident memory"
    assert ended.status == -signal.SIGKILL


def test_the_number_of_processes_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_PROCESSES", 8)
    code = """
        import os, time
        while os.fork() == 0:
            pass
        time.sleep(1000)
    """
    ended = run(tmp_path, code)
    assert ended.overstepped == "more than 8 processes"


@EVERYWHERE
@pytest.mark.parametrize(
    ("limits", "code", "said"),
    [
        (Limits(address_space_bytes=GIB // 2), "bytearray(1 << 30)", "MemoryError"),
        (
            Limits(file_bytes=1000),
            "import signal; signal.signal(25, signal.SIG_IGN); f = open('f', 'wb', 0); "
            "f.write(bytes(1000)); f.write(b'x')",
            "File too large",
        ),
        (Limits(), "import resource; print(resource.getrlimit(4))", r"\(0, 0\)"),
    ],
    ids=["addresses", "file", "core"],
)
def test_limits_of_the_system(tmp_path, parts, limits, code, said):
    assert re.search(said, run(tmp_path, code, parts=parts, limits=limits).output)


def test_processor_time_is_limited(tmp_path):
    assert run(tmp_path, "while True: pass", limits=Limits(cpu_seconds=1)).status in (
        -signal.SIGXCPU,
        -signal.SIGKILL,
    )


def test_the_environment_is_a_few_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ended = run(tmp_path, "import os; print(dict(os.environ))", variables={"GIVEN": "1"})
    found = eval(ended.output)
    assert "SECRET_TOKEN" not in found
    assert (found["OMP_NUM_THREADS"], found["GIVEN"]) == ("1", "1")
    assert set(found) - set(sandbox.PASSED) <= {
        "HOME",
        "TMPDIR",
        "LANG",
        "LC_CTYPE",
        "GIVEN",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONUSERBASE",
        "TORCHINDUCTOR_COMPILE_THREADS",
    }


def test_a_part_that_cannot_be_set_up_is_an_error(tmp_path, monkeypatch):
    # A kernel that has no namespace of processes.
    broken = tmp_path / "jail.py"
    source = Path(jail.__file__).read_text()
    broken.write_text(source.replace("0x10000000, 0x20000000", "0x10000000, 0x1"))
    monkeypatch.setattr(jail, "__file__", str(broken))
    ended = run(tmp_path, "print('ran')", parts=["processes"])
    assert ended.status == jail.FAILED
    assert ended.output.startswith("sandbox: cannot leave the namespaces of processes: ")
    sandbox.missing_parts.cache_clear()
    try:
        missing = sandbox.missing_parts()
        assert "processes" in missing
        assert missing["processes"].startswith("sandbox: cannot leave the namespaces of processes")
        assert "processes" not in sandbox.allowed_parts()
    finally:
        sandbox.missing_parts.cache_clear()


def test_takes_a_file(tmp_path):
    (tmp_path / "made").write_bytes(b"12345")
    take_file(tmp_path / "made", tmp_path / "copy", 5)
    assert (tmp_path / "copy").read_bytes() == b"12345"
    with pytest.raises(ValueError, match=r"^made must be a file of at most 4 bytes, got 5 bytes"):
        take_file(tmp_path / "made", tmp_path / "copy", 4)


def test_takes_no_link_pipe_or_folder(tmp_path):
    made = tmp_path / "made"
    for make, said in (
        (lambda: made.symlink_to("/etc/passwd"), "made must be a file: Too many levels"),
        (lambda: os.mkfifo(made), "made must be a file of at most 9 bytes, got 0 bytes of mode p"),
        (lambda: None, "made must be a file: No such file"),
    ):
        make()
        with pytest.raises(ValueError, match=f"^{said}"):
            take_file(made, tmp_path / "copy", 9)
        made.unlink(missing_ok=True)
