"""Kernels that the user promoted from the archive: found in the user's cache, checked, loaded.

A table of variants may name one. The compiled kernels then ask for it, once, when a call first
needs it. It is loaded only where it is still what was promoted: the same files, by their hashes,
for this version of fastshard, torch and Python. Else one warning says why it is ignored. Nothing of
the wheel is a promoted kernel. ``fastshard archive promote`` writes them.
"""

import ctypes
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fastshard.build_record import source_version
from fastshard.environment import cache_dir

FORMAT = 1
PREFIX = "promoted_"
"""Of their variants; is_promoted in csrc/ops/instances.h."""
MANIFEST, LIBRARY = "kernel.json", "kernel.so"

Add = Callable[[str, str, str, int, int], None]

_libraries: list[ctypes.CDLL] = []  # kept: the ops call into them
_loaders: list[object] = []  # as well


@dataclass(frozen=True)
class Promoted:
    """What is known of a promoted kernel.

    Attributes:
        name: Its variant.
        op: That it is a variant of.
        dtypes: In which it was measured to be faster.
        fastshard: Version that it was compiled for.
        torch: See ``fastshard``.
        python: See ``fastshard``.
        id: In the archive.
        op_name: In the archive.
        kernel_name: The authors' name.
        source: Data set.
        revision: Of the data set; None where it was read from files.
        licence: Of the kernel.
        attribution: Who made it.
        measured: Per shape ``dtype``, ``shape``, ``us``, and ``auto_us`` of ours beside it.
        verified: The times of its verdict, as ``Verdict.times``.
        files: Name -> SHA-256 of all files but the manifest.
    """

    name: str
    op: str
    dtypes: tuple[str, ...]
    fastshard: str
    torch: str
    python: str
    id: str
    op_name: str
    kernel_name: str
    source: str
    revision: str | None
    licence: str
    attribution: str
    measured: tuple[dict, ...]
    verified: dict
    files: dict[str, str]

    def __post_init__(self):
        for name in ("dtypes", "measured"):  # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))


def folder_of(name: str) -> Path:
    """Where a promoted kernel is or will be."""
    return cache_dir() / "promoted" / name


def python_version() -> str:
    """As a manifest has it: libraries are of one minor version."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest_text(promoted: Promoted) -> str:
    """What the manifest holds."""
    return json.dumps({"format": FORMAT, **asdict(promoted)}, indent=1) + "\n"


def read(folder: Path) -> Promoted:
    """The manifest of a folder.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        known = {field.name for field in fields(Promoted)}
        found = Promoted(**{name: value for name, value in content.items() if name in known})
        if found.name != folder.name or LIBRARY not in found.files:
            raise ValueError(f"it is of {found.name}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} must be of fastshard archive promote, got {error!r}") from None
    return found


def read_all(op: str | None = None) -> list[Promoted]:
    """Every promoted kernel, or those of one op; an unreadable one is left out with a warning."""
    found = []
    for folder in sorted((cache_dir() / "promoted").glob(f"{PREFIX}*")):
        try:
            found.append(read(folder))
        except (ValueError, OSError) as error:
            warnings.warn(f"a promoted kernel is ignored: {error}", stacklevel=2)
    return [each for each in found if op is None or each.op == op]


def why_unusable(promoted: Promoted, folder: Path) -> str | None:
    """Why a kernel may not be loaded; None where it may."""
    for what, was, runs in (
        ("fastshard", promoted.fastshard, source_version()),
        ("torch", promoted.torch, str(torch.__version__)),
        ("Python", promoted.python, python_version()),
    ):
        if was != runs:
            return f"it was compiled for {what} {was}, this is {runs}"
    for name, was in promoted.files.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            return f"its file {name} is not there"
        if digest(path) != was:
            return f"its file {name} has changed"
    return None


def load(op: str, dtype: str, variant: str, add: Add | None = None) -> None:
    """Let the raw op run a promoted kernel, if it may be loaded; else warn.

    Args:
        op: Of the kernels.
        dtype: Of the call.
        variant: Name of the kernel.
        add: As ``fastshard._C.add_instance``, by default that.
    """
    try:
        _load(op, dtype, variant, add)
    except (ValueError, OSError, AttributeError) as error:
        warnings.warn(
            f"the promoted kernel {variant} is ignored: {error}; fastshard archive promote it "
            "again, or demote it",
            stacklevel=2,
        )


def _load(op: str, dtype: str, variant: str, add: Add | None) -> None:
    if not re.fullmatch(rf"{PREFIX}\w+", variant):
        raise ValueError(f"its name must be {PREFIX} and word characters")
    folder = folder_of(variant)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there")
    promoted = read(folder)
    if promoted.op != op:
        raise ValueError(f"it is of {promoted.op}, and not of {op}")
    reason = why_unusable(promoted, folder)
    if reason is not None:
        raise ValueError(reason)
    if add is None:
        import fastshard._C

        add = fastshard._C.add_instance
    library = ctypes.CDLL(str(folder / LIBRARY))
    ctypes.PYFUNCTYPE(None)(("fastshard_prepare", library))()
    num_bytes = ctypes.c_size_t.in_dll(library, "fastshard_params_bytes").value
    launch = getattr(library, f"fastshard_instance_{dtype}")
    add(op, dtype, variant, num_bytes, ctypes.cast(launch, ctypes.c_void_p).value)
    _libraries.append(library)


def use_loader() -> None:
    """Let the compiled kernels ask ``load`` for promoted kernels from now on."""
    import fastshard._C

    callback = ctypes.CFUNCTYPE(None, *[ctypes.c_char_p] * 3)(
        lambda *words: load(*(word.decode() for word in words))
    )
    _loaders[:] = [callback]
    fastshard._C.use_instance_loader(ctypes.cast(callback, ctypes.c_void_p).value)
