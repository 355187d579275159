"""A script in the place of nvcc."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Compiles 192x4 badly, 224x3 not at all; else writes what it was given.
SCRIPT = f"""#!/bin/bash
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.1"; exit; fi
echo "$@" >>"$(dirname "$0")/calls"
code="${{@: -3:1}}" out="${{@: -1}}"
if grep -q "{{192, 4}}" "$code"; then
  echo "ptxas warning : Registers are spilled to local memory in function 'f'," \\
    "624 bytes spill stores, 380 bytes spill loads" >&2
fi
if grep -q "{{224, 3}}" "$code"; then
  echo "In file included from $code:3:"
  echo "{ROOT}/csrc/norm/row.cuh(7): error: static assertion failed"; exit 2
fi
cp "$code" "$out"
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """The folder of a CUDA toolkit; its nvcc writes its calls to ``bin/calls``."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "nvcc"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home
