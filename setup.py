"""Build of the fastshard wheel; everything static is in pyproject.toml.

With a CUDA toolkit the wheel holds one compiled library, ``fastshard._C``, on the LibTorch stable
ABI: one abi3 wheel serves every Python >= 3.10 and torch >= 2.11 of a CUDA major. Its version names
the major where that is not 13, as 0.1.0+cu12. Without a toolkit it is pure Python.

Environment:
    FASTSHARD_BUILD_CUDA  auto (default): CUDA where a toolkit is found; 1: fail without one;
                          0: pure Python
    TORCH_CUDA_ARCH_LIST  architectures to compile for, default "8.6+PTX"
    CUDA_HOME             the toolkit, where it is not in a usual place
    FASTSHARD_LINEINFO    1 keeps source lines in the machine code, for profilers
    MAX_JOBS              parallel compiler processes
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = (2, 11)  # the oldest torch that the binary serves
CUDA_MAJOR = "13"  # of the wheel whose version has no local part: torch's own since 2.11


def load_nvcc():
    """The package's module, by its path: the package around it imports torch."""
    path = ROOT / "fastshard" / "tune" / "nvcc.py"
    spec = importlib.util.spec_from_file_location("nvcc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = load_nvcc()


def wants_cuda(cuda_home: Path | None) -> bool:
    choice = os.environ.get("FASTSHARD_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTSHARD_BUILD_CUDA must be auto, 0 or 1, got {choice!r}")
    found = nvcc.has_nvcc(cuda_home)
    if choice == "1" and not found:
        raise SystemExit(
            "FASTSHARD_BUILD_CUDA=1 needs a CUDA toolkit with nvcc, found none "
            f"(CUDA_HOME={cuda_home}); {nvcc.HOW_TO_GET_IT}"
        )
    return found and choice != "0"


def cuda_archs() -> str:
    """Semicolon-separated, e.g. "8.6+PTX"; torch accepts spaces too."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    return re.sub(r"[;\s]+", ";", asked) or nvcc.DEFAULT_ARCHS


def local_version(cuda_version: str) -> str:
    """What distinguishes wheels that differ in the CUDA major alone; "" for torch's own."""
    major = cuda_version.split(".")[0]
    return "" if major == CUDA_MAJOR else f"+cu{major}"


class BuildPy(build_py):
    """Writes fastshard/_build_info.py: what `fastshard info` says of the binary."""

    build_info: dict[str, str] = {}  # noqa: RUF012  (set once below, before setup() runs)

    def run(self):
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib)
        lines = [f"{name} = {value!r}\n" for name, value in self.build_info.items()]
        (base / "fastshard" / "_build_info.py").write_text(
            '"""Written by setup.py: what this build was compiled for."""\n\n' + "".join(lines)
        )


def torch_cuda_stub() -> str:
    """Folder of an empty libtorch_cuda.so: a CPU-only torch has its headers, but not it."""
    folder = tempfile.mkdtemp(prefix="fastshard-stub-")
    library = f"{folder}/libtorch_cuda.so"
    command = ["g++", "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", library, "-x", "c++", "-"]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    return folder


def extension_arguments(cuda_home: Path, version: str) -> dict:
    """Arguments of setup() for the compiled library."""
    # torch would guess it from an nvcc on PATH, which may be a wrapper script
    os.environ["CUDA_HOME"] = str(cuda_home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()
    import torch
    from torch.utils import cpp_extension

    library_dirs = [str(cuda_home / "lib64")]
    if torch.version.cuda is None:
        cpp_extension.CUDA_HOME = str(cuda_home)
        cpp_extension._check_cuda_version = lambda *args, **kwargs: None
        library_dirs.insert(0, torch_cuda_stub())

    target = f"0x{TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48:016x}"
    defines = [
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={target}",
        # spaces: nvcc would cut the definition at commas
        f"-DFASTSHARD_CUDA_ARCHS={cuda_archs().replace(';', ' ')}",
    ]
    prefix_map = f"-ffile-prefix-map={ROOT}=."
    cxx = ["-O3", "-g0", "-std=c++20", "-Wall", "-fvisibility=hidden", prefix_map, *defines]
    # torch adds no -gencode where any flag has "arch" in it, as the path of a checkout may
    nvcc_flags = [
        *nvcc.flags(version),
        *nvcc.arch_flags(cuda_archs()),
        "-Xptxas=-warn-spills",
        f"-Xcompiler=-fvisibility=hidden,-g0,{prefix_map}",
        *defines,
        # torch's flags forbid the operators of the 16-bit types, which kernels use
        *(
            f"-U__CUDA_NO_{name}__"
            for name in (
                "HALF_OPERATORS",
                "HALF_CONVERSIONS",
                "HALF2_OPERATORS",
                "BFLOAT16_CONVERSIONS",
            )
        ),
    ]
    if os.environ.get("FASTSHARD_LINEINFO") == "1":
        nvcc_flags.append("-lineinfo")

    # Relative, as setuptools demands.
    sources = [
        str(path.relative_to(ROOT))
        for pattern in ("ops/*.cpp", "*/*.cu")
        for path in sorted((ROOT / "csrc").glob(pattern))
    ]
    extension = cpp_extension.CUDAExtension(
        "fastshard._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc_flags},
        py_limited_api=True,
    )
    # Only what the stable ABI needs: CUDAExtension adds c10, torch_python, a shared CUDA runtime.
    extension.libraries = []
    extension.library_dirs = library_dirs + extension.library_dirs
    extension.extra_link_args = [
        "-Wl,-s,-z,relro,-z,now",
        f"-Wl,--version-script={ROOT / 'csrc' / 'exports.map'}",
        "-Wl,--no-as-needed,-ltorch_cpu,-ltorch_cuda,--as-needed",
        "-lcudart_static",
        "-lrt",
        "-ldl",
        "-lpthread",
    ]
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension, "build_py": BuildPy},
        "options": {
            "bdist_wheel": {"py_limited_api": "cp310"},
            "egg_info": {"tag_build": local_version(version)},
        },
    }


def main() -> None:
    cuda_home = nvcc.find_cuda_home()
    arguments = {"cmdclass": {"build_py": BuildPy}}
    if wants_cuda(cuda_home):
        version = nvcc.cuda_version(cuda_home)
        try:
            arguments = extension_arguments(cuda_home, version)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            # An isolated build runs this file once for its requirements, and again with them.
            arguments["setup_requires"] = ["torch>=2.13,<3", "ninja"]
        BuildPy.build_info = {
            "CUDA_VERSION": version,
            "CUDA_ARCHS": cuda_archs(),
            "TORCH_TARGET": ".".join(map(str, TORCH_TARGET)),
        }
    else:
        BuildPy.build_info = {"CUDA_VERSION": "", "CUDA_ARCHS": "", "TORCH_TARGET": ""}
    setup(**arguments)


main()
