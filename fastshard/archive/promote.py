"""``fastshard archive promote`` and ``demote``: a verified kernel as one more variant of an op.

Only RMSNorm and LayerNorm of the archive mean what an op of ours means. Their source is compiled
with ``wrapper.cpp`` into a library that takes the op's parameters. It is measured as ``fastshard
tune`` measures, at the shapes of a model, and kept only where it beats ours at one of them: in
``promoted`` of the cache folder, with its source, licence and attribution. From then on ``tune``
measures it beside our variants, and a table may name it (``fastshard.ops.promoted`` loads it).
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from fastshard.archive import catalog, compile, source, verdict, wrapper
from fastshard.archive.schema import Row
from fastshard.bench.presets import find_model
from fastshard.build_record import source_version
from fastshard.environment import cache_dir
from fastshard.files import replace_text
from fastshard.ops import promoted, variants
from fastshard.ops.promoted import LIBRARY, MANIFEST, Promoted
from fastshard.tune import shapes
from fastshard.tune.measure import GpuMeasurer
from fastshard.tune.problem import Measurement, Problem
from fastshard.tune.search import MIN_GAIN

DTYPES = ("float16", "bfloat16")
CONSENT = (
    "promote lets native code that nobody has read run in every process of yours that uses "
    "fastshard, outside of any sandbox: if you trust it, pass --i-trust-this-code"
)

Say = Callable[[str], None]


class Measurer(Protocol):
    """As ``GpuMeasurer``."""

    def __call__(self, problem: Problem, variants: Sequence[str]) -> list[Measurement]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Timed:
    """A promoted kernel beside ours.

    Attributes:
        problem: Dtype and shape.
        found: Its measurement.
    """

    problem: Problem
    found: Measurement

    @property
    def wins(self) -> bool:
        """Whether it is so much faster that the tuner would choose it."""
        return self.found.ratio <= 1 - MIN_GAIN


def promote(
    text: str,
    *,
    trusts: bool,
    model_name: str = "llama-3.1-8b",
    dtypes: Sequence[str] = DTYPES,
    parts: Sequence[str] | None = None,
    measurer: Callable[[Mapping[str, str]], Measurer] | None = None,
    say: Say = print,
) -> Promoted:
    """Keep a verified kernel as a candidate of the tuner, if it beats ours.

    Args:
        text: ID or its beginning.
        trusts: That the user consents to running the kernel outside of a sandbox.
        model_name: A preset or a checkpoint: whose shapes.
        dtypes: In which it is measured.
        parts: Kinds of isolation of the compiler; by default all that the machine allows.
        measurer: Of the environment of the measuring process; by default on the current GPU.
        say: Is given each line.

    Raises:
        ValueError: no consent; no such row; its op is not ours; it is not verified as it is.
        RuntimeError: no compiler or GPU; it does not compile; it is nowhere faster.
    """
    if not trusts:
        raise ValueError(CONSENT)
    archive = source.load()
    row = source.whole_row(archive, catalog.find_id(source.rows(archive), text))
    kind = check(row)
    config, _ = find_model(model_name)
    problems = problems_of(kind.ours, config, dtypes)
    name, library = wrapper.name_of(row.cuda_code), wrapper.build(row, kind.ours, parts)
    make = measurer or (lambda environment: GpuMeasurer(environment=dict(environment)))
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".promote-", dir=cache_dir()) as staged:
        folder = Path(staged) / "promoted" / name
        files = _stage(folder, row, library)

        def describe(won: Sequence[str], timed: Sequence[Timed]) -> Promoted:
            found = _manifest(archive, row, kind.ours, name, won, timed, files)
            replace_text(folder / MANIFEST, promoted.manifest_text(found))
            return found

        describe(dtypes, ())  # to be measured it must be found, in a cache folder of its own
        timed = _measure(make({**os.environ, "FASTSHARD_CACHE_DIR": staged}), name, problems, say)
        winners = [each for each in timed if each.wins]
        if not winners:
            raise RuntimeError(_why_not(row, model_name, timed))
        won = {each.problem.dtype for each in winners}
        found = describe([dtype for dtype in dtypes if dtype in won], timed)
        _replace(folder, promoted.folder_of(name), Path(staged))
    say(f"{catalog.plain(row.id)} is kept as {name} in {promoted.folder_of(name)}")
    say(f"faster than ours at {len(winners)} of {len(timed)} shapes of {model_name}")
    say(f"fastshard tune --op {kind.ours} --model {model_name} decides where it is used")
    return found


def demote(text: str) -> Promoted:
    """Delete a promoted kernel, and the entries of the user's tables that name it.

    Args:
        text: ID, its beginning, or the variant's name.

    Raises:
        ValueError: no promoted kernel is meant, or several are.
    """
    kept = promoted.read_all()
    exact = [each for each in kept if text in (each.id, each.name)]
    found = exact or [each for each in kept if text and each.id.startswith(text)]
    if len(found) != 1:
        names = ", ".join(catalog.plain(each.id) for each in kept) or "none"
        raise ValueError(
            f"id must be of one promoted kernel, got {catalog.plain(text)!r}; there are: {names}"
        )
    for path in sorted(variants.user_tables_dir().glob("*.json")):
        _forget(path, found[0].name)
    with tempfile.TemporaryDirectory(prefix=".demote-", dir=cache_dir()) as away:
        promoted.folder_of(found[0].name).rename(Path(away) / "kernel")
    return found[0]


def _forget(path: Path, name: str) -> None:
    """Take the entries that name a kernel out of a table."""
    try:
        table = variants.read_table(path)
    except variants.OtherVersion:
        return  # nobody reads it
    kept = tuple(entry for entry in table.entries if entry.variant != name)
    if kept != table.entries:
        variants.write_table(path, replace(table, entries=kept))


def check(row: Row) -> catalog.Kind:
    """What a row is to us, if it may be promoted.

    Raises:
        ValueError: its op is not ours; it has no verdict, or not a good one, or of other code.
    """
    kind, identity = catalog.kind_of(row.op_name), catalog.plain(row.id)
    if kind is None or not kind.same_meaning:
        same = ", ".join(kind.name for kind in catalog.KINDS if kind.same_meaning)
        why = f": {kind.note}" if kind else ""
        raise ValueError(
            f"op must be one whose meaning is ours, {same}, to be promoted, got "
            f"{catalog.plain(row.op_name or 'null')} of {identity}{why}"
        )
    found = verdict.load(row.id)
    code = hashlib.sha256((row.cuda_code or "").encode()).hexdigest()
    if found is None or found.code_sha256 != code:
        raise ValueError(
            f"{identity} must be verified before it is promoted, and this code is not: "
            f"fastshard archive verify {identity}"
        )
    if not found.is_verified:
        raise ValueError(
            f"{identity} must be verified before it is promoted, its verdict is {found.verdict}: "
            f"{catalog.plain(found.reason)}"
        )
    return kind


def problems_of(op: str, config, dtypes: Sequence[str]) -> list[Problem]:
    """The shapes of a model at which a kernel of ``op`` is measured."""
    found = []
    for dtype in dtypes:
        if op == "layer_norm":
            found += shapes.layer_norms(config, dtype)
        else:
            found += [each for each in shapes.problems(config, dtype) if each.op == op]
    return found


def _stage(folder: Path, row: Row, library: Path) -> dict[str, str]:
    """Copy a kernel's library and source to a folder; returns their names and hashes."""
    folder.mkdir(parents=True)
    shutil.copyfile(library, folder / LIBRARY)
    written = "kernel.cu" if compile.is_cuda(row.cuda_code) else "kernel.cpp"
    replace_text(folder / written, row.cuda_code)
    return {name: promoted.digest(folder / name) for name in (LIBRARY, written)}


