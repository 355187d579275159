"""The rules by which a kernel's answers are judged: each a function of plain values.

Every rule returns a ``Reason`` to reject the kernel, or None. Errors are held to float64 as
everywhere here: at most twice what eager PyTorch errs in the same dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastshard.archive import verdict

POISONS = (0xFF, 0x3E)
"""Bytes that fresh memory is filled with, in turn: NaN, and a small number (0.19 in float32, 1.6 in
float16). A kernel that looks for one of them meets the other."""
FACTOR = 2.0
"""Errors of eager PyTorch that a kernel may make."""
ORDER = 1e-5
"""Of the values' size, in float32: what another order of summation may err beside that. n terms
one after the other err by some sqrt(n) * 6e-8 of their size, 8e-6 for 2**14 of them, where PyTorch
may add them up in blocks, and err less. Factors in tf32, each rounded by up to 5e-4, and skipped
work lie above."""
ROUNDING = 1e-2
"""Of the largest value: a larger error is no rounding."""
LIMIT_NOISE = 0.05
"""Share by which a time may lie below the physical limit."""
CLOCK_FACTOR = 4.0
"""Times what a process says of its kernel, that a clock outside may see."""
CLOCK_US = {"cpu": 5.0, "cuda": 25.0}
"""Microseconds of a call beside the kernel: Python, the launch."""
CHUNK = 2**24
"""Elements that are compared at a time: float64 of a whole answer may take gigabytes."""


@dataclass(frozen=True)
class Reason:
    """Why a kernel is rejected: one of ``verdict.VERDICTS``, and what was seen."""

    verdict: str
    text: str


@dataclass(frozen=True)
class Truth:
    """The reference's answers to one set of inputs.

    Attributes:
        eager: In the dtype of the inputs.
        golden: In float64, of the same inputs.
        edited: Numbers of the arguments' tensors that the reference writes to.
        aliased: Numbers of those that an answer of the reference lies in.
        device: Where answers are compared.
    """

    eager: Sequence[Tensor]
    golden: Sequence[Tensor]
    edited: frozenset[int] = frozenset()
    aliased: frozenset[int] = frozenset()
    device: torch.device | str = "cpu"


def check_guards(found: str) -> Reason | None:
    """Nothing was written beside a buffer, or into a freed one."""
    return Reason(verdict.OUT_OF_BOUNDS, f"it wrote to {found}") if found else None


def check_inputs(edited: Sequence[int], truth: Truth) -> Reason | None:
    """No argument changed that the reference leaves alone."""
    wrong = sorted(set(edited) - truth.edited)
    if not wrong:
        return None
    return Reason(verdict.EDITED_INPUTS, f"tensor {_listed(wrong)} of its arguments changed")


def check_memory(aliased: Sequence[int], is_earlier: bool, truth: Truth) -> Reason | None:
    """The answer lies in memory of its own."""
    wrong = sorted(set(aliased) - truth.aliased)
    if wrong:
        text = f"its answer lies in tensor {_listed(wrong)} of its arguments"
        return Reason(verdict.SHARED_MEMORY, text)
    if is_earlier:
        return Reason(verdict.SHARED_MEMORY, "two calls returned the same memory")
    return None


def check_order(is_late: bool) -> Reason | None:
    """The answer was there when the call's stream reached its end."""
    if not is_late:
        return None
    return Reason(verdict.UNORDERED, "its answer changed after the stream had passed the call")


def check_answer(
    actual: Sequence[Tensor],
    truth: Truth,
    *,
    poison: int | None = None,
    earlier: Sequence[Truth] = (),
) -> Reason | None:
    """The answer is the reference's.

    Args:
        actual: Of the kernel.
        truth: Of the reference to the same inputs.
        poison: The byte that its memory was filled with.
        earlier: Of the calls before, on other inputs in the same memory.
    """
    reason = check_closeness(actual, truth)
    if reason is None:
        return None
    if poison is not None:
        count = sum(
            count_unwritten(*pair, poison) for pair in zip(actual, truth.eager, strict=False)
        )
        if count:
            total = sum(out.numel() for out in actual)
            text = f"{count} of {total} elements are what its memory held before"
            return Reason(verdict.NOT_WRITTEN, text)
    if any(check_closeness(actual, other) is None for other in earlier):
        return Reason(verdict.STALE, "the same addresses, other values: an earlier answer came")
    return reason


