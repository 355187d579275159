"""The table that a search starts from, and what it becomes by what was found."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastshard.build_record import source_version
from fastshard.environment import shipped_tables_dir
from fastshard.ops import variants
from fastshard.ops.variants import Entry, Table, key_shape
from fastshard.tune import recorded
from fastshard.tune.problem import Problem
from fastshard.tune.search import Found
from fastshard.tune.space import MENU, Space

Key = tuple[str, str, tuple[int, ...]]


def key(of: Problem | Entry) -> Key:
    """What calls that share an entry share."""
    return of.op, of.dtype, key_shape(of.op, of.shape)


def read(path: Path, device: str, *, is_stale_allowed: bool = False) -> Table:
    """The measured table of this device that is there, or an empty one.

    Args:
        path: Need not exist.
        device: Name.
        is_stale_allowed: Whether an empty one may take the place of a table of another version of
            fastshard, which the kernels ignore.

    Raises:
        ValueError: it is another table, or none.
        OSError: it cannot be read.
    """
    empty = Table(device, "measured", source_version(), ())
    if not path.exists():
        return empty
    try:
        table = variants.read_table(path)
    except variants.OtherVersion:
        if is_stale_allowed:
            return empty
        raise
    if table.device != device or table.origin != "measured":
        raise ValueError(
            f"{path} must be a measured table of {device}, got a {table.origin} one of "
            f"{table.device}"
        )
    return table


def chosen(old: Table) -> dict[Key, str]:
    """The variants of the wheel's tables of this device, and of the old one, which counts more."""
    shipped = variants.read_tables([shipped_tables_dir()])
    tables = (*(table for table in shipped if table.device == old.device), old)
    return {key(entry): entry.variant for table in tables for entry in table.entries}


def merged(old: Table, found: Sequence[tuple[Found, Entry | None]], space: Space = MENU) -> Table:
    """The new entries, and those old ones that no measurement speaks against.

    Args:
        old: Of the same device.
        found: Problems whose winners were confirmed, with the entries that this gave.
        space: What an entry may name.
    """
    searched = {key(each.problem): each for each, _ in found}
    new = [entry for _, entry in found if entry is not None]
    replaced = set(map(key, new))

    def is_kept(entry: Entry) -> bool:
        if key(entry) not in searched:
            return True
        each = searched[key(entry)]
        measured = each.measured.get(entry.variant)
        is_open = measured is None or measured.reason == recorded.UNKNOWN
        is_legal = entry.variant in space.legal_variants(each.problem)
        return is_open and is_legal and key(entry) not in replaced

    return replace(old, entries=(*filter(is_kept, old.entries), *new))
