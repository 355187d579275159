"""Promoted kernels: asked for once, loaded only where they are what was promoted."""

import ctypes
import shutil
import subprocess
import warnings
from dataclasses import replace

import pytest
import torch

from emulator import runtime
from fastshard.build_record import source_version
from fastshard.ops import promoted
from helpers import EMULATOR_ONLY, skip_or_fail

NAME = "promoted_0123456789ab"
# Stands for any kernel: it sets the first output to 7, of whatever dtype, and says who called.
SOURCE = """
#include <cstddef>
#include <cstdint>
struct Rows { const void* x; const void* residual; uint16_t* out; };
extern "C" const size_t fastshard_params_bytes = %d;
static uint16_t seven = 0;
extern "C" void fastshard_prepare() { seven = 0x4700; }  // in float16
static const char* run(const void* params, void*) {
  *static_cast<const Rows*>(params)->out = seven;
  return nullptr;
}
extern "C" const char* fastshard_instance_float16(const void* p, void* s) { return run(p, s); }
"""
PARAMS_BYTES = 128  # of RmsNormParams: rows of 112, a pointer, a float and a bool


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", "there is no g++")
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.cpp").write_text(SOURCE % PARAMS_BYTES)
    command = ["g++", "-shared", "-fPIC", folder / "a.cpp", "-o", folder / "kernel.so"]
    subprocess.run(command, check=True, timeout=60)
    return (folder / "kernel.so").read_bytes()


def keep(library: bytes, kept_as=NAME, **values) -> promoted.Promoted:
    folder = promoted.folder_of(kept_as)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.so").write_bytes(library)
    (folder / "kernel.cu").write_text("the source")
    files = {file: promoted.digest(folder / file) for file in ("kernel.so", "kernel.cu")}
    found = promoted.Promoted(
        name=kept_as,
        op="rms_norm",
        dtypes=("float16",),
        fastshard=source_version(),
        torch=str(torch.__version__),
        python=promoted.python_version(),
        id="1/36/a",
        op_name="36_RMSNorm_",
        kernel_name="a",
        source="a data set",
        revision=None,
        licence="CC-BY-4.0",
        attribution="its authors",
        measured=({"dtype": "float16", "shape": [1, 64], "us": 1.0, "auto_us": 2.0},),
        verified={"float32": {"candidate": 1.0}},
        files=files,
    )
    found = replace(found, **values)
    (folder / "kernel.json").write_text(promoted.manifest_text(found))
    return found


def loaded(op="rms_norm", dtype="float16", variant=NAME) -> list:
    added = []
    promoted.load(op, dtype, variant, lambda *what: added.append(what))
    return added


def test_a_manifest_is_read_back(library):
    found = keep(library)
    assert promoted.read(promoted.folder_of(NAME)) == found
    keep(library, "promoted_other", op="layer_norm")
    assert promoted.read_all("rms_norm") == [found]
    assert [each.op for each in promoted.read_all()] == ["rms_norm", "layer_norm"]


def test_it_is_loaded(library):
    keep(library)
    ((op, dtype, variant, num_bytes, address),) = loaded()
    assert (op, dtype, variant, num_bytes) == ("rms_norm", "float16", NAME, PARAMS_BYTES)
    out = (ctypes.c_uint16 * 1)()
    rows = (ctypes.c_void_p * 3)(None, None, ctypes.addressof(out))
    launch = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)(address)
    assert launch(ctypes.addressof(rows), None) is None
    assert out[0] == 0x4700


def touch(name, text="changed"):
    (promoted.folder_of(NAME) / name).write_text(text)


IGNORED = {
    "gone": (lambda: promoted.folder_of(NAME).rename("away"), r"promoted_0123456789ab is not ther"),
    "library": (lambda: touch("kernel.so"), r"its file kernel\.so has changed"),
    "source": (lambda: touch("kernel.cu"), r"its file kernel\.cu has changed"),
    "no library": (
        lambda: (promoted.folder_of(NAME) / "kernel.so").unlink(),
        r"its file kernel\.so is not there",
    ),
    "no manifest": (lambda: (promoted.folder_of(NAME) / "kernel.json").unlink(), "No such file"),
    "damaged": (lambda: touch("kernel.json", "{"), "must be of fastshard archive promote, got"),
    "format": (lambda: touch("kernel.json", '{"format": 9}'), "another format"),
}


@pytest.mark.parametrize("how", IGNORED)
def test_what_has_changed_is_ignored(how, library, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    keep(library)
    change, reason = IGNORED[how]
    change()
    with pytest.warns(
        UserWarning,
        match=rf"^the promoted kernel {NAME} is ignored: .*{reason}.*; fastshard archive promote "
        "it again, or demote it$",
    ):
        assert loaded() == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"fastshard": "0.0.1"}, r"compiled for fastshard 0\.0\.1, this is "),
        ({"torch": "2.0.0"}, r"compiled for torch 2\.0\.0, this is "),
        ({"python": "3.1"}, r"compiled for Python 3\.1, this is "),
        ({"op": "layer_norm"}, "it is of layer_norm, and not of rms_norm"),
        ({"name": "promoted_other"}, "it is of promoted_other"),
        ({"files": {}}, "it is of promoted_0123456789ab"),
        ({"files": {"kernel.so": "", "../a": ""}}, r"its file kernel\.so has changed"),
    ],
)
def test_what_was_made_for_another_is_ignored(values, reason, library):
    keep(library, **values)
    with pytest.warns(UserWarning, match=reason):
        assert loaded() == []


