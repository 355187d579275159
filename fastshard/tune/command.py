"""``fastshard tune``: search, time the winners once more, write the table."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch

from fastshard.bench.presets import PRESETS, find_model, preset
from fastshard.build_record import source_version
from fastshard.environment import cache_dir
from fastshard.files import replace_text
from fastshard.ops import variants
from fastshard.ops.promoted import read_all
from fastshard.ops.variants import Entry, Table
from fastshard.tune import model, recorded, shapes, table
from fastshard.tune.compiler import Compiler, CompilingMeasurer, checkout
from fastshard.tune.confirm import Confirmed, confirm
from fastshard.tune.measure import GpuMeasurer
from fastshard.tune.patch import menu_patch
from fastshard.tune.problem import SIZES, Problem
from fastshard.tune.recorded import Recorder, Replay, Study
from fastshard.tune.report import generation_line, summary
from fastshard.tune.search import Generation, Search, mean_gain
from fastshard.tune.space import MENU, OPEN, with_promoted

MIN_BUDGET = 5.0
"""Seconds: one generation of one problem and its confirmation take about as long."""
INTERRUPTED = 130


def run(
    *,
    model_name: str = "llama-3.1-8b",
    ops: Sequence[str] | None = None,
    dtype: str = "bfloat16",
    budget: float = 120.0,
    seed: int = 0,
    strategy: str = "evolve",
    study_path: Path | None = None,
    replays: bool = False,
    output: Path | None = None,
    patch_path: Path | None = None,
    source: Path | None = None,
    plot_path: Path | None = None,
    say: Callable[[str], None] = print,
    advance: Callable[[float], None] = lambda share: None,
) -> int:
    """Tune the shapes of a model.

    Args:
        model_name: A preset, or a checkpoint's folder.
        ops: Of ``SIZES``; None: all that the model has.
        dtype: float16 or bfloat16.
        budget: Seconds of measuring; with ``replays`` the seconds that it took then.
        seed: Of the search and of the inputs.
        strategy: Of ``search.STRATEGIES``.
        study_path: Measurements, kept and not made again; by default in the cache folder.
        replays: Measure nothing: play the study back.
        output: The table, merged with what is there; by default the user's, which the kernels use.
        patch_path: Also compile variants that are not in the menus, and write here a patch that
            adds those that win; they are never in the table.
        source: Of the patch, and of what is compiled: a checkout, by default the working directory.
        plot_path: Gain so far over seconds, PNG or SVG.
        say: Is given each line.
        advance: Is given the share of the budget that is spent.

    Returns:
        The exit status: 0, or ``INTERRUPTED`` after Ctrl-C, which ends the search but not what
        comes after it.

    Raises:
        ValueError: an op, model or strategy is unknown, the budget too small, a file unreadable,
            ``source`` no checkout of this version.
        RuntimeError: there is no GPU, Optuna or matplotlib; or no nvcc for a patch.
    """
    problems = _problems(model_name, ops, dtype)
    if budget < MIN_BUDGET:
        raise ValueError(f"budget must be at least {MIN_BUDGET:g} s, got {budget:g} s")
    if plot_path is not None:
        from fastshard.bench import plot

        plot.check(plot_path)
    if patch_path is not None:
        source = checkout(source or Path.cwd())
    elif source is not None:
        raise ValueError("a source is of use only for a patch of the menu, and none is asked for")
    with ExitStack() as stack:
        if replays:
            if study_path is None:
                raise ValueError("a study must be given to be played back, got none")
            measurer = Replay(recorded.read(study_path))
            figures = model.H200
        else:
            compiler = patch_path and Compiler(source, cache_dir() / "instances")
            measurer = _recorder(stack, seed, study_path, compiler)
            figures = model.figures_of(torch.cuda.get_device_capability())
        is_own = output is None
        output = output or variants.user_tables_dir() / f"{_slug(measurer.device)}.json"
        old = table.read(output, measurer.device, is_stale_allowed=is_own)
        chosen = table.chosen(old)
        promoted = _promoted(problems)
        search = Search(
            measurer,
            problems,
            strategy=strategy,
            seed=seed,
            figures=figures,
            space=with_promoted(MENU if patch_path is None else OPEN, {} if replays else promoted),
            known=lambda problem: chosen.get(table.key(problem)),
        )
        say(f"{measurer.device}: {len(problems)} problems of {model_name}, {strategy}")
        spent = _Spent(search) if replays else _Clock()
        steps: list[tuple[float, float]] = []

        def report(generation: Generation) -> None:
            steps.append((generation.spent, mean_gain(search.found)))
            advance(min(generation.spent / budget, 1.0))
            say(generation_line(generation))

        status = 0
        try:
            search.run(budget, spent, report)
        except KeyboardInterrupt:
            say("interrupted: what was found so far is timed once more and kept")
            status = INTERRUPTED
        confirmed: list[Confirmed] = []
        try:
            for found in search.found:
                confirmed.append(confirm(found, measurer, say))
        except KeyboardInterrupt:
            say("interrupted: what was timed once more is kept")
            status = INTERRUPTED
    entries, additions = ([c[i] for c in confirmed if c[i] is not None] for i in (1, 2))
    variants.write_table(
        output, table.merged(old, [each[:2] for each in confirmed], with_promoted(MENU, promoted))
    )
    for line in summary(search.found, entries, additions):
        say(line)
    say(f"{len(entries)} entries written to {output}")
    if patch_path is not None:
        _write_patch(patch_path, source, additions, say)
    if plot_path is not None:
        from fastshard.tune import progress_plot

        progress_plot.write(steps, plot_path, f"{measurer.device}: {model_name}, {strategy}")
    return status


def write_model_table(capability: str, output: Path) -> Table:
    """Write what the cost model chooses for the norms of every preset.

    Norms only: for products by tiles the heuristic in csrc is this model, and where attention is
    split the model is too coarse to overrule it.

    Raises:
        ValueError: no figures of such a device are known.
    """
    if capability not in model.FIGURES:
        known = ", ".join(model.FIGURES)
        raise ValueError(f"capability must be one of {known}, got {capability!r}")
    figures = model.FIGURES[capability]
    entries = {}
    for name in PRESETS:
        for dtype in ("bfloat16", "float16"):
            for problem in shapes.problems(preset(name), dtype):
                variant = model.better_norm(problem, figures)
                if variant is not None:
                    entry = Entry(problem.op, dtype, problem.shape, variant)
                    entries[table.key(entry)] = entry
    written = Table(capability, "model", source_version(), tuple(entries.values()))
    variants.write_table(output, written)
    return written


class _Clock:
    """Seconds since it was made."""

    def __init__(self):
        self._begin = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._begin


class _Spent:
    """Seconds that measuring what was played back took."""

    def __init__(self, search: Search):
        self._search = search

    def __call__(self) -> float:
        founds = self._search.found
        return sum(m.seconds for found in founds for m in found.measured.values())


def _problems(model_name: str, ops: Sequence[str] | None, dtype: str) -> list[Problem]:
    for op in ops or ():
        if op not in SIZES:
            raise ValueError(f"op must be one of {', '.join(SIZES)}, got {op!r}")
    config, _ = find_model(model_name)
    found = shapes.problems(config, dtype)
    if ops is not None and "layer_norm" in ops and read_all("layer_norm"):
        found += shapes.layer_norms(config, dtype)
    chosen = [problem for problem in found if ops is None or problem.op in ops]
    if not chosen:
        raise ValueError(f"{model_name} has no {' or '.join(ops)}")
    return chosen


def _promoted(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """The promoted kernels of each op that is tuned, in their dtypes."""
    tuned = {(problem.op, problem.dtype) for problem in problems}
    found: dict[str, list[str]] = {}
    for each in read_all():
        if any((each.op, dtype) in tuned for dtype in each.dtypes):
            found.setdefault(each.op, []).append(each.name)
    return found


def _recorder(
    stack: ExitStack, seed: int, path: Path | None, compiler: Compiler | None
) -> Recorder:
    """What measures on this GPU, and keeps that in a study."""
    library = {} if compiler is None else {"library": compiler.library}
    gpu = stack.enter_context(GpuMeasurer(seed=seed, **library))
    # Of this version: another's variants are others.
    path = path or cache_dir() / "studies" / f"{_slug(gpu.device)}-{version('fastshard')}.json"
    measurer = gpu if compiler is None else CompilingMeasurer(gpu, compiler)
    return Recorder(measurer, _study_of(path, gpu.device), path)


def _study_of(path: Path, device: str) -> Study:
    if not path.exists():
        return Study(device, version("fastshard"))
    study = recorded.read(path)
    if study.device != device:
        raise ValueError(f"{path} must be a study of {device}, got one of {study.device}")
    return study


def _write_patch(
    path: Path, source: Path, additions: Sequence[Entry], say: Callable[[str], None]
) -> None:
    text = menu_patch(source, [(entry.op, entry.variant) for entry in additions])
    if text == "":
        say(f"no variant to add to the menus: {path} is not written")
        return
    replace_text(path, text)
    say(f"patch of the menus written to {path}: git apply it in {source}, build, and tune again")


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")
