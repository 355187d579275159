"""What this build was compiled for; empty strings where there are no kernels."""

from importlib import metadata

try:
    from fastshard._build_info import CUDA_ARCHS, CUDA_VERSION, TORCH_TARGET
except ModuleNotFoundError:  # a checkout that was never built
    CUDA_ARCHS = CUDA_VERSION = TORCH_TARGET = ""

__all__ = ["CUDA_ARCHS", "CUDA_VERSION", "TORCH_TARGET", "source_version"]


def source_version() -> str:
    """The installed version of the sources: without ``+cu12``, which names the wheel's CUDA."""
    return metadata.version("fastshard").partition("+")[0]
