"""One line of an error, and which errors speak only of another rank."""

import pytest
import torch
import torch.distributed as dist

from fastshard import CheckpointError
from fastshard.dist import causes
from fastshard.dist.causes import (
    count_oom_kills,
    describe,
    is_device_fault,
    is_expected,
    is_lost_connection,
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\n  Tried 2 GiB."), None),
        (CheckpointError("x.safetensors: truncated"), None),
        (MemoryError(), "MemoryError"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
        (dist.DistNetworkError("Broken pipe\nException raised from f\nframe #0"), "Broken pipe"),
    ],
)
def test_an_error_is_one_line(error, text):
    assert describe(error) == (text or " ".join(str(error).split()))
    assert is_expected(error) == (not isinstance(error, KeyError | AssertionError))


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistNetworkError("x"), True),
        (dist.DistBackendError("x"), True),
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("/gloo/ is no directory"), False),
        (MemoryError(), False),
    ],
)
def test_a_lost_connection_is_told_from_a_fault(error, is_lost):
    assert is_lost_connection(error) is is_lost


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("CUDA error: 7"), False),
    ],
)
def test_a_fault_of_a_device_is_told_from_want_of_memory(error, is_fault):
    assert is_device_fault(error) is is_fault


def test_kills_for_want_of_memory_are_counted(monkeypatch, tmp_path):
    path = tmp_path / "vmstat"
    monkeypatch.setattr(causes, "_VMSTAT", path)
    assert count_oom_kills() == 0
    path.write_text("nr_free_pages 12\noom_kill 7\noom_kill_other 5\n")
    assert count_oom_kills() == 7
