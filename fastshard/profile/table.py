"""A recording as lines: kernels and our ops on a GPU, ops on a CPU."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastshard.ops._library import Cost
from fastshard.profile.recorded import NAMESPACE, Call, Kernel, Recording

SORTS = ("time", "name")

_COPIES = ("Memcpy", "Memset")
"""How names of copies and fills begin, which are kernels of nobody's."""

LimitUs = Callable[[str, Cost], float]
"""Name of an op of ours and the cost of one call -> microseconds that it takes at best."""

NOTE = (
    "% limit: of the fastest plain read, copy or mma.sync of as much, measured cold: above 100 % "
    "inputs came from the L2. Keys and values count as full caches where only the GPU knows how "
    "many are held."
)


@dataclass
class Row:
    """All calls of one name.

    Attributes:
        calls: How many.
        us: Their time together.
        costs: Known costs, and how many calls had each.
        costed_us: Time of the calls with a known cost.
    """

    name: str
    calls: int
    us: float
    costs: dict[Cost, int]
    costed_us: float

    def percent_of_limit(self, limit_us: LimitUs) -> float | None:
        """None where no cost is known."""
        if not self.costs or self.costed_us == 0:
            return None
        op = self.name.removeprefix(NAMESPACE)
        best = sum(calls * limit_us(op, cost) for cost, calls in self.costs.items())
        return 100 * best / self.costed_us


class _Rows(dict):
    """Name -> row, made at the first call that is added."""

    def add(self, name: str, us: float, *, calls: int = 1, cost: Cost | None = None) -> None:
        row = self.setdefault(name, Row(name, 0, 0.0, defaultdict(int), 0.0))
        row.calls += calls
        row.us += us
        if cost is not None:
            row.costs[cost] += calls
            row.costed_us += us


def lines(
    recording: Recording, *, sort: str = "time", limit_us: LimitUs | None = None
) -> Iterator[str]:
    """The table, or on a GPU both tables.

    Args:
        sort: One of ``SORTS``; time is the longest first.
        limit_us: On a GPU; None leaves the column out.
    """
    if not recording.kernels:
        yield from _table("op (time on the CPU)", op_rows_on_cpu(recording), sort)
        return
    kernels = kernel_rows(recording)
    total = sum(row.us for row in kernels)
    yield from _table("kernel", kernels, sort)
    ours = op_rows_on_gpu(recording)
    if ours:
        yield ""
        yield from _table("op of fastshard (time of its kernels)", ours, sort, total, limit_us)
        if limit_us is not None:
            yield NOTE


def kernel_rows(recording: Recording) -> list[Row]:
    rows = _Rows()
    for kernel in recording.kernels:
        rows.add(short_name(kernel.name), kernel.us)
    return list(rows.values())


def op_rows_on_cpu(recording: Recording) -> list[Row]:
    """Ops of any library that were called from outside of ops."""
    rows = _Rows()
    for call in recording.calls:
        rows.add(call.op, call.cpu_us)
    return list(rows.values())


def op_rows_on_gpu(recording: Recording) -> list[Row]:
    """Our ops by the time of their kernels.

    A replay of a CUDA graph calls no op. Its kernels are counted as calls of an op where that is
    sure: where the host's own calls ran the kernel by one op only, once a call, and at one cost.
    """
    rows, launchers = _Rows(), defaultdict(list)
    launched: dict[str, int] = defaultdict(int)
    for call in recording.calls:
        if call.op.startswith(NAMESPACE) and call.kernels:
            rows.add(call.op, sum(kernel.us for kernel in call.kernels), cost=call.cost)
        for kernel in _without_copies(call):
            launchers[kernel.name].append(call)
            launched[kernel.name] += 1
    totals = _Rows()
    for kernel in recording.kernels:
        totals.add(kernel.name, kernel.us)
    for name, calls in launchers.items():
        replays = totals[name].calls - launched[name] if name in totals else 0
        if replays > 0 and _is_one_op(calls):
            direct = sum(kernel.us for call in calls for kernel in _without_copies(call))
            rows.add(calls[0].op, totals[name].us - direct, calls=replays, cost=calls[0].cost)
    return list(rows.values())


def _without_copies(call: Call) -> list[Kernel]:
    return [kernel for kernel in call.kernels if not kernel.name.startswith(_COPIES)]


def _is_one_op(calls: Sequence[Call]) -> bool:
    """Whether calls that launch some kernel launch no other, and are of one op and cost."""
    return (
        calls[0].op.startswith(NAMESPACE)
        and all(len(_without_copies(call)) == 1 for call in calls)
        and len({(call.op, call.cost) for call in calls}) == 1
    )


def short_name(kernel: str) -> str:
    """A kernel's name without its result and parameters: what is before them tells it apart."""
    kernel, depth = kernel.removeprefix("void "), 0
    for i, letter in enumerate(kernel):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and kernel[i - 1] != " " and i > 0:
            if kernel.startswith("(anonymous namespace)", i):
                continue
            return kernel[:i]
    return kernel


def _table(
    title: str,
    rows: Sequence[Row],
    sort: str,
    total_us: float | None = None,
    limit_us: LimitUs | None = None,
) -> Iterator[str]:
    """Figures first: a name may be long."""
    total = sum(row.us for row in rows) if total_us is None else total_us
    limit = "" if limit_us is None else f"{'% limit':>9}"
    yield f"{'calls':>7} {'total ms':>11} {'mean us':>11} {'share':>7}{limit}  {title}"
    key = (lambda row: row.name) if sort == "name" else (lambda row: (-row.us, row.name))
    for row in sorted(rows, key=key):
        share = 100 * row.us / total if total else 0.0
        if limit_us is not None:
            percent = row.percent_of_limit(limit_us)
            limit = f"{'-' if percent is None else f'{percent:.1f}%':>9}"
        yield (
            f"{row.calls:>7} {row.us / 1e3:>11.3f} {row.us / row.calls:>11.2f} {share:>6.1f}%"
            f"{limit}  {row.name}"
        )