def test_a_file_elsewhere_is_none_of_it(library, tmp_path):
    found = keep(library)
    (promoted.folder_of(NAME).parent / "a").write_text("x")
    digest = promoted.digest(promoted.folder_of(NAME).parent / "a")
    keep(library, files={**found.files, "../a": digest})
    with pytest.warns(UserWarning, match=r"its file \.\./a is not there"):
        assert loaded() == []


def test_no_library_and_no_such_dtype(library):
    keep(library)
    with pytest.warns(UserWarning, match="fastshard_instance_float32"):
        assert loaded(dtype="float32") == []
    keep(b"no library", "promoted_text")
    with pytest.warns(UserWarning, match=r"promoted_text/kernel\.so"):
        assert loaded(variant="promoted_text") == []


@pytest.mark.parametrize("name", ["promoted_", "promoted_../a", "256x2", "promoted_a/b"])
def test_a_name_is_no_path(name, library):
    with pytest.warns(UserWarning, match="its name must be promoted_ and word characters"):
        assert loaded(variant=name) == []


def test_an_unreadable_one_is_left_out_of_the_list(library):
    found = keep(library)
    keep(library, "promoted_damaged")
    (promoted.folder_of("promoted_damaged") / "kernel.json").write_text("[")
    with pytest.warns(UserWarning, match="a promoted kernel is ignored: .*promoted_damaged"):
        assert promoted.read_all() == [found]


def rms_norm(variant="auto", rows=3):
    x = torch.ones(rows, 64, dtype=torch.float16)
    return torch.ops.fastshard.rms_norm(x, torch.ones(64).half(), 1e-5, False, variant)


@EMULATOR_ONLY
def test_the_first_call_loads_it(library, device):
    name = "promoted_first"
    keep(library, name)
    asked = []

    def load(*words):
        asked.append(words)
        promoted.load(*words, runtime.add_instance)

    with runtime.instance_loader(load):
        assert rms_norm()[0, 0] == 1
        assert asked == [], "only where it is needed"
        assert [rms_norm(name)[0, 0].item() for _ in range(3)] == [7, 7, 7]
        assert asked == [("rms_norm", "float16", name)], "once"


@EMULATOR_ONLY
def test_a_call_while_it_is_loaded_goes_on_without_it(device):
    """As one of another thread does; else this one would load it again, and again."""
    name, asked = "promoted_meanwhile", []

    def load(*words):
        asked.append(words)
        if len(asked) < 4:
            with pytest.raises(RuntimeError, match=f"got {name}"):
                rms_norm(name)

    with runtime.instance_loader(load), pytest.raises(RuntimeError, match=f"got {name}"):
        rms_norm(name)
    assert asked == [("rms_norm", "float16", name)]


@EMULATOR_ONLY
def test_one_that_is_not_there(device):
    name = "promoted_missing"
    asked = []
    with runtime.instance_loader(lambda *words: asked.append(words)):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"variant must be auto, .*, got {name}"):
                rms_norm(name)
    assert asked == [("rms_norm", "float16", name)]
    with pytest.raises(RuntimeError, match=r"variant must be auto, .*, got promoted_unasked"):
        rms_norm("promoted_unasked")  # no loader


@EMULATOR_ONLY
def test_a_table_that_names_a_missing_one_is_a_table_without_it(device):
    expected = rms_norm()
    asked = []
    for capability in ("8.6", "9.0"):
        table = f"{capability}\trms_norm\tfloat16\t4,64\tpromoted_not_there\n"
        with runtime.variants(table), runtime.instance_loader(lambda *w: asked.append(w)):
            assert torch.equal(rms_norm(), expected)
            assert torch.equal(rms_norm(rows=9), expected[:1].expand(9, 64)), "another bucket"
    assert asked == [("rms_norm", "float16", "promoted_not_there")]


@EMULATOR_ONLY
def test_one_of_other_parameters_is_refused(library, device):
    name = "promoted_size"
    other = library.replace(PARAMS_BYTES.to_bytes(8, "little"), (8).to_bytes(8, "little"))
    assert other != library
    keep(other, name)
    with (
        runtime.instance_loader(lambda *w: promoted.load(*w, runtime.add_instance)),
        pytest.raises(RuntimeError, match="takes 8 bytes of parameters, this build has 128"),
    ):
        rms_norm(name)


def test_the_wheel_promotes_nothing():
    from fastshard.environment import shipped_tables_dir
    from fastshard.ops import variants

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables = variants.read_tables([shipped_tables_dir()])
    names = [entry.variant for table in tables for entry in table.entries]
    assert names
    assert not any(name.startswith(promoted.PREFIX) for name in names)
