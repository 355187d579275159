"""A Triton kernel that reads a buffer and does no more than it must; needs ``triton``."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_kernel(x, sums, size, rounds, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Each program adds up ``BLOCKS`` blocks of ``BLOCK`` of x's ``size`` elements a round.

    Programs take turns at the blocks; program i writes ``sums[i]``.
    """
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for j in range(rounds):
        start = (j * tl.num_programs(0) + program).to(tl.int64) * (BLOCK * BLOCKS)
        for i in tl.static_range(BLOCKS):
            offsets = start + i * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(x + offsets, mask=offsets < size, other=0)
    tl.store(sums + program, tl.sum(total))


@triton.jit
def _nothing_kernel(x):
    pass


def read(
    x: Tensor, sums: Tensor, block: int, blocks: int, num_warps: int, num_programs: int | None
) -> None:
    """Write sums of parts of ``x``, int32, to the front of ``sums``, int32.

    Args:
        x: ``[n]``, n a multiple of 16: else loads are narrow.
        sums: An element a program.
        block: Elements of a load of the whole program.
        blocks: Loads in flight.
        num_warps: Of a program.
        num_programs: None: as many as read all of ``x`` in one round.
    """
    size = x.numel()
    parts = triton.cdiv(size, block * blocks)
    programs = num_programs or parts
    rounds = triton.cdiv(parts, programs)
    _sum_kernel[(programs,)](x, sums, size, rounds, BLOCK=block, BLOCKS=blocks, num_warps=num_warps)


def nothing(x: Tensor) -> None:
    """Launch a kernel that does nothing."""
    _nothing_kernel[(1,)](x, num_warps=1)
