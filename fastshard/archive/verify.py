"""Verifying kernels: three processes, one of which is trusted.

The kernel's process (``candidate``) and that of the row's PyTorch code (``reference``) each have a
sandbox; neither sees the other's files. For each set of inputs the reference writes the arguments,
the kernel answers, and only then the reference does: no right answer is anywhere that a kernel
could copy it from, neither in memory that it reuses nor in a file. This process compares.

What a kernel may try, and what catches it:

- returning memory it did not write, or a former answer: poisoned memory of two kinds, and arguments
  that change at the same addresses, once by a single element (``NOT_WRITTEN``, ``STALE``);
- handing out an argument, or one buffer for all answers: addresses (``SHARED_MEMORY``);
- work on another stream, or in a thread: inputs that are written late, answers that are copied by
  the stream right behind the call, and compared again afterwards (``UNORDERED``);
- being right in checks and idle in timings, whether it counts calls or looks for the poison: the
  answers of timed calls are compared too, in rounds picked at random, and in the last;
- changing PyTorch, the clock or the comparison in its process: nothing is compared there, and a
  clock outside looks on (``TOO_FAST``).

What cannot be caught: code that takes over its process, and answers for it as this module expects.
It can claim a time between the physical limit and a few times less than the truth; it cannot make a
wrong answer right. Reads out of bounds show only where what was read matters. Inputs on which a
kernel is wrong may be none of those that it was tried on.
"""

import hashlib
import random
import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastshard.archive import cases, catalog, compile, rules, sandbox, trees, verdict
from fastshard.archive.foreign import Foreign, Rejected
from fastshard.archive.rules import Reason, Truth
from fastshard.archive.schema import Row
from fastshard.archive.verdict import Verdict
from fastshard.tune.worker import Worker

