"""What a variant costs on paper: microseconds by bytes, FLOPs, and how it fills the device.

Good enough to leave out what cannot win, and to order what might; it decides nothing that can be
measured. Times of kernels are sums of a launch, what memory or tensor cores take at the share of
the device that is busy, and of the last wave, which may be nearly empty.
"""

from dataclasses import dataclass
from math import ceil, inf

from fastshard.tune import menu, space
from fastshard.tune.problem import AUTO, Problem
from fastshard.tune.tile import Tile, tile_named

PRUNE = 3.0
"""Modelled above so many times the best one, a variant is not measured."""


@dataclass(frozen=True)
class Figures:
    """A device on paper.

    Attributes:
        gbps: Bandwidth of its memory.
        tflops: Dense 16-bit products with float32 sums by ``mma.sync``.
        library_tflops: The same by PyTorch's products.
        multiprocessors: How many.
        threads: Resident on a multiprocessor.
        launch_us: Of a kernel in a graph.
        latency_us: From a load of global memory to its value.
    """

    gbps: float
    tflops: float
    library_tflops: float
    multiprocessors: int
    threads: int
    launch_us: float = 1.5
    latency_us: float = 0.7


# NVIDIA's data sheets: A10, 24 GB (compute capability 8.6), 125 TFLOP/s; H200 SXM, 989 TFLOP/s, of
# which mma.sync reaches 621 (docs/prefill.md).
A10 = Figures(600, 125, 125, 72, 1536)
H200 = Figures(4800, 621, 989, 132, 2048)
FIGURES = {"8.6": A10, "9.0": H200}


def figures_of(capability: tuple[int, int]) -> Figures:
    """Of the device, or of the nearest one that is known."""
    return H200 if capability >= (9, 0) else A10


def modelled_us(problem: Problem, variant: str, device: Figures) -> float | None:
    """Microseconds of a legal variant; None for ``AUTO``, which is never left out."""
    if variant == AUTO:
        return None
    return _MODELS[problem.op](problem.sizes(), variant, device)


def pruned(problem: Problem, variants: list[str], device: Figures) -> dict[str, str]:
    """Those that are not worth measuring, and why: far above the best of our own on paper."""
    times = {name: modelled_us(problem, name, device) for name in variants if name != AUTO}
    best = min((us for name, us in times.items() if name != "library"), default=inf)
    return {
        name: f"{us:.1f} us on paper, the best one {best:.1f}"
        for name, us in times.items()
        if us > PRUNE * best
    }


def _busy_us(num_bytes: float, flops: float, device: Figures, share: float = 1.0) -> float:
    memory = num_bytes / min(1.0, 2 * share) / device.gbps / 1e3  # half of them can fill the bus
    return max(memory, flops / share / device.tflops / 1e6)


