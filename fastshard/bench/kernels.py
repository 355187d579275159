"""The machine code of this installation, and which kernels stand behind which benchmark."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import fastshard
from fastshard.bench import machine_code
from fastshard.bench.machine_code import Kernel

_ATTENTION = ("attention_kernel", "attention_combine_kernel")
_LAYERS = ("rms_norm_kernel", "rope_kernel", "act_and_mul_kernel")
KERNELS = {
    "attention": ("decode_attention_kernel", *_ATTENTION),
    "linear": ("linear_kernel",),
    "mlp": ("fused_mlp_kernel", "gemm_kernel", "act_and_mul_kernel"),
    "norm": ("rms_norm_kernel", "layer_norm_kernel"),
    "prefill": (*_ATTENTION, "gemm_kernel", *_LAYERS),
    "decode": (
        "decode_step_kernel",
        "decode_attention_kernel",
        *_ATTENTION,
        "linear_kernel",
        "fused_mlp_kernel",
        *_LAYERS,
    ),
}
"""Kernels that the ops of a benchmark can launch."""
DTYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}


def describe(names: Sequence[str] | None = None, dtype: torch.dtype | None = None) -> dict:
    """What each kernel takes, as plain values; or why that is not known.

    Args:
        names: Benchmarks, whose kernels are listed; None: all kernels. ``start`` and ``load`` have
            none.
        dtype: Of the kernels, float16 or bfloat16; None: all.

    Returns:
        ``kernels``: of each ``Kernel.to_dict``. ``missing``: what could not be had, and why.
    """
    wanted = names if names is None else {k for name in names for k in KERNELS.get(name, ())}

    def is_wanted(kernel: Kernel) -> bool:
        name = kernel.short_name.split("<")[0]
        of_dtype = dtype is None or f"<{DTYPES[dtype]}" in kernel.name
        return (wanted is None or name in wanted) and of_dtype

    try:
        found = machine_code.read_kernels(library(), is_wanted) if wanted != set() else []
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return {"kernels": [], "missing": [f"machine code: {' '.join(str(error).split())[:300]}"]}
    return {"kernels": [kernel.to_dict() for kernel in found], "missing": []}


def lines(compiled: dict) -> list[str]:
    """What ``describe`` gave, for a reader."""
    missing = [f"missing: {reason}" for reason in compiled["missing"]]
    return machine_code.table(compiled["kernels"]) + missing


def library() -> Path:
    """The compiled library of this installation.

    Raises:
        RuntimeError: there is none.
    """
    found = sorted(Path(fastshard.__file__).parent.glob("_C*.so"))
    if not found:
        raise RuntimeError("this build is pure Python, it has no compiled kernels")
    return found[0]