_HALF = re.compile(r"\b(__half2?|Half|kHalf|HALF)\b|AND_HALF")
CLOCK_SECONDS, CLOCK_ROUNDS = 0.02, 5


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
class _Seen:
    """What came out for one dtype."""

    reason: Reason | None = None
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Verifier:
    """Verifies one row after another.

    Args:
        settings: See ``Settings``.

    Raises:
        RuntimeError: there is no compiler.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self._is_cuda = settings.device.type == "cuda"
        self._compiler = compile.check_compilers(cuda=self._is_cuda)
        self._arch = None
        if self._is_cuda:
            self._arch = ".".join(map(str, torch.cuda.get_device_capability(settings.device)))
        self._rates: dict[str, float] | None = None

    def __call__(self, row: Row) -> Verdict:
        """Verify a row that was read whole.

        Raises:
            RuntimeError: not the kernel, but this machine fails: no nvcc, no sandbox.
        """
        missing = [
            column
            for column, text in (
                ("CUDA_Code", row.cuda_code),
                ("PyTorch_Code_Functional", row.functional_code),
            )
            if not (text and text.strip())
        ]
        if missing:
            reason = Reason(verdict.INCOMPLETE, f"{' and '.join(missing)} is null")
            return self._verdict(row, reason, {})
        if compile.is_cuda(row.cuda_code) and not self._is_cuda:
            raise RuntimeError(f"{row.id} is CUDA code, which needs nvcc and a GPU")
        built = self._build(row.cuda_code)
        if built.library is None:
            return self._verdict(row, Reason(verdict.NOT_COMPILED, built.reason), {})
        full = self._judge(row, built, "float32")
        seen = {"float32": full}
        notes = list(full.notes)
        if full.reason is None and _HALF.search(row.cuda_code):
            half = self._judge(row, built, "float16")
            notes += [f"float16: {note}" for note in half.notes]
            if half.reason is None:
                seen["float16"] = half
            else:
                notes.append(f"float16: {half.reason.verdict}: {half.reason.text}")
        times = {dtype: each.times for dtype, each in seen.items() if each.times}
        return self._verdict(row, full.reason, times, notes)

    def _build(self, code: str) -> compile.Built:
        return compile.build(
            code,
            parts=self.settings.parts,
            arch=self._arch,
            timeout=self.settings.compile_timeout,
        )

    def _guard(self) -> compile.Built:
        code = (Path(__file__).parent / "guard.cpp").read_text()
        if self._is_cuda:
            code = f"#define FASTSHARD_GUARD_CUDA\n{code}"
        built = compile.build(code, parts=self.settings.parts, cuda=self._is_cuda, arch=self._arch)
        if built.library is None:
            raise RuntimeError(f"the canaries' allocator does not compile: {built.reason}")
        return built

    def _judge(self, row: Row, built: compile.Built, dtype: str) -> _Seen:
        trial = _Trial(self.settings, row, built, self._guard(), dtype)
        seen = _Seen()
        try:
            with trial:
                trial.check()
                trial.time(self._limits(), seen)
        except Rejected as rejected:
            seen.reason = rejected.reason
        return seen

    def _limits(self) -> dict[str, float]:
        if self._rates is None:
            worker = Worker("fastshard.archive.timing:rates", timeout=300)
            (self._rates,) = worker.ask({"device": str(self.settings.device)})
            worker.close()
        return self._rates

    def _verdict(
        self, row: Row, reason: Reason | None, times: dict, notes: Sequence[str] = ()
    ) -> Verdict:
        device = self.settings.device
        code = row.cuda_code or ""
        return Verdict(
            id=row.id,
            verdict=verdict.VERIFIED if reason is None else reason.verdict,
            reason="" if reason is None else reason.text,
            op_name=row.op_name,
            kernel_name=row.kernel_name,
            code_sha256=code and hashlib.sha256(code.encode(errors="surrogatepass")).hexdigest(),
            claimed={"native": row.speedup_native, "compile": row.speedup_compile},
            times=times,
            notes=tuple(notes),
            environment={
                "device": torch.cuda.get_device_name(device) if self._is_cuda else "cpu",
                "torch": torch.__version__,
                "cuda": torch.version.cuda or "none",
                "compiler": self._compiler,
                "isolation": ", ".join(self.settings.parts) or "limits alone",
            },
        )


class _Trial:
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
        self._truths: list[Truth] = []  # of the contents of the published shape
        self._stack = ExitStack()

    def __enter__(self) -> "_Trial":
        self._own = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        code = self._own / "reference.py"
        code.write_text(self._row.functional_code, errors="surrogatepass")
        box = self._box([code])
        self._inputs = box.scratch / "inputs"
        self._inputs.mkdir()
        self._reference = self._enter("fastshard.archive.reference:answer", box)
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

    def check(self) -> None:
        """Hold every answer to the reference's; raises ``Rejected``."""
        box = self._box([self._inputs, self._built.folder, self._guard.folder])
        kernel = self._enter("fastshard.archive.candidate:answer", box)
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
            if number == 0:
                self._truths = truths
                _reject(rules.check_vacuous(truths))

    def _call(self, kernel: Foreign, shape: int, content: str, earlier: list[Truth]) -> Truth:
        """One call; returns the reference's answers."""
        arguments, out = self._make(shape, content), kernel.box.scratch / f"answer{self._count}"
        poison = rules.POISONS[len(earlier) % len(rules.POISONS)]
        is_first = not earlier
        said = kernel.ask(
            do="call",
            arguments=str(arguments),
            is_first=is_first,
            is_late=not is_first,
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

    def time(self, rates: dict[str, float], seen: _Seen) -> None:
        """Time the kernel in a process of its own, then its peers; raises ``Rejected``."""
        settings = self._settings
        known = [0, 1, 3]  # of cases.CONTENTS
        contents = [self._make(0, cases.CONTENTS[i]) for i in known]
        chooser = random.SystemRandom()
        rounds = [*chooser.sample(range(settings.rounds - 1), len(known) - 1), settings.rounds - 1]
        chooser.shuffle(rounds)
        box = self._box([self._inputs, self._built.folder])
        kernel = self._enter("fastshard.archive.candidate:answer", box)
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
        calls = max(8, min(2000, int(CLOCK_SECONDS * 1e6 / max(us, 1e-3))))
        outside = min(
            kernel.seconds(do="clock", arguments=str(contents[0]), calls=calls)
            for _ in range(CLOCK_ROUNDS)
        )
        _reject(rules.check_clock(us, outside * 1e6 / calls, settings.device.type))
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
        least = rules.least_us(sum(b.nbytes for b in read), written, peers["flops"], rates)
        _reject(rules.check_limit(us, least))

    def _make(self, shape: int, content: str) -> Path:
        self._count += 1
        path = self._inputs / f"arguments{self._count}"
        self._ask_reference(
            "make", shape=shape, content=content, seed=self._settings.seed, path=str(path)
        )
        return path

    def _solve(self, shape: int, arguments: Path) -> Truth:
        path = self._reference.box.scratch / f"truth{self._count}"
        said = self._ask_reference("solve", shape=shape, arguments=str(arguments), path=str(path))
        found = self._reference.take(path, self._own).value()
        edited, aliased = frozenset(said["edited"]), frozenset(said["aliased"])
        return Truth(found["eager"], found["golden"], edited, aliased)

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

    def _enter(self, target: str, box: sandbox.Sandbox) -> Foreign:
        return self._stack.enter_context(Foreign(target, box, self._settings.timeout))


def _at(reason: Reason, shape: int, where: str) -> Reason:
    """With the inputs named; of another shape than the published one, of no other verdict."""
    if shape == 0:
        return Reason(reason.verdict, f"{where}: {reason.text}")
    return Reason(verdict.ONE_SHAPE, f"{where}: {reason.verdict}: {reason.text}")


def _reject(reason: Reason | None) -> None:
    if reason is not None:
        raise Rejected(reason)