def _norm(sizes: dict[str, int], variant: str, device: Figures) -> float:
    threads, vecs = map(int, variant.split("x"))
    rows, row_bytes = sizes["rows"], sizes["hidden_size"] * 2
    rows_of_block = max(1, 128 // threads)
    resident = device.multiprocessors * (device.threads // max(threads, 128)) * rows_of_block
    at_once = min(rows, resident)
    # By Little's law: bytes on their way over the latency; a row takes two and its reductions.
    in_flight = at_once * row_bytes * 2
    rate = min(device.gbps * 1e3, in_flight / device.latency_us)  # bytes a microsecond
    row_us = 2 * device.latency_us + 0.02 * threads / 32 + 0.02 * vecs
    return device.launch_us + row_us + 2 * rows * row_bytes / rate


def _product_us(rows: int, columns: int, depth: int, tile: Tile, device: Figures) -> float:
    tiles = ceil(rows / tile.rows) * ceil(columns / tile.columns)
    waves = ceil(tiles / device.multiprocessors)
    of_wave = 2 * tile.rows * tile.columns * depth * device.multiprocessors
    num_bytes = 2 * (rows * depth + columns * depth + rows * columns)
    us = _busy_us(num_bytes, waves * of_wave / _tile_share(tile), device)
    return device.launch_us + us


def _tile_share(tile: Tile) -> float:
    """Of the device's rate: warps of 64 x 64 sums reach 0.8 of it, smaller ones read more.

    For 16 values of k a warp reads 32 bytes a row and column of its sums, at 128 bytes a clock, and
    computes 32 FLOPs a sum, at some 1024 a clock.
    """
    reads = 8 * (1 / tile.warp_rows + 1 / tile.warp_columns)  # over the products, in clocks
    return 0.8 * 1.25 / (1 + reads)


def _fused_mlp(sizes: dict[str, int], variant: str, device: Figures) -> float:
    rows, hidden, intermediate = sizes.values()
    if variant == "library":
        flops = 6 * rows * hidden * intermediate
        num_bytes = 6 * hidden * intermediate + 10 * rows * intermediate
        share = device.library_tflops / device.tflops
        return 3 * device.launch_us + _busy_us(num_bytes, flops / share / 0.8, device)
    names = menu.TILES if variant == "tiles" else (variant.removeprefix("tiles_"),)
    return min(
        _product_us(rows, 2 * intermediate, hidden, tile, device)
        + _product_us(rows, hidden, intermediate, tile, device)
        for tile in map(tile_named, names)
    )


def _linear(sizes: dict[str, int], variant: str, device: Figures) -> float:
    rows, depth, columns = sizes.values()
    return device.launch_us + _busy_us(2 * depth * columns, 2 * rows * depth * columns, device)


def _attention(sizes: dict[str, int], variant: str, device: Figures) -> float:
    batch, s_q, s_kv, heads, kv_heads, head_dim = sizes.values()
    kernel, _, asked = variant.partition("/")
    rows = s_q * heads // kv_heads
    pairs = s_q * s_kv - s_q * (s_q - 1) / 2  # causal, the queries at the end
    flops = 4 * batch * heads * head_dim * pairs
    kv_bytes = 4 * batch * kv_heads * s_kv * head_dim
    if kernel == "library":
        share = device.library_tflops / device.tflops
        return device.launch_us + _busy_us(kv_bytes, flops / share / 0.6, device)
    # Rows of a block, blocks of a multiprocessor, share of the products that are of real rows.
    of_block, resident = {"decode": (16, 2), "few": (16, 3), "small": (64, 2), "prefill": (128, 2)}[
        kernel
    ]
    blocks = batch * kv_heads * ceil(rows / of_block)
    capacity = device.multiprocessors * resident
    splits = int(asked or max(1, min(capacity // blocks, s_kv // 256)))
    waves = ceil(blocks * splits / capacity)
    share = blocks * splits / (waves * capacity)
    wasted = ceil(rows / of_block) * of_block / rows
    efficiency = {"decode": 0.2, "few": 0.2, "small": 0.4, "prefill": 0.6}[kernel]
    read = kv_bytes * ceil(rows / of_block) / 4 if rows > of_block else kv_bytes  # L2 serves most
    us = device.launch_us + _busy_us(read, flops * wasted / efficiency, device, share)
    if splits > 1:
        partial_bytes = 8 * batch * heads * s_q * head_dim * splits
        us += device.launch_us * (kernel != "decode") + _busy_us(partial_bytes, 0, device)
    return us + device.latency_us * 2


_MODELS = {
    **dict.fromkeys(menu.NORMS, _norm),
    "fused_mlp": _fused_mlp,
    "linear": _linear,
    **dict.fromkeys(space.ATTENTIONS, _attention),
}


def better_norm(problem: Problem, device: Figures, gain: float = 0.02) -> str | None:
    """A norm's variant that is clearly better than the heuristic's on paper; None for other ops.

    The heuristic takes the first of the menu that holds a row (csrc/norm/row.h).
    """
    if problem.op not in menu.NORMS:
        return None
    row_bytes = problem.sizes()["hidden_size"] * 2
    held = {
        name: 16 * int(name.split("x")[0]) * int(name.split("x")[1]) for name in menu.ROW_CONFIGS
    }
    heuristic = next((name for name in menu.ROW_CONFIGS if held[name] >= row_bytes), None)
    if heuristic is None:
        return None
    times = {
        name: modelled_us(problem, name, device) for name in space.MENU.legal_variants(problem)
    }
    best = min(times, key=times.get)
    return best if times[best] < (1 - gain) * modelled_us(problem, heuristic, device) else None
