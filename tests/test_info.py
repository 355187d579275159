"""``fastshard info``: every fact under its key, and a line for each."""

import json
import types

import pytest
import torch

import fastshard
from fastshard import build_record, info, ops


@pytest.fixture
def gpus(monkeypatch):
    """A build for 8.6 with PTX, an A10 and a T4."""
    found = [
        types.SimpleNamespace(name="NVIDIA A10", major=8, minor=6, total_memory=24 * 2**30),
        types.SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=16 * 2**30),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(ops, "HAS_KERNELS", True)
    for name, value in {
        "CUDA_ARCHS": "8.6+PTX;9.0a",
        "CUDA_VERSION": "13.0",
        "TORCH_TARGET": "2.11",
    }.items():
        monkeypatch.setattr(build_record, name, value)


def test_facts_of_a_cuda_build(gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path))
    facts = info.describe()
    assert facts["fastshard"] == fastshard.__version__
    assert facts["torch"] == torch.__version__
    assert facts["build"] == {
        "cuda": "13.0",
        "architectures": ["8.6+PTX", "9.0a"],
        "torch_target": "2.11",
        "kernels_loaded": True,
    }
    assert [(gpu["name"], gpu["compute_capability"], gpu["served"]) for gpu in facts["gpus"]] == [
        ("NVIDIA A10", "8.6", True),
        ("Tesla T4", "7.5", False),
    ]
    assert facts["cache_dir"] == {"path": str(tmp_path), "exists": True}
    assert facts["tuning_tables"]["measured"] == {
        "path": str(tmp_path / "tuning"),
        "exists": False,
    }
    assert json.loads(json.dumps(facts)) == facts


def test_text_of_a_cuda_build(gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "none"))
    lines = dict(line.split("  ", 1) for line in info.format_text(info.describe()).splitlines())
    lines = {name.strip(): text.strip() for name, text in lines.items()}
    assert lines["kernels"] == "CUDA 13.0 for 8.6+PTX 9.0a, torch >= 2.11 (loaded)"
    assert lines["gpu 0"] == "NVIDIA A10, compute capability 8.6, 24.0 GiB (served)"
    assert lines["gpu 1"].endswith("7.5, 16.0 GiB (not served: no code for it in this build)")
    assert lines["cache"] == f"{tmp_path / 'none'} (not there yet)"


def test_text_of_a_cuda_build_under_a_cpu_torch(gpus, monkeypatch):
    monkeypatch.setattr(ops, "HAS_KERNELS", False)
    text = info.format_text(info.describe())
    assert "torch >= 2.11 (not loaded: this torch is not a CUDA build)" in text
    assert "24.0 GiB (not served" in text


def test_text_of_a_pure_build(monkeypatch):
    for name in ("CUDA_ARCHS", "CUDA_VERSION", "TORCH_TARGET"):
        monkeypatch.setattr(build_record, name, "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = info.format_text(info.describe())
    assert "kernels          none: pure Python, runs on CPU\n" in text
    assert "gpus             none visible\n" in text
