"""Parquet files with the archive's columns, of rows that a test names by what differs."""

from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

ROW = {
    "Op_Name": "36_RMSNorm_",
    "Level_ID": 1,
    "Task_ID": 36,
    "Kernel_Name": "rms_norm_rows",
    "CUDA_Runtime": 0.25,
    "PyTorch_Native_Runtime": 0.75,
    "PyTorch_Compile_Runtime": 0.5,
    "CUDA_Speedup_Native": 3.0,
    "CUDA_Speedup_Compile": 2.0,
    "CUDA_Code": "// the kernel\nint forward();\n",
    "PyTorch_Code_Module": "class Model: ...\n",
    "PyTorch_Code_Functional": "def module_fn(x): ...\n",
    "Correct": True,
    "Max_Diff": 1e-6,
    "Error": None,
    "NCU_Profile": "{'metrics': {'Duration': {'avg_value': 12.5, 'unit': 'us'}}, 'rules': {}}",
    "Torch_Profile": None,
    "Clang_Tidy": "{'stdout': 'none'}",
    "__index_level_0__": 7,
}
_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def write_rows(path: Path, *rows: dict, without: tuple[str, ...] = (), **settings) -> Path:
    """Write rows, each ``ROW`` with these values in the place of its own.

    Args:
        path: Its folder is made.
        rows: Values by column, null for None.
        without: Columns that the file has not.
        settings: Of ``parquet.write_table``.
    """
    found = [{**ROW, **row} for row in rows]
    columns = {}
    for name, value in ROW.items():
        values = [row[name] for row in found]
        kind = next((type(v) for v in (*values, value) if v is not None), str)
        columns[name] = pa.array(values, type=_TYPES[kind])
    kept = {name: values for name, values in columns.items() if name not in without}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(kept), path, **settings)
    return path
