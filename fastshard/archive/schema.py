"""What a row of the archive is: columns, kinds of values, a ``Row``.

The data set is ``SakanaAI/AI-CUDA-Engineer-Archive``. Every value may be null. Profiles are texts
of Python dicts; they are read as literals, and never evaluated.
"""

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SPLITS = ("level_1", "level_2", "level_3")
CODE = ("CUDA_Code", "PyTorch_Code_Module", "PyTorch_Code_Functional")
PROFILES = ("NCU_Profile", "Torch_Profile", "Clang_Tidy")
KINDS = {
    "Op_Name": "text",
    "Level_ID": "an integer",
    "Task_ID": "an integer",
    "Kernel_Name": "text",
    "CUDA_Runtime": "a number",
    "PyTorch_Native_Runtime": "a number",
    "PyTorch_Compile_Runtime": "a number",
    "CUDA_Speedup_Native": "a number",
    "CUDA_Speedup_Compile": "a number",
    "CUDA_Code": "text",
    "PyTorch_Code_Module": "text",
    "PyTorch_Code_Functional": "text",
    "Correct": "true or false",
    "Max_Diff": "a number",
    "Error": "text",
    "NCU_Profile": "text",
    "Torch_Profile": "text",
    "Clang_Tidy": "text",
    "__index_level_0__": "an integer",
}
"""Every column, and what its values are where they are not null."""
LIGHT = tuple(name for name in KINDS if name not in (*CODE, *PROFILES))
"""Columns that are read for a list: all but the long texts."""
LONGEST_LITERAL = 2_000_000
"""Characters of a profile above which it is not parsed."""


@dataclass(frozen=True)
class Row:
    """One kernel, as the archive has it.

    Attributes:
        id: ``level/task/kernel name``, with ``@`` and the row's index where a name repeats.
        op_name: Like ``36_RMSNorm_``.
        level: 1, 2 or 3.
        task: Of the level.
        kernel_name: The authors' name.
        cuda_ms: Claimed milliseconds, on an H100.
        native_ms: Of eager PyTorch.
        compile_ms: Of ``torch.compile``.
        speedup_native: Claimed, over eager PyTorch.
        speedup_compile: Claimed, over ``torch.compile``.
        correct: Claimed.
        max_diff: Claimed, from PyTorch.
        error: Of the authors' run.
        cuda_code: Source; None where it is null or was not read, as the next.
        module_code: PyTorch, as modules.
        functional_code: PyTorch, as a function of tensors, ``module_fn``.
        ncu_profile: Text of a dict.
        torch_profile: Text of a dict.
        clang_tidy: Text of a dict.
        index: Of the row in the data set.
    """

    id: str
    op_name: str | None
    level: int | None
    task: int | None
    kernel_name: str | None
    cuda_ms: float | None
    native_ms: float | None
    compile_ms: float | None
    speedup_native: float | None
    speedup_compile: float | None
    correct: bool | None
    max_diff: float | None
    error: str | None
    cuda_code: str | None
    module_code: str | None
    functional_code: str | None
    ncu_profile: str | None
    torch_profile: str | None
    clang_tidy: str | None
    index: int | None


def check_columns(names: Iterable[str], where: str) -> None:
    """Raise where columns of the archive are missing.

    Args:
        names: The columns that are there; others may be there too.
        where: Whose, for the message.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in KINDS if name not in set(names)]
    if missing:
        raise ValueError(
            f"{where} must have the columns of the archive, {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )


def row_of(values: Mapping[str, object], identity: str, where: str) -> Row:
    """A row of what was read.

    Args:
        values: By column; a column that is not there was not read.
        identity: The row's ID.
        where: For messages.

    Raises:
        ValueError: a value is of another kind than its column's.
    """
    read = {name: _value(name, values.get(name), where) for name in KINDS}
    return Row(
        id=identity,
        op_name=read["Op_Name"],
        level=read["Level_ID"],
        task=read["Task_ID"],
        kernel_name=read["Kernel_Name"],
        cuda_ms=read["CUDA_Runtime"],
        native_ms=read["PyTorch_Native_Runtime"],
        compile_ms=read["PyTorch_Compile_Runtime"],
        speedup_native=read["CUDA_Speedup_Native"],
        speedup_compile=read["CUDA_Speedup_Compile"],
        correct=read["Correct"],
        max_diff=read["Max_Diff"],
        error=read["Error"],
        cuda_code=read["CUDA_Code"],
        module_code=read["PyTorch_Code_Module"],
        functional_code=read["PyTorch_Code_Functional"],
        ncu_profile=read["NCU_Profile"],
        torch_profile=read["Torch_Profile"],
        clang_tidy=read["Clang_Tidy"],
        index=read["__index_level_0__"],
    )


def parse_profile(text: str | None) -> dict | None:
    """The dict that a profile's text spells; None where it spells none.

    Only literals are read: a call, a name or an operator in the text makes it no dict.
    """
    if text is None or len(text) > LONGEST_LITERAL:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, dict) else None


def _value(name: str, value: object, where: str) -> object:
    """As ``Row`` has it. A number that is no number is null, as pandas writes it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    kind = KINDS[name]
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "true or false" and isinstance(value, bool):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind == "a number":
            return float(value)
        if kind == "an integer" and float(value).is_integer():
            return int(value)
    raise ValueError(f"{name} must be {kind} or null, got {value!r:.60} in {where}")
