"""The machine-code check of the CI: each of its rules fails on a kernel that breaks it."""

import collections
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RULES = {
    "tensor_cores": [r"\battention_kernel<"],
    "allow_local": [
        {"kernel": "sample_kernel", "reason": "a test"},
        {"kernel": "rope_kernel", "archs": ["sm_90"], "max_stack": 8, "reason": "a test"},
    ],
}

if sys.version_info < (3, 11):
    pytest.skip("the check reads TOML with tomllib, of Python 3.11", allow_module_level=True)


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check", ROOT / ".ci" / "check_machine_code.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def kernel(check, name, *, arch="sm_86", stack=0, shared=0, **instructions):
    counts = collections.Counter({key.replace("_", "."): n for key, n in instructions.items()})
    return check.Kernel(name, arch, 32, stack, shared, counts)


@pytest.mark.parametrize(
    ("archs", "errors"),
    [
        ("8.6+PTX", []),
        ("8.6", ["code for compute_86, not of 8.6"]),
        ("9.0a;8.6+PTX", ["no code for sm_90a, of 9.0a;8.6+PTX"]),
        (
            "8.0+PTX",
            [
                "no code for compute_80, of 8.0+PTX",
                "no code for sm_80, of 8.0+PTX",
                "code for compute_86, not of 8.0+PTX",
                "code for sm_86, not of 8.0+PTX",
            ],
        ),
    ],
)
def test_images_are_those_that_the_wheel_claims(check, archs, errors):
    assert check.check_images({"sm_86"}, {"compute_86"}, archs) == errors


@pytest.mark.parametrize(
    ("name", "usage", "error"),
    [
        ("norm_kernel<float>", {}, None),
        ("norm_kernel<float>", {"stack": 8}, "8 bytes of stack, 0 local-memory instructions"),
        ("norm_kernel<float>", {"LDL_64": 3}, "0 bytes of stack, 3 local-memory instructions"),
        ("sample_kernel<float>", {"stack": 8}, None),
        ("norm_kernel<float>", {"shared": 4}, "4 bytes of static shared memory"),
        ("attention_kernel<__half>", {"HMMA_16816_F32": 1}, None),
        ("attention_kernel<__nv_bfloat16>", {"HMMA_16816_F32_BF16": 1}, None),
        ("attention_kernel<__nv_bfloat16>", {"HMMA_16816_F32": 1}, "no HMMA of its own dtype"),
        ("attention_kernel<__half>", {"HMMA_16816_F32_BF16": 1}, "no HMMA of its own dtype"),
        ("attention_kernel<__half>", {"FFMA": 9}, "no HMMA of its own dtype"),
    ],
)
def test_kernel_rules(check, name, usage, error):
    errors = check.check_kernel(kernel(check, name, **usage), RULES)
    assert len(errors) == (error is not None)
    assert error is None or error in errors[0]


@pytest.mark.parametrize(
    ("arch", "stack", "allowed"), [("sm_90", 8, True), ("sm_90", 16, False), ("sm_86", 8, False)]
)
def test_local_memory_is_allowed_of_an_architecture_up_to_a_size(check, arch, stack, allowed):
    rope = kernel(check, "rope_kernel<float>", arch=arch, stack=stack)
    assert (check.check_kernel(rope, RULES) == []) == allowed


def test_a_rule_for_an_architecture_counts_where_that_is_compiled_for(check):
    names = ("attention_kernel<__half>", "attention_kernel<__nv_bfloat16>", "sample_kernel<float>")
    kernels = [kernel(check, name) for name in names]
    assert check.check_rules_used(kernels, RULES) == []
    kernels.append(kernel(check, "sample_kernel<float>", arch="sm_90"))
    errors = check.check_rules_used(kernels, RULES)
    assert errors == ["allow_local rule 'rope_kernel' matches no kernel"]


def test_a_rule_that_matches_nothing_is_an_error(check):
    errors = check.check_rules_used([kernel(check, "attention_kernel<__half>")], RULES)
    assert errors == [
        "allow_local rule 'sample_kernel' matches no kernel",
        r"tensor_cores '\\battention_kernel<' has no kernel for __nv_bfloat16",
    ]


@pytest.mark.parametrize(
    ("arch", "reported", "static"),
    [("sm_86", 1024, 1024), ("sm_90", 1024, 0), ("sm_90a", 1040, 16), ("sm_90", 0, 0)],
)
def test_what_the_system_reserves_is_no_static_shared_memory(check, arch, reported, static):
    rope = kernel(check, "rope_kernel<float>", arch=arch)
    usage = f"  Function k:\n  REG:32 STACK:0 SHARED:{reported} LOCAL:0 CONSTANT[0]:528\n"
    check.machine_code._read_usage({"k": rope}, usage)
    assert rope.static_shared == static


def test_a_kernel_that_is_compiled_twice_is_an_error(check):
    kernels = [kernel(check, name) for name in ("a<1>", "a<2>", "a<1>")]
    assert check.check_compiled_once(kernels) == ["sm_86 a<1>: compiled 2 times"]


def test_a_kernel_that_an_architecture_lacks_is_an_error(check):
    kernels = [kernel(check, "a"), kernel(check, "b"), kernel(check, "b", arch="sm_90")]
    assert check.check_compiled_once(kernels) == ["sm_90 a: not compiled"]


def test_sources_launch_in_one_way(check, tmp_path):
    assert check.check_sources(ROOT / "csrc") == []
    (tmp_path / "bad.cu").write_text(
        "// <<< in a comment\nkernel<<<1, 1>>>();\n__shared__ int x;\n"
    )
    assert [error.split(":")[1] for error in check.check_sources(tmp_path)] == ["2", "3"]


def test_shared_storage_is_bounded_when_compiling(tmp_path):
    nvcc = next(filter(shutil.which, ["/usr/local/cuda/bin/nvcc", "nvcc"]), None)
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("needs nvcc and g++")
    source = tmp_path / "bound.cu"
    source.write_text(
        '#include "common/launch.cuh"\n'
        "struct Storage { char bytes[SIZE]; };\n"
        "int bytes() { return fastshard::shared_bytes<Storage>(); }\n"
    )
    command = [nvcc, "-std=c++20", "-DFASTSHARD_CUDA_ARCHS=8.6", f"-I{ROOT / 'csrc'}", "-c"]
    for size, fits in [(101376, True), (101377, False)]:
        arguments = [f"-DSIZE={size}", str(source), "-o", str(tmp_path / "bound.o")]
        run = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert (run.returncode == 0) == fits, run.stderr
        assert fits or "more shared memory than a block" in run.stderr