def _manifest(
    archive: source.Archive,
    row: Row,
    op: str,
    name: str,
    dtypes: Sequence[str],
    timed: Sequence[Timed],
    files: dict[str, str],
) -> Promoted:
    measured = tuple(
        {
            "dtype": each.problem.dtype,
            "shape": list(each.problem.shape),
            "us": each.found.us,
            "auto_us": each.found.auto_us,
        }
        for each in timed
        if each.found.us is not None
    )
    return Promoted(
        name=name,
        op=op,
        dtypes=tuple(dtypes),
        fastshard=source_version(),
        torch=str(torch.__version__),
        python=promoted.python_version(),
        id=row.id,
        op_name=row.op_name or "",
        kernel_name=row.kernel_name or "",
        source=archive.source,
        revision=archive.revision,
        licence=catalog.LICENCE,
        attribution=catalog.ATTRIBUTION,
        measured=measured,
        verified={dtype: dict(times) for dtype, times in verdict.load(row.id).times.items()},
        files=files,
    )


def _measure(measurer: Measurer, name: str, problems: Sequence[Problem], say: Say) -> list[Timed]:
    """Time the kernel beside ours at each shape; the measuring process ends with this."""
    found = []
    try:
        for problem in problems:
            timed = Timed(problem, measurer(problem, [name])[0])
            found.append(timed)
            seen = timed.found
            what = seen.reason or f"{seen.us:.2f} us, ours {seen.auto_us:.2f} us"
            say(f"{problem}: {what}{' (faster)' if timed.wins else ''}")
    finally:
        measurer.close()
    return found


def _why_not(row: Row, model_name: str, timed: Sequence[Timed]) -> str:
    what = f"{catalog.plain(row.id)} is not promoted: at no shape of {model_name} is it "
    what += f"{100 * MIN_GAIN:.0f} % faster than ours"
    best = min(timed, key=lambda each: each.found.ratio)
    if best.found.us is None:
        return f"{what}; at none may it be used: {best.found.reason}"
    return f"{what}; at best it takes {best.found.ratio:.2f} of our time, {best.problem}"


def _replace(folder: Path, final: Path, spare: Path) -> None:
    """Move a folder to its place; what was there goes away with ``spare``."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(spare / "old")
    folder.rename(final)
