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
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fastshard.archive import compile, verdict
from fastshard.archive.foreign import Rejected
from fastshard.archive.rules import Reason
from fastshard.archive.schema import Row
from fastshard.archive.trial import Seen, Settings, Trial
from fastshard.archive.verdict import Verdict
from fastshard.tune.worker import Worker, WorkerFailed

_HALF = re.compile(r"\b(__half2?|Half|kHalf|HALF)\b|AND_HALF")


class Verifier:
    """Verifies one row after another.

    Args:
        settings: See ``Settings``.

    Attributes:
        device_name: As verdicts have it.

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
        self.device_name = torch.cuda.get_device_name(settings.device) if self._is_cuda else "cpu"
        self._rates: dict[str, float] | None = None

    def __call__(self, row: Row) -> Verdict:
        """Verify a row that was read whole.

        Raises:
            RuntimeError: not the kernel, but this machine fails: no nvcc, no sandbox.
        """
        return self.judge(row, self.build(row))

    def build(self, row: Row) -> compile.Built | None:
        """Compile a row's source; None of a row that lacks a part. Nothing foreign is run.

        Raises:
            RuntimeError: as of a call.
        """
        if _missing(row):
            return None
        if compile.is_cuda(row.cuda_code) and not self._is_cuda:
            raise RuntimeError(f"{row.id} is CUDA code, which needs nvcc and a GPU")
        return compile.build(
            row.cuda_code,
            parts=self.settings.parts,
            arch=self._arch,
            timeout=self.settings.compile_timeout,
        )

    def judge(self, row: Row, built: compile.Built | None) -> Verdict:
        """The verdict of a row and what ``build`` made of it.

        Raises:
            RuntimeError: as of a call.
        """
        if built is None:
            reason = Reason(verdict.INCOMPLETE, f"{' and '.join(_missing(row))} must not be null")
            return self._verdict(row, reason, {})
        if built.library is None:
            return self._verdict(row, Reason(verdict.NOT_COMPILED, built.reason), {})
        full = self._try(row, built, "float32")
        seen = {"float32": full}
        notes = list(full.notes)
        if full.reason is None and not _HALF.search(row.cuda_code):
            notes.append("float16 was not tried: the source does not name it")
        elif full.reason is None:
            half = self._try(row, built, "float16")
            notes += [f"float16: {note}" for note in half.notes]
            if half.reason is None:
                seen["float16"] = half
            else:
                notes.append(f"float16: {half.reason.verdict}: {half.reason.text}")
        times = {dtype: each.times for dtype, each in seen.items() if each.times}
        return self._verdict(row, full.reason, times, notes)

    def _guard(self) -> compile.Built:
        code = (Path(__file__).parent / "guard.cpp").read_text()
        if self._is_cuda:
            code = f"#define FASTSHARD_GUARD_CUDA\n{code}"
        built = compile.build(code, parts=self.settings.parts, cuda=self._is_cuda, arch=self._arch)
        if built.library is None:
            raise RuntimeError(f"the canaries' allocator does not compile: {built.reason}")
        return built

    def _try(self, row: Row, built: compile.Built, dtype: str) -> Seen:
        trial = Trial(self.settings, row, built, self._guard(), dtype)
        seen = Seen()
        try:
            with trial:
                trial.check(seen)
                trial.time(self._limits, seen)
        except Rejected as rejected:
            seen.reason = rejected.reason
        return seen

    def _limits(self) -> dict[str, float]:
        if self._rates is None:
            worker = Worker("fastshard.archive.timing:rates", timeout=300)
            try:
                (self._rates,) = worker.ask({"device": str(self.settings.device)})
            except WorkerFailed as error:
                raise RuntimeError(f"the limits of the device are unknown: {error}") from None
            finally:
                worker.close()
        return self._rates

    def _verdict(
        self, row: Row, reason: Reason | None, times: dict, notes: Sequence[str] = ()
    ) -> Verdict:
        code = row.cuda_code or ""
        return Verdict(
            id=row.id,
            verdict=verdict.VERIFIED if reason is None else reason.verdict,
            reason="" if reason is None else reason.text,
            op_name=row.op_name,
            kernel_name=row.kernel_name,
            code_sha256=code and hashlib.sha256(code.encode()).hexdigest(),
            claimed={"native": row.speedup_native, "compile": row.speedup_compile},
            times=times,
            notes=tuple(notes),
            environment={
                "device": self.device_name,
                "torch": torch.__version__,
                "cuda": torch.version.cuda or "none",
                "compiler": self._compiler,
                "isolation": ", ".join(self.settings.parts) or "limits alone",
            },
        )


def _missing(row: Row) -> list[str]:
    """The columns that a row must have to be verified, and has not."""
    needed = {
        "CUDA_Code": row.cuda_code,
        "PyTorch_Code_Functional": row.functional_code,
    }
    return [column for column, text in needed.items() if not (text and text.strip())]
