"""Instances outside the menus: their source compiles, runs in the place of a variant, is right."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from emulator import runtime
from emulator.build import build_library
from fastshard.tune import inputs, instances, nvcc
from fastshard.tune.compiler import Compiler
from fastshard.tune.problem import Problem
from helpers import KERNELS_ONLY

ROOT = Path(__file__).parents[2]
HAS_NVCC = nvcc.has_nvcc(nvcc.find_cuda_home())
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="there is no nvcc")


def load(problem, variant, device, folder) -> None:
    """Compile an instance by the kernels' compiler, and let the raw op find it."""
    if device.type == "cuda":
        if not HAS_NVCC:
            pytest.skip("there is no nvcc")
        compiler = Compiler(ROOT, folder)
        assert compiler.build(problem, [variant]) == {}
        library, add = compiler.library(problem, variant), None
    else:
        code = folder / f"{problem.op}-{variant}.cu"
        code.write_text(instances.source(problem.op, problem.dtype, variant))
        library, add = build_library(code.with_suffix(".so"), [code]), runtime.add_instance
    instances.load(problem.op, problem.dtype, variant, library, add)


def run(problem, variant, device) -> None:
    made = inputs.make(problem, device, 1, seed=0)
    golden, plain = made.golden(), made.plain()
    out = made.sample(made.call(0, variant))
    assert (out.double() - golden).norm() <= 2 * (plain.double() - golden).norm()


@KERNELS_ONLY
@pytest.mark.parametrize(
    ("problem", "variant"),
    [
        (Problem("rms_norm", "bfloat16", (3, 2296)), "96x3"),  # a ragged row
        (Problem("add_rms_norm", "float16", (3, 2304)), "96x3"),
        (Problem("layer_norm", "float16", (9, 376)), "16x3"),  # rows of a block, one missing
        (Problem("add_layer_norm", "bfloat16", (2, 3000)), "192x2"),
        (Problem("fused_mlp", "bfloat16", (150, 200, 88)), "tiles_64x96_32x2_4x1"),
        (Problem("fused_mlp", "float16", (40, 200, 200)), "tiles_32x128_64x3_2x4"),
    ],
    ids=str,
)
def test_an_instance_runs_and_is_right(problem, variant, device, tmp_path):
    with pytest.raises(RuntimeError, match=rf"no variant {variant} holds rows|got {variant}"):
        run(problem, variant, device)
    load(problem, variant, device, tmp_path)
    run(problem, variant, device)
    other = "float16" if problem.dtype == "bfloat16" else "bfloat16"
    with pytest.raises(RuntimeError, match=rf"no variant {variant} holds rows|got {variant}"):
        run(Problem(problem.op, other, problem.shape), variant, device)


@KERNELS_ONLY
def test_an_instance_refuses_longer_rows(device, tmp_path):
    load(Problem("rms_norm", "float16", (1, 64)), "32x3", device, tmp_path)
    run(Problem("rms_norm", "float16", (5, 768)), "32x3", device)
    with pytest.raises(RuntimeError, match="no variant 32x3 holds rows of 1552 bytes"):
        run(Problem("rms_norm", "float16", (5, 776)), "32x3", device)


@KERNELS_ONLY
def test_an_instance_of_other_parameters_is_refused(device):
    add = runtime.add_instance
    if device.type == "cuda":
        import fastshard._C

        add = fastshard._C.add_instance
    add("layer_norm", "float16", "96x7", 8, 1)
    with pytest.raises(
        RuntimeError,
        match=r"takes 8 bytes of parameters, this build has \d+: it was compiled from another csrc",
    ):
        run(Problem("layer_norm", "float16", (2, 64)), "96x7", device)


def test_sources():
    """One launcher of one dtype, and of the add_ norms that of the norm."""
    text = instances.source("add_rms_norm", "bfloat16", "320x3")
    assert text == instances.source("rms_norm", "bfloat16", "320x3")
    assert "launch_rms_norm<__nv_bfloat16, RowMenu<RowVariant{320, 3}>>(params, {320, 3}" in text
    assert "FS_INSTANCE(fastshard::RmsNormParams," in text
    text = instances.source("layer_norm", "float16", "64x5")
    assert "FS_INSTANCE(fastshard::LayerNormParams," in text
    text = instances.source("fused_mlp", "float16", "tiles_128x192_32x4_4x2")
    assert "launch_tiled_mlp<__half, GemmConfig<4, 2, 32, 96, 32, 4, 1>>(params, stream)" in text
    with pytest.raises(ValueError, match="must have a name like"):
        instances.source("fused_mlp", "float16", "tiles_128x192")


def test_a_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / "a.so").write_text("no library")
    with pytest.raises(OSError, match=r"a\.so"):
        instances.load("rms_norm", "float16", "1x1", tmp_path / "a.so", runtime.add_instance)


@needs_nvcc
def test_nvcc_compiles_instances(tmp_path):
    """And what it makes has what loading asks for."""
    compiler = Compiler(ROOT, tmp_path)
    problem = Problem("rms_norm", "bfloat16", (1, 4096))
    assert compiler.build(problem, ["320x2", "256x2"]) == {}
    assert compiler.library(problem, "256x2") is None, "of the menu"
    (made,) = tmp_path.iterdir()
    assert made == compiler.library(problem, "320x2")
    names = subprocess.check_output(["nm", "-D", "--defined-only", made], text=True)
    assert "fastshard_instance" in names
    assert "fastshard_params_bytes" in names
    adds = []
    instances.load("rms_norm", "bfloat16", "320x2", made, lambda *what: adds.append(what))
    ((*what, num_bytes, address),) = adds
    assert what == ["rms_norm", "bfloat16", "320x2"]
    launch = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(address)
    assert launch(bytes(num_bytes), None) is None, "no rows: nothing to launch"


@needs_nvcc
@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("tiles_128x256_64x4_2x4", "does not compile: .*more shared memory than a block"),
        ("tiles_128x192_32x2_2x2", "spills [1-9][0-9]* bytes of registers"),
    ],
)
def test_nvcc_says_why_not(variant, why, tmp_path):
    """Of what the rules of the search leave out."""
    problem = Problem("fused_mlp", "float16", (512, 512, 512))
    found = Compiler(ROOT, tmp_path).build(problem, [variant])
    assert found.keys() == {variant}
    assert re.search(why, found[variant]), found
    assert list(tmp_path.iterdir()) == [], "nothing that could be taken for an instance"
