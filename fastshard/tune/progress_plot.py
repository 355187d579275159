"""The gain of a search over the seconds that it took, as PNG or SVG; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

_INK, _GRAY = "#1f4e79", "#8a8a8a"


def write(steps: Sequence[tuple[float, float]], path: Path, title: str) -> None:
    """Draw ``steps``, seconds and geometric means of auto / best so far."""
    from matplotlib.figure import Figure

    seconds, gains = zip(*([(0.0, 1.0), *steps]), strict=True)
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.step(seconds, gains, where="post", color=_INK, linewidth=2)
    axes.axhline(1.0, color=_GRAY, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"{gains[-1]:.3f}x",
        (seconds[-1], gains[-1]),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color=_INK,
    )
    axes.set_xlabel("seconds of measuring")
    axes.set_ylabel("time of auto / best so far,\ngeometric mean")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, None)
    axes.margins(y=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
