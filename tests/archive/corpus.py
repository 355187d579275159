"""Rows as the archive has them, of kernels made for tests: a right one, and one for each trick.

The tricks are of one source (``kernels``; in C++, or in CUDA): one build serves all, since builds
are kept by the content of their source. ``ENTRIES`` says of each
kernel which verdict it must get, and a pattern of the reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastshard.archive import verdict

KERNELS = Path(__file__).parent / "kernels"
COLUMNS = {
    "Op_Name": "23_Softmax",
    "Level_ID": 1,
    "Task_ID": 23,
    "Kernel_Name": None,
    "CUDA_Runtime": 0.01,
    "PyTorch_Native_Runtime": 0.04,
    "PyTorch_Compile_Runtime": 0.05,
    "CUDA_Speedup_Native": 4.0,
    "CUDA_Speedup_Compile": 5.0,
    "CUDA_Code": None,
    "PyTorch_Code_Module": "",
    "PyTorch_Code_Functional": None,
    "Correct": True,
    "Max_Diff": 1e-7,
    "Error": "",
    "NCU_Profile": "{'metrics': {'SM Busy': {'value': 42.0, 'unit': '%'}}}",
    "Torch_Profile": "{'cudaLaunchKernel': {'cpu_time_total': 12.5}}",
    "Clang_Tidy": "{'stderr': '', 'errored': False}",
    "__index_level_0__": 0,
}
"""Column -> what it holds where a kernel says nothing else."""
TRICKS = (
    "right",
    "wrong",
    "unwritten",
    "past_the_end",
    "before_the_start",
    "edits_input",
    "one_shape",
    "refuses_shapes",
    "hangs",
    "alias",
    "static_output",
    "caches_by_pointer",
    "caches_by_corners",
    "detects_poison",
    "overflows",
    "inaccurate",
    "crashes",
    "hogs_memory",
    "late",
    "patches_torch",
    "ones",
    "lazy",
    "forks",
    "spoils_free",
    "early",
    "faults",
)
"""In the order of the enum ``Trick``."""
SOFTMAX = "torch.softmax(x, dim=1)"
SUM_OF_SOFTMAX = "torch.softmax(x, dim=1).sum(dim=1)"
BROKEN = """
int forward(int x, int which) { return undeclared(x); }
"""
DIES_WHEN_LOADED = """#include <csignal>
struct Trap { Trap() { raise(SIGKILL); } } trap;
"""


@dataclass(frozen=True)
class Entry:
    """What verifying a kernel must give.

    Attributes:
        verdict: Of ``fastshard.archive.verdict``.
        reason: A pattern that its reason matches in full.
        trick: Of the source.
        body: Of the reference.
        call: What the reference's module passes.
        code: In the place of the source.
    """

    verdict: str
    reason: str
    trick: str = "right"
    body: str = SOFTMAX
    call: str = "x, self.which"
    code: str | None = None


def reference(trick: str, body: str = SOFTMAX, call: str = "x, self.which") -> str:
    """The row's PyTorch code, in the form of the archive: a function, a module that calls it."""
    return f"""import torch
import torch.nn as nn
import torch.nn.functional as F


def module_fn(x: torch.Tensor, which: int) -> torch.Tensor:
    return {body}


class Model(nn.Module):
    def __init__(self, which):
        super(Model, self).__init__()
        self.which = which

    def forward(self, x, fn=module_fn):
        return fn({call})


batch_size = 32
num_features = 96
which = {TRICKS.index(trick)}


def get_inputs():
    return [torch.randn(batch_size, num_features)]


def get_init_inputs():
    return [which]
"""


