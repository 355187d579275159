"""Tiles of a matrix product on paper: their names, what they take of a multiprocessor, their rules.

The rules are those of csrc/gemm/tile.cuh and of compute capability 8.6.
"""

import re
from dataclasses import astuple, dataclass

REGISTERS = 65536  # of a multiprocessor
MAX_REGISTERS = 255  # of a thread
SHARED_BYTES = 101376  # of a block
MAX_THREADS = 512
_MULTIPROCESSOR_BYTES, _SYSTEM_BYTES = 102400, 1024  # of shared memory; the latter of each block
_OTHER_REGISTERS = 48  # addresses and counters, beside sums and fragments


@dataclass(frozen=True)
class Tile:
    """The numbers of a GemmConfig but the last, which follows from them.

    Attributes:
        row_warps: Of a block, side by side; as ``column_warps``.
        column_warps: See ``row_warps``.
        warp_rows: Rows of a warp's sums.
        warp_columns: Columns of a warp's sums.
        depth: Values of k in a stage.
        stages: Of the ring in shared memory.
    """

    row_warps: int
    column_warps: int
    warp_rows: int
    warp_columns: int
    depth: int
    stages: int

    @property
    def rows(self) -> int:
        return self.row_warps * self.warp_rows

    @property
    def columns(self) -> int:
        return self.column_warps * self.warp_columns

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.column_warps

    @property
    def shared_bytes(self) -> int:
        return 2 * (self.rows + self.columns) * self.depth * self.stages

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, fragments of two steps, and the rest."""
        fragments = 2 * (self.warp_rows // 4 + self.warp_columns // 4)
        return self.warp_rows * self.warp_columns // 32 + fragments + _OTHER_REGISTERS

    @property
    def min_blocks(self) -> int:
        """That a multiprocessor holds: what the compiler keeps registers for."""
        by_memory = _MULTIPROCESSOR_BYTES // (self.shared_bytes + _SYSTEM_BYTES)
        return max(1, min(by_memory, REGISTERS // (self.threads * self.registers)))

    @property
    def config(self) -> tuple[int, ...]:
        """The numbers of its GemmConfig."""
        return (*astuple(self), self.min_blocks)

    def why_illegal(self) -> str | None:
        """Why no kernel is compiled of it; None where it is worth trying."""
        if not 64 <= self.threads <= MAX_THREADS:
            return f"{self.threads} threads, not 64 to {MAX_THREADS}"
        if self.shared_bytes > SHARED_BYTES:
            return f"{self.shared_bytes} bytes of shared memory, at most {SHARED_BYTES}"
        most = min(MAX_REGISTERS, REGISTERS // self.threads)
        if self.registers > most:
            return f"about {self.registers} registers a thread, at most {most}"
        # Threads copy 16 bytes each: at a time so many whole rows of a stage.
        rows_at_a_time = self.threads * 8 // self.depth
        if rows_at_a_time % 32 or self.rows % rows_at_a_time or self.columns % rows_at_a_time:
            return (
                f"{self.threads} threads copy {rows_at_a_time} rows of a stage at a time: must be "
                f"a multiple of 32 and divide {self.rows} and {self.columns}"
            )
        return None


SHORT_NAMES = {
    "128x256": Tile(2, 4, 64, 64, 32, 4),
    "128x128": Tile(2, 2, 64, 64, 32, 3),
    "64x128": Tile(2, 2, 32, 64, 32, 4),
}
"""Tiles that the menu has under names of their own."""


def name_of(tile: Tile) -> str:
    """Rows x columns, depth x stages, warps in rows x in columns, unless the menu has it shorter.

    Like ``128x192_32x4_4x2``, a tile of warps of 32 x 96 sums.
    """
    for name, known in SHORT_NAMES.items():
        if tile == known:
            return name
    return (
        f"{tile.rows}x{tile.columns}_{tile.depth}x{tile.stages}_"
        f"{tile.row_warps}x{tile.column_warps}"
    )


def tile_named(name: str) -> Tile:
    """The tile of a name as ``name_of`` gives it.

    Raises:
        ValueError: it is none.
    """
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    numbers = re.fullmatch("_".join(["([1-9][0-9]*)x([1-9][0-9]*)"] * 3), name)
    if numbers is not None:
        rows, columns, depth, stages, row_warps, column_warps = map(int, numbers.groups())
        tile = Tile(
            row_warps, column_warps, rows // row_warps, columns // column_warps, depth, stages
        )
        if name_of(tile) == name:
            return tile
    raise ValueError(f"tile must have a name like 128x192_32x4_4x2, got {name!r}")
