"""Which GPUs a build serves, and what it says of those that it does not."""

import pytest
import torch

import fastshard
from fastshard import devices, ops

GIB = 2**30


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        ("8.6", (8, 6), True),
        ("8.6", (8, 9), True),  # same major version, later minor
        ("8.6", (8, 0), False),
        ("8.6", (9, 0), False),
        ("8.6+PTX", (9, 0), True),
        ("8.6+PTX", (12, 0), True),
        ("8.6+PTX", (8, 0), False),
        ("8.0;9.0", (9, 0), True),
        ("8.0;9.0", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("9.0a+PTX", (10, 0), False),
        ("10.0;12.1", (12, 1), True),
        ("", (8, 6), False),
    ],
)
def test_served_compute_capabilities(archs, capability, served):
    assert devices.is_served(archs, capability) == served


@pytest.mark.parametrize(
    ("archs", "capability", "code"),
    [
        ("8.6+PTX", (8, 6), "sm_86"),
        ("8.6+PTX", (8, 9), "sm_86"),
        ("8.6+PTX", (9, 0), "compute_86 (PTX)"),
        ("8.0+PTX;8.6+PTX", (9, 0), "compute_86 (PTX)"),
        ("8.0;8.6;9.0+PTX", (8, 9), "sm_86"),
        ("8.6+PTX;9.0a", (9, 0), "sm_90a"),
        ("8.6+PTX;9.0a", (10, 0), "compute_86 (PTX)"),
        ("8.6", (9, 0), None),
    ],
)
def test_code_that_the_driver_loads(archs, capability, code):
    assert devices.loaded_code(archs, capability) == code


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.mark.parametrize("archs", ["8.6+PTX", ""])
def test_a_gpu_without_code_raises(monkeypatch, archs):
    pretend_gpu(monkeypatch, (7, 5))
    monkeypatch.setattr(devices, "CUDA_ARCHS", archs)
    monkeypatch.setattr(ops, "HAS_KERNELS", bool(archs))
    built = r"8\.6\+PTX" if archs else "no GPU"
    with pytest.raises(
        RuntimeError,
        match=rf"Tesla T4 has compute capability 7\.5, and this build of fastshard has code for "
        rf"{built}; rebuild with TORCH_CUDA_ARCH_LIST='7\.5', or choose the device cpu",
    ):
        fastshard.load(device="cuda")


def test_a_gpu_with_code_is_the_default(monkeypatch):
    pretend_gpu(monkeypatch, (8, 6))
    monkeypatch.setattr(ops, "HAS_KERNELS", True)
    assert devices.default_device() == torch.device("cuda")
    monkeypatch.setattr(ops, "HAS_KERNELS", False)
    assert devices.default_device() == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:1", "cuda:7"])
def test_a_device_that_is_not_there_raises(monkeypatch, device):
    pretend_gpu(monkeypatch, (8, 6))
    with pytest.raises(RuntimeError, match=f"device {device} is not there: torch .* sees 1 CUDA"):
        fastshard.load(device=device)


def test_other_kinds_of_device_raise():
    with pytest.raises(RuntimeError, match="device must be cpu or cuda, got meta"):
        fastshard.load(device="meta")


@pytest.mark.parametrize(
    ("config", "device", "dtype"),
    [
        ({"dtype": "float16"}, "cpu", torch.float32),
        ({"dtype": "float16"}, "cuda", torch.float16),
        ({"torch_dtype": "float16"}, "cuda", torch.float16),
        ({"torch_dtype": "bfloat16"}, "cuda", torch.bfloat16),
        ({"dtype": "float32"}, "cuda", torch.bfloat16),
        ({}, "cuda", torch.bfloat16),
    ],
)
def test_default_dtype(config, device, dtype):
    assert devices.default_dtype(config, torch.device(device)) == dtype


def test_available_memory_of_this_machine():
    available = devices.available_bytes(torch.device("cpu"))
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0.01 * GIB < available <= total


def test_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 24 * GIB))
    assert devices.available_bytes(torch.device("cuda")) == 3 * GIB


@pytest.mark.parametrize(
    ("dtype", "device", "allowed"),
    [
        (torch.float32, "cuda", "float16 or bfloat16 on cuda, got torch.float32"),
        (torch.float64, "cpu", "float16 or bfloat16 or float32 on cpu, got torch.float64"),
        (torch.float32, "cpu", None),
        (torch.bfloat16, "cuda", None),
    ],
    ids=str,
)
def test_a_dtype_that_does_not_run_raises(dtype, device, allowed):
    if allowed is None:
        devices.check_dtype(dtype, torch.device(device))
        return
    with pytest.raises(TypeError, match=f"dtype must be {allowed}"):
        devices.check_dtype(dtype, torch.device(device))


def test_load_checks_the_dtype():
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        fastshard.load(device="cpu", dtype=torch.float64)
