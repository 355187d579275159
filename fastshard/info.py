"""What this installation is: build, devices, places. Everything that a bug report needs."""

import platform

import torch

import fastshard
from fastshard import build_record, ops
from fastshard.devices import is_served
from fastshard.environment import cache_dir, shipped_tables_dir


def describe() -> dict:
    """Collect the facts, as plain values that JSON can hold."""
    cache, tables = cache_dir(), shipped_tables_dir()
    return {
        "fastshard": fastshard.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build": {
            "cuda": build_record.CUDA_VERSION or None,
            "architectures": list(filter(None, build_record.CUDA_ARCHS.split(";"))),
            "torch_target": build_record.TORCH_TARGET or None,
            "kernels_loaded": ops.HAS_KERNELS,
        },
        "gpus": [_describe_gpu(i) for i in range(torch.cuda.device_count())],
        "cache_dir": _place(cache),
        "tuning_tables": {"shipped": _place(tables), "measured": _place(cache / "tuning")},
    }


def _describe_gpu(index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return {
        "index": index,
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "served": ops.HAS_KERNELS and is_served(build_record.CUDA_ARCHS, capability),
    }


def _place(path) -> dict:
    return {"path": str(path), "exists": path.exists()}


def format_text(facts: dict) -> str:
    """The facts of ``describe`` for a human, one a line."""
    build = facts["build"]
    if build["cuda"]:
        state = (
            "loaded" if build["kernels_loaded"] else "not loaded: this torch is not a CUDA build"
        )
        compiled = (
            f"CUDA {build['cuda']} for {' '.join(build['architectures'])}, "
            f"torch >= {build['torch_target']} ({state})"
        )
    else:
        compiled = "none: pure Python, runs on CPU"
    lines = [
        ("fastshard", facts["fastshard"]),
        ("python", facts["python"]),
        ("torch", f"{facts['torch']} (CUDA {facts['torch_cuda'] or 'none'})"),
        ("kernels", compiled),
    ]
    for gpu in facts["gpus"]:
        served = "served" if gpu["served"] else "not served: no code for it in this build"
        lines.append(
            (
                f"gpu {gpu['index']}",
                f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
                f"{gpu['memory_gib']} GiB ({served})",
            )
        )
    if not facts["gpus"]:
        lines.append(("gpus", "none visible"))
    places = {
        "cache": facts["cache_dir"],
        "shipped tables": facts["tuning_tables"]["shipped"],
        "measured tables": facts["tuning_tables"]["measured"],
    }
    for name, place in places.items():
        lines.append((name, place["path"] + ("" if place["exists"] else " (not there yet)")))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
