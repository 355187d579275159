"""Rows of what was read: nulls, kinds of values, and profiles that are literals alone."""

import pytest

from archive.parquet_rows import ROW
from fastshard.archive import schema

NULLS = dict.fromkeys(schema.KINDS)


def test_a_row_has_every_column():
    assert list(ROW) == list(schema.KINDS)
    row = schema.row_of({**ROW, "Error": "an error", "Torch_Profile": "{}"}, "an id", "a file")
    assert vars(row) == {
        "id": "an id",
        "op_name": "36_RMSNorm_",
        "level": 1,
        "task": 36,
        "kernel_name": "rms_norm_rows",
        "cuda_ms": 0.25,
        "native_ms": 0.75,
        "compile_ms": 0.5,
        "speedup_native": 3.0,
        "speedup_compile": 2.0,
        "correct": True,
        "max_diff": 1e-6,
        "error": "an error",
        "cuda_code": ROW["CUDA_Code"],
        "module_code": ROW["PyTorch_Code_Module"],
        "functional_code": ROW["PyTorch_Code_Functional"],
        "ncu_profile": ROW["NCU_Profile"],
        "torch_profile": "{}",
        "clang_tidy": ROW["Clang_Tidy"],
        "index": 7,
    }


def test_every_value_may_be_null():
    row = schema.row_of(NULLS, "an id", "a file")
    assert set(vars(row).values()) == {"an id", None}


def test_columns_that_were_not_read_are_null():
    assert schema.row_of({"Task_ID": 3}, "an id", "a file").cuda_code is None


@pytest.mark.parametrize("name", ["Max_Diff", "CUDA_Runtime", "Level_ID", "Correct", "Op_Name"])
def test_not_a_number_is_null(name):
    """As pandas writes a null."""
    row = schema.row_of({name: float("nan")}, "an id", "a file")
    assert set(vars(row).values()) == {"an id", None}


def test_a_whole_float_is_an_integer():
    """As pandas writes integers of a column with nulls."""
    row = schema.row_of({"Level_ID": 2.0, "CUDA_Runtime": 3}, "an id", "a file")
    assert (row.level, row.cuda_ms) == (2, 3.0)
    assert type(row.level) is int
    assert type(row.cuda_ms) is float


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Op_Name", 3, "Op_Name must be text or null, got 3 in a file"),
        ("Task_ID", "3", "Task_ID must be an integer or null, got '3' in a file"),
        ("Task_ID", 2.5, "Task_ID must be an integer or null, got 2.5 in a file"),
        ("Task_ID", True, "Task_ID must be an integer or null, got True in a file"),
        ("Level_ID", float("inf"), "Level_ID must be an integer or null, got inf in a file"),
        ("Max_Diff", "0", "Max_Diff must be a number or null, got '0' in a file"),
        ("Correct", 1, "Correct must be true or false or null, got 1 in a file"),
        ("CUDA_Code", b"x" * 99, "CUDA_Code must be text or null, got b'x{58} in a file"),
    ],
)
def test_a_value_of_another_kind(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        schema.row_of({name: value}, "an id", "a file")


def test_missing_columns():
    schema.check_columns([*schema.KINDS, "another"], "a.parquet")
    names = [name for name in schema.KINDS if name != "Task_ID"]
    with pytest.raises(
        ValueError,
        match=r"^a\.parquet must have the columns of the archive, Task_ID is missing$",
    ):
        schema.check_columns(names, "a.parquet")
    with pytest.raises(ValueError, match=r"archive, Op_Name, Task_ID are missing$"):
        schema.check_columns(names[1:], "a.parquet")


def test_a_profile_is_a_literal():
    assert schema.parse_profile("{'a': {'b': 1.5, 'c': None}, 'd': [True, -2]}") == {
        "a": {"b": 1.5, "c": None},
        "d": [True, -2],
    }


def test_a_profile_is_never_evaluated(tmp_path):
    made = tmp_path / "made"
    assert schema.parse_profile(f"{{'a': open({str(made)!r}, 'w')}}") is None
    assert schema.parse_profile(f"__import__('pathlib').Path({str(made)!r}).touch()") is None
    assert not made.exists()


@pytest.mark.parametrize(
    "text",
    [None, "", "{'a': 1", "[1, 2]", "'a'", "{[]: 1}", "{'a': nan}", "\0", "(" * 5000, "-" * 90000],
    ids=lambda text: repr(text)[:12],
)
def test_what_is_no_dict_is_none(text):
    assert schema.parse_profile(text) is None


def test_a_very_long_profile_is_not_parsed(monkeypatch):
    monkeypatch.setattr(schema, "LONGEST_LITERAL", 8)
    assert schema.parse_profile("{'a': 1}") == {"a": 1}
    assert schema.parse_profile("{'a': 12}") is None
