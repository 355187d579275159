"""Compiling foreign sources by ``torch.utils.cpp_extension``, in a sandbox, kept by content.

A build is a folder of ``archive/builds`` in the cache, named by the digest of all that decides it:
its library, or the reason why there is none. The compiler runs with a limit of address space (a
source can make it take all memory) and of time, without network; what it made is not loaded there.

``python -m fastshard.archive.compile SOURCE FOLDER FLAG ...`` is the process in the sandbox.
"""

import hashlib
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastshard.archive import jail, sandbox
from fastshard.environment import cache_dir
from fastshard.files import replace_text
from fastshard.tune import nvcc

TIMEOUT = 900.0
"""Seconds after which a compiler is killed."""
LIMITS = sandbox.Limits(
    resident_bytes=8 * sandbox.GIB, address_space_bytes=32 * sandbox.GIB, file_bytes=sandbox.GIB
)
"""Of a compiler. PyTorch built for CUDA takes some 10 GiB of addresses when it is imported."""
NAME = "archive_kernel"
"""Of every module that is compiled; each is loaded into a process of its own."""
FLAGS = ("-O3",)
"""Of the compilers. Without fast mathematics, which eager PyTorch is compiled without too."""
FEWER_HEADERS = ("-DTORCH_INDUCTOR_CPP_WRAPPER",)
"""Leaves PyTorch's C++ modules, optimizers and data loaders out of ``torch/extension.h``, which few
kernels name and which are a third of the time of compiling."""
_EXTENSION = "torch/extension.h"
_CUDA = re.compile(r"__global__|<<<|\bcuda(_runtime|_fp16|_bf16)?\.h\b|ATen/cuda|c10/cuda|cublas")


@dataclass(frozen=True)
class Built:
    """A library, or the reason why there is none.

    Attributes:
        library: A Python module named ``NAME``.
        reason: What the compiler said, or why it was stopped.
        folder: The only folder that a process needs to load it.
    """

    library: Path | None
    reason: str | None
    folder: Path


def is_cuda(code: str) -> bool:
    """Whether a source needs nvcc."""
    return bool(_CUDA.search(code))


