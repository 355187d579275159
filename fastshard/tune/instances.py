"""Instances of the kernels' templates that are not in the menus: their source, and loading them.

The source is a few lines that instantiate one launcher for one dtype (csrc/common/instance.h). A
library of it, loaded, stands in for a variant of the menu: the raw op finds it by its name.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

from fastshard.tune.menu import NORMS
from fastshard.tune.tile import tile_named

_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_libraries: dict[tuple[str, str, str, Path], ctypes.CDLL] = {}  # kept: the ops call into them

Add = Callable[[str, str, str, int, int], None]


def source(op: str, dtype: str, variant: str) -> str:
    """The CUDA source of an instance.

    Args:
        op: One of the norms, or ``fused_mlp``.
        dtype: float16 or bfloat16.
        variant: Like ``320x3`` of a norm, ``tiles_128x192_32x4_4x2`` of ``fused_mlp``.

    Raises:
        ValueError: there is no such tile.
    """
    type_name = _TYPES[dtype]
    if op in NORMS:
        kernel = op.removeprefix("add_")
        header = f"norm/{kernel}.cuh"
        params = "".join(word.capitalize() for word in kernel.split("_")) + "Params"
        numbers = variant.replace("x", ", ")
        call = (
            f"launch_{kernel}<{type_name}, RowMenu<RowVariant{{{numbers}}}>>"
            f"(params, {{{numbers}}}, stream)"
        )
    else:
        header, params = "mlp/launch_tiled_mlp.cuh", "TiledMlpParams"
        numbers = ", ".join(map(str, tile_named(variant.removeprefix("tiles_")).config))
        call = f"launch_tiled_mlp<{type_name}, GemmConfig<{numbers}>>(params, stream)"
    return f"""// Written by fastshard tune: {variant} of {op.removeprefix("add_")} in {dtype}.
#include "common/instance.h"
#include "{header}"

namespace fastshard {{

void launch_instance(const {params}& params, cudaStream_t stream) {{
  {call};
}}

}}  // namespace fastshard

FS_INSTANCE(fastshard::{params}, fastshard::launch_instance);
"""


def load(op: str, dtype: str, variant: str, library: Path, add: Add | None = None) -> None:
    """Let the raw op run a variant by this library from now on.

    Args:
        op: As in ``source``, like ``dtype`` and ``variant``.
        dtype: See ``op``.
        variant: See ``op``.
        library: Compiled from the source.
        add: Tells the kernels of it: the op, dtype, variant, bytes of its parameters, and the
            launcher's address. By default that of the compiled kernels.

    Raises:
        OSError: the library cannot be loaded.
    """
    if (op, dtype, variant, library) in _libraries:
        return
    if add is None:
        import fastshard._C

        add = fastshard._C.add_instance
    loaded = ctypes.CDLL(str(library))
    num_bytes = ctypes.c_size_t.in_dll(loaded, "fastshard_params_bytes").value
    address = ctypes.cast(loaded.fastshard_instance, ctypes.c_void_p).value
    add(op, dtype, variant, num_bytes, address)
    _libraries[op, dtype, variant, library] = loaded
