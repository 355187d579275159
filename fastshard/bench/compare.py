"""``fastshard bench compare A.json B.json``: the lines of two runs beside each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from fastshard.bench.report import Line, format_us
from fastshard.bench.result_file import ResultFile, read

Key = tuple[str, str, str, str]
"""Case, variant, shape and dtype: what makes two lines the same."""

LIMITS = ("copy_gbps", "graph_node_us", "matmul_tflops", "mma_tflops")
LIMIT_TOLERANCE = 0.02
"""Two measured limits that differ by less are taken for the same."""

NOTE = "A/B: above 1 B is the faster; equal: the ranges p20-p80 of both overlap"


@dataclass(frozen=True)
class Pair:
    """One line as measured in two runs."""

    a: Line
    b: Line

    @property
    def ratio(self) -> float:
        """How many times as fast B is."""
        return self.a.timing.us / self.b.timing.us

    @property
    def is_equal(self) -> bool:
        """The ranges from the 20th to the 80th percentile overlap."""
        a, b = self.a.timing, self.b.timing
        return a.p20 <= b.p80 and b.p20 <= a.p80

    @property
    def verdict(self) -> str:
        if self.is_equal:
            return "equal"
        return "B faster" if self.ratio > 1 else "B slower"


@dataclass(frozen=True)
class Comparison:
    """The lines that two runs share, in the order of the first, and those that only one has."""

    pairs: list[Pair]
    only_a: list[Line]
    only_b: list[Line]


def lines(path_a: Path, path_b: Path) -> Iterator[str]:
    """What ``fastshard bench compare`` prints.

    Raises:
        ValueError: a file is no result of ``fastshard bench --json``, or holds a line twice.
        OSError: a file cannot be read.
    """
    a, b = read(path_a), read(path_b)
    found = match(a, b)
    yield from _header(a, b)
    yield ""
    rows = [("case", "variant", "shape", "dtype", "A", "B", "A/B", "verdict")]
    rows += [_row(pair) for pair in found.pairs]
    if found.pairs:
        yield from _aligned(rows, right=(4, 5, 6))
        yield from _summary(found.pairs)
    else:
        yield "no line is in both files"
    for name, lonely in (("A", found.only_a), ("B", found.only_b)):
        if lonely:
            yield ""
            yield f"only in {name}:"
            rows = [(*_key(line), format_us(line.timing.us)) for line in lonely]
            yield from _aligned(rows, right=(4,))


def match(a: ResultFile, b: ResultFile) -> Comparison:
    """Pair the lines of two runs.

    Raises:
        ValueError: one holds two lines of the same case, variant, shape and dtype.
    """
    of_a, of_b = _by_key(a), _by_key(b)
    return Comparison(
        [Pair(line, of_b[key]) for key, line in of_a.items() if key in of_b],
        [line for key, line in of_a.items() if key not in of_b],
        [line for key, line in of_b.items() if key not in of_a],
    )


def differences(a: ResultFile, b: ResultFile) -> list[str]:
    """What of the two runs' surroundings is not the same, one text each."""
    keys = dict.fromkeys((*a.environment, *b.environment))
    found = [(key, a.environment.get(key), b.environment.get(key)) for key in keys]
    texts = [f"{key} differs: {x} in A, {y} in B" for key, x, y in found if x != y]
    for key in LIMITS:
        x, y = a.limits.get(key), b.limits.get(key)
        if x and y and abs(x - y) > LIMIT_TOLERANCE * max(x, y):
            texts.append(f"the measured limit {key} differs: {x:.2f} in A, {y:.2f} in B")
    return texts


def _by_key(result: ResultFile) -> dict[Key, Line]:
    found: dict[Key, Line] = {}
    for line in result.lines:
        if _key(line) in found:
            raise ValueError(f"{result.path} holds the line {', '.join(_key(line))} twice")
        found[_key(line)] = line
    return found


def _key(line: Line) -> Key:
    return line.case, line.variant, line.shape, line.dtype


def _header(a: ResultFile, b: ResultFile) -> Iterator[str]:
    for name, result in (("A", a), ("B", b)):
        seen = {key: value or "unknown" for key, value in result.environment.items()}
        yield (
            f"{name}  {result.path}: {seen.get('device', 'unknown')}, "
            f"{seen.get('clocks.sm', 'unknown clock')}, "
            f"driver {seen.get('driver_version', 'unknown')}, "
            f"fastshard {seen.get('fastshard', 'unknown')} ({seen.get('code', 'unknown code')}), "
            f"torch {seen.get('torch', 'unknown')}"
        )
    for text in differences(a, b):
        yield f"warning: {text}"


def _row(pair: Pair) -> tuple[str, ...]:
    times = (format_us(line.timing.us) for line in (pair.a, pair.b))
    return (*_key(pair.a), *times, f"{pair.ratio:.3f}", pair.verdict)


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[str]:
    """Rows with columns of equal width; those of index in ``right`` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _summary(pairs: Sequence[Pair]) -> Iterator[str]:
    """The geometric means of our lines and of the peers': the latter should be one."""
    yield ""
    for name, is_peer in (("fastshard", False), ("peers", True)):
        of = [pair for pair in pairs if pair.a.is_peer == is_peer]
        if of:
            count = f"{len(of)} line{'s' * (len(of) > 1)}"
            equal = sum(pair.is_equal for pair in of)
            mean = geometric_mean([pair.ratio for pair in of])
            yield f"geometric mean of A/B, {name}: {mean:.3f} ({count}, {equal} equal)"
    yield NOTE
