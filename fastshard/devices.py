"""Which device to run on, whether this build has code for it, and what memory it has."""

import re
from pathlib import Path

import torch

from fastshard import ops
from fastshard.build_record import CUDA_ARCHS


def is_served(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``archs`` runs on a GPU of this compute capability.

    Machine code serves its own major version from its minor upwards, PTX every later GPU.

    Args:
        archs: As ``TORCH_CUDA_ARCH_LIST``, e.g. ``"8.6;9.0a+PTX"``; architecture-specific code
            (a suffix letter) serves its own compute capability only.
    """
    return loaded_code(archs, capability) is not None


def loaded_code(archs: str, capability: tuple[int, int]) -> str | None:
    """What the driver loads of a build on a GPU of this compute capability; None: nothing runs.

    The best machine code that fits, e.g. ``sm_86``; without any the newest PTX, e.g.
    ``compute_86 (PTX)``, which the driver compiles at first use.

    Args:
        archs: As for ``is_served``.
    """
    machine_code, ptx = [], []
    for arch in filter(None, archs.split(";")):
        major, minor, letter, has_ptx = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", arch).groups()
        built = (int(major), int(minor))
        if capability == built or (capability > built and capability[0] == built[0] and not letter):
            machine_code.append((built, letter))
        elif capability > built and has_ptx and not letter:
            ptx.append(built)
    if machine_code:
        (major, minor), letter = max(machine_code)
        return f"sm_{major}{minor}{letter}"
    if ptx:
        return "compute_{}{} (PTX)".format(*max(ptx))
    return None


def default_device() -> torch.device:
    """The current GPU where this build has CUDA kernels and there is one, else the CPU."""
    return torch.device("cuda" if ops.HAS_KERNELS and torch.cuda.is_available() else "cpu")


def check_device(device: torch.device) -> None:
    """Raise where the model could not run on ``device``.

    Raises:
        RuntimeError: there is no such device, or this build has no code for it.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise RuntimeError(f"device must be cpu or cuda, got {device}")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device {device} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if not ops.HAS_KERNELS or not is_served(CUDA_ARCHS, (major, minor)):
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and "
            f"this build of fastshard has code for {CUDA_ARCHS or 'no GPU'}; rebuild with "
            f"TORCH_CUDA_ARCH_LIST='{major}.{minor}', or choose the device cpu"
        )


def default_dtype(config: dict, device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU the checkpoint's own 16-bit type, bfloat16 where it has none.

    Args:
        config: A Hugging Face ``config.json``.
    """
    if device.type == "cpu":
        return torch.float32
    name = config.get("dtype") or config.get("torch_dtype")
    return torch.float16 if name == "float16" else torch.bfloat16


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise TypeError where a model does not run in ``dtype`` on ``device``."""
    allowed = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if device.type == "cpu":
        allowed["float32"] = torch.float32
    if dtype not in allowed.values():
        raise TypeError(f"dtype must be {' or '.join(allowed)} on {device.type}, got {dtype}")


def available_bytes(device: torch.device) -> int:
    """Memory that a model could take: free on a GPU, available without swapping on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024
