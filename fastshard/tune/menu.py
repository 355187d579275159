"""The menus of csrc that ``fastshard tune --patch`` adds to: a line for each variant."""

from fastshard.ops.promoted import PREFIX

ROW_CONFIGS = (
    "16x1",
    "32x1",
    "64x2",
    "128x2",
    "256x2",
    "128x4",
    "512x1",
    "256x4",
    "512x4",
    "1024x2",
    "1024x4",
)
"""Threads of a row and 16-byte vectors of a thread: kRowMenu in csrc/norm/row.h."""

TILES = (
    "128x256",
    "128x128",
    "64x128",
)
"""Tiles of matrix products: kGemmMenu in csrc/gemm/choose_tile.h."""

NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")


def has(op: str, variant: str) -> bool:
    """Whether a legal variant is compiled into the wheel, or a kernel that the user promoted."""
    if is_promoted(variant):
        return True
    if op in NORMS:
        return variant in ROW_CONFIGS
    return op != "fused_mlp" or variant.removeprefix("tiles_") in (*TILES, "library", "tiles")


def is_promoted(variant: str) -> bool:
    """Whether it is a kernel of the user's cache, by ``fastshard archive promote``."""
    return variant.startswith(PREFIX)
