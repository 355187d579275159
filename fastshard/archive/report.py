"""``fastshard archive report``: what was claimed of kernels beside what was verified.

A table, and a plot of the same. A rejected kernel has no verified speed-up, however fast it
returned: it has a reason. Claims are of the authors' H100, verified figures of this machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastshard.archive.catalog import plain
from fastshard.archive.verdict import VERDICTS, Verdict
from fastshard.bench import plot as bench_plot
from fastshard.bench.plot import FAINT, GRID, INK, OURS, PEER, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLAIMED_DTYPE = "float32"
"""Of every claim."""
HEADER = (
    f"{'id':<52} {'dtype':<8} {'claimed':>8} {'x eager':>8} {'x compile':>9} {'x ours':>7}  verdict"
)
NOTE = (
    "claimed: times as fast as eager PyTorch by the authors, in float32 on an H100; x: times as "
    "fast as eager, torch.compile and our op, measured here; of what is rejected no time counts"
)
WIDTH, SCATTER, ROW, EDGE = 7.5, 3.6, 0.26, 0.9  # inches


def sort(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Verified ones first, the fastest first; then by verdict and by what was claimed."""
    order = list(VERDICTS)

    def key(verdict: Verdict) -> tuple:
        speedup = verdict.speedup() or 0.0
        return order.index(verdict.verdict), -speedup, -(claim_of(verdict) or 0.0), verdict.id

    return sorted(verdicts, key=key)


def claim_of(verdict: Verdict) -> float | None:
    """Claimed speed-up over eager PyTorch; None where there is none that is positive."""
    claim = verdict.claimed.get("native")
    return claim if claim is not None and 0 < claim < math.inf else None


def lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The table: a line for each kernel and dtype, the reason below, then counts.

    Raises:
        RuntimeError: there are no verdicts.
    """
    _check_any(verdicts)
    yield from dict.fromkeys(map(_place, verdicts))
    yield HEADER
    for verdict in sort(verdicts):
        yield from _of(verdict)
    yield ""
    for name, count in _counts(verdicts).items():
        yield f"{count:>5} {name}: {VERDICTS[name]}"
    yield from _comparison(verdicts)
    yield NOTE


def draw(verdicts: Sequence[Verdict]) -> Figure:
    """The figure: verified over claimed speed-ups, and below them the claims that were rejected.

    Raises:
        RuntimeError: there are no verdicts.
    """
    from matplotlib.figure import Figure

    _check_any(verdicts)
    rejected = [name for name in _counts(verdicts) if not _is_verified(name)]
    strip = ROW * max(len(rejected), 1)
    height = SCATTER + strip + 3 * EDGE
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    left, width = 0.3, 0.65
    top = figure.add_axes((left, 1 - (EDGE + SCATTER) / height, width, SCATTER / height))
    below = figure.add_axes((left, EDGE * 1.1 / height, width, strip / height), sharex=top)
    claims = [claim for claim in map(claim_of, verdicts) if claim is not None]
    _draw_verified(top, [v for v in verdicts if v.is_verified], claims)
    _draw_rejected(below, verdicts, rejected)
    counts = _counts(verdicts)
    verified = sum(count for name, count in counts.items() if _is_verified(name))
    inch, margin = 1 / height, 0.25 / WIDTH
    figure.text(
        margin,
        1 - 0.35 * inch,
        f"{verified} of {len(verdicts)} kernels verified",
        fontsize=13,
        fontweight="bold",
    )
    places = "; ".join(dict.fromkeys(map(_place, verdicts)))
    figure.text(margin, 1 - 0.6 * inch, places, color=QUIET)
    figure.text(margin, 0.15 * inch, "Claims: float32 on the authors' H100.", color=QUIET)
    return figure


def write_plot(verdicts: Sequence[Verdict], path: Path) -> None:
    """Plot to ``path``, as PNG or SVG by its name.

    Raises:
        ValueError: the name says no format.
        RuntimeError: there are no verdicts, or matplotlib is not installed.
    """
    bench_plot.check(path)
    import matplotlib

    with matplotlib.rc_context(bench_plot.STYLE):
        figure = draw(verdicts)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata=metadata)


def _of(verdict: Verdict) -> Iterator[str]:
    """The lines of one kernel: each dtype that was timed, or one where none was."""
    dtypes = list(verdict.times) if verdict.is_verified else []
    for number, dtype in enumerate(dtypes or ["-"]):
        ratios = [verdict.speedup(peer, dtype) for peer in ("eager", "compile", "ours")]
        has_claim = dtype in (CLAIMED_DTYPE, "-")
        yield (
            f"{plain(verdict.id) if number == 0 else '':<52} {plain(dtype):<8} "
            f"{_times(claim_of(verdict) if has_claim else None):>8} {_times(ratios[0]):>8} "
            f"{_times(ratios[1]):>9} {_times(ratios[2]):>7}  {verdict.verdict}"
        )
    if verdict.reason:
        yield f"    {' '.join(plain(verdict.reason).split())}"
    for note in verdict.notes:
        yield f"    note: {' '.join(plain(note).split())}"


def _comparison(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Claimed and verified speed-ups of the kernels that have both."""
    pairs = [(claim_of(v), v.speedup()) for v in verdicts]
    both = [(claim, found) for claim, found in pairs if claim is not None and found is not None]
    if both:
        claimed, found = (_geometric_mean(values) for values in zip(*both, strict=True))
        slower = sum(seen < claim for claim, seen in both)
        yield (
            f"of {len(both)} with a claim that were verified: {claimed:.2f} x eager claimed, "
            f"{found:.2f} x found (geometric means); {slower} slower than claimed"
        )


