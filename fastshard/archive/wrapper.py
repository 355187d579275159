"""A kernel of the archive as a library that an op can call: its source inside ``wrapper.cpp``."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from fastshard.archive import catalog, compile, sandbox
from fastshard.archive.schema import Row
from fastshard.ops.promoted import PREFIX

MARKER = "// KERNEL\n"


def name_of(code: str) -> str:
    """The variant's name, by the content of the kernel."""
    return PREFIX + hashlib.sha256(code.encode()).hexdigest()[:12]


def wrapped(code: str, op: str, name: str) -> str:
    """The kernel's source inside of ``wrapper.cpp``."""
    before, after = (Path(__file__).parent / "wrapper.cpp").read_text().split(MARKER)
    define = "#define FASTSHARD_LAYER_NORM\n" if op == "layer_norm" else ""
    return f"{define}{before}{code}\n{after.replace('FASTSHARD_NAME', name)}"


def build(row: Row, op: str, parts: Sequence[str] | None = None) -> Path:
    """The library of a kernel as a variant of an op.

    Args:
        row: Read whole.
        op: ``rms_norm`` or ``layer_norm``.
        parts: Kinds of isolation of the compiler; by default all that the machine allows.

    Raises:
        RuntimeError: it does not compile; or there is no compiler, or no GPU for CUDA code.
    """
    cuda = compile.is_cuda(row.cuda_code)
    if cuda and not torch.cuda.is_available():
        raise RuntimeError(
            f"{catalog.plain(row.id)} is CUDA code, promoted only on the GPU that shall run it, "
            f"and torch {torch.__version__} sees none"
        )
    arch = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None
    built = compile.build(
        wrapped(row.cuda_code, op, name_of(row.cuda_code)),
        parts=sandbox.allowed_parts() if parts is None else parts,
        cuda=cuda,
        arch=arch,
    )
    if built.library is None:
        raise RuntimeError(
            f"{catalog.plain(row.id)} does not compile as a variant of {op}: {built.reason}"
        )
    return built.library