def check_closeness(actual: Sequence[Tensor], truth: Truth) -> Reason | None:
    """Shapes, dtypes and values are the reference's, as far as rounding allows."""
    if len(actual) != len(truth.eager):
        return _wrong(f"{len(actual)} tensors came, the reference has {len(truth.eager)}")
    for i, (out, eager, golden) in enumerate(zip(actual, truth.eager, truth.golden, strict=True)):
        if out.shape != eager.shape:
            return _wrong(f"answer {i} is of shape {list(out.shape)}, not {list(eager.shape)}")
        if out.dtype != eager.dtype:
            return _wrong(f"answer {i} is of {_name(out.dtype)}, not {_name(eager.dtype)}")
        reason = _compare(out, eager, golden, truth.device)
        if reason is not None:
            return reason
    return None


def can_compare(truth: Truth) -> bool:
    """Whether there is anything to hold an answer to: one element that is finite."""
    pairs = zip(truth.eager, truth.golden, strict=True)
    return any(bool(_comparable(eager, golden).any()) for eager, golden in pairs)


def check_vacuous(truths: Sequence[Truth]) -> Reason | None:
    """The reference has more than one answer to inputs that differ."""
    first, *others = truths
    if not others or any(check_closeness(other.eager, first) is not None for other in others):
        return None
    text = f"{len(truths)} sets of inputs, seeds and scales apart, have one answer"
    return Reason(verdict.VACUOUS, text)


def check_clock(us: float, outside_us: float, device: str) -> Reason | None:
    """A clock that the kernel's process cannot touch sees about the same time.

    Args:
        us: Of a call, as the process says.
        outside_us: Of a call, by the least of several rounds.
        device: ``cpu`` or ``cuda``.
    """
    if outside_us <= CLOCK_FACTOR * us + CLOCK_US[device]:
        return None
    text = f"its process says {us:.3g} us a call, a clock outside {outside_us:.3g} us"
    return Reason(verdict.TOO_FAST, text)


def least_us(bytes_read: int, bytes_written: int, rates: Mapping[str, float]) -> float:
    """Microseconds below which the device cannot do it.

    Args:
        bytes_read: Of all arguments, once each.
        bytes_written: Of the answer. What a cache may hold of it does not count.
        rates: ``gbps`` at best, and ``cache_bytes``.
    """
    num_bytes = bytes_read + max(0, bytes_written - rates["cache_bytes"])
    return num_bytes / rates["gbps"] / 1e3


def does_fewer_flops(us: float, flops: int, rates: Mapping[str, float]) -> bool:
    """Whether the device could not do the reference's products in this time.

    A kernel may need fewer: a product with a diagonal matrix is none.

    Args:
        us: Of the kernel.
        flops: Of the products in the reference.
        rates: ``tflops`` at best.
    """
    return us < flops / rates["tflops"] / 1e6 * (1 - LIMIT_NOISE)


def check_limit(us: float, limit_us: float) -> Reason | None:
    """The time is not below the physical limit."""
    if us >= limit_us * (1 - LIMIT_NOISE):
        return None
    text = f"{us:.3g} us, less than the {limit_us:.3g} us that the device takes at least"
    return Reason(verdict.TOO_FAST, text)


def count_poison(out: Tensor, poison: int) -> int:
    """Elements all of whose bytes are the poison. Of booleans, none: their bytes are 0 or 1."""
    return int(_holds(out, poison).sum())


