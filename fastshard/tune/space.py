"""The variants of each op: how they are spelled, and which are legal for a problem.

A variant is a choice for each gene of its op. What a kernel would refuse, and what is another
variant under a second name, is illegal, with a reason. ``MENU`` holds what csrc compiles into the
wheel, ``OPEN`` also what ``fastshard tune --patch`` compiles by itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from fastshard.tune.menu import NORMS, ROW_CONFIGS, TILES
from fastshard.tune.problem import AUTO, Problem
from fastshard.tune.tile import MAX_REGISTERS, MAX_THREADS, REGISTERS, Tile, name_of

Genes = dict[str, str | int]

ATTENTIONS = ("attention", "cached_attention")

STREAMED_ROWS = 16  # csrc/gemv, csrc/mlp/fused_mlp.h
DECODE_ROWS = 16  # csrc/attention/decode_attention.h, as the next
DECODE_HEAD_DIMS = (64, 96, 128)
KEYS_OF_A_TILE = 16  # the fewest of any kernel: more splits than such tiles leave some empty
_SPLITS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

_ATTENTION_GENES = {
    "kernel": (AUTO, "library", "decode", "few", "small", "prefill"),
    "splits": _SPLITS,
}
"""Splits of 0: as many as the heuristic takes."""
_NORM_GENES = {
    gene: tuple(sorted({int(name.split("x")[at]) for name in ROW_CONFIGS}))
    for at, gene in enumerate(("threads", "vecs"))
}
_GENES = {
    **dict.fromkeys(NORMS, _NORM_GENES),
    "fused_mlp": {"path": (AUTO, "library", "tiles"), "tile": (AUTO, *TILES)},
    "linear": {"path": (AUTO, "library")},
    **dict.fromkeys(ATTENTIONS, _ATTENTION_GENES),
}
_OPEN_NORM_GENES = {
    "threads": (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 1024),
    "vecs": tuple(range(1, 9)),
}
_OPEN_MLP_GENES = {
    "path": (AUTO, "library", "tiles", "tile"),
    "row_warps": (1, 2, 4),
    "column_warps": (1, 2, 4),
    "warp_rows": (16, 32, 64),
    "warp_columns": (32, 64, 96),
    "depth": (32, 64),
    "stages": (2, 3, 4, 5, 6),
}


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


_Rule = Callable[[dict[str, int], Genes], tuple[str, str | None]]


@dataclass(frozen=True)
class Space:
    """What can be chosen.

    Attributes:
        genes: Of each op, and what each can be.
        rules: By op: the variant of sizes and genes, and why it is illegal.
    """

    genes: dict[str, dict[str, tuple[str | int, ...]]]
    rules: dict[str, _Rule]

    def candidate(self, problem: Problem, genes: Genes) -> Candidate:
        """Spell the genes out and judge them."""
        return Candidate(genes, *self.rules[problem.op](problem.sizes(), genes))

    def candidates(self, problem: Problem) -> Iterator[Candidate]:
        """Every combination of genes, legal or not."""
        names = self.genes[problem.op]
        for choices in product(*names.values()):
            yield self.candidate(problem, dict(zip(names, choices, strict=True)))

    def legal_variants(self, problem: Problem) -> list[str]:
        """All that may be measured, ``AUTO`` not among them."""
        legal = (each.variant for each in self.candidates(problem) if each.why_illegal is None)
        return [variant for variant in dict.fromkeys(legal) if variant != AUTO]

    def genes_of(self, problem: Problem, variant: str) -> Genes | None:
        """The genes that spell a legal variant; None where there are none."""
        for each in self.candidates(problem):
            if each.variant == variant and each.why_illegal is None:
                return each.genes
        return None


def _norm(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    variant = f"{genes['threads']}x{genes['vecs']}"
    if variant not in ROW_CONFIGS:
        return variant, "not compiled"
    return variant, _why_row_does_not_fit(sizes, genes)


def _open_norm(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    threads, vecs = genes["threads"], genes["vecs"]
    variant = f"{threads}x{vecs}"
    if variant not in ROW_CONFIGS:
        if threads > MAX_THREADS:
            return variant, f"{threads} threads, at most {MAX_THREADS} outside the menu"
        # Of each vector: x, residual or sum, weight and bias, in 4 registers each, and the rest.
        registers, most = 16 * vecs + 24, min(MAX_REGISTERS, REGISTERS // threads)
        if registers > most:
            return variant, f"about {registers} registers a thread, at most {most}"
    return variant, _why_row_does_not_fit(sizes, genes)


def _why_row_does_not_fit(sizes: dict[str, int], genes: Genes) -> str | None:
    row_bytes, held = sizes["hidden_size"] * 2, genes["threads"] * genes["vecs"] * 16
    if row_bytes > held:
        return f"holds {held} bytes of a row of {row_bytes}"
    if row_bytes * 4 < held:
        return f"has room for {held} bytes, four times a row of {row_bytes}"
    return None


def _fused_mlp(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    path, tile = genes["path"], genes["tile"]
    variant = path if path != "tiles" or tile == AUTO else f"tiles_{tile}"
    if path != "tiles" and tile != AUTO:
        return variant, f"{path} has no tiles to choose"
    return variant, None


def _open_mlp(sizes: dict[str, int], genes: Genes) -> tuple[str, str | None]:
    path, *numbers = genes.values()
    if path != "tile":
        return path, None
    tile = Tile(*numbers)
    return f"tiles_{name_of(tile)}", tile.why_illegal()


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


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(NORMS, _norm),
    "fused_mlp": _fused_mlp,
    "linear": _linear,
    "attention": _attention,
    "cached_attention": _cached_attention,
}

MENU = Space(_GENES, _RULES)
OPEN = Space(
    {**_GENES, **dict.fromkeys(NORMS, _OPEN_NORM_GENES), "fused_mlp": _OPEN_MLP_GENES},
    {**_RULES, **dict.fromkeys(NORMS, _open_norm), "fused_mlp": _open_mlp},
)


def with_promoted(space: Space, names: Mapping[str, Sequence[str]]) -> Space:
    """The space with promoted kernels as further variants of their ops.

    Args:
        space: To be extended.
        names: Op -> its promoted kernels.
    """
    genes, rules = dict(space.genes), dict(space.rules)
    for op, promoted in names.items():
        if promoted:
            genes[op] = {**space.genes[op], "promoted": ("", *promoted)}
            rules[op] = _or_promoted(space.genes[op], space.rules[op])
    return Space(genes, rules)


def _or_promoted(genes: Mapping[str, Sequence[str | int]], rule: _Rule) -> _Rule:
    first = {name: choices[0] for name, choices in genes.items()}

    def judge(sizes: dict[str, int], chosen: Genes) -> tuple[str, str | None]:
        rest = {name: choice for name, choice in chosen.items() if name != "promoted"}
        if not chosen["promoted"]:
            return rule(sizes, rest)
        is_first = rest == first
        return chosen["promoted"], None if is_first else "a promoted kernel has nothing to choose"

    return judge
