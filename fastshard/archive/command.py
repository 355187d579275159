"""``fastshard archive`` and its commands that only read: fetch, list, show, report."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from fastshard.archive import catalog, source
from fastshard.archive import report as reports
from fastshard.archive import verdict as verdicts
from fastshard.archive.schema import SPLITS, Row
from fastshard.ops import promoted

Say = Callable[[str], None]


def say_state(say: Say) -> int:
    """Say what was fetched; returns the exit status."""
    archive = source.load()
    say(f"{archive.num_rows} kernels of {_whence(archive)} in {archive.folder}")
    counts = Counter(verdict.verdict for verdict in verdicts.load_all())
    found = [f"{counts[name]} {name}" for name in verdicts.VERDICTS if counts[name]]
    say(f"verdicts     {', '.join(found) or 'none: fastshard archive verify'}")
    for each in promoted.read_all():
        say(
            f"promoted     {catalog.plain(each.id)} as {each.name} of {each.op} in "
            f"{', '.join(each.dtypes)}"
        )
    say(f"licence      {catalog.LICENCE}")
    say(f"by           {catalog.ATTRIBUTION}")
    return 0


def fetch(
    path: Path | None, *, splits: Sequence[str] = SPLITS, revision: str | None = None, say: Say
) -> int:
    """Copy the archive into the cache; as ``source.fetch``."""
    found = source.fetch(path, splits=splits, revision=revision)
    say(f"{found.num_rows} kernels of {_whence(found)} kept in {found.folder}")
    say(f"licence: {catalog.LICENCE}; by {catalog.ATTRIBUTION}")
    say("Their times and speed-ups are claims: fastshard archive verify measures.")
    return 0


def list_rows(
    *, op: str | None = None, level: int | None = None, min_speedup: float | None = None, say: Say
) -> int:
    """Print a line for each row that passes the filters of ``catalog.select``."""
    rows = source.rows(source.load())
    found = catalog.select(rows, op=op, level=level, min_speedup=min_speedup)
    known = {verdict.id: verdict.verdict for verdict in verdicts.load_all()}
    say(catalog.HEADER)
    for row in found:
        say(catalog.line(row, known.get(row.id)))
    say(f"{len(found)} of {len(rows)} kernels; all figures are the authors' claims")
    return 0


def show(text: str, *, say: Say) -> int:
    """Print all of the row whose ID begins with ``text``."""
    archive = source.load()
    identity = catalog.find_id(source.rows(archive), text)
    row = source.whole_row(archive, identity)
    for line in catalog.describe(row, _verdict_on(row)):
        say(line)
    return 0


def report(*, op: str | None = None, plot_path: Path | None = None, say: Say) -> int:
    """Print the table of verdicts, and plot it; as ``report.lines`` and ``report.write_plot``."""
    found = verdicts.load_all()
    if op is not None:
        kinds = {verdict.id: catalog.kind_of(verdict.op_name) for verdict in found}
        found = [v for v in found if kinds[v.id] is not None and kinds[v.id].name == op]
    if plot_path is not None:
        reports.write_plot(found, plot_path)
    for line in reports.lines(found):
        say(line)
    return 0


def _verdict_on(row: Row) -> str | None:
    """The verdict with its reason, if it is of this code; None where there is none."""
    verdict = verdicts.load(row.id)
    if verdict is None:
        return None
    code = row.cuda_code
    if verdict.code_sha256 != (hashlib.sha256(code.encode()).hexdigest() if code else ""):
        return "none of this code, only of an earlier one: fastshard archive verify"
    reason = " ".join(catalog.plain(verdict.reason).split())
    return f"{verdict.verdict}: {reason}" if reason else verdict.verdict


def _whence(archive: source.Archive) -> str:
    return archive.source + (f" at {archive.revision[:12]}" if archive.revision else "")
