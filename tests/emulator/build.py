"""Compile csrc, kernels and torch boundary, against the SIMT emulator into a library of CPU ops.

``python tests/emulator/build.py [DIR]`` builds into DIR (default: the working directory). Objects
are kept by the content of everything that goes into them: a second build takes no time.

Environment:
    FASTSHARD_EMULATOR_CACHE  folder of the objects; default ``fastshard/emulator`` in the XDG cache
    CUDA_HOME                 the toolkit whose headers are used, where it is not in a usual place
    CXX                       the compiler, default g++
    MAX_JOBS                  compiler processes at a time, default one a core
"""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent.resolve()
CSRC = HERE.parent.parent / "csrc"
TORCH_TARGET = "0x020b000000000000"  # as in setup.py
UNUSED_SECONDS = 30 * 24 * 3600  # objects that no build asked for in this time are removed

FLAGS = [
    *("-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
    # Kernels access the same memory as several types; multiply-adds are fused, as by nvcc.
    *("-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-DFS_EMULATOR", "-DFS_OP_NAMESPACE=fastshard_emulator", "-DFS_OP_KEY=CPU"),
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
KERNEL_FLAGS = [
    "-fsanitize=alignment,bounds-strict",  # host_api.cpp has the handlers
    "-ftrivial-auto-var-init=pattern",  # registers that nobody wrote hold NaN as fp16, else -1e38
]


class MissingTool(RuntimeError):
    """The machine lacks the compiler or the CUDA headers: there is no emulator on it."""


def compiler() -> str:
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise MissingTool(f"there is no {name}")
    return path


def cuda_include() -> Path:
    """The first usual place that holds the CUDA headers; CUDA_HOME overrides the search."""
    homes = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
        Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13",
    ]
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_fp16.h").exists():
            return Path(home) / "include"
    raise MissingTool("there are no CUDA headers (CUDA_HOME)")


def cache_folder() -> Path:
    if os.environ.get("FASTSHARD_EMULATOR_CACHE"):
        return Path(os.environ["FASTSHARD_EMULATOR_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastshard" / "emulator"


def machine_flags() -> list[str]:
    """AVX2, FMA and F16C where this CPU has them: mma is several times faster with them."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    names = ("avx2", "fma", "f16c")
    has_all = all(re.search(rf"^flags\b.*\b{name}\b", flags, re.M) for name in names)
    return ["-march=x86-64-v3"] if has_all else []


def torch_flags() -> tuple[list[str], list[str]]:
    """What compiling and linking against the torch of this Python takes."""
    import torch

    root = Path(torch.__file__).parent
    include = root / "include"
    compile_flags = [f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include"]
    link_flags = [f"-L{root / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    return compile_flags, link_flags


def toolchain_id() -> str:
    import torch

    version = subprocess.check_output([compiler(), "--version"], text=True)
    cuda = (cuda_include() / "cuda_runtime_api.h").read_text(errors="replace")
    return f"{version} torch {torch.__version__} {re.search(r'CUDART_VERSION +([0-9]+)', cuda)[1]}"


def headers_of(source: Path, roots: Iterable[Path]) -> dict[str, bytes]:
    """Every header of ours that `source` includes, at any depth: name -> content.

    `roots` are searched in order after the includer's own folder, as the compiler does; what is in
    none of them belongs to the toolchain.
    """
    found: dict[str, bytes] = {}
    pending = [source]
    while pending:
        current = pending.pop()
        for name in re.findall(rb'^\s*#\s*include\s*["<]([^">]+)[">]', current.read_bytes(), re.M):
            for root in (current.parent, *roots):
                path = root / name.decode()
                if path.is_file():
                    if str(path) not in found:
                        found[str(path)] = path.read_bytes()
                        pending.append(path)
                    break
    return found


def compile_object(source: Path, csrc: Path, flags: list[str], identity: str) -> Path:
    """The object of one source, from the cache or compiled into it."""
    roots = (HERE / "include", csrc)
    digest = hashlib.sha256(repr((identity, source.name, flags)).encode())
    contents = [source.read_bytes(), *sorted(headers_of(source, roots).values())]
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    target = cache_folder() / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if target.exists():
        os.utime(target)
        return target
    includes = [f"-I{root}" for root in roots] + [f"-isystem{cuda_include()}"]
    # Messages name csrc/norm/rms_norm.cuh, wherever the checkout is.
    prefix = f"-ffile-prefix-map={csrc.parent}/="
    run_atomically(
        [compiler(), *flags, prefix, *includes, "-x", "c++", "-c", str(source), "-o"], target
    )
    return target


def run_atomically(command: list[str], target: Path) -> None:
    """Run a compiler whose last argument is its output; another process may do the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
    os.close(handle)
    try:
        result = subprocess.run([*command, temporary], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Wait until no other process builds the same in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, by a crash too
        yield


def remove_unused(folder: Path) -> None:
    for path in folder.glob("*.o"):
        if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
            path.unlink(missing_ok=True)


def build_library(
    output: Path, sources: list[Path], csrc: Path = CSRC, flags: Iterable[str] = ()
) -> Path:
    """Compile `sources` and the emulator, and link them into the shared library `output`.

    Args:
        output: The library to write.
        sources: ``.cu`` and ``.cpp`` files. Of a function that several define, the first counts.
        csrc: Where the sources in it find the project's headers; others find the checkout's.
        flags: More of the compiler's, but for the checkout's csrc, whose objects builds share.

    Returns:
        `output`.

    Raises:
        MissingTool: There is no compiler, or there are no CUDA headers.
        RuntimeError: A source does not compile; the message ends with the compiler's.
    """
    torch_compile, torch_link = torch_flags()
    identity = toolchain_id()
    common = [*FLAGS, *machine_flags()]

    def compile_one(source: Path) -> Path:
        own = () if source.is_relative_to(CSRC) else flags
        if source.parent == HERE:
            extra = ["-O3"]
        else:
            extra = KERNEL_FLAGS if source.suffix == ".cu" else torch_compile
        root = csrc if source.is_relative_to(csrc) else CSRC
        return compile_object(source, root, [*common, *own, *extra], identity)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, [*sorted(HERE.glob("*.cpp")), *sources]))
    # -Bsymbolic: our stand-ins of CUDA's host functions, whatever else is loaded
    command = [compiler(), "-shared", "-Wl,-Bsymbolic", *map(str, objects), *torch_link, "-o"]
    run_atomically(command, output)
    remove_unused(cache_folder())
    return output


def product_sources(csrc: Path = CSRC) -> list[Path]:
    kernels = sorted(csrc.glob("*/*.cu"))
    boundary = [path for path in sorted(csrc.glob("ops/*.cpp")) if path.name != "module.cpp"]
    return kernels + boundary


@functools.cache
def build(output_dir: Path, csrc: Path = CSRC) -> Path:
    """Build the library of every op of csrc in `output_dir`; see `build_library`."""
    with only_builder(cache_folder()):
        return build_library(output_dir / "fastshard_emulator.so", product_sources(csrc), csrc)


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
