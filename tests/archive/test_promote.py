"""Promotion: who may be promoted, what is kept of whom, and that the op then runs the kernel.

Kernels are C++ here, and run by the raw ops on the emulator. What is measured is made up.
"""

import ctypes
import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch

import fastshard.build_record
from archive import shared_builds
from archive.parquet_rows import write_rows
from emulator import runtime
from fastshard import cli
from fastshard.archive import catalog, compile, promote, sandbox, source, verdict, wrapper
from fastshard.ops import promoted, variants
from fastshard.ops.variants import Entry, Table, read_table, write_table
from fastshard.tune.problem import Measurement, Problem, rejected
from helpers import (
    CUDA_ONLY,
    EMULATOR_ONLY,
    assert_as_accurate,
    assert_replays_in_a_graph,
    cuda_kernel_names,
    skip_or_fail,
)

KERNELS = Path(__file__).parent / "kernels"
CODE = {op: (KERNELS / f"{op}.cpp").read_text() for op in ("rms_norm", "layer_norm")}
ID = "1/36/rms_norm_rows"


def measured(us, auto_us=2.0):
    return Measurement(us, us, us, auto_us, 0.5, 1e-4, None, 0.1)


class Measurer:
    """Answers what it is told; keeps what it was asked, and what was there to be loaded."""

    def __init__(self, answer):
        self.answer, self.asked, self.is_closed = answer, [], False

    def __call__(self, environment):
        self.environment = environment
        return self.measure

    @property
    def measure(self):
        parent = self

        class Asked:
            def __call__(self, problem, variants):
                (name,) = variants
                parent.asked.append((problem, name))
                root = Path(parent.environment["FASTSHARD_CACHE_DIR"])
                found = promoted.read(root / "promoted" / name)
                assert promoted.why_unusable(found, root / "promoted" / name) is None
                assert found.op == problem.op
                return [parent.answer(problem)]

            def close(self):
                parent.is_closed = True

        return Asked()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Stands for the compiler; what it was given is kept."""
    given = []

    def build(code, **settings):
        given.append((code, settings))
        (tmp_path / "made.so").write_bytes(b"a library")
        return compile.Built(tmp_path / "made.so", None, tmp_path)

    monkeypatch.setattr(compile, "build", build)
    return given


def fetch(tmp_path, *rows, **verdicts):
    """An archive of these rows (by default one that may be promoted), verified unless said."""
    rows = rows or ({"CUDA_Code": CODE["rms_norm"]},)
    source.fetch(write_rows(tmp_path / "a.parquet", *rows))
    for row in source.rows(source.load()):
        code = source.whole_row(source.load(), row.id).cuda_code or ""
        keep(row.id, code, **verdicts)


def keep(identity, code, name=verdict.VERIFIED, **values):
    digest = hashlib.sha256(code.encode()).hexdigest() if code else ""
    values = {"times": {"float32": {"candidate": 1.0, "eager": 3.0}}, **values}
    verdict.save(verdict.Verdict(identity, name, code_sha256=digest, **values))


def run(measurer, text=ID, **settings):
    said = []
    settings = {"trusts": True, "parts": [], **settings}
    found = promote.promote(text, measurer=measurer, say=said.append, **settings)
    return found, said


def wins_in_float16(problem):
    if problem.dtype == "bfloat16":
        return rejected("bfloat16 is not implemented", 0.1)
    return measured(1.5 if problem.shape[0] == 512 else 2.5)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_kept(cache, built, tmp_path):
    fetch(tmp_path)
    measurer = Measurer(wins_in_float16)
    found, said = run(measurer)
    name = f"promoted_{hashlib.sha256(CODE['rms_norm'].encode()).hexdigest()[:12]}"
    folder = cache / "promoted" / name
    assert promoted.read_all() == [found] == [promoted.read(folder)]
    assert (found.name, found.op, found.dtypes) == (name, "rms_norm", ("float16",))
    assert (found.id, found.op_name, found.kernel_name) == (ID, "36_RMSNorm_", "rms_norm_rows")
    assert (found.source, found.revision) == (str(tmp_path / "a.parquet"), None)
    assert (found.licence, found.attribution) == (catalog.LICENCE, catalog.ATTRIBUTION)
    assert found.fastshard == fastshard.build_record.source_version()
    assert found.torch == torch.__version__
    assert found.verified == {"float32": {"candidate": 1.0, "eager": 3.0}}
    assert [tuple(each["shape"]) for each in found.measured] == [
        *((1, 4096), (16, 4096), (512, 4096), (2048, 4096), (8192, 4096))
    ]
    assert found.measured[2] == {
        "dtype": "float16",
        "shape": [512, 4096],
        "us": 1.5,
        "auto_us": 2.0,
    }
    assert {path.name for path in folder.iterdir()} == {"kernel.json", "kernel.so", "kernel.cpp"}
    assert (folder / "kernel.cpp").read_text() == CODE["rms_norm"]
    assert (folder / "kernel.so").read_bytes() == b"a library"
    assert promoted.why_unusable(found, folder) is None
    assert len(measurer.asked) == 10
    assert measurer.is_closed
    assert "rms_norm float16 512x4096: 1.50 us, ours 2.00 us (faster)" in said
    assert "rms_norm float16 1x4096: 2.50 us, ours 2.00 us" in said
    assert "rms_norm bfloat16 1x4096: bfloat16 is not implemented" in said
    assert said[-2:] == [
        "faster than ours at 1 of 10 shapes of llama-3.1-8b",
        "fastshard tune --op rms_norm --model llama-3.1-8b decides where it is used",
    ]
    assert [path.name for path in cache.iterdir() if path.name[0] == "."] == []


def test_what_is_compiled(cache, built, tmp_path):
    fetch(tmp_path)
    found, _ = run(Measurer(wins_in_float16))
    ((code, settings),) = built
    assert settings == {"parts": [], "cuda": False, "arch": None}
    assert CODE["rms_norm"] in code
    assert "#define FASTSHARD_LAYER_NORM" not in code
    assert f"the promoted kernel {found.name} failed" in code
    assert ID not in code, "a name of the archive is no code"
    assert "#define FASTSHARD_LAYER_NORM" in wrapper.wrapped("", "layer_norm", "x")


def test_shapes_and_dtypes_of_the_model(cache, built, tmp_path):
    fetch(tmp_path)
    measurer = Measurer(lambda problem: measured(1.0))
    run(measurer, model_name="llama-3.2-1b", dtypes=["bfloat16"])
    assert [problem for problem, _ in measurer.asked] == [
        Problem("rms_norm", "bfloat16", (rows, 2048)) for rows in (1, 16, 512, 2048, 8192)
    ]


def test_layer_norms_are_measured_at_the_model_s_width(cache, built, tmp_path):
    fetch(tmp_path, {"Op_Name": "40_LayerNorm", "CUDA_Code": CODE["layer_norm"]})
    measurer = Measurer(lambda problem: measured(1.0))
    found, _ = run(measurer, dtypes=["float16"])
    assert found.op == "layer_norm"
    assert {problem.shape[1] for problem, _ in measurer.asked} == {4096}
    assert {problem.op for problem, _ in measurer.asked} == {"layer_norm"}


def test_what_is_not_faster_is_not_kept(cache, built, tmp_path):
    fetch(tmp_path)
    before = content(cache)
    with pytest.raises(
        RuntimeError,
        match=r"^1/36/rms_norm_rows is not promoted: at no shape of llama-3\.1-8b is it 2 % faster "
        r"than ours; at best it takes 0\.99 of our time, rms_norm float16 1x4096$",
    ):
        run(Measurer(lambda problem: measured(1.97 + problem.shape[0] / 1e6)))
    with pytest.raises(
        RuntimeError, match=r"faster than ours; at none may it be used: it crashed$"
    ):
        run(Measurer(lambda problem: rejected("it crashed", 0.1)))
    assert content(cache) == before


def test_an_interrupted_measurement_keeps_nothing(cache, built, tmp_path):
    fetch(tmp_path)
    before = content(cache)

    def interrupt(problem):
        raise KeyboardInterrupt

    measurer = Measurer(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(measurer)
    assert measurer.is_closed
    assert content(cache) == before


def test_promoted_again_takes_the_place(cache, built, tmp_path):
    fetch(tmp_path)
    run(Measurer(wins_in_float16))
    found, _ = run(Measurer(lambda problem: measured(1.0)))
    assert promoted.read_all() == [found]
    assert found.dtypes == ("float16", "bfloat16")


def test_demote(cache, built, tmp_path):
    fetch(tmp_path)
    for text in (ID, "1/3", None):
        found, _ = run(Measurer(wins_in_float16))
        with pytest.raises(ValueError, match=rf"got ''; there are: {ID}$"):
            promote.demote("")
        before = content(cache)
        assert promote.demote(text or found.name) == found
        assert promoted.read_all() == []
        kept = {name for name in before if not name.startswith("promoted/")}
        assert content(cache).keys() == kept
    for text in (ID, "", "promoted_"):
        with pytest.raises(
            ValueError, match=rf"^id must be of one promoted kernel, got '{text}'; there are: none$"
        ):
            promote.demote(text)


def test_demote_takes_it_out_of_the_user_s_tables(cache, built, tmp_path):
    fetch(tmp_path)
    found, _ = run(Measurer(wins_in_float16))
    version = fastshard.build_record.source_version()
    entries = [
        Entry("rms_norm", "float16", (rows, 4096), variant)
        for rows, variant in ((1, found.name), (16, "256x2"), (512, "promoted_other"))
    ]
    tables = cache / "tables"
    for name, kept, of_version in (("a", entries, version), ("b", entries[1:], version)):
        write_table(tables / f"{name}.json", Table("GPU", "measured", of_version, tuple(kept)))
    write_table(tables / "c.json", Table("GPU", "measured", "0.0.1", tuple(entries)))
    before, written = content(tables), (tables / "b.json").stat().st_mtime_ns
    promote.demote(ID)
    assert read_table(tables / "a.json").entries == tuple(entries[1:])
    after = content(tables)
    assert (after["b.json"], after["c.json"]) == (before["b.json"], before["c.json"])
    assert (tables / "b.json").stat().st_mtime_ns == written


def test_demote_of_several(cache, built, tmp_path):
    rows = [{"CUDA_Code": f"code {i}", "Kernel_Name": f"k{i}"} for i in range(2)]
    fetch(tmp_path, *rows)
    for i in range(2):
        run(Measurer(wins_in_float16), f"1/36/k{i}")
    with pytest.raises(ValueError, match=r"got '1/36/'; there are: 1/36/k., 1/36/k."):
        promote.demote("1/36/")
    assert promote.demote("1/36/k1").kernel_name == "k1"
    assert [each.kernel_name for each in promoted.read_all()] == ["k0"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"Op_Name": "23_Softmax"},
            "op must be one whose meaning is ours, rmsnorm, layernorm, to be promoted, got "
            "23_Softmax of 1/36/rms_norm_rows: ours is a part of attention",
        ),
        ({"Op_Name": "19_ReLU"}, "to be promoted, got 19_ReLU of 1/36/rms_norm_rows$"),
        ({"Op_Name": None}, "to be promoted, got null of 1/36/rms_norm_rows$"),
    ],
)
def test_ops_that_are_not_ours(values, message, cache, built, tmp_path):
    fetch(tmp_path, values)
    with pytest.raises(ValueError, match=message):
        run(None)
    assert built == []


def test_what_is_not_verified(cache, built, tmp_path):
    fetch(tmp_path)
    verify = "and this code is not: fastshard archive verify 1/36/rms_norm_rows"
    verdict.path_of(ID).unlink()
    with pytest.raises(ValueError, match=f"^{ID} must be verified before it is promoted, {verify}"):
        run(None)
    keep(ID, "earlier code")
    with pytest.raises(ValueError, match=verify):
        run(None)
    keep(ID, CODE["rms_norm"], verdict.WRONG, reason="off\x1b by 2")
    with pytest.raises(
        ValueError, match=r"before it is promoted, its verdict is wrong: off\\x1b by 2$"
    ):
        run(None)
    assert built == []


def test_no_consent(cache, built, tmp_path, capsys):
    fetch(tmp_path)
    with pytest.raises(ValueError, match=r"^promote lets native code that nobody has read run"):
        run(None, trusts=False)
    assert cli.main(["archive", "promote", ID]) == 1
    err = capsys.readouterr().err
    assert "outside of any sandbox: if you trust it, pass --i-trust-this-code\n" in err
    assert built == []


def test_the_commands(cache, built, tmp_path, capsys, monkeypatch):
    fetch(tmp_path)
    measurer = Measurer(wins_in_float16)
    monkeypatch.setattr(promote, "GpuMeasurer", lambda environment: measurer(environment))
    monkeypatch.setattr(sandbox, "allowed_parts", lambda: ["network"])
    command = ["archive", "promote", ID, "--i-trust-this-code", "--model", "llama-3.2-1b"]
    assert cli.main([*command, "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert "faster than ours at 1 of 5 shapes of llama-3.2-1b\n" in out
    assert built[0][1]["parts"] == ["network"]
    (found,) = promoted.read_all()
    assert cli.main(["archive", "demote", ID]) == 0
    assert capsys.readouterr().out == f"{found.name} is deleted\n"
    assert cli.main(["archive", "demote", ID]) == 1
    assert "id must be of one promoted kernel, got" in capsys.readouterr().err


def test_the_state_names_it(cache, built, tmp_path, capsys):
    fetch(tmp_path)
    found, _ = run(Measurer(lambda problem: measured(1.0)))
    assert cli.main(["archive"]) == 0
    line = f"promoted     {ID} as {found.name} of rms_norm in float16, bfloat16\n"
    assert line in capsys.readouterr().out


def test_cuda_code_without_a_gpu(cache, built, tmp_path, monkeypatch):
    fetch(tmp_path, {"CUDA_Code": "__global__ void f() {}"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError,
        match=rf"^{ID} is CUDA code, promoted only on the GPU that shall run it, and",
    ):
        run(None)
    assert built == []


def test_it_does_not_compile(cache, tmp_path, monkeypatch):
    fetch(tmp_path)
    failed = compile.Built(None, "forward must take x and eps", tmp_path)
    monkeypatch.setattr(compile, "build", lambda code, **settings: failed)
    with pytest.raises(
        RuntimeError,
        match=rf"^{ID} does not compile as a variant of rms_norm: forward must take x and eps$",
    ):
        run(None)
    assert not (cache / "promoted").exists()


# What follows compiles: each op once. That of rms_norm has further functions to choose from.

CHOICES = """
torch::Tensor no_eps(torch::Tensor x) { return x; }
int no_tensor(torch::Tensor x, float eps) { return 1; }
torch::Tensor whole(torch::Tensor x, int64_t dim) { return x; }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const char* given = std::getenv("FASTSHARD_TEST_FORWARD");
  const std::string choice = given == nullptr ? "" : given;
  if (choice == "no eps") m.def("forward", &no_eps);
  if (choice == "no tensor") m.def("forward", &no_tensor);
  if (choice == "whole") m.def("forward", &whole, "with a dimension");
  if (!choice.empty()) return;
