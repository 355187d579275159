"""Bars and a roofline of measured lines: ``fastshard bench --plot`` and ``fastshard bench plot``.

Bars: of each shape our line and the best peer's, as a share of the case's measured limit. Roofline:
the same lines as operations a second over operations a byte, under the bandwidth and the rates that
were measured in the same run. Needs the ``bench`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from fastshard.bench.compare import Pair
from fastshard.bench.report import Line, format_us
from fastshard.bench.result_file import ResultFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
# Blue and orange of Okabe and Ito: told apart in any kind of colour blindness, and in grey.
OURS, PEER = "#0072B2", "#F0A830"
INK, QUIET, FAINT, GRID = "#222222", "#555555", "#8A8A8A", "#E4E4E4"
MARKERS = {"attention": "o", "linear": "s", "mlp": "^", "norm": "D", "prefill": "P", "decode": "v"}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # of the same widths; an SVG names both
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text as text: small, and drawn in the reader's own font
    "svg.hashsalt": "fastshard",  # the same result gives the same file
}

# Inches
WIDTH, MARGIN, HEADER, FOOTER = 11.5, 0.25, 0.7, 0.3
LETTER, RATIOS, BETWEEN = 0.062, 0.55, 0.3  # of labels left of the bars; right of them; columns
ROW, CASE, ROOFLINE, AXIS = 0.34, 0.34, 4.2, 0.6
INSIDE = 55  # % of the limit from which on a bar is long enough for its text


@dataclass(frozen=True)
class Shape:
    """What is drawn of one shape of a case.

    Attributes:
        case: Name of the benchmark.
        label: The shape, with its dtype where the plot has several.
        ours: The first of our variants, which is the default one; None where none ran.
        peer: The fastest peer; None where none ran.
    """

    case: str
    label: str
    ours: Line | None
    peer: Line | None


def check(path: Path) -> None:
    """Find out before anything is measured whether ``path`` can be plotted.

    Raises:
        ValueError: its name says no format that there is.
        RuntimeError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot must be a file that ends in {' or '.join(FORMATS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "a plot needs matplotlib, which is not installed: pip install 'fastshard[bench]'"
        ) from None


def write(results: Sequence[ResultFile], path: Path) -> None:
    """Plot results of one GPU to ``path``, as PNG or SVG by its name.

    Raises:
        ValueError: the name says no format; the results are of several GPUs, or have no lines.
        RuntimeError: matplotlib is not installed.
    """
    check(path)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(results).savefig(path, dpi=150, metadata=metadata)


def shapes(results: Sequence[ResultFile]) -> list[Shape]:
    """Every shape that was measured, cases together."""
    lines = [line for result in results for line in result.lines]
    has_dtypes = len({line.dtype for line in lines}) > 1
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        label = f"{line.shape}, {line.dtype}" if has_dtypes else line.shape
        found.setdefault((line.case, label), []).append(line)
    cases = list(dict.fromkeys(case for case, _ in found))
    return [
        Shape(
            case,
            label,
            next((line for line in of if not line.is_peer), None),
            min((line for line in of if line.is_peer), key=lambda x: x.timing.us, default=None),
        )
        for (case, label), of in sorted(found.items(), key=lambda item: cases.index(item[0][0]))
    ]


def draw(results: Sequence[ResultFile]) -> Figure:
    """The figure: one panel of bars a case, in two columns, and the roofline below.

    Raises:
        ValueError: the results are of several GPUs, or have no lines.
    """
    from matplotlib.figure import Figure

    devices = dict.fromkeys(str(result.environment.get("device")) for result in results)
    if len(devices) > 1:
        raise ValueError(f"a plot must be of one GPU, got results of {', '.join(devices)}")
    drawn = shapes(results)
    if not drawn:
        raise ValueError("a plot needs measured lines, got none")
    columns = _columns([list(of) for _, of in groupby(drawn, key=lambda shape: shape.case)])
    tallest = max(sum(CASE + ROW * len(case) for case in column) for column in columns)
    height = HEADER + tallest + AXIS + ROOFLINE + AXIS + FOOTER
    figure = Figure(figsize=(WIDTH, height), facecolor="white")

    def add_axes(left: float, top: float, width: float, tall: float) -> Axes:
        """Axes at inches from the upper left corner."""
        box = (left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height)
        return figure.add_axes(box)

    share = (WIDTH - 2 * MARGIN - BETWEEN * (len(columns) - 1)) / len(columns)
    labels = 0.1 + LETTER * max(len(shape.label) for shape in drawn)
    shares = [line.percent_of_limit for s in drawn for line in (s.ours, s.peer) if line]
    for i, column in enumerate(columns):
        top, left = HEADER, MARGIN + i * (share + BETWEEN) + labels
        for case in column:
            tall = ROW * len(case)
            axes = add_axes(left, top + CASE, share - labels - RATIOS, tall)
            _draw_bars(axes, case, max(100.0, *shares))
            top += CASE + tall
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("% of the measured limit")
    top = HEADER + tallest + AXIS + CASE
    _draw_roofline(
        add_axes(MARGIN + 0.5, top, WIDTH - 2 * MARGIN - 0.5, ROOFLINE - CASE), drawn, results
    )
    _write_texts(figure, drawn, results)
    return figure


def _columns(cases: list[list[Shape]]) -> list[list[list[Shape]]]:
    """Cases in order, cut into two columns as even as can be."""
    if len(cases) == 1:
        return [cases]

    def tallest(cut: int) -> float:
        return max(sum(CASE + ROW * len(c) for c in part) for part in (cases[:cut], cases[cut:]))

    cut = min(range(1, len(cases)), key=tallest)
    return [cases[:cut], cases[cut:]]


def _draw_bars(axes: Axes, drawn: Sequence[Shape], longest: float) -> None:
    axes.set_label(f"bars of {drawn[0].case}")
    axes.set_title(drawn[0].case, loc="left", fontweight="bold", fontsize=9.5, x=0, pad=4)
    for row, shape in enumerate(drawn):
        both = 0.2 if shape.ours and shape.peer else 0.0
        for line, offset, colour, on in (
            (shape.ours, -both, OURS, "white"),
            (shape.peer, both, PEER, INK),
        ):
            if line is None:
                continue
            share = line.percent_of_limit
            axes.barh(row + offset, share, height=0.38, color=colour)
            is_inside = share >= INSIDE
            name = "" if line is shape.ours else f"{line.variant}  "
            axes.text(
                share - 1.5 if is_inside else share + 1.5,
                row + offset,
                f"{name}{format_us(line.timing.us)}",
                ha="right" if is_inside else "left",
                va="center_baseline",
                color=on if is_inside else INK,
                fontsize=6.8,
            )
        if shape.ours and shape.peer:
            pair = Pair(shape.peer, shape.ours)
            text = "equal" if pair.is_equal else f"{pair.ratio:.2f}\N{MULTIPLICATION SIGN}"
            where = axes.get_yaxis_transform()
            axes.text(1.02, row, text, transform=where, va="center", fontweight="bold")
    axes.set_yticks(range(len(drawn)), [shape.label for shape in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlim(0, 1.03 * longest)
    axes.set_xticks(range(0, int(longest) + 1, 25))
    axes.tick_params(length=0, labelbottom=False)
    axes.axvline(100, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0.9)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def bandwidth(results: Sequence[ResultFile]) -> float:
    """GB/s of the fastest plain read or copy of any size in these runs; 0 where none is known."""
    limits = [result.limits for result in results]
    sizes = [size for of in limits for kind in ("read", "copy") for size in of.get(kind) or ()]
    return max([of.get("copy_gbps") or 0.0 for of in limits] + [size["gbps"] for size in sizes])


def _draw_roofline(axes: Axes, drawn: Sequence[Shape], results: Sequence[ResultFile]) -> None:
    axes.set_label("roofline")
    axes.set_title("roofline", loc="left", fontweight="bold", fontsize=9.5, pad=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = [
        (line.flops / line.num_bytes, line.tflops, colour, MARKERS.get(shape.case, "o"), size)
        for shape in drawn
        for line, colour, size in ((shape.peer, PEER, 30), (shape.ours, OURS, 38))
        if line
    ]
    for x, y, colour, marker, size in points:
        axes.scatter(
            x, y, size, colour, marker=marker, edgecolors="white", linewidths=0.6, zorder=4
        )
    _draw_roofs(axes, min(x for x, *_ in points) / 2, max(x for x, *_ in points) * 3, results)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("FLOPs per byte of least traffic")
    axes.set_ylabel("TFLOP/s")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _add_markers(axes, [shape.case for shape in drawn])


def _draw_roofs(axes: Axes, left: float, right: float, results: Sequence[ResultFile]) -> None:
    """What the measured bandwidth allows, up to either measured rate of products."""
    rate = bandwidth(results) / 1e3  # TFLOP/s at one FLOP a byte
    mma, matmul = (
        max(result.limits.get(key) or 0.0 for result in results)
        for key in ("mma_tflops", "matmul_tflops")
    )
    if not rate or not (mma or matmul):
        return
    right = max(right, 3 * max(mma, matmul) / rate)
    for peak, name, style in ((matmul, "PyTorch's matmul", (0, (4, 2))), (mma, "mma.sync", "-")):
        if not peak:
            continue
        ridge = peak / rate
        xs, ys = (left, ridge, right), (rate * left, peak, peak)
        axes.plot(xs, ys, color=INK, linewidth=1.1, linestyle=style)
        where = (
            (ridge, (8, -5), "left", "top") if peak == mma else (right, (0, 3), "right", "bottom")
        )
        x, shift, ha, va = where
        text = f"{name}, {peak:.0f} TFLOP/s"
        axes.annotate(text, (x, peak), shift, textcoords="offset points", ha=ha, va=va)
    x = (mma or matmul) / rate / 4  # where few cases are
    text = f"fastest read or copy, {rate:.2f} TB/s"
    axes.annotate(text, (x, rate * x), (8, -4), textcoords="offset points", va="top")


def _add_markers(axes: Axes, cases: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=FAINT, marker=MARKERS.get(case, "o"), linestyle="none", label=case)
        for case in dict.fromkeys(cases)
    ]
    axes.legend(handles=handles, loc="lower right", frameon=False, ncols=2, fontsize=8)


def _write_texts(figure: Figure, drawn: Sequence[Shape], results: Sequence[ResultFile]) -> None:
    """Title and legend above; below where it was measured, and what the limits are."""
    from matplotlib.patches import Patch

    def seen(key: str) -> str:
        found = dict.fromkeys(str(of.environment.get(key) or "unknown") for of in results)
        return " and ".join(found)

    left, inch = MARGIN / WIDTH, 1 / figure.get_figheight()
    has_peers = any(shape.peer for shape in drawn)
    title = f"fastshard{' beside the best peer' * has_peers}, {seen('device')}"
    figure.text(left, 1 - 0.3 * inch, title, fontsize=14, fontweight="bold")
    subtitle = "Bars: share of what this GPU does at best, measured in the same run"
    if has_peers:
        subtitle += "; bold: how many times as fast as the best peer"
    figure.text(left, 1 - 0.54 * inch, f"{subtitle}.", color=QUIET)
    handles = [Patch(color=OURS, label="fastshard"), Patch(color=PEER, label="best peer")]
    figure.legend(
        handles=handles if has_peers else handles[:1],
        loc="upper right",
        bbox_to_anchor=(1 - left, 1 - 0.1 * inch),
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    dtypes = dict.fromkeys(line.dtype for result in results for line in result.lines)
    note = (
        f"{', '.join(dtypes)}; {seen('clocks.sm')}, fastshard {seen('fastshard')} "
        f"({seen('code')}), torch {seen('torch')}. Limit: a plain read, for norms a copy, of as "
        "many bytes; for prefill the rate of mma.sync."
    )
    figure.text(left, 0.12 * inch, note, color=QUIET, fontsize=7.5)
