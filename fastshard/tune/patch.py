"""Winners as a patch of the menus of a checkout: csrc, and the list that the search goes by."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from fastshard.tune.menu import NORMS
from fastshard.tune.tile import tile_named

_CSRC_ROWS = ("csrc/norm/row.h", "constexpr RowVariant kRowMenu[] = {", "};")
_CSRC_TILES = ("csrc/gemm/choose_tile.h", "constexpr GemmMenuEntry kGemmMenu[] = {", "};")
_ROWS = ("fastshard/tune/menu.py", "ROW_CONFIGS = (", ")")
_TILES = ("fastshard/tune/menu.py", "TILES = (", ")")
"""A menu: its file, and the lines that begin and end it."""


def menu_patch(source: Path, additions: Iterable[tuple[str, str]]) -> str:
    """The unified diff that adds variants to the menus, for ``git apply``; empty for none.

    Args:
        source: A checkout.
        additions: Ops and variants; what a menu has, or what was added, is not added again.

    Raises:
        ValueError: a menu is not where it should be.
    """
    old: dict[str, str] = {}
    new: dict[str, str] = {}
    for op, variant in dict.fromkeys(additions):
        for (name, begin, end), line in _lines(op, variant):
            if name not in old:
                old[name] = new[name] = (source / name).read_text()
            new[name] = _with_line(new[name], begin, end, line, source / name)
    parts = []
    for name in sorted(old):
        lines = (text[name].splitlines(keepends=True) for text in (old, new))
        parts += difflib.unified_diff(*lines, f"a/{name}", f"b/{name}")
    return "".join(parts)


def _lines(op: str, variant: str) -> list[tuple[tuple[str, str, str], str]]:
    """The lines of a variant, each with the menu that it is for."""
    if op in NORMS:
        numbers = variant.replace("x", ", ")
        return [(_CSRC_ROWS, f"    {{{numbers}}},"), (_ROWS, f'    "{variant}",')]
    name = variant.removeprefix("tiles_")
    numbers = ", ".join(map(str, tile_named(name).config))
    # A speed of 0: the heuristic leaves it alone, the tables choose it.
    return [
        (_CSRC_TILES, f'    {{"{name}", {numbers}, 0}},'),
        (_TILES, f'    "{name}",'),
    ]


def _with_line(text: str, begin: str, end: str, line: str, path: Path) -> str:
    lines = text.split("\n")
    if lines.count(begin) != 1 or end not in lines[lines.index(begin) :]:
        raise ValueError(
            f"{path} must have a menu that begins with {begin!r} and ends with {end!r}"
        )
    first = lines.index(begin)
    last = lines.index(end, first)
    key = line.split(",")[0] if '"' in line else line  # a name, or two numbers
    if any(each.startswith(key) for each in lines[first:last]):
        return text
    return "\n".join([*lines[:last], line, *lines[last:]])