def _draw_verified(axes: Axes, verified: Sequence[Verdict], claims: Sequence[float]) -> None:
    axes.set_label("verified")
    pairs = [(claim_of(v), v.speedup()) for v in verified]
    points = [(claim, found) for claim, found in pairs if claim is not None and found is not None]
    ends = [*claims, *(value for point in points for value in point), 1.0]
    low, high = min(ends) / 1.5, max(ends) * 1.5
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot((low, high), (low, high), color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    axes.annotate("as claimed", (high, high), (-4, -12), textcoords="offset points", ha="right")
    axes.axhline(1, color=FAINT, linewidth=0.8)
    axes.scatter([claim for claim, _ in points], [found for _, found in points], 30, OURS, zorder=4)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("verified here, times as fast as eager")
    axes.tick_params(labelbottom=False)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rejected(axes: Axes, verdicts: Sequence[Verdict], names: Sequence[str]) -> None:
    """A row for each verdict that is a rejection, with a cross at each claim."""
    axes.set_label("rejected")
    counts = _counts(verdicts)
    for row, name in enumerate(names):
        claims = [claim_of(v) for v in verdicts if v.verdict == name]
        found = [claim for claim in claims if claim is not None]
        axes.scatter(found, [row] * len(found), 26, PEER, marker="x", zorder=4)
    axes.set_yticks(range(len(names)), [f"{name} ({counts[name]})" for name in names])
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.set_title("rejected", loc="left", fontsize=8, pad=3)
    axes.set_xlabel("claimed, times as fast as eager")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many of each verdict, in the order of ``VERDICTS``."""
    found = Counter(verdict.verdict for verdict in verdicts)
    return {name: found[name] for name in VERDICTS if found[name]}


def _is_verified(name: str) -> bool:
    return Verdict("", name).is_verified


def _place(verdict: Verdict) -> str:
    """Where it was verified."""
    words = (f"{key} {value}" for key, value in verdict.environment.items())
    return "verified on " + (plain(", ".join(words)) or "an unknown machine")


def _check_any(verdicts: Sequence[Verdict]) -> None:
    if not verdicts:
        raise RuntimeError("no kernel has a verdict yet: fastshard archive verify gives one")


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
