"""What this build was compiled for; empty strings where there are no kernels."""

try:
    from fastshard._build_info import CUDA_ARCHS, CUDA_VERSION, TORCH_TARGET
except ModuleNotFoundError:  # a checkout that was never built
    CUDA_ARCHS = CUDA_VERSION = TORCH_TARGET = ""

__all__ = ["CUDA_ARCHS", "CUDA_VERSION", "TORCH_TARGET"]
