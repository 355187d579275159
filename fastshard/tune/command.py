"""``fastshard tune``: search, time the winners once more, write the table."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from fastshard.bench.presets import PRESETS, preset
from fastshard.environment import cache_dir
from fastshard.files import replace_text
from fastshard.ops import variants
from fastshard.ops.variants import Entry, Table, key_shape
from fastshard.tune import model, recorded, shapes
from fastshard.tune.compiler import Compiler, CompilingMeasurer, checkout
from fastshard.tune.measure import GpuMeasurer
from fastshard.tune.patch import menu_patch
from fastshard.tune.problem import SIZES, Measurer, Problem
from fastshard.tune.recorded import Recorder, Replay, Study
from fastshard.tune.report import generation_line, summary
from fastshard.tune.search import MIN_GAIN, Found, Generation, Search, mean_gain
from fastshard.tune.space import MENU, OPEN

MIN_BUDGET = 5.0
"""Seconds: one generation of one problem and its confirmation take about as long."""
INTERRUPTED = 130
_ENDS = ("winner", "addition")  # of Found: for the table, for the patch of the menu


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
        output = output or variants.user_tables_dir() / f"{_slug(measurer.device)}.json"
        old = _table_at(output, measurer.device)
        chosen = {(e.op, e.dtype, key_shape(e.op, e.shape)): e.variant for e in old.entries}
        search = Search(
            measurer,
            problems,
            strategy=strategy,
            seed=seed,
            figures=figures,
            space=MENU if patch_path is None else OPEN,
            known=lambda p: chosen.get((p.op, p.dtype, key_shape(p.op, p.shape))),
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
        entries, additions = (_confirmed(search.found, which, measurer, say) for which in _ENDS)
    variants.write_table(output, _merged(old, search.found, entries))
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
                    entries[entry.op, dtype, key_shape(entry.op, entry.shape)] = entry
    table = Table(capability, "model", version("fastshard"), tuple(entries.values()))
    variants.write_table(output, table)
    return table


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
    if Path(model_name).is_dir():
        from fastshard.checkpoint import Checkpoint

        config = Checkpoint(model_name).config
    elif model_name in PRESETS:
        config = preset(model_name)
    else:
        presets = ", ".join(PRESETS)
        raise ValueError(f"model must be a folder or one of {presets}, got {model_name!r}")
    found = shapes.problems(config, dtype)
    chosen = [problem for problem in found if ops is None or problem.op in ops]
    if not chosen:
        raise ValueError(f"{model_name} has no {' or '.join(ops)}")
    return chosen


def _recorder(
    stack: ExitStack, seed: int, path: Path | None, compiler: Compiler | None
) -> Recorder:
    """What measures on this GPU, and keeps that in a study."""
    library = {} if compiler is None else {"library": compiler.library}
    gpu = stack.enter_context(GpuMeasurer(seed=seed, **library))
    path = path or cache_dir() / "studies" / f"{_slug(gpu.device)}.json"
    measurer = gpu if compiler is None else CompilingMeasurer(gpu, compiler)
    return Recorder(measurer, _study_of(path, gpu.device), path)


def _study_of(path: Path, device: str) -> Study:
    if not path.exists():
        return Study(device, version("fastshard"))
    study = recorded.read(path)
    if study.device != device:
        raise ValueError(f"{path} must be a study of {device}, got one of {study.device}")
    return study


def _table_at(path: Path, device: str) -> Table:
    """The table that is there, which must be of this device, or an empty one."""
    if not path.exists():
        return Table(device, "measured", version("fastshard"), ())
    table = variants.read_table(path)
    if table.device != device or table.origin != "measured":
        raise ValueError(
            f"{path} must be a measured table of {device}, got a {table.origin} one of "
            f"{table.device}"
        )
    return table


def _confirmed(
    founds: Sequence[Found],
    which: str,
    measurer: Measurer,
    say: Callable[[str], None],
) -> list[Entry]:
    """The winners, or the additions, that win again in a fresh process."""
    entries = []
    for found in founds:
        problem, variant = found.problem, getattr(found, which)
        if variant is None:
            continue
        again = measurer.confirm(problem, variant)
        to_beat = 1.0 if which == "winner" else found.best_of_menu[1]
        if again.ratio > to_beat * (1 - MIN_GAIN):
            why = again.reason or f"{again.ratio:.3f} of auto's time"
            say(f"{problem}: {variant} was not confirmed: {why}")
            found.measured[variant] = replace(again, us=None, reason=f"not confirmed: {why}")
        else:
            entries.append(Entry(problem.op, problem.dtype, problem.shape, variant))
    return entries


def _write_patch(
    path: Path, source: Path, additions: Sequence[Entry], say: Callable[[str], None]
) -> None:
    text = menu_patch(source, [(entry.op, entry.variant) for entry in additions])
    if text == "":
        say(f"no variant to add to the menus: {path} is not written")
        return
    replace_text(path, text)
    say(f"patch of the menus written to {path}: git apply it in {source}, build, and tune again")


def _merged(old: Table, founds: Sequence[Found], entries: Sequence[Entry]) -> Table:
    """The old entries of other problems, and the new ones."""
    searched = {(f.problem.op, f.problem.dtype, _key(f.problem)) for f in founds if f.measured}
    kept = [e for e in old.entries if (e.op, e.dtype, _key(e)) not in searched]
    return replace(old, entries=(*kept, *entries))


def _key(of: Problem | Entry) -> tuple[int, ...]:
    return key_shape(of.op, of.shape)


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")