def check_compilers(*, cuda: bool) -> str:
    """The compiler and what it needs, as one line for a verdict.

    Raises:
        RuntimeError: it is not there.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"compiling needs a C++ compiler, and there is no {compiler}: set CXX")
    if shutil.which("ninja", path=_path()) is None:
        raise RuntimeError("compiling by torch.utils.cpp_extension needs ninja: pip install ninja")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise RuntimeError(
            f"compiling needs Python's headers, and there are none in {headers}: install "
            "python3-dev, or as your system calls it"
        )
    if not cuda:
        return compiler
    home = nvcc.find_cuda_home()
    if not nvcc.has_nvcc(home):
        raise RuntimeError(
            f"CUDA code needs nvcc, and there is none (CUDA_HOME={home}): {nvcc.HOW_TO_GET_IT}"
        )
    return f"nvcc {nvcc.cuda_version(home)}"


def build(
    code: str,
    *,
    parts: Sequence[str],
    cuda: bool | None = None,
    arch: str | None = None,
    timeout: float = TIMEOUT,
) -> Built:
    """Compile a source, or find it compiled.

    Args:
        code: C++ or CUDA.
        parts: Kinds of isolation of the compiler's process, of ``jail.PARTS``.
        cuda: Whether nvcc compiles it; by default as ``is_cuda`` says.
        arch: Compute capability like ``8.6``; for CUDA.
        timeout: Seconds.

    Raises:
        RuntimeError: the compiler is not there, or is for another CUDA than PyTorch.
    """
    import torch

    cuda = is_cuda(code) if cuda is None else cuda
    compiler = check_compilers(cuda=cuda)
    if cuda and torch.version.cuda is None:
        raise RuntimeError(f"CUDA code needs a torch for CUDA, got torch {torch.__version__}")
    identity = repr((code, cuda, torch.__version__, compiler, arch, FLAGS, sys.version_info[:2]))
    digest = hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()
    folder = cache_dir() / "archive" / "builds" / digest[:32]
    library, reason = folder / f"{NAME}.so", folder / "reason.txt"
    if library.exists():
        return Built(library, None, folder)
    if reason.exists():
        return Built(None, reason.read_text(), folder)
    variables = {"PATH": _path(), "MAX_JOBS": "1"}
    if cuda:
        variables |= {"CUDA_HOME": str(nvcc.find_cuda_home()), "TORCH_CUDA_ARCH_LIST": arch or ""}
    toolkit = [Path(variables["CUDA_HOME"])] if cuda else []
    with sandbox.temporary(LIMITS, parts, toolkit) as box:
        source = box.scratch / f"{NAME}.{'cu' if cuda else 'cpp'}"
        source.write_text(code, errors="surrogatepass")
        for flags in ((*FLAGS, *FEWER_HEADERS), FLAGS) if _EXTENSION in code else (FLAGS,):
            made = Path(tempfile.mkdtemp(prefix="build", dir=box.scratch))
            ended = _run(box, source, made, flags, timeout, variables)
            failure = _why_not(ended, timeout)
            if failure is None:
                return Built(_keep(made / f"{NAME}.so", library), None, folder)
            if ended.is_late or ended.overstepped:  # of this machine, and not of the source
                return Built(None, failure, folder)
    replace_text(reason, failure)
    return Built(None, failure, folder)


def _run(
    box: sandbox.Sandbox,
    source: Path,
    folder: Path,
    flags: Sequence[str],
    timeout: float,
    variables: Mapping[str, str],
) -> sandbox.Finished:
    """Compile in a sandbox, in a process of this module."""
    safely = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *safely, "-m", __name__, str(source), str(folder), *flags]
    return box.run(command, timeout=timeout, variables=variables)


def _why_not(ended: sandbox.Finished, timeout: float) -> str | None:
    if ended.is_late:
        return f"the compiler took more than {timeout:g} s"
    if ended.overstepped:
        return f"the compiler took {ended.overstepped}"
    if ended.status == 0:
        return None
    is_for_another_cuda = re.search(r"^The detected CUDA version \(", ended.output, re.MULTILINE)
    if ended.status == jail.FAILED or is_for_another_cuda:
        raise RuntimeError(f"the compiler could not be run: {ended.output.strip()[-300:]}")
    lines = [" ".join(line.split()) for line in ended.output.splitlines()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
    last = [line for line in lines if line][-1:] or [f"status {ended.status}"]
    said = (errors or last)[0]
    return re.sub(rf"\S*/({NAME}\.cu|{NAME}\.cpp)", r"\1", said)[:300]


def _keep(made: Path, library: Path) -> Path:
    """Copy what was made to where it is kept, whole or not at all."""
    if made.is_symlink() or not made.is_file():
        raise RuntimeError(f"the compiler made no {made.name}")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".part", delete=False) as part:
        shutil.copyfile(made, part.name)
    os.replace(part.name, library)
    return library


def _path() -> str:
    """Where programs are, those that pip installs for this Python too, like ninja."""
    return os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])


def _cuda_libraries(home: Path, folder: Path) -> list[str]:
    """Where the linker finds CUDA's runtime: a toolkit of pip has only its versioned name."""
    folders = [home / name for name in ("lib64", "lib")]
    for each in folders:
        if (each / "libcudart.so").exists():
            return [f"-L{each}"]
    found = sorted(path for each in folders for path in each.glob("libcudart.so.*"))
    if not found:
        return []
    (folder / "libcudart.so").symlink_to(found[0])
    return [f"-L{folder}"]


def _loaded_libstdcxx() -> list[str]:
    """The C++ library that PyTorch runs on, for the linker to take before what the compiler names.

    A compiler that finds it only as an archive, or is told to, would put a second one into what it
    links: beside the first its streams crash, as in every message that has a number in it.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in maps if "/libstdc++.so" in line})


def _compile(source: str, folder: str, *flags: str) -> None:
    from torch.utils import cpp_extension

    # `load` imports what it built, which is for another sandbox to do. A PyTorch that has no such
    # function imports it here, where there is nothing to win either.
    cpp_extension._import_module_from_library = lambda *arguments: None
    cuda = source.endswith(".cu")
    libraries = _loaded_libstdcxx()
    if cuda:
        libraries += _cuda_libraries(Path(os.environ["CUDA_HOME"]), Path(folder))
    cpp_extension.load(
        NAME,
        [source],
        extra_ldflags=libraries,
        extra_cflags=list(flags),
        extra_cuda_cflags=list(flags),
        build_directory=folder,
        with_cuda=cuda,
    )


if __name__ == "__main__":
    _compile(*sys.argv[1:])