def count_unwritten(out: Tensor, eager: Tensor, poison: int) -> int:
    """Elements that hold the poison where the reference does not, unless as many do by chance.

    Of a large answer some elements come to the small number, most of all in float16: then about as
    many come to each of the two numbers beside it, which no memory was filled with.
    """
    if out.shape != eager.shape or out.dtype != eager.dtype:
        return count_poison(out, poison)

    def count(step: int) -> int:
        at = _holds(out, poison, step)
        found, right = out[at].double(), eager[at].double()
        return int((~torch.isclose(found, right, rtol=ROUNDING, atol=0.0, equal_nan=True)).sum())

    unwritten = count(0)
    if unwritten and out.is_floating_point() and poison != POISONS[0]:  # no NaN comes so by chance
        by_chance = count(-1) + count(1)
        return unwritten if unwritten > by_chance else 0
    return unwritten


def _holds(out: Tensor, poison: int, step: int = 0) -> Tensor:
    """Which elements have the bits of the poison, or of a number that is ``step`` numbers on."""
    if out.dtype == torch.bool or out.is_complex():
        return torch.zeros_like(out, dtype=torch.bool)
    size = out.element_size()
    code = int.from_bytes(bytes([poison] * size), "little", signed=True)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return out.contiguous().view(bits) == code + step


def _compare(
    out: Tensor, eager: Tensor, golden: Tensor, device: torch.device | str
) -> Reason | None:
    total = out.numel()
    if total == 0:
        return None
    flat = (x.reshape(-1).split(CHUNK) for x in (out, eager, golden))
    chunks = ([x.to(device) for x in chunk] for chunk in zip(*flat, strict=True))
    if not out.is_floating_point():
        # Where rounding decides, as of the index of a maximum, eager PyTorch is no judge.
        wrong = sum(int(((o != e) & (e == g.to(e.dtype))).sum()) for o, e, g in chunks)
        return _wrong(f"{wrong} of {total} elements differ") if wrong else None
    found = torch.stack([_measure(*chunk) for chunk in chunks]).cpu()
    wrong, finite = (int(count) for count in found[:, :2].sum(0))
    if wrong:
        return _wrong(f"{wrong} of {total} elements are not finite, or should not be")
    if not finite:
        return None
    largest, mean = found[:, 2:5].amax(0).tolist(), (found[:, 5:].sum(0) / finite).tolist()
    slack = ORDER if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    # The largest element alone would hide an error in the small ones: the mean is held to it too.
    for how, (error, allowed, of) in (("largest", largest), ("mean", mean)):
        if error > FACTOR * allowed + slack * of:
            kind = verdict.INACCURATE if largest[0] <= ROUNDING * largest[2] else verdict.WRONG
            return Reason(kind, f"{how} error {error:.1e}, eager {allowed:.1e}, of {of:.1e}")
    return None


def _measure(out: Tensor, eager: Tensor, golden: Tensor) -> Tensor:
    """Of flat tensors: how many elements are finite and should not be, or the other way round; how
    many can be compared; of these the largest, and then the sum, of the error, of eager's error,
    and of the values: float64 ``[8]``."""
    out, eager = out.double(), eager.double()
    finite = _comparable(eager, golden)
    same = (eager == golden) | (eager.isnan() & golden.isnan())
    unlike = ~finite & same & ~((out == eager) | (out.isnan() & eager.isnan()))
    wrong = (unlike | (finite & ~out.isfinite())).sum()
    sizes = [torch.where(finite, x, 0).abs() for x in (out - golden, eager - golden, golden)]
    found = [wrong, finite.sum(), *(x.max() for x in sizes), *(x.sum() for x in sizes)]
    return torch.stack([x.double() for x in found])


def _comparable(eager: Tensor, golden: Tensor) -> Tensor:
    """Where eager overflows and float64 does not, there is nothing to hold an answer to."""
    return eager.isfinite() & golden.isfinite()


def _wrong(text: str) -> Reason:
    return Reason(verdict.WRONG, text)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
