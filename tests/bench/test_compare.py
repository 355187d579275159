"""``fastshard bench compare``: what is matched, what is called equal, and files it refuses."""

import copy
import json
from pathlib import Path

import pytest

import fastshard.bench
from fastshard import cli

RESULTS = sorted((Path(fastshard.bench.__file__).parent / "results").glob("*.json"))
MEASURED = [path for path in RESULTS if path.name != "load_h200.json"]


def line(variant, us, *, spread=0.5, shape="1 x 2", is_peer=False, **more):
    return {
        "case": "mlp",
        "variant": variant,
        "is_peer": is_peer,
        "shape": shape,
        "dtype": "bfloat16",
        "timing": {"us": us, "p20": us - spread, "p80": us + spread, "n": 9},
        "num_bytes": 10,
        "flops": 20,
        "limit_us": 5.0,
        "best_peer_us": None,
        "error": None,
        "eager_error": None,
        "first_call_seconds": 0.5,
    } | more


def result(*lines, limits=None, **environment):
    known = {"device": "NVIDIA H200", "clocks.sm": "1980 MHz", "driver_version": "580.1"}
    known |= {"fastshard": "0.1.0", "code": "sm_90", "torch": "2.11.0"}
    limits = {"copy_gbps": 4000.0, "mma_tflops": None} | (limits or {})
    return {"environment": known | environment, "limits": limits, "lines": list(lines)}


@pytest.fixture
def compare(tmp_path, capsys):
    """Compare two contents, or files: (status, lines of stdout, stderr)."""

    def compare(*contents):
        paths = []
        for name, content in zip("ab", contents, strict=True):
            path = content if isinstance(content, Path) else tmp_path / f"{name}.json"
            if isinstance(content, dict | list):
                path.write_text(json.dumps(content))
            elif isinstance(content, str | bytes):
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            paths.append(str(path))
        status = cli.main(["bench", "compare", *paths])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return compare


def words(lines):
    return [" ".join(text.split()) for text in lines]


def test_lines_of_two_runs_side_by_side(compare, tmp_path):
    a = result(
        line("fastshard", 80.0),
        line("fastshard", 1200.0, shape="16 x 2"),
        line("torch eager", 90.0, is_peer=True),
    )
    b = result(
        line("torch eager", 90.9, is_peer=True),
        line("fastshard", 100.0),
        line("fastshard", 600.0, shape="16 x 2"),
    )
    status, out, err = compare(a, b)
    assert (status, err) == (0, "")
    assert out[0] == (
        f"A  {tmp_path}/a.json: NVIDIA H200, 1980 MHz, driver 580.1, fastshard 0.1.0 (sm_90), "
        "torch 2.11.0"
    )
    assert out[1].startswith(f"B  {tmp_path}/b.json: NVIDIA H200, ")
    assert words(out[2:]) == [
        "",
        "case variant shape dtype A B A/B verdict",
        "mlp fastshard 1 x 2 bfloat16 80.00 us 100.00 us 0.800 B slower",
        "mlp fastshard 16 x 2 bfloat16 1.200 ms 600.00 us 2.000 B faster",
        "mlp torch eager 1 x 2 bfloat16 90.00 us 90.90 us 0.990 equal",
        "",
        "geometric mean of A/B, fastshard: 1.265 (2 lines, 0 equal)",  # sqrt(0.8 * 2)
        "geometric mean of A/B, peers: 0.990 (1 line, 1 equal)",
        "A/B: above 1 B is the faster; equal: the ranges p20-p80 of both overlap",
    ]


def test_columns_are_aligned(compare):
    lines = [line("fastshard", 9.0), line("torch compile", 12_345.0, shape="16 x 4096")]
    out = compare(result(*lines), result(*lines))[1]
    header, first, second = out[3:6]
    for name in ("variant", "shape", "dtype", "verdict"):
        start = header.index(name)
        assert all(text[start - 1] == " " != text[start] for text in (first, second)), name
    for name in (" A", " B", " A/B"):
        end = header.index(f"{name} ") + len(name)
        assert all(text[end - 1] != " " == text[end] for text in (first, second)), name


@pytest.mark.parametrize(
    ("b", "spread", "verdict"),
    [
        (81.0, 0.5, "equal"),  # both ranges hold 80.5
        (81.25, 0.5, "B slower"),
        (78.75, 0.5, "B faster"),
        (90.0, 20.0, "equal"),  # one range within the other
        (70.0, 20.0, "equal"),
    ],
)
def test_ranges_that_overlap_are_equal(compare, b, spread, verdict):
    out = compare(result(line("fastshard", 80.0)), result(line("fastshard", b, spread=spread)))[1]
    assert out[4].endswith(f"  {verdict}")


