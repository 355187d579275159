"""Filters, IDs and their prefixes, kinds of ops, and what is printed of foreign text."""

import pytest

from archive.parquet_rows import ROW
from fastshard.archive import arguments, catalog, schema
from fastshard.archive.schema import row_of


def row(identity="1/36/a", **values):
    return row_of({**ROW, **values}, identity, "a file")


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        ("1_Square_matrix_multiplication_", "matmul"),
        ("4_Matrix_vector_multiplication_", "matmul"),
        ("5_Matrix_scalar_multiplication", None),
        ("6_Matmul_with_large_K_dimension_", "matmul"),
        ("10_3D_tensor_matrix_multiplication", "matmul"),
        ("13_Matmul_for_symmetric_matrices", "matmul"),
        ("3_Batched_matrix_multiplication", "batched_matmul"),
        ("29_Matmul_Mish_Mish", None),
        ("23_Softmax", "softmax"),
        ("24_LogSoftmax", None),
        ("99_Matmul_GELU_Softmax", None),
        ("36_RMSNorm_", "rmsnorm"),
        ("40_LayerNorm", "layernorm"),
        ("35_GroupNorm_", None),
        ("62_Matmul_GroupNorm_LeakyReLU_Sum", None),
        ("1_MLP", "mlp"),
        ("3_DeepNarrowMLP", "mlp"),
        ("43_MinGPTCausalAttention", "attention"),
        ("50_ReLUSelfAttention", "attention"),
        ("19_ReLU", None),
        ("", None),
        (None, None),
    ],
)
def test_kinds(op_name, kind):
    found = catalog.kind_of(op_name)
    assert (found and found.name) == kind


def test_the_command_line_knows_every_kind_level_and_split():
    assert arguments.OPS == catalog.OPS
    assert arguments.SPLITS == schema.SPLITS
    assert tuple(f"level_{level}" for level in arguments.LEVELS) == schema.SPLITS


def test_only_norms_have_our_meaning():
    same = {kind.ours for kind in catalog.KINDS if kind.same_meaning}
    assert same == {"rms_norm", "layer_norm"}


ROWS = [
    row("3/1/a", Op_Name="1_MLP", Level_ID=3, Task_ID=1, CUDA_Speedup_Native=9.0),
    row("1/36/slow", CUDA_Speedup_Native=1.5),
    row("1/36/fast", CUDA_Speedup_Native=4.0),
    row("1/36/unclaimed", CUDA_Speedup_Native=None),
    row("1/23/soft", Op_Name="23_Softmax", Task_ID=23, CUDA_Speedup_Native=2.0),
]


def test_by_task_the_largest_claim_first():
    assert [r.id for r in catalog.select(ROWS)] == [
        *("1/23/soft", "1/36/fast", "1/36/slow", "1/36/unclaimed", "3/1/a")
    ]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({"op": "rmsnorm"}, ["1/36/fast", "1/36/slow", "1/36/unclaimed"]),
        ({"level": 3}, ["3/1/a"]),
        ({"min_speedup": 2.0}, ["1/23/soft", "1/36/fast", "3/1/a"]),
        ({"min_speedup": 0.0}, ["1/23/soft", "1/36/fast", "1/36/slow", "3/1/a"]),
        ({"op": "rmsnorm", "min_speedup": 2.0, "level": 1}, ["1/36/fast"]),
        ({"op": "matmul"}, []),
    ],
)
def test_filters(filters, ids):
    assert [r.id for r in catalog.select(ROWS, **filters)] == ids


def test_an_unknown_op():
    with pytest.raises(
        ValueError,
        match=r"^op must be one of batched_matmul, matmul, softmax, rmsnorm, layernorm, attention, "
        r"mlp, got 'conv'$",
    ):
        catalog.select(ROWS, op="conv")


def test_an_id_or_its_only_beginning():
    rows = [*ROWS, row("1/36/slower")]
    assert catalog.find_id(rows, "1/36/fast") == "1/36/fast"
    assert catalog.find_id(rows, "1/2") == "1/23/soft"
    assert catalog.find_id(rows, "1/36/slow") == "1/36/slow", "though another begins so"
    with pytest.raises(
        ValueError,
        match=r"^id '1/36/' must be of one row, 4 begin so: 1/36/slow, 1/36/fast, 1/36/u",
    ):
        catalog.find_id(rows, "1/36/")
    for text in ("2/", "", "1/36/fast2", "1/36/fast\x1b"):
        with pytest.raises(
            ValueError, match=r"^id must be one of the archive, or its beginning, g"
        ):
            catalog.find_id(rows, text)


def test_a_line():
    text = catalog.line(row(CUDA_Runtime=0.0123456, Correct=False), "wrong")
    assert text.split() == [
        *("1/36/a", "36_RMSNorm_", "0.01235", "3.00", "2.00", "incorrect", "rms_norm", "wrong")
    ]
    nulls = row_of(dict.fromkeys(schema.KINDS), "-/-/row-0", "a file")
    assert catalog.line(nulls, None).split() == ["-/-/row-0", *"-------"]


def test_everything_of_a_row():
    lines = list(catalog.describe(row(Error="it\nfailed", Torch_Profile="no {literal"), "wrong"))
    text = "\n".join(lines)
    assert "the same as fastshard.ops.rms_norm: over dimension 1" in text
    assert "CUDA 0.25 ms, eager 0.75 ms, compile 0.5 ms, on the authors' H100" in text
    assert "3.00 x eager, 2.00 x compile, correct: True, largest difference 1.00e-06" in text
    assert "verdict here wrong" in text
    assert f"licence      {catalog.LICENCE}" in lines
    assert f"by           {catalog.ATTRIBUTION}" in lines
    assert "--- error of the authors' run\nit\nfailed\n" in text
    assert (
        "--- NCU_Profile\nmetrics.Duration.avg_value = 12.5\nmetrics.Duration.unit = us\n" in text
    )
    assert "rules = {}" in text
    assert "--- Torch_Profile\nno {literal\n" in text
    for name in schema.CODE:
        assert f"--- {name}\n{ROW[name]}".rstrip() in text
    other = "\n".join(catalog.describe(row(Op_Name="23_Softmax", NCU_Profile=None), None))
    assert "not the same as fastshard.ops.attention" in other
    assert "verdict here none: fastshard archive verify" in other
    assert "--- NCU_Profile: none\n" in other


def test_licence_and_authors():
    assert "CC-BY-4.0" in catalog.LICENCE
    assert "Sakana AI" in catalog.ATTRIBUTION
    assert "Lange" in catalog.ATTRIBUTION


def test_foreign_text_commands_no_terminal():
    evil = "a\x1b]0;title\x07\rb\u202e\x9bc"
    values = dict.fromkeys((*schema.CODE, *schema.PROFILES, "Error", "Op_Name"), evil)
    found = row(f"1/36/{evil}", **values, Kernel_Name=evil)
    printed = [catalog.line(found, None), *catalog.describe(found, None)]
    assert all(char.isprintable() or char in "\n\t" for text in printed for char in text)
    assert catalog.plain(evil) == r"a\x1b]0;title\x07\rb\u202e\x9bc"
    profile = row(NCU_Profile="{'a': '\\x1b[2J', '\\x1b': 1}")
    assert all(line.isprintable() or "\n" in line for line in catalog.describe(profile, None))
