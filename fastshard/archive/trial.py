"""One kernel in one dtype, tried on every set of inputs and timed: the order of the rules.

For each set of inputs: the reference's process writes the arguments, the kernel's answers, and only
then the reference's does.
"""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastshard.archive import cases, catalog, compile, rules, sandbox, trees, verdict
from fastshard.archive.foreign import Foreign, Rejected
from fastshard.archive.rules import Reason, Truth
from fastshard.archive.schema import Row

CLOCK_SECONDS = {"cpu": 0.05, "cuda": 0.005}
"""Of a round. On a GPU that others use too, a short one may fall between what they run; a CPU's own
time, which the kernel of the system counts in hundredths, needs longer ones."""
CLOCK_ROUNDS = {"cpu": 5, "cuda": 50}
CLOCK_PATIENCE = 20.0
"""Seconds after which there is no further round."""
CLOCK_CALLS = {"cpu": (8, 2000), "cuda": (8, 200)}
"""Of a round, at least and at most: of a process that lies, a call may take any time."""
REFERENCE_SECONDS = 900.0
"""In which the row's PyTorch code answers at least; torch.compile is a part of it."""


@dataclass(frozen=True)
class Settings:
    """How kernels are verified.

    Attributes:
        device: ``cpu`` or a CUDA device.
        parts: Kinds of isolation, of ``jail.PARTS``.
        timeout: Seconds without a sign of life after which a kernel hangs.
        compile_timeout: Seconds of the compiler.
        resident_bytes: Of a process.
        rounds: Timed, of each variant.
        compiles: Whether ``torch.compile`` is a peer.
        seed: Of the inputs.
    """

    device: torch.device
    parts: Sequence[str]
    timeout: float = 120.0
    compile_timeout: float = compile.TIMEOUT
    resident_bytes: int = 32 * sandbox.GIB
    rounds: int = 30
    compiles: bool = True
    seed: int = 0