"""
MODULE = "PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {\n"
COMPILED = {**CODE, "rms_norm": CODE["rms_norm"].replace(MODULE, CHOICES)}


@pytest.fixture(scope="module", params=["rms_norm", "layer_norm"])
def kernel(request, tmp_path_factory):
    """An op and the folder of a cache in which its kernel is promoted."""
    try:
        compile.check_compilers(cuda=False)
    except RuntimeError as error:
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", str(error))
    folder = tmp_path_factory.mktemp(request.param)
    builds = shared_builds.folder_of(tmp_path_factory)
    shared_builds.use(builds, folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSHARD_CACHE_DIR", str(folder / "cache"))
        shared_builds.compile_once(patch, builds)
        op_name = {"rms_norm": "36_RMSNorm_", "layer_norm": "40_LayerNorm"}[request.param]
        fetch(folder, {"Op_Name": op_name, "CUDA_Code": COMPILED[request.param]})
        found, _ = run(Measurer(lambda problem: measured(1.0)))
    return request.param, found.name, folder / "cache"


def reference(op, x, weight, bias, eps):
    if op == "rms_norm":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@EMULATOR_ONLY
def test_the_op_runs_it(device, kernel, monkeypatch):
    op, name, folder = kernel
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(folder))
    raw = getattr(torch.ops.fastshard, op)
    called = []

    def load(*words):
        called.append(words)
        promoted.load(*words, runtime.add_instance)

    def call(x, weight, bias, *, eps=0.5, in_fp32=False, variant=name):
        rest = (eps, in_fp32) if op == "rms_norm" else (bias, eps)
        return raw(x, weight, *rest, variant)

    with runtime.instance_loader(load):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            weight, bias = torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
            strided = torch.randn(6, 2, 3, 192, dtype=dtype)[::2, :, :, 64:128]
            for x in (torch.randn(7, 64, dtype=dtype), strided, strided[:, :1, ::2]):
                golden = reference(op, x.double(), weight.double(), bias.double(), 0.5)
                naive = reference(op, x, weight, bias, 0.5)
                for in_fp32 in (False, True):
                    out = call(x, weight, bias, in_fp32=in_fp32)
                    assert out.is_contiguous()
                    # In 16 bit the kernel rounds before the weight, as the op does.
                    plain = call(x, weight, bias, in_fp32=in_fp32, variant="auto")
                    assert_as_accurate(out, golden, plain if op == "rms_norm" else naive)
            assert call(torch.randn(0, 64, dtype=dtype), weight, bias).shape == (0, 64)
        if op == "layer_norm":  # no weight and no bias are ones and zeros
            x = torch.randn(7, 64)
            golden = torch.nn.functional.layer_norm(x.double(), (64,), None, None, 0.5)
            assert (call(x, None, None) - golden).abs().max() < 1e-5
        else:
            with pytest.raises(
                RuntimeError,
                match=rf"the promoted kernel {name} failed, fastshard archive demote it: five rows",
            ):
                call(torch.randn(5, 64), torch.ones(64), None)
    dtypes = ("float16", "bfloat16", "float32")
    assert called == [(op, dtype, name) for dtype in dtypes]


class Params(ctypes.Structure):
    """Of rms_norm, as far as it is read before ``forward`` is called: no residual, 1 row."""

    _fields_ = (("pointers", ctypes.c_void_p * 4), ("rest", ctypes.c_int64 * 12))


@pytest.mark.parametrize("kernel", ["rms_norm"], indirect=True)
def test_signatures_that_are_not_the_op_s(kernel, monkeypatch):
    _, name, folder = kernel
    # A copy: the library that the op runs is another.
    library = ctypes.CDLL(shutil.copy(folder / "promoted" / name / "kernel.so", folder))
    launch = library.fastshard_instance_float32
    launch.restype = ctypes.c_char_p
    params = Params()
    params.rest[8] = 1  # num_tokens
    for choice in ("no eps", "no tensor", "whole"):
        monkeypatch.setenv("FASTSHARD_TEST_FORWARD", choice)
        ctypes.PYFUNCTYPE(None)(("fastshard_prepare", library))()
        assert launch(ctypes.byref(params), None).decode() == (
            f"the promoted kernel {name} failed, fastshard archive demote it: "
            "its forward must take x and eps, and return a tensor"
        )


# On a GPU, by nvcc: the kernel is launched on no stream, which the wrapper must put right.


@pytest.fixture
def cuda_archive(tmp_path, tmp_path_factory, monkeypatch):
    """The folder of a cache with a LayerNorm in CUDA, verified."""
    builds = shared_builds.folder_of(tmp_path_factory)
    shared_builds.use(builds, tmp_path / "cache")
    shared_builds.compile_once(monkeypatch, builds)
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))
    code = (KERNELS / "layer_norm.cu").read_text()
    fetch(tmp_path, {"Op_Name": "40_LayerNorm", "CUDA_Code": code})
    return tmp_path / "cache"


@CUDA_ONLY
def test_a_slower_kernel_is_measured_and_refused(device, cuda_archive):
    """It is right, and its launches are captured in graphs; but it is slower, its copy included."""
    said = []
    with pytest.raises(RuntimeError, match=r"ours; at best it takes [0-9.]+ of our time"):
        promote.promote(ID, trusts=True, dtypes=["float16"], parts=[], say=said.append)
    assert len(said) == 5
    assert all(re.search(r"4096: [0-9.]+ us, ours [0-9.]+ us$", line) for line in said), said
    assert not (cuda_archive / "promoted").exists()


@CUDA_ONLY
def test_a_table_names_it_and_the_op_runs_it_in_a_graph(device, cuda_archive, monkeypatch):
    found, _ = run(Measurer(lambda problem: measured(1.0)))
    entry = Entry("layer_norm", "float16", (7, 4096), found.name)
    version = fastshard.build_record.source_version()
    table = Table(torch.cuda.get_device_name(device), "measured", version, (entry,))
    write_table(variants.user_tables_dir() / "gpu.json", table)
    loads, load = [], promoted.load
    monkeypatch.setattr(promoted, "load", lambda *words: (loads.append(words), load(*words)))
    x = torch.randn(7, 4096, device=device, dtype=torch.float16)
    weight, bias = torch.randn(2, 4096, device=device, dtype=torch.float16)
    try:
        variants.use_tables()
        names = cuda_kernel_names(lambda: fastshard.ops.layer_norm(x, weight, bias))
        assert loads == [("layer_norm", "float16", found.name)]
        assert any("layernorm_rows" in name for name in names), names
        assert_replays_in_a_graph(lambda: fastshard.ops.layer_norm(x, weight, bias), x)
        golden = reference("layer_norm", x.double(), weight.double(), bias.double(), 1e-5)
        naive = reference("layer_norm", x, weight, bias, 1e-5)
        assert_as_accurate(fastshard.ops.layer_norm(x, weight, bias), golden, naive)
    finally:
        variants.use_tables([])
