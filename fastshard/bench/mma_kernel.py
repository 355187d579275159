"""A Triton kernel that issues ``mma.sync`` and does no more; needs ``triton``.

``tl.dot`` is compiled to what the device has best, so the instruction is written out, in a loop of
its own: the one loop counts for all, and no value goes through registers of the compiler's choice.
"""

import triton
import triton.language as tl
from torch import Tensor

CHAINS = 8
"""Products of a warp that do not wait for each other."""
FLOPS = 2 * 16 * 8 * 16
"""Of one instruction: ``[16, 16]`` times ``[16, 8]``."""


def _loop() -> str:
    """PTX that repeats ``CHAINS`` products ``$7`` times; $0 is the sum of their elements.

    $1 to $4 are the left fragment, $5 and $6 the right one.
    """
    sums = [f"c{i}" for i in range(4 * CHAINS)]
    products = [", ".join(sums[i : i + 4]) for i in range(0, len(sums), 4)]
    lines = [
        f".reg .f32 {', '.join(sums)};",
        ".reg .s32 i;",
        ".reg .pred more;",
        *(f"mov.f32 {c}, 0f00000000;" for c in sums),
        "mov.s32 i, $7;",
        "again:",
        *(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            f"{{{c}}}, {{$1, $2, $3, $4}}, {{$5, $6}}, {{{c}}};"
            for c in products
        ),
        "sub.s32 i, i, 1;",
        "setp.gt.s32 more, i, 0;",
        "@more bra again;",
        *(f"add.f32 c0, c0, {c};" for c in sums[1:]),
        "mov.f32 $0, c0;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


LOOP = tl.constexpr(_loop())


@triton.jit
def _multiply_kernel(words, sums, rounds, THREADS: tl.constexpr):
    """Thread i multiplies words ``[4, THREADS]`` and ``[2, THREADS]`` of column i, all the same."""
    thread = tl.arange(0, THREADS)
    word = words + thread
    total = tl.inline_asm_elementwise(
        LOOP,
        "=f,r,r,r,r,r,r,r",
        [
            tl.load(word),
            tl.load(word + THREADS),
            tl.load(word + 2 * THREADS),
            tl.load(word + 3 * THREADS),
            tl.load(word + 4 * THREADS),
            tl.load(word + 5 * THREADS),
            rounds,
        ],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )
    tl.store(sums + tl.program_id(0) * THREADS + thread, total)


def multiply(words: Tensor, sums: Tensor, rounds: int, num_programs: int) -> int:
    """Multiply bfloat16 fragments over and over; returns the number of operations.

    Args:
        words: ``[6, threads]`` int32, each two bfloat16: of a thread four of the left fragment,
            two of the right one. threads: a power of two, whole warps.
        sums: ``[num_programs, threads]`` float32, written.
        rounds: How often each warp makes ``CHAINS`` products, at least 1.
        num_programs: Blocks of ``threads`` threads.
    """
    threads = words.shape[1]
    _multiply_kernel[(num_programs,)](words, sums, rounds, THREADS=threads, num_warps=threads // 32)
    return num_programs * threads // 32 * rounds * CHAINS * FLOPS
