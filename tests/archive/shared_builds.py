"""One folder of builds for all tests of a run, each source compiled once, whoever runs them.

Workers of pytest-xdist share it: compiling for CUDA takes half a minute and 3 GB.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.build import only_builder
from fastshard.archive import compile


def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with builds."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own in that of the run
        base = base.parent
    folder = base / "shared_builds"
    folder.mkdir(exist_ok=True)
    return folder


def use(builds: Path, cache: Path) -> None:
    """Let another cache folder have the same builds."""
    for folder in (builds / "archive" / "builds", cache / "archive"):
        folder.mkdir(parents=True, exist_ok=True)
    (cache / "archive" / "builds").symlink_to(builds / "archive" / "builds")


def compile_once(patch: pytest.MonkeyPatch, builds: Path) -> None:
    """Let whoever wants the same source at the same time wait for the first."""
    build: Callable[..., compile.Built] = compile.build

    def wait_and_build(code: str, **settings) -> compile.Built:
        with only_builder(builds / hashlib.sha256(code.encode()).hexdigest()):
            return build(code, **settings)

    patch.setattr(compile, "build", wait_and_build)