AT = r"\[32, 96\]"
UNWRITTEN = "3072 of 3072 elements are what its memory held before"
ENTRIES: dict[str, Entry] = {
    "right": Entry(verdict.VERIFIED, ""),
    "wrong": Entry(verdict.WRONG, rf"as published, {AT}: largest error .*", "wrong"),
    "unwritten": Entry(verdict.NOT_WRITTEN, rf"as published, {AT}: {UNWRITTEN}", "unwritten"),
    "past_the_end": Entry(
        verdict.OUT_OF_BOUNDS,
        rf"as published, {AT}: it wrote to byte 1 after a buffer of 12288 bytes",
        "past_the_end",
    ),
    "before_the_start": Entry(
        verdict.OUT_OF_BOUNDS,
        rf"as published, {AT}: it wrote to byte 1 before a buffer of 12288 bytes",
        "before_the_start",
    ),
    "spoils_free": Entry(
        verdict.OUT_OF_BOUNDS,
        rf"as published, {AT}: it wrote to byte 0 of a freed buffer of 12288 bytes",
        "spoils_free",
    ),
    "edits_input": Entry(
        verdict.EDITED_INPUTS,
        rf"as published, {AT}: tensor 0 of its arguments changed",
        "edits_input",
    ),
    "one_shape": Entry(
        verdict.ONE_SHAPE, r"as published, \[32, 97\]: wrong: largest error .*", "one_shape"
    ),
    "refuses_shapes": Entry(
        verdict.ONE_SHAPE,
        r"as published, \[32, 97\]: raised an error: "
        "RuntimeError: num_features must be 96, got 97.*",
        "refuses_shapes",
    ),
    "hangs": Entry(
        verdict.HUNG,
        rf"as published, {AT}: when it was called: no answer for \d+ s: killed",
        "hangs",
    ),
    "alias": Entry(
        verdict.SHARED_MEMORY,
        rf"as published, {AT}: its answer lies in tensor 0 of its arguments",
        "alias",
    ),
    "static_output": Entry(
        verdict.SHARED_MEMORY,
        rf"another seed, {AT}: two calls returned the same memory",
        "static_output",
    ),
    "caches_by_pointer": Entry(
        verdict.STALE,
        rf"another seed, {AT}: the same addresses, other values: an earlier answer came",
        "caches_by_pointer",
    ),
    "caches_by_corners": Entry(
        verdict.STALE,
        rf"one element changed, {AT}: the same addresses, other values: an earlier answer came",
        "caches_by_corners",
    ),
    "detects_poison": Entry(
        verdict.NOT_WRITTEN, rf"another seed, {AT}: {UNWRITTEN}", "detects_poison"
    ),
    "overflows": Entry(
        verdict.WRONG,
        rf"scaled, {AT}: \d+ of 3072 elements are not finite, or should not be",
        "overflows",
    ),
    "inaccurate": Entry(
        verdict.INACCURATE, rf"as published, {AT}: (largest|mean) error .*", "inaccurate"
    ),
    "crashes": Entry(
        verdict.CRASHED,
        rf"as published, {AT}: when it was called: the process ended by signal 11.*",
        "crashes",
    ),
    "hogs_memory": Entry(
        verdict.TOO_MUCH_MEMORY,
        rf"as published, {AT}: when it was called: more than .* GiB of resident memory",
        "hogs_memory",
    ),
    "late": Entry(
        verdict.UNORDERED,
        rf"as published, {AT}: its answer changed after the stream had passed the call",
        "late",
    ),
    "patches_torch": Entry(
        verdict.TOO_FAST,
        "its process says .* us a call, a clock outside .* us",
        "patches_torch",
    ),
    "ones": Entry(
        verdict.VACUOUS,
        "6 sets of inputs, seeds and scales apart, have one answer",
        "ones",
        SUM_OF_SOFTMAX,
    ),
    "lazy": Entry(verdict.WRONG, r"in timed calls: .*", "lazy"),
    "forks": Entry(verdict.WRONG, rf"as published, {AT}: largest error .*", "forks"),
    "does_not_compile": Entry(
        verdict.NOT_COMPILED,
        r"archive_kernel\.\w+[:(]2.*undeclared.*",
        code=BROKEN,
    ),
    "dies_when_loaded": Entry(
        verdict.CRASHED,
        "when it was loaded: the process ended by signal 9.*",
        code=DIES_WHEN_LOADED,
    ),
    "reference_fails": Entry(
        verdict.REFERENCE_FAILED,
        "IndexError: Dimension out of range .*",
        body="torch.softmax(x, dim=7)",
    ),
    "other_arguments": Entry(
        verdict.REFUSED,
        rf"as published, {AT}: TypeError: forward\(\): incompatible function arguments.*",
        call="x, str(self.which)",
    ),
    "nulls": Entry(verdict.INCOMPLETE, "CUDA_Code and PyTorch_Code_Functional must not be null"),
    # The stream fills the answer's memory with poison after the kernel has written it.
    "early": Entry(verdict.NOT_WRITTEN, rf"as published, {AT}: {UNWRITTEN}", "early"),
    "faults": Entry(
        verdict.CRASHED, rf"as published, {AT}: .*CUDA error: an illegal memory access.*", "faults"
    ),
}
_GPU_ALONE = ("early", "faults")
_CPU_ALONE = ("forks",)
CPU_NAMES = [name for name in ENTRIES if name not in _GPU_ALONE]
CUDA_NAMES = [name for name in ENTRIES if name not in _CPU_ALONE]
"""Entries that the source has in CUDA."""


def source(language: str) -> str:
    """The kernels in ``cpp`` or ``cu``."""
    parts = ("tricks.h", f"softmax.{language}", "forward.cpp")
    return "\n".join((KERNELS / part).read_text() for part in parts)


def row(name: str, language: str = "cpp") -> dict[str, object]:
    """The columns of a kernel of ``ENTRIES``, its code in ``cpp`` or ``cu``."""
    entry = ENTRIES[name]
    if name == "nulls":
        return dict.fromkeys(COLUMNS) | {"Level_ID": 1, "Task_ID": 23, "Kernel_Name": name}
    return COLUMNS | {
        "Kernel_Name": name,
        "CUDA_Code": entry.code or source(language),
        "PyTorch_Code_Functional": reference(entry.trick, entry.body, entry.call),
        "__index_level_0__": list(ENTRIES).index(name),
    }


def write_parquet(
    path: Path, names: Iterable[str] | None = None, language: str = "cpp"
) -> list[dict[str, object]]:
    """Write rows of ``ENTRIES`` (all, or these) as the archive has them; returns their columns."""
    import pyarrow
    import pyarrow.parquet

    rows = [row(name, language) for name in (CPU_NAMES if names is None else names)]
    schema = pyarrow.schema([(name, _type(COLUMNS, name)) for name in COLUMNS])
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)
    return rows


def _type(columns: dict[str, object], name: str):
    import pyarrow

    value = columns[name]
    if isinstance(value, bool):
        return pyarrow.bool_()
    if isinstance(value, int):
        return pyarrow.int64()
    return pyarrow.float64() if isinstance(value, float) else pyarrow.string()