@dataclass
class Seen:
    """What came out for one dtype."""

    reason: Reason | None = None
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Trial:
    """One kernel in one dtype: its processes and folders; a context manager."""

    def __init__(
        self,
        settings: Settings,
        row: Row,
        built: compile.Built,
        guard: compile.Built,
        dtype: str,
    ):
        self._settings, self._row, self._dtype = settings, row, dtype
        self._built, self._guard = built, guard
        self._device = str(settings.device)
        self._count = 0
        self._can_scale = False
        self._truths: list[Truth] = []  # of the contents of the published shape
        self._stack = ExitStack()

    def __enter__(self) -> "Trial":
        self._own = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        code = self._own / "reference.py"
        code.write_text(self._row.functional_code, errors="surrogatepass")
        box = self._box([code])
        self._inputs = box.scratch / "inputs"
        self._inputs.mkdir()
        seconds = max(REFERENCE_SECONDS, self._settings.timeout)
        self._reference = self._stack.enter_context(
            Foreign("fastshard.archive.reference:answer", box, seconds)
        )
        try:
            self._shapes = self._ask_reference("read", code=str(code), seed=self._settings.seed)[
                "shapes"
            ]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def check(self, seen: Seen) -> None:
        """Hold every answer to the reference's; raises ``Rejected``.

        Args:
            seen: Is given what could not be tried.
        """
        box = self._box([self._inputs, self._built.folder, self._guard.folder])
        kernel = self._enter(box)
        self._open(kernel, guard=str(self._guard.library))
        for number, shape in enumerate(self._shapes):
            contents = cases.CONTENTS if number == 0 else cases.OTHER
            truths: list[Truth] = []
            for content in contents:
                where = f"{content}, {', '.join(map(str, shape))}"
                try:
                    truths.append(self._call(kernel, number, content, truths))
                except Rejected as rejected:
                    raise Rejected(_at(rejected.reason, number, where)) from None
                if not rules.can_compare(truths[-1]):
                    seen.notes.append(f"{where}: the reference is nowhere finite: not compared")
            if number == 0:
                self._truths = truths
                _reject(rules.check_vacuous(truths))
        if len(self._shapes) == 1:
            seen.notes.append("no other shape was tried: the reference takes none")
        if not self._can_scale:
            seen.notes.append("no input was scaled or shifted: none is floating")

    def _call(self, kernel: Foreign, shape: int, content: str, earlier: list[Truth]) -> Truth:
        """One call; returns the reference's answers."""
        arguments, out = self._make(shape, content), kernel.box.scratch / f"answer{self._count}"
        poison = rules.POISONS[len(earlier) % len(rules.POISONS)]
        said = kernel.ask(
            do="call",
            arguments=str(arguments),
            is_first=not earlier,
            poison=poison,
            out=str(out),
        )
        actual = kernel.take(out, self._own)
        truth = self._solve(shape, arguments)
        arguments.unlink()
        _reject(rules.check_guards(said["guards"]))
        _reject(rules.check_inputs(said["edited"], truth))
        _reject(rules.check_memory(said["aliased"], said["is_earlier"], truth))
        _reject(rules.check_order(said["is_late"]))
        _reject(
            rules.check_answer(
                trees.tensors_of(actual.value()), truth, poison=poison, earlier=earlier
            )
        )
        return truth

    def time(self, rates: Callable[[], dict[str, float]], seen: Seen) -> None:
        """Time the kernel in a process of its own, then its peers; raises ``Rejected``.

        Args:
            rates: Measures what the device can do; called of a kernel that is right alone.
            seen: Is given the times.
        """
        settings = self._settings
        known = [0, 1, 3]  # of cases.CONTENTS
        contents = [self._make(0, cases.CONTENTS[i]) for i in known]
        chooser = random.SystemRandom()
        rounds = [*chooser.sample(range(settings.rounds - 1), len(known) - 1), settings.rounds - 1]
        chooser.shuffle(rounds)
        box = self._box([self._inputs, self._built.folder])
        kernel = self._enter(box)
        self._open(kernel, guard=None)
        said = kernel.ask(
            do="time",
            contents=[str(path) for path in contents],
            known=list(zip(rounds, range(len(known)), strict=True)),
            rounds=settings.rounds,
            out=str(box.scratch),
        )
        for i, content in enumerate(known):
            actual = kernel.take(box.scratch / f"timed{i}", self._own)
            reason = rules.check_answer(trees.tensors_of(actual.value()), self._truths[content])
            _reject(reason and Reason(reason.verdict, f"in timed calls: {reason.text}"))
        seen.times["candidate"] = us = float(said["us"])
        self._check_clock(kernel, contents[0], us)
        kind = catalog.kind_of(self._row.op_name)
        peers = self._ask_reference(
            "time",
            contents=[str(path) for path in contents],
            rounds=settings.rounds,
            compiles=settings.compiles,
            kind=kind and kind.name,
        )
        seen.times |= peers["us"]
        seen.notes += peers["notes"]
        read = trees.load(contents[0]).buffers
        written = sum(out.nbytes for out in self._truths[0].eager)
        limits = rates()
        _reject(rules.check_limit(us, rules.least_us(sum(b.nbytes for b in read), written, limits)))
        if rules.does_fewer_flops(us, peers["flops"], limits):
            seen.notes.append(
                "it must do fewer operations than the reference: less time than those"
            )

    def _check_clock(self, kernel: Foreign, arguments: Path, us: float) -> None:
        """One round that a clock outside agrees with is enough: what else runs here delays some."""
        kind = self._settings.device.type
        least, most = CLOCK_CALLS[kind]
        calls = max(least, min(most, int(CLOCK_SECONDS[kind] * 1e6 / max(us, 1e-3))))
        deadline = time.monotonic() + CLOCK_PATIENCE
        for _ in range(CLOCK_ROUNDS[kind]):
            seconds = kernel.seconds(
                on_cpu=kind == "cpu", do="clock", arguments=str(arguments), calls=calls
            )
            reason = rules.check_clock(us, seconds * 1e6 / calls, kind)
            if reason is None:
                return
            if time.monotonic() > deadline:
                break
        _reject(reason)

    def _make(self, shape: int, content: str) -> Path:
        self._count += 1
        path = self._inputs / f"arguments{self._count}"
        said = self._ask_reference(
            "make", shape=shape, content=content, seed=self._settings.seed, path=str(path)
        )
        self._can_scale |= said["can_scale"]
        return path

    def _solve(self, shape: int, arguments: Path) -> Truth:
        path = self._reference.box.scratch / f"truth{self._count}"
        said = self._ask_reference("solve", shape=shape, arguments=str(arguments), path=str(path))
        found = self._reference.take(path, self._own).value()
        edited, aliased = frozenset(said["edited"]), frozenset(said["aliased"])
        return Truth(found["eager"], found["golden"], edited, aliased, self._settings.device)

    def _ask_reference(self, step: str, **request) -> dict:
        try:
            return self._reference.ask(do=step, device=self._device, dtype=self._dtype, **request)
        except Rejected as rejected:
            raise Rejected(Reason(verdict.REFERENCE_FAILED, rejected.reason.text)) from None

    def _open(self, kernel: Foreign, guard: str | None) -> None:
        kernel.ask(do="open", library=str(self._built.library), device=self._device, guard=guard)

    def _box(self, readable: Sequence[Path]) -> sandbox.Sandbox:
        limits = sandbox.Limits(resident_bytes=self._settings.resident_bytes)
        return self._stack.enter_context(sandbox.temporary(limits, self._settings.parts, readable))

    def _enter(self, box: sandbox.Sandbox) -> Foreign:
        kernel = Foreign("fastshard.archive.candidate:answer", box, self._settings.timeout)
        return self._stack.enter_context(kernel)


def _at(reason: Reason, shape: int, where: str) -> Reason:
    """With the inputs named; what fails at another shape has passed at the published one."""
    if shape == 0 or reason.verdict == verdict.INACCURATE:
        return Reason(reason.verdict, f"{where}: {reason.text}")
    return Reason(verdict.ONE_SHAPE, f"{where}: {reason.verdict}: {reason.text}")


def _reject(reason: Reason | None) -> None:
    if reason is not None:
        raise Rejected(reason)
