"""Rows as the archive has them, of kernels made for tests: a right one, and one for each trick.

The tricks are functions of one source (``kernels/softmax.cpp``, its CUDA twin ``softmax.cu``): one
build serves all, since builds are kept by the content of their source. ``ENTRIES`` says of each
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
)
"""In the order of the enum ``Trick`` of both sources."""
SOFTMAX = "torch.softmax(x, dim=1)"
SUM_OF_SOFTMAX = "torch.softmax(x, dim=1).sum(dim=1)"
BROKEN = """#include <torch/extension.h>
torch::Tensor forward(torch::Tensor x, int64_t which) { return undeclared(x); }
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


ENTRIES: dict[str, Entry] = {
    "right": Entry(verdict.VERIFIED, ""),
    "wrong": Entry(verdict.WRONG, "", "wrong"),
    "unwritten": Entry(verdict.NOT_WRITTEN, "", "unwritten"),
    "past_the_end": Entry(verdict.OUT_OF_BOUNDS, "", "past_the_end"),
    "before_the_start": Entry(verdict.OUT_OF_BOUNDS, "", "before_the_start"),
    "spoils_free": Entry(verdict.OUT_OF_BOUNDS, "", "spoils_free"),
    "edits_input": Entry(verdict.EDITED_INPUTS, "", "edits_input"),
    "one_shape": Entry(verdict.ONE_SHAPE, "", "one_shape"),
    "refuses_shapes": Entry(verdict.ONE_SHAPE, "", "refuses_shapes"),
    "hangs": Entry(verdict.HUNG, "", "hangs"),
    "alias": Entry(verdict.SHARED_MEMORY, "", "alias"),
    "static_output": Entry(verdict.SHARED_MEMORY, "", "static_output"),
    "caches_by_pointer": Entry(verdict.STALE, "", "caches_by_pointer"),
    "caches_by_corners": Entry(verdict.STALE, "", "caches_by_corners"),
    "detects_poison": Entry(verdict.NOT_WRITTEN, "", "detects_poison"),
    "overflows": Entry(verdict.WRONG, "", "overflows"),
    "inaccurate": Entry(verdict.INACCURATE, "", "inaccurate"),
    "crashes": Entry(verdict.CRASHED, "", "crashes"),
    "hogs_memory": Entry(verdict.TOO_MUCH_MEMORY, "", "hogs_memory"),
    "late": Entry(verdict.UNORDERED, "", "late"),
    "patches_torch": Entry(verdict.TOO_FAST, "", "patches_torch"),
    "ones": Entry(verdict.VACUOUS, "", "ones", SUM_OF_SOFTMAX),
    "lazy": Entry(verdict.WRONG, "", "lazy"),
    "forks": Entry(verdict.VERIFIED, "", "forks"),
    "does_not_compile": Entry(verdict.NOT_COMPILED, "", code=BROKEN),
    "dies_when_loaded": Entry(verdict.CRASHED, "", code=DIES_WHEN_LOADED),
    "reference_fails": Entry(verdict.REFERENCE_FAILED, "", body="torch.softmax(x, dim=7)"),
    "other_arguments": Entry(verdict.REFUSED, "", call="x, str(self.which)"),
    "nulls": Entry(verdict.INCOMPLETE, ""),
}


def source(language: str) -> str:
    """The kernels in ``cpp`` or ``cu``."""
    return (KERNELS / f"softmax.{language}").read_text()


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

    rows = [row(name, language) for name in (ENTRIES if names is None else names)]
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
