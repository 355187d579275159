"""The variants of each op: how they are spelled, and which are legal for a problem.

A variant is a choice for each gene of its op. What a kernel would refuse, and what is another
variant under a second name, is illegal, with a reason. The menus are those of csrc.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from fastshard.tune.problem import AUTO, Problem

Genes = dict[str, str | int]

NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
ATTENTIONS = ("attention", "cached_attention")

# Threads of a row and vectors of a thread: RowConfigs in csrc/norm/row.cuh.
ROW_CONFIGS = ("16x1", "32x1", "64x2", "128x2", "256x2", "128x4", "512x1", "256x4", "512x4")
ROW_CONFIGS += ("1024x2", "1024x4")
TILES = ("128x256", "128x128", "64x128")  # csrc/gemm/choose_tile.h
STREAMED_ROWS = 16  # csrc/gemv, csrc/mlp/fused_mlp.h
DECODE_ROWS = 16  # csrc/attention/decode_attention.h, as the next
DECODE_HEAD_DIMS = (64, 96, 128)
KEYS_OF_A_TILE = 16  # the fewest of any kernel: more splits than such tiles leave some empty
_SPLITS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

_NORM_GENES = {"threads": (16, 32, 64, 128, 256, 512, 1024), "vecs": (1, 2, 4)}
_ATTENTION_GENES = {
    "kernel": (AUTO, "library", "decode", "few", "small", "prefill"),
    "splits": _SPLITS,
}
GENES: dict[str, dict[str, tuple[str | int, ...]]] = {
    **dict.fromkeys(NORMS, _NORM_GENES),
    "fused_mlp": {"path": (AUTO, "library", "tiles"), "tile": (AUTO, *TILES)},
    "linear": {"path": (AUTO, "library")},
    **dict.fromkeys(ATTENTIONS, _ATTENTION_GENES),
}
"""The genes of each op and what each can be; splits of 0: as many as the heuristic takes."""


@dataclass(frozen=True)
class Candidate:
    """One choice for each gene.

    Attributes:
        genes: The choices.
        variant: As the raw op takes it.
        why_illegal: None where it may be measured.
    """

    genes: Genes
    variant: str
    why_illegal: str | None


def candidate(problem: Problem, genes: Genes) -> Candidate:
    """Spell the genes out and judge them."""
    return Candidate(genes, *_RULES[problem.op](problem.sizes(), genes))


def candidates(problem: Problem) -> Iterator[Candidate]:
    """Every combination of genes, legal or not."""
    names = GENES[problem.op]
    for choices in product(*names.values()):
        yield candidate(problem, dict(zip(names, choices, strict=True)))


def legal_variants(problem: Problem) -> list[str]:
    """All that may be measured, ``AUTO`` not among them."""
    legal = (each.variant for each in candidates(problem) if each.why_illegal is None)
    return [variant for variant in dict.fromkeys(legal) if variant != AUTO]


def genes_of(problem: Problem, variant: str) -> Genes | None:
    """The genes that spell a legal variant; None where there are none."""
    for each in candidates(problem):
        if each.variant == variant and each.why_illegal is None:
            return each.genes
    return None


def _norm(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    variant = f"{genes['threads']}x{genes['vecs']}"
    row_bytes, held = sizes["hidden_size"] * 2, genes["threads"] * genes["vecs"] * 16
    if variant not in ROW_CONFIGS:
        return variant, "not compiled"
    if row_bytes > held:
        return variant, f"holds {held} bytes of a row of {row_bytes}"
    if row_bytes * 4 < held:
        return variant, f"has room for {held} bytes, four times a row of {row_bytes}"
    return variant, None


def _fused_mlp(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    path, tile = genes["path"], genes["tile"]
    variant = path if path != "tiles" or tile == AUTO else f"tiles_{tile}"
    if path != "tiles" and tile != AUTO:
        return variant, f"{path} has no tiles to choose"
    return variant, None


def _linear(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    if genes["path"] != AUTO and sizes["rows"] > STREAMED_ROWS:
        return genes["path"], f"more than {STREAMED_ROWS} rows go to the library anyway"
    return genes["path"], None


def _attention(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    kernel, splits = genes["kernel"], genes["splits"]
    rows = sizes["s_q"] * sizes["num_qo_heads"] // sizes["num_kv_heads"]
    variant = kernel if splits == 0 else f"{kernel}/{splits}"
    if kernel in (AUTO, "library") and splits != 0:
        return variant, f"{kernel} splits as it likes"
    if kernel == "decode" and rows > DECODE_ROWS:
        return variant, f"{rows} query rows a key/value head, decode takes {DECODE_ROWS}"
    if kernel == "decode" and sizes["head_dim"] not in DECODE_HEAD_DIMS:
        return variant, f"decode is not compiled for head_dim {sizes['head_dim']}"
    if kernel == "prefill" and sizes["head_dim"] > 128:
        return variant, "the same kernel as small"
    if splits > 1 and splits * KEYS_OF_A_TILE > sizes["s_kv"]:
        return variant, f"more splits than tiles of {sizes['s_kv']} keys"
    return variant, None


def _cached_attention(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    if genes["kernel"] == "library":
        return "library", "the library takes no lengths that are on the device"
    return _attention(sizes, genes)


_RULES = {
    **dict.fromkeys(NORMS, _norm),
    "fused_mlp": _fused_mlp,
    "linear": _linear,
    "attention": _attention,
    "cached_attention": _cached_attention,
}
