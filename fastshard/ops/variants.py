"""The tables that say which variant of a kernel serves a call: read, merged, given to the kernels.

A table is a JSON file of one device. The user's (``FASTSHARD_CACHE_DIR``) counts more than those
that came with the wheel, and of either an entry for a device's name more than one for its compute
capability. Without an entry a heuristic in csrc decides.
"""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastshard.build_record import source_version
from fastshard.environment import cache_dir, shipped_tables_dir
from fastshard.files import replace_text

FORMAT = 1
ORIGINS = ("measured", "model")
COUNTS = {"attention": 3, "cached_attention": 3}
"""How many of an op's sizes, the first, count what a call has of something: calls in one bucket
share an entry. Batch, queries and keys of attention; of every other op its rows."""


@dataclass(frozen=True)
class Entry:
    """The variant for one op, dtype and shape.

    Attributes:
        op: Name without its namespace.
        dtype: Like ``bfloat16``.
        shape: Counts (``COUNTS``), of which the buckets count, then the op's own sizes: rows and
            hidden_size of a norm.
        variant: As the raw op takes it.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    variant: str


@dataclass(frozen=True)
class Table:
    """What was found for one device.

    Attributes:
        device: Name like ``NVIDIA A10``, or a compute capability like ``8.6``.
        origin: Of ``ORIGINS``: timed on such a device, or computed for it.
        fastshard: Version whose variants these are.
        entries: At most one for each op, dtype and bucket of shapes.
    """

    device: str
    origin: str
    fastshard: str
    entries: tuple[Entry, ...]


class OtherVersion(ValueError):
    """A table of another version of fastshard, whose variants may be others."""


def bucket(rows: int) -> int:
    """The power of two at or above ``rows``: calls in one bucket share an entry."""
    return 1 << max(rows - 1, 0).bit_length()


def key_shape(op: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape by which an entry is found: counts in their buckets, other sizes as they are."""
    counts = COUNTS.get(op, 1)
    return (*map(bucket, shape[:counts]), *shape[counts:])


def user_tables_dir() -> Path:
    """Where the user's own tables are."""
    return cache_dir() / "tables"


def read_table(path: Path) -> Table:
    """Read one file.

    Raises:
        ValueError: it is not a table, or one of another version of fastshard (``OtherVersion``).
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} must be a table of variants of format {FORMAT}")
    installed = source_version()
    if content.get("fastshard") != installed:
        raise OtherVersion(
            f"{path} must be of fastshard {installed}, whose variants it names, "
            f"got {content.get('fastshard')}"
        )
    entries = content.get("entries")
    if not (
        _is_word(content.get("device"))
        and content.get("origin") in ORIGINS
        and isinstance(entries, list)
        and all(map(_is_entry, entries))
    ):
        raise ValueError(
            f"{path} must have device, origin, and entries of op, dtype, shape and variant"
        )
    return Table(
        content["device"],
        content["origin"],
        installed,
        tuple(Entry(e["op"], e["dtype"], tuple(e["shape"]), e["variant"]) for e in entries),
    )


def write_table(path: Path, table: Table) -> None:
    """Write one file, whole or not at all; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    replace_text(path, json.dumps({"format": FORMAT, **asdict(table)}, indent=1) + "\n")


def read_tables(folders: Sequence[Path] | None = None) -> list[Table]:
    """All tables, those that count most last; one that cannot be read is left out with a warning.

    Args:
        folders: By default that of the wheel, then the user's.
    """
    tables = []
    for folder in (shipped_tables_dir(), user_tables_dir()) if folders is None else folders:
        found = []
        for path in sorted(folder.glob("*.json")):
            try:
                found.append(read_table(path))
            except (ValueError, OSError) as error:
                warnings.warn(f"a table of variants is ignored: {error}", stacklevel=2)
        tables += sorted(found, key=lambda table: not _is_capability(table.device))
    return tables


def table_lines(tables: Iterable[Table]) -> str:
    """As the kernels take them, see csrc/ops/variants.h."""
    return "".join(
        f"{table.device}\t{entry.op}\t{entry.dtype}\t"
        f"{','.join(map(str, key_shape(entry.op, entry.shape)))}\t{entry.variant}\n"
        for table in tables
        for entry in table.entries
    )


def use_tables(folders: Sequence[Path] | None = None) -> None:
    """Let the compiled kernels choose by these tables from now on.

    Args:
        folders: As in ``read_tables``; an empty sequence leaves the heuristics alone.
    """
    import fastshard._C

    fastshard._C.use_variants(table_lines(read_tables(folders)))


def _is_word(value: object) -> bool:
    """Whether it can be a field of a line."""
    return isinstance(value, str) and value != "" and value.isprintable()


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return False
    sizes = entry["shape"]
    return all(_is_word(entry.get(name)) for name in ("op", "dtype", "variant")) and (
        len(sizes) > 0 and all(type(size) is int and size > 0 for size in sizes)
    )


def _is_capability(device: str) -> bool:
    return device.replace(".", "", 1).isdigit()
