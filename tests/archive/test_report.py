"""Claimed beside verified: every line, count and point; a rejection has a reason and no speed."""

import math

import pytest

from fastshard import cli
from fastshard.archive import report, verdict
from fastshard.archive.verdict import Verdict

matplotlib = pytest.importorskip("matplotlib")

TIMES = {"candidate": 10.0, "eager": 20.0, "compile": 15.0, "ours": 5.0}
FAST = {"candidate": 1.0, "eager": 8.0}


def made(identity, name=verdict.VERIFIED, native=4.0, **values):
    values = {"times": {"float32": TIMES}, "environment": {"device": "a GPU"}, **values}
    return Verdict(identity, name, claimed={"native": native, "compile": 3.0}, **values)


FOUND = [
    made("1/1/wrong", verdict.WRONG, 90.0, reason="off by\n 2.0"),
    made("1/1/slow", notes=("compile: none",)),
    made("1/1/fast", native=16.0, times={"float32": FAST, "float16": TIMES}),
    made("1/1/unclaimed", native=None, times={"float32": TIMES}),
    made("1/1/nulls", verdict.INCOMPLETE, None, times={}, reason="CUDA_Code is null"),
    made("1/1/worse", verdict.WRONG, 95.0, reason="off by 3.0"),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))


def test_verified_first_then_by_verdict():
    assert [v.id for v in report.sort(FOUND)] == [
        *("1/1/fast", "1/1/slow", "1/1/unclaimed", "1/1/nulls", "1/1/worse", "1/1/wrong")
    ]


def test_the_table():
    place, header, *rest = report.lines(FOUND)
    assert (place, header) == ("verified on device a GPU", report.HEADER)
    table = rest[: rest.index("")]
    assert [line.split() for line in table] == [
        ["1/1/fast", "float32", "16.00", "8.00", "-", "-", "verified"],
        ["float16", "-", "2.00", "1.50", "0.50", "verified"],
        ["1/1/slow", "float32", "4.00", "2.00", "1.50", "0.50", "verified"],
        ["note:", "compile:", "none"],
        ["1/1/unclaimed", "float32", "-", "2.00", "1.50", "0.50", "verified"],
        ["1/1/nulls", "-", "-", "-", "-", "-", "incomplete", "row"],
        ["CUDA_Code", "is", "null"],
        ["1/1/worse", "-", "95.00", "-", "-", "-", "wrong"],
        ["off", "by", "3.0"],
        ["1/1/wrong", "-", "90.00", "-", "-", "-", "wrong"],
        ["off", "by", "2.0"],
    ]
    assert rest[rest.index("") + 1 :] == [
        "    3 verified: right by every rule, and timed",
        "    1 incomplete row: a column that is needed is null",
        "    2 wrong: its answer is not the reference's",
        "of 2 with a claim that were verified: 8.00 x eager claimed, 4.00 x found (geometric "
        "means); 2 slower than claimed",
        report.NOTE,
    ]


def test_no_comparison_without_both():
    lines = list(report.lines([FOUND[0], FOUND[3]]))
    assert not any(line.startswith("of ") for line in lines)


def test_places_are_named_once():
    other = made("1/1/b", environment={"device": "another", "torch": "3"})
    lines = list(report.lines([*FOUND, other]))
    assert lines[:2] == ["verified on device a GPU", "verified on device another, torch 3"]
    lines = list(report.lines([made("1/1/c", environment={})]))
    assert lines[0] == "verified on an unknown machine"


@pytest.mark.parametrize("claim", [0.0, -1.0, math.inf, None])
def test_what_is_no_speed_up_is_no_claim(claim):
    assert report.claim_of(made("1/1/a", native=claim)) is None
    report.draw([made("1/1/a", native=claim)])


def test_foreign_text_is_plain():
    evil = "a\x1b[2J"
    lines = report.lines(
        [made(evil, verdict.WRONG, reason=evil, notes=(evil,), environment={evil: evil})]
    )
    assert all(line.isprintable() for line in lines)


def points(axes):
    return [tuple(map(float, p)) for found in axes.collections for p in found.get_offsets()]


def test_the_plot():
    figure = report.draw(FOUND)
    top, below = figure.axes
    assert (top.get_label(), below.get_label()) == ("verified", "rejected")
    assert sorted(points(top)) == [(4.0, 2.0), (16.0, 8.0)]
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert labels == ["incomplete row (1)", "wrong (2)"]
    assert sorted(points(below)) == [(90.0, 1.0), (95.0, 1.0)]
    low, high = top.get_xlim()
    assert low <= 1
    assert high >= 95, "claims of what was rejected are in the picture too"
    assert below.get_xlim() == (low, high)
    assert figure.texts[0].get_text() == "3 of 6 kernels verified"
    assert figure.texts[1].get_text() == "verified on device a GPU"


def test_a_plot_of_none_verified():
    figure = report.draw(FOUND[:1])
    assert points(figure.axes[0]) == []
    assert figure.texts[0].get_text() == "0 of 1 kernels verified"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_command(suffix, tmp_path, capsys):
    for each in FOUND:
        verdict.save(each)
    path = tmp_path / "new" / f"plot.{suffix}"
    assert cli.main(["archive", "report", "--plot", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == list(report.lines(FOUND))
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_of_one_op(capsys):
    verdict.save(made("1/36/a", op_name="36_RMSNorm_"))
    verdict.save(made("1/23/a", op_name="23_Softmax"))
    verdict.save(made("1/-/a", op_name=None))
    assert cli.main(["archive", "report", "--op", "softmax"]) == 0
    out = capsys.readouterr().out
    assert "1/23/a" in out
    assert "1/36/a" not in out
    assert "1/-/a" not in out
    assert cli.main(["archive", "report", "--op", "mlp"]) == 1
    assert "no kernel has a verdict yet: fastshard archive verify" in capsys.readouterr().err


def test_wrong_input(tmp_path, capsys):
    with pytest.raises(
        RuntimeError, match=r"^no kernel has a verdict yet: fastshard archive verify gives one$"
    ):
        list(report.lines([]))
    with pytest.raises(RuntimeError, match="no kernel has a verdict yet"):
        report.write_plot([], tmp_path / "a.svg")
    with pytest.raises(ValueError, match=r"plot must be a file that ends in \.png or \.svg"):
        report.write_plot(FOUND, tmp_path / "a.pdf")
    path = verdict.save(FOUND[0])
    path.write_text("{")
    assert cli.main(["archive", "report"]) == 1
    assert "is no verdict of fastshard archive verify" in capsys.readouterr().err
    assert list(tmp_path.glob("a.*")) == []
