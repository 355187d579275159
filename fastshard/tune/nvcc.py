"""The CUDA compiler: where it is, and what it is told of every kernel.

setup.py loads this file by its path, in a build without fastshard or torch: it imports nothing of
them.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

DEFAULT_ARCHS = "8.6+PTX"
HOW_TO_GET_IT = "set CUDA_HOME, or pip install 'cuda-toolkit[nvcc,cudart,cccl,crt]'"


def find_cuda_home() -> Path | None:
    """The first usual place with both nvcc and the headers; CUDA_HOME overrides the search."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
        nvcc and Path(nvcc).resolve().parent.parent,
        Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13",
    ]
    for candidate in filter(None, candidates):
        home = Path(candidate)
        if has_nvcc(home) and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def has_nvcc(cuda_home: Path | None) -> bool:
    """Whether the compiler is there."""
    return cuda_home is not None and (cuda_home / "bin" / "nvcc").exists()


def cuda_version(cuda_home: Path) -> str:
    """Like ``13.0``."""
    text = subprocess.check_output([cuda_home / "bin" / "nvcc", "--version"], text=True)
    return re.search(r"release (\d+\.\d+)", text)[1]


def flags(version: str) -> list[str]:
    """What nvcc of this version is told of every kernel, beside the architectures."""
    compresses = tuple(map(int, version.split("."))) >= (12, 8)
    return ["-O3", "-std=c++20", *(["--compress-mode=size"] if compresses else [])]


def arch_flags(archs: str) -> list[str]:
    """What ``8.6+PTX``, or several separated by semicolons or commas, is for nvcc."""
    flags = []
    for arch in re.split("[;,]", archs):
        number = arch.removesuffix("+PTX").replace(".", "")
        kinds = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(kinds)}]")
    return flags
