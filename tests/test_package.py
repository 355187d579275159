"""What is installed: the wheel and not the checkout, and a build record that matches the wheel."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from ranks import run_ranks

import fastshard
from fastshard import build_record, ops

CHECKOUT = Path(__file__).resolve().parent.parent


def cuda_major_of(cuda_version: str) -> str:
    """What the version of a wheel says of its CUDA; nothing of 13, nor of none."""
    major = cuda_version.split(".")[0]
    return "" if major in ("", "13") else f"cu{major}"


def test_tests_import_the_installed_wheel():
    assert not Path(fastshard.__file__).is_relative_to(CHECKOUT / "fastshard")
    version, _, local = importlib.metadata.version("fastshard").partition("+")
    assert version == fastshard.__version__
    assert local == cuda_major_of(build_record.CUDA_VERSION)


def test_ranks_import_it_too():
    assert run_ranks(1, "ranks:package_file") == [fastshard.__file__]


def test_build_record_matches_the_wheel():
    from fastshard import _build_info

    compiled = importlib.util.find_spec("fastshard._C") is not None
    assert bool(_build_info.CUDA_ARCHS) == compiled


def test_kernels_are_registered_where_torch_has_cuda():
    """A CUDA torch without a GPU must still have the CUDA implementations, so that it can trace."""
    compiled = importlib.util.find_spec("fastshard._C") is not None
    expected = compiled and torch.version.cuda is not None
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("fastshard::rms_norm", "CUDA")
    assert has_cuda == ops.HAS_KERNELS == expected


def test_import_takes_in_torch_and_nothing_heavy(tmp_path):
    """``import fastshard`` costs little above ``import torch``: the rest is imported where used."""
    heavy = {"tokenizers", "huggingface_hub", "jinja2", "rich", "safetensors", "transformers"}
    heavy |= {"torchtune", "torchao", "matplotlib", "optuna", "pyarrow", "sympy", "asyncio", "http"}
    heavy |= {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.export"}
    heavy |= {"fastshard.pipeline"}
    code = (
        "import sys, torch; before = set(sys.modules); import fastshard; "
        f"print(sorted({heavy!r} & (set(sys.modules) - before)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert run.stdout == "[]\n"


def test_import_starts_no_cuda_context():
    code = "import fastshard, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
