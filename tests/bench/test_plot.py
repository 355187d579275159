"""Plots of results, through matplotlib's objects: every bar, label, ratio, point and roof."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastshard.bench
from fastshard import cli
from fastshard.bench import command, plot, result_file
from fastshard.bench.report import Line
from fastshard.bench.timing import Timing

matplotlib = pytest.importorskip("matplotlib")

FOLDER = Path(fastshard.bench.__file__).parent / "results"
STORED = ("decode_h200", "decode_h200_sm90", "norm_h200", "prefill_h200")


def bench(*arguments) -> int:
    return cli.main(["bench", *map(str, arguments)])


def stored(*names):
    return [result_file.read(FOLDER / f"{name}.json") for name in names]


def bars_of(figure):
    """Case -> axes, of the panels of bars."""
    found = {axes.get_label(): axes for axes in figure.axes}
    assert found.pop("roofline") is figure.axes[-1]
    return {label.removeprefix("bars of "): axes for label, axes in found.items()}


def expected_of(name):
    """(case, shape) -> the lines to be drawn, ours before the peer, from the file itself."""
    groups = {}
    for line in json.loads((FOLDER / f"{name}.json").read_text())["lines"]:
        groups.setdefault((line["case"], line["shape"]), []).append(line)
    found = {}
    for key, lines in groups.items():
        ours = [line for line in lines if not line["is_peer"]][:1]
        peers = sorted((line["timing"]["us"], i) for i, line in enumerate(lines) if line["is_peer"])
        found[key] = ours + [lines[i] for _, i in peers[:1]]
    return found


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("name", STORED)
def test_every_shape_has_its_bars(name):
    figure = plot.draw(stored(name))
    expected = expected_of(name)
    panels = bars_of(figure)
    assert list(panels) == list(dict.fromkeys(case for case, _ in expected))
    for case, axes in panels.items():
        shapes = {shape: lines for (of, shape), lines in expected.items() if of == case}
        assert [label.get_text() for label in axes.get_yticklabels()] == list(shapes)
        bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.patches]
        assert len(bars) == sum(map(len, shapes.values()))
        texts = texts_of(axes)
        for row, lines in enumerate(shapes.values()):
            widths = [width for y, width in sorted(bars) if abs(y - row) < 0.5]
            assert widths == pytest.approx([line["percent_of_limit"] for line in lines])
            for line in lines[1:]:
                us = line["timing"]["us"]
                time = f"{us:.2f} us" if us < 1e3 else f"{us / 1e3:.3f} ms"
                assert f"{line['variant']}  {time}" in texts


def line_of(variant="fastshard", us=10.0, *, spread=0.1, **more):
    values = {"case": "mlp", "is_peer": variant != "fastshard", "shape": "1 x 2"}
    values |= {"dtype": "bfloat16", "num_bytes": 4_000, "flops": 8_000, "limit_us": 5.0}
    values |= {"best_peer_us": None, "error": 0.0, "eager_error": None, "first_call_seconds": 0.0}
    return Line(variant=variant, timing=Timing(us, us - spread, us + spread, 9), **(values | more))


def result_of(*lines, limits=None, **environment):
    limits = limits or {"copy_gbps": 2000.0, "mma_tflops": 100.0, "matmul_tflops": 120.0}
    environment = {"device": "NVIDIA H200", "torch": "2.11.0"} | environment
    return result_file.ResultFile(Path("x.json"), [], environment, limits, list(lines))


def test_the_ratio_or_that_both_are_equal():
    peers = [line_of("slow", 99.0), line_of("fast", 15.0)]
    near = [line_of(shape="near"), line_of("peer", 10.15, shape="near")]
    alone = [line_of(shape="alone"), line_of("only", 7.0, shape="theirs")]
    ours = [line_of(), line_of(us=1.0, variant="fastshard")]
    axes = bars_of(plot.draw([result_of(*ours, *peers, *near, *alone)]))["mlp"]
    assert texts_of(axes) == [
        *("10.00 us", "fast  15.00 us", "1.50\N{MULTIPLICATION SIGN}"),
        *("10.00 us", "peer  10.15 us", "equal"),
        *("10.00 us", "only  7.00 us"),
    ]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [50, 100 / 3, 50, 500 / 10.15, 50, 500 / 7]
    )
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours == [plot.OURS, plot.PEER, plot.OURS, plot.PEER, plot.OURS, plot.PEER]


def test_cases_of_two_results_and_dtypes_stand_together():
    first = result_of(line_of(shape="a"), line_of(shape="b", case="norm"))
    second = result_of(line_of(shape="a", dtype="float16"), fastshard="0.2.0")
    figure = plot.draw([first, second])
    labels = {
        case: [label.get_text() for label in axes.get_yticklabels()]
        for case, axes in bars_of(figure).items()
    }
    assert labels == {"mlp": ["a, bfloat16", "a, float16"], "norm": ["b, bfloat16"]}
    assert "bfloat16, float16; " in figure.texts[-1].get_text()
    assert "fastshard unknown and 0.2.0 " in figure.texts[-1].get_text()


def test_peers_are_named_only_where_there_are_some():
    figure = plot.draw([result_of(line_of())])
    assert figure.texts[0].get_text() == "fastshard, NVIDIA H200"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fastshard"]
    figure = plot.draw([result_of(line_of(), line_of("peer"))])
    assert figure.texts[0].get_text() == "fastshard beside the best peer, NVIDIA H200"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fastshard", "best peer"]


@pytest.mark.parametrize("name", STORED)
def test_every_bar_is_a_point_of_the_roofline(name):
    axes = plot.draw(stored(name)).axes[-1]
    points = sorted(tuple(dots.get_offsets()[0]) for dots in axes.collections)
    lines = [line for lines in expected_of(name).values() for line in lines]
    expected = sorted((of["flops"] / of["num_bytes"], of["tflops"]) for of in lines)
    assert points == [pytest.approx(point) for point in expected]
    cases = list(dict.fromkeys(line["case"] for line in lines))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == cases


def test_the_roofs_are_what_was_measured():
    limits = {"copy_gbps": 1800.0, "mma_tflops": 100.0, "matmul_tflops": 120.0}
    limits |= {"read": [{"gbps": 1500.0}, {"gbps": 2000.0}], "copy": [{"gbps": 1900.0}]}
    axes = plot.draw([result_of(line_of(), limits=limits)]).axes[-1]
    roofs = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    # 2 FLOPs a byte: from half of it on; 2 TB/s reach 120 TFLOP/s at 60 FLOPs a byte
    assert roofs == [([1, 60, 180], [2, 120, 120]), ([1, 50, 180], [2, 100, 100])]
    assert texts_of(axes) == [
        "PyTorch's matmul, 120 TFLOP/s",
        "mma.sync, 100 TFLOP/s",
        "fastest read or copy, 2.00 TB/s",
    ]
    without = plot.draw([result_of(line_of(), limits=limits | {"mma_tflops": None})]).axes[-1]
    assert [list(line.get_ydata()) for line in without.lines] == [[2, 120, 120]]


@pytest.mark.parametrize(
    "results",
    [
        stored("decode_h200", "prefill_h200"),
        stored("norm_h200"),
        [
            result_of(
                line_of(shape="qwen2.5-0.5b, 24 layers, b16, 131072 keys, greedy"),
                line_of("torch compile", 9.9e5, case="decode", limit_us=9e5),
            )
        ],
    ],
    ids=["decode and prefill", "norm", "long label"],
)
def test_all_text_is_within_the_figure(results):
    with matplotlib.rc_context(plot.STYLE):
        figure = plot.draw(results)
        figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())]
    assert len(texts) > 3
    for text in (*texts, *figure.texts):
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text


def test_files(tmp_path):
    results = [FOLDER / "decode_h200.json", FOLDER / "prefill_h200.json"]
    for name in ("a.svg", "b.svg", "c.PNG"):
        assert bench("plot", *results, tmp_path / "plots" / name) == 0
    svg = (tmp_path / "plots" / "a.svg").read_text()
    assert (tmp_path / "plots" / "b.svg").read_text() == svg
    texts = {re.sub("&gt;", ">", text) for text in re.findall(r"<text [^>]*>([^<]*)</text>", svg)}
    shapes = [shape for name in STORED[::3] for _, shape in expected_of(name)]
    assert len(shapes) == 32
    assert set(shapes) <= texts
    png = (tmp_path / "plots" / "c.PNG").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == round(150 * plot.WIDTH)


def test_a_run_is_plotted(tmp_path, monkeypatch):
    path, drawn = tmp_path / "x.svg", []
    environment = {"device": "NVIDIA H200"}
    limits = {"copy_gbps": 2000.0, "read": [], "copy": []}
    named = type("Limits", (), {"__init__": lambda *args: None, "describe": lambda self: limits})
    monkeypatch.setattr(command, "_current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(command, "Stopwatch", lambda *args, **keywords: None)
    monkeypatch.setattr(command, "Limits", named)
    monkeypatch.setattr(command.report, "describe_environment", lambda device: environment)
    monkeypatch.setattr(command.report, "introduction", lambda *args: [])
    monkeypatch.setattr(command.kernels, "describe", lambda *args: {"kernels": [], "missing": []})
    lines = [line_of(), line_of("peer", 12.0)]
    monkeypatch.setattr(command, "_results", lambda *args: iter(lines))
    monkeypatch.setattr(plot, "write", lambda *args: drawn.append(args))
    assert bench("mlp", "--plot", path) == 0
    (((measured,), where),) = drawn
    assert (where, measured.lines) == (path, lines)
    assert (measured.environment, measured.limits) == (environment, limits)


@pytest.mark.parametrize("arguments", [["mlp", "--plot"], ["plot", FOLDER / "norm_h200.json"]])
@pytest.mark.parametrize(
    ("name", "is_there", "message"),
    [
        ("x.pdf", True, "plot must be a file that ends in .png or .svg, got "),
        (
            "x.svg",
            False,
            "a plot needs matplotlib, which is not installed: pip install 'fastshard[bench]'",
        ),
    ],
)
def test_what_cannot_be_plotted_is_said_first(
    arguments, name, is_there, message, tmp_path, monkeypatch, capsys
):
    if not is_there:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench(*arguments, tmp_path / name) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"fastshard: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_results_that_make_no_plot(tmp_path, capsys):
    assert bench("plot", FOLDER / "start_h200.json", tmp_path / "x.svg") == 1
    assert "a plot needs measured lines, got none" in capsys.readouterr().err
    assert bench("plot", FOLDER / "load_h200.json", tmp_path / "x.svg") == 1
    assert "must be a result of fastshard bench --json: environment" in capsys.readouterr().err
    here, there = result_of(line_of()), result_of(line_of())
    there = replace(there, environment={"device": "NVIDIA A10"})
    message = "a plot must be of one GPU, got results of NVIDIA H200, NVIDIA A10"
    with pytest.raises(ValueError, match=message):
        plot.draw([here, there])