@pytest.mark.parametrize("key", ["case", "variant", "shape", "dtype"])
def test_lines_of_one_file_only_are_listed(compare, key):
    shared = line("fastshard", 80.0)
    a, b = line("other", 70.0) | {key: "in a"}, line("other", 60.0) | {key: "in b"}
    out = words(compare(result(shared, a), result(b, shared))[1])
    names = ("case", "variant", "shape", "dtype")
    assert out[-6:] == [
        "",
        "only in A:",
        " ".join(a[name] for name in names) + " 70.00 us",
        "",
        "only in B:",
        " ".join(b[name] for name in names) + " 60.00 us",
    ]
    assert sum(" 80.00 us " in text for text in out) == 1
    assert "geometric mean of A/B, fastshard: 1.000 (1 line, 1 equal)" in out


def test_runs_that_share_nothing(compare):
    status, out, _ = compare(result(line("x", 1.0)), result(line("y", 1.0)))
    assert (status, out[3]) == (0, "no line is in both files")
    assert not any("geometric" in text for text in out)


def test_what_differs_around_the_runs_is_said(compare):
    limits = {"copy_gbps": 4000.0, "mma_tflops": 600.0, "matmul_tflops": 700.0}
    a = result(line("x", 1.0), limits=limits, triton="3.6.0", cuda="13.0")
    limits = {"copy_gbps": 3000.0, "mma_tflops": 590.0, "matmul_tflops": None}
    b = result(line("x", 1.0), limits=limits, device="NVIDIA A10", triton=None)
    out = compare(a, b)[1]
    assert out[1].split(": ")[1].startswith("NVIDIA A10, ")
    assert out[2:7] == [
        "warning: device differs: NVIDIA H200 in A, NVIDIA A10 in B",
        "warning: triton differs: 3.6.0 in A, None in B",
        "warning: cuda differs: 13.0 in A, None in B",
        "warning: the measured limit copy_gbps differs: 4000.00 in A, 3000.00 in B",
        "",
    ]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_a_stored_result_equals_itself(compare, path):
    status, out, err = compare(path, path)
    assert (status, err) == (0, "")
    lines = json.loads(path.read_text())["lines"]
    assert sum(text.endswith("  1.000  equal") for text in out) == len(lines)
    assert not any(text.startswith(("warning", "only in")) for text in out)


def test_stored_results_of_two_builds(compare):
    folder = RESULTS[0].parent
    out = compare(folder / "decode_h200.json", folder / "decode_h200_sm90.json")[1]
    assert "warning: code differs: compute_86 (PTX) in A, sm_90 in B" in out
    assert sum("fastshard persistent" in text for text in out) == 8
    assert sum(text.startswith("only in") for text in out) == 1


def changed(edit):
    content = copy.deepcopy(result(line("x", 1.0), line("y", 2.0)))
    edit(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is no JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff\xfe\x00", "it is no JSON ("),
        ([], "it is no JSON object"),
        ({"benchmark": "load"}, "environment is missing"),
        (changed(lambda c: c.update(lines={})), "lines is missing"),
        (changed(lambda c: c["lines"].append(3)), "line 3 has no timing"),
        (changed(lambda c: c["lines"][1].pop("shape")), "line 2 has no shape"),
        (
            changed(lambda c: c["lines"][0]["timing"].update(us=0)),
            "us of line 1 must be positive, got 0",
        ),
        (
            changed(lambda c: c["lines"][0]["timing"].update(p80="1")),
            "p80 of line 1 must be positive, got 1",
        ),
        (
            changed(lambda c: c["lines"][0].update(flops=None)),
            "flops of line 1 must be positive, got None",
        ),
        (changed(lambda c: c["lines"][1].pop("is_peer")), "line 2: "),
    ],
)
def test_a_file_that_is_no_result_is_one_line(compare, content, message):
    for contents in ((content, result()), (result(), content)):
        status, out, err = compare(*contents)
        assert (status, out, err.count("\n")) == (1, [], 1)
        name = "ab"[contents.index(content)]
        assert f"/{name}.json must be a result of fastshard bench --json: {message}" in err


def test_a_line_that_stands_twice_is_refused(compare):
    status, _, err = compare(result(line("x", 1.0)), result(line("x", 1.0), line("x", 2.0)))
    assert status == 1
    assert "/b.json holds the line mlp, x, 1 x 2, bfloat16 twice" in err


def test_a_file_that_is_not_there(compare, tmp_path):
    status, _, err = compare(tmp_path / "none.json", result())
    assert (status, err.count("\n")) == (1, 1)
    assert "none.json" in err


def test_compare_takes_two_files(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "compare", "a.json"])
    assert stop.value.code == 2
    assert "the following arguments are required: B.json" in capsys.readouterr().err
