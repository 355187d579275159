"""A Triton kernel that reads a buffer and does no more than it must; needs ``triton``."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_kernel(x, sums, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Program i adds up ``BLOCKS`` blocks of ``BLOCK`` int32 elements and writes the sum."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * (BLOCK * BLOCKS)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(BLOCKS):
        total += tl.load(x + start + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + program, tl.sum(total))


@triton.jit
def _nothing_kernel(x):
    pass


def read(x: Tensor, sums: Tensor, block: int, blocks: int, num_warps: int) -> None:
    """Write the sums of consecutive parts of ``x``, int32, to the front of ``sums``, int32.

    Elements beyond a multiple of ``block * blocks`` are not read.
    """
    programs = x.numel() // (block * blocks)
    _sum_kernel[(programs,)](x, sums, BLOCK=block, BLOCKS=blocks, num_warps=num_warps)


def nothing(x: Tensor) -> None:
    """Launch a kernel that does nothing."""
    _nothing_kernel[(1,)](x, num_warps=1)
