"""``fastshard archive`` and its commands that only read: fetch, list, show."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastshard.archive import catalog, source
from fastshard.archive.schema import SPLITS

Say = Callable[[str], None]


def say_state(say: Say) -> int:
    """Say what was fetched; returns the exit status."""
    archive = source.load()
    say(f"{archive.num_rows} kernels of {_whence(archive)} in {archive.folder}")
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
    say(catalog.HEADER)
    for row in found:
        say(catalog.line(row, None))
    say(f"{len(found)} of {len(rows)} kernels; all figures are the authors' claims")
    return 0


def show(text: str, *, say: Say) -> int:
    """Print all of the row whose ID begins with ``text``."""
    archive = source.load()
    identity = catalog.find_id(source.rows(archive), text)
    for line in catalog.describe(source.whole_row(archive, identity), None):
        say(line)
    return 0


def _whence(archive: source.Archive) -> str:
    return archive.source + (f" at {archive.revision[:12]}" if archive.revision else "")
