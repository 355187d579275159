"""Finding and showing rows: filters, IDs and their prefixes, which op of ours a kernel is of.

The archive's texts are foreign: what is printed of them has no control characters.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastshard.archive.schema import Row, parse_profile
from fastshard.archive.source import REPOSITORY

LICENCE = "CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/"
ATTRIBUTION = (
    "The AI CUDA Engineer Archive, Sakana AI: R. T. Lange, A. Prasad, Q. Sun, M. Faldor, Y. Tang, "
    f"D. Ha, 2025, https://huggingface.co/datasets/{REPOSITORY}"
)


@dataclass(frozen=True)
class Kind:
    """A kind of op in the archive, and what it is to us.

    Attributes:
        name: As ``--op`` takes it.
        pattern: Of the archive's op names without their number, in any case.
        ours: The op of ``fastshard.ops`` that computes it, or would; None where there is none.
        same_meaning: Whether that op computes exactly what the archive's does.
        note: How the two differ, or how one stands for the other.
    """

    name: str
    pattern: str
    ours: str | None
    same_meaning: bool
    note: str


KINDS = (
    Kind(
        "batched_matmul",
        r"batched_matrix_multiplication_?",
        "attention",
        False,
        "it is Q K^T alone, in float32; ours never stores the scores",
    ),
    Kind(
        "matmul",
        r".*matrix_(vector_)?multiplication_?|matmul_(with|for)_.*",
        "linear",
        False,
        "it is a float32 product; ours is a 16-bit x @ weight.T with bias, norm and residual",
    ),
    Kind("softmax", r"softmax_?", "attention", False, "ours is a part of attention"),
    Kind(
        "rmsnorm",
        r"rmsnorm_?",
        "rms_norm",
        True,
        "over dimension 1, which of [rows, hidden_size] is the last; the weight comes after it",
    ),
    Kind("layernorm", r"layernorm_?", "layer_norm", True, "over the dimensions of the weight"),
    Kind(
        "attention",
        r".*attention_?",
        "attention",
        False,
        "it is a whole module with its projections, in float32",
    ),
    Kind("mlp", r".*mlp_?", "fused_mlp", False, "it is a stack of layers with ReLU; ours is gated"),
)
"""In the order in which they are tried."""
OPS = tuple(kind.name for kind in KINDS)


def kind_of(op_name: str | None) -> Kind | None:
    """What an op of the archive is to us; None where it is nothing."""
    name = re.sub(r"^\d+_", "", op_name or "")
    return next((k for k in KINDS if re.fullmatch(k.pattern, name, re.IGNORECASE)), None)


def select(
    rows: Sequence[Row],
    *,
    op: str | None = None,
    level: int | None = None,
    min_speedup: float | None = None,
) -> list[Row]:
    """The rows that pass all filters, by task, the largest claim first.

    Args:
        rows: Of the archive.
        op: Of ``OPS``.
        level: 1, 2 or 3.
        min_speedup: Least claimed speed-up over eager PyTorch; a row without a claim has none.

    Raises:
        ValueError: ``op`` is unknown.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")

    def passes(row: Row) -> bool:
        kind = kind_of(row.op_name)
        claim = row.speedup_native
        return (
            (op is None or (kind is not None and kind.name == op))
            and (level is None or row.level == level)
            and (min_speedup is None or (claim is not None and claim >= min_speedup))
        )

    found = [row for row in rows if passes(row)]
    return sorted(found, key=lambda r: (r.level or 0, r.task or 0, -(r.speedup_native or 0), r.id))


def find_id(rows: Sequence[Row], text: str) -> str:
    """The ID that ``text`` is, or is the only beginning of.

    Raises:
        ValueError: there is none, or several begin so.
    """
    found = [row.id for row in rows if row.id.startswith(text)] if text else []
    if text in found or len(found) == 1:
        return text if text in found else found[0]
    if found:
        some = ", ".join(map(plain, found[:3]))
        raise ValueError(f"id {plain(text)!r} must be of one row, {len(found)} begin so: {some}...")
    raise ValueError(
        f"id must be one of the archive, or its beginning, got {plain(text)!r}: "
        "fastshard archive list shows them"
    )


HEADER = (
    f"{'id':<52} {'op':<34} {'ms':>9} {'x eager':>8} {'x compile':>9} {'claim':<9} {'ours':<10} "
    "verdict here"
)


def line(row: Row, verdict: str | None) -> str:
    """One row of a list.

    Args:
        row: Its long texts are not needed.
        verdict: Of this machine, where there is one.
    """
    kind = kind_of(row.op_name)
    claim = {True: "correct", False: "incorrect", None: "-"}[row.correct]
    return (
        f"{plain(row.id):<52} {plain(row.op_name or '-'):<34} {_number(row.cuda_ms, '.4g'):>9} "
        f"{_number(row.speedup_native, '.2f'):>8} {_number(row.speedup_compile, '.2f'):>9} "
        f"{claim:<9} {(kind and kind.ours) or '-':<10} {verdict or '-'}"
    )


def describe(row: Row, verdict: str | None) -> Iterator[str]:
    """Everything about a row that was read whole: claims, licence, profiles, code."""
    kind = kind_of(row.op_name)
    yield f"id           {plain(row.id)}"
    yield f"op           {plain(row.op_name or '-')}"
    if kind is not None:
        means = "the same as" if kind.same_meaning else "not the same as"
        yield f"ours         {means} fastshard.ops.{kind.ours}: {kind.note}"
    claims = [("CUDA", row.cuda_ms), ("eager", row.native_ms), ("compile", row.compile_ms)]
    times = ", ".join(f"{name} {_number(value, '.4g')} ms" for name, value in claims)
    yield f"claimed      {times}, on the authors' H100"
    yield (
        f"             {_number(row.speedup_native, '.2f')} x eager, "
        f"{_number(row.speedup_compile, '.2f')} x compile, "
        f"correct: {row.correct if row.correct is not None else '-'}, "
        f"largest difference {_number(row.max_diff, '.2e')}"
    )
    yield f"verdict here {verdict or 'none: fastshard archive verify'}"
    yield f"licence      {LICENCE}"
    yield f"by           {ATTRIBUTION}"
    if row.error:
        yield from _section("error of the authors' run", row.error)
    for name, text in (
        ("NCU_Profile", row.ncu_profile),
        ("Torch_Profile", row.torch_profile),
        ("Clang_Tidy", row.clang_tidy),
    ):
        yield from _section(name, "\n".join(profile_lines(text)) if text else None)
    yield from _section("PyTorch_Code_Functional", row.functional_code)
    yield from _section("PyTorch_Code_Module", row.module_code)
    yield from _section("CUDA_Code", row.cuda_code)


def profile_lines(text: str) -> list[str]:
    """A profile's leaves as ``path = value``; where it is no literal of a dict, the text."""
    profile = parse_profile(text)
    return text.splitlines() if profile is None else list(_leaves(profile, ""))


def plain(text: str) -> str:
    """Text without what could command a terminal: controls are spelled out, but for newlines."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def _leaves(value: object, path: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    else:
        yield f"{path} = {value}"


def _section(name: str, text: str | None) -> Iterator[str]:
    yield ""
    yield f"--- {name}" + ("" if text else ": none")
    if text:
        yield plain(text.rstrip("\n"))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
