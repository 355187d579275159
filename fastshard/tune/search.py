"""The search: which variants are measured next, until the budget is spent or nothing is left.

A generation of one problem after the other. ``evolve`` is Optuna's NSGA-II on the genes of
``space``: generation 0 holds what a table has, what won for the nearest problem of the same op,
promoted kernels and the best on paper; what costs too much on paper is left out; a problem within
``NEAR_LIMIT`` of what the device can do is left alone. ``random`` draws legal variants evenly,
``all`` takes every one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, fsum, inf, log

from fastshard.tune import menu, model
from fastshard.tune.problem import AUTO, Measurement, Measurer, Problem
from fastshard.tune.space import MENU, Space

STRATEGIES = ("evolve", "random", "all")
POPULATION = 6
NEAR_LIMIT = 1.05
MIN_GAIN = 0.02
"""A variant must be so much faster than ``AUTO``: less is within the noise of two runs."""
_ASKS = 40  # of the sampler for each variant wanted: most of what it says is known already
_PAPER_SEEDS = 3
_FRUITLESS = 2  # generations without anything new, after which a problem is done


@dataclass
class Found:
    """What is known of one problem.

    Attributes:
        measured: By variant.
        left_out: Variants that were not measured, and why.
    """

    problem: Problem
    measured: dict[str, Measurement] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> tuple[str, float]:
        """The fastest variant and its time over that of ``AUTO``, which is the first."""
        return self._best_of(self.measured)

    @property
    def best_of_menu(self) -> tuple[str, float]:
        """The same of what the wheel has."""
        return self._best_of(name for name in self.measured if menu.has(self.problem.op, name))

    @property
    def winner(self) -> str | None:
        """The variant for the table, one of the menu; None where ``AUTO`` stays."""
        name, ratio = self.best_of_menu
        return name if ratio <= 1 - MIN_GAIN else None

    @property
    def addition(self) -> str | None:
        """The variant that the menu should have: faster than all that it has; None for none."""
        name, ratio = self.best
        return name if ratio <= self.best_of_menu[1] * (1 - MIN_GAIN) else None

    def _best_of(self, names: Iterable[str]) -> tuple[str, float]:
        ratios = {AUTO: 1.0, **{name: self.measured[name].ratio for name in names}}
        name = min(ratios, key=ratios.get)
        return name, ratios[name]

    @property
    def is_near_limit(self) -> bool:
        """Whether ``AUTO`` is within 5 % of what the device takes at least."""
        timed = [found for found in self.measured.values() if found.us is not None]
        return any(found.auto_us <= NEAR_LIMIT * found.limit_us for found in timed)


@dataclass(frozen=True)
class Generation:
    """One generation of one problem, for a reader."""

    number: int
    found: Found
    new: int
    spent: float


def mean_gain(founds: Sequence[Found]) -> float:
    """Geometric mean of the times of ``AUTO`` over the best ones."""
    return exp(-fsum(log(found.best[1]) for found in founds) / max(len(founds), 1))


class Search:
    """One search; ``found`` grows as it goes on.

    Args:
        measurer: Measures or plays back.
        problems: Each one once.
        strategy: Of ``STRATEGIES``.
        seed: The same seed and measurements choose the same.
        figures: Of the device, on paper.
        space: What can be chosen.
        known: What a table has for a problem, or None.

    Raises:
        RuntimeError: Optuna is not installed.
    """

    def __init__(
        self,
        measurer: Measurer,
        problems: Sequence[Problem],
        *,
        strategy: str = "evolve",
        seed: int = 0,
        figures: model.Figures = model.H200,
        space: Space = MENU,
        known: Callable[[Problem], str | None] = lambda problem: None,
    ):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self._measurer, self._strategy = measurer, strategy
        self.found = [Found(problem) for problem in problems]
        self._species = [
            _Species(found, strategy, seed + number, figures, space, known(found.problem))
            for number, found in enumerate(self.found)
        ]

    def run(
        self,
        budget: float,
        spent: Callable[[], float],
        report: Callable[[Generation], None] = lambda generation: None,
    ) -> None:
        """Measure until ``spent()`` reaches ``budget``, both in seconds, or all is done."""
        number = 0
        while any(not species.is_done for species in self._species):
            for species in self._species:
                if spent() >= budget:
                    return
                if species.is_done:
                    continue
                if number == 0 and self._strategy == "evolve":
                    species.add_seeds(self._winners_near(species.found.problem))
                new = species.next_generation(self._measurer)
                report(Generation(number, species.found, new, spent()))
            number += 1

    def _winners_near(self, problem: Problem) -> list[str]:
        """The best variants of the nearest problem of the same op that has any measured."""
        of_op = [f for f in self.found if f.problem.op == problem.op and f.measured]
        nearest = min(of_op, key=lambda f: _distance(f.problem, problem), default=None)
        if nearest is None:
            return []
        ranked = sorted(nearest.measured, key=lambda name: nearest.measured[name].ratio)
        return [name for name in ranked if nearest.measured[name].ratio < inf][:2]


def _distance(a: Problem, b: Problem) -> float:
    return fsum(abs(log(x / y)) for x, y in zip(a.shape, b.shape, strict=True))


class _Species:
    """The candidates of one problem."""

    def __init__(
        self,
        found: Found,
        strategy: str,
        seed: int,
        figures: model.Figures,
        space: Space,
        known: str | None,
    ):
        self.found, self._strategy, self._space = found, strategy, space
        problem = found.problem
        self._legal = space.legal_variants(problem)
        self._queue: list[str] = []
        self._fruitless = 0
        if strategy == "evolve":
            promoted = [name for name in self._legal if menu.is_promoted(name)]  # on no paper
            modelled = [name for name in self._legal if name not in promoted]
            found.left_out.update(model.pruned(problem, modelled, figures))
            worth = [name for name in modelled if name not in found.left_out]
            on_paper = sorted(worth, key=lambda name: model.modelled_us(problem, name, figures))
            self._queue = [*promoted, *on_paper[:_PAPER_SEEDS]]
            self.add_seeds([known] if known else [])
        if strategy == "all":
            self._queue = list(self._legal)
        else:
            self._study = _study(strategy, seed)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left that is worth measuring."""
        known = self.found.measured.keys() | self.found.left_out.keys()
        is_near = self._strategy == "evolve" and self.found.is_near_limit
        return is_near or self._fruitless >= _FRUITLESS or known >= set(self._legal)

    def add_seeds(self, variants: Sequence[str]) -> None:
        """Measure these first, also what looks bad on paper."""
        for variant in set(variants) & set(self._legal):
            self.found.left_out.pop(variant, None)
        self._queue = [*variants, *self._queue]

    def next_generation(self, measurer: Measurer) -> int:
        """Measure what comes next; returns how many variants that were."""
        batch, trials = self._batch()
        if batch:
            self.found.measured.update(zip(batch, measurer(self.found.problem, batch), strict=True))
        for trial, variant in trials:
            self._tell(trial, variant)
        self._fruitless = 0 if batch else self._fruitless + 1
        return len(batch)

    def _batch(self) -> tuple[list[str], list]:
        """Variants to measure, and the trials that wait for their times."""
        batch: list[str] = []
        trials = []
        while self._queue and len(batch) < POPULATION:
            variant = self._queue.pop(0)
            if self._is_new(variant, batch):
                batch.append(variant)
                if self._strategy != "all":
                    self._study.enqueue_trial(self._space.genes_of(self.found.problem, variant))
        if self._strategy == "all":
            return batch, trials
        for _ in range(_ASKS * POPULATION):
            is_full = len(batch) == POPULATION and len(trials) >= POPULATION
            if is_full or not any(self._is_new(name, batch) for name in self._legal):
                break
            trial = self._study.ask()
            genes = {
                name: trial.suggest_categorical(name, choices)
                for name, choices in self._space.genes[self.found.problem.op].items()
            }
            found = self._space.candidate(self.found.problem, genes)
            variant = found.variant
            if found.why_illegal is not None:
                if variant not in self._legal:  # other genes may spell it too
                    self.found.left_out.setdefault(variant, found.why_illegal)
            elif self._is_new(variant, batch) and len(batch) < POPULATION:
                batch.append(variant)
            if variant in batch:
                trials.append((trial, variant))
            else:
                self._tell(trial, variant)
        return batch, trials

    def _is_new(self, variant: str, batch: Sequence[str]) -> bool:
        is_known = variant in self.found.measured or variant in self.found.left_out
        return variant in self._legal and not is_known and variant not in batch

    def _tell(self, trial, variant: str) -> None:
        """What is left out or may not be chosen has no time: it breeds nothing."""
        from optuna.trial import TrialState

        ratio = 1.0 if variant == AUTO else inf
        if variant in self.found.measured:
            ratio = self.found.measured[variant].ratio
        if ratio == inf:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, ratio)


def _study(strategy: str, seed: int):
    """An Optuna study whose sampler breeds, or draws evenly.

    Raises:
        RuntimeError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise RuntimeError("tune needs Optuna: pip install 'fastshard[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if strategy == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    return optuna.create_study(sampler=sampler)
