"""Every environment variable that fastshard reads at run time."""

import os
from pathlib import Path
from typing import NamedTuple


class LaunchedRank(NamedTuple):
    """This process among those of torchrun."""

    rank: int
    size: int
    local_rank: int


def launched_rank() -> LaunchedRank | None:
    """What torchrun says of this process: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``; else None."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name) for name in names):
        return None
    return LaunchedRank(*(int(os.environ[name]) for name in names))


def launch_attempt() -> int:
    """How often torchrun has started the ranks again: ``TORCHELASTIC_RESTART_COUNT``."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def launcher_error_file() -> Path | None:
    """Where torchrun looks for this rank's cause: ``TORCHELASTIC_ERROR_FILE``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def cache_dir() -> Path:
    """Where measured tables are kept: ``FASTSHARD_CACHE_DIR``, else the user's cache folder."""
    if os.environ.get("FASTSHARD_CACHE_DIR"):
        return Path(os.environ["FASTSHARD_CACHE_DIR"])
    # The XDG base directory specification: an empty or relative value counts as unset.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "fastshard"


def decode_mode() -> str:
    """How tokens are decoded where the caller does not say: ``FASTSHARD_DECODE``, else auto."""
    return os.environ.get("FASTSHARD_DECODE") or "auto"


def sum_way() -> str:
    """How ranks that share layers add up where the caller does not say: ``FASTSHARD_SUMS``."""
    return os.environ.get("FASTSHARD_SUMS") or "group"


def emits_nvtx() -> bool:
    """Whether commands put NVTX ranges around layers and ops: ``FASTSHARD_NVTX`` is 1."""
    return os.environ.get("FASTSHARD_NVTX") == "1"


def shipped_tables_dir() -> Path:
    """Where the tables that came with the wheel are; not movable."""
    return Path(__file__).parent / "tune" / "tables"
