"""Benchmarks that measure in a process of their own, which leaves its result as JSON."""

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def result_of(command: Sequence[str], timeout: float) -> dict:
    """What ``command`` writes into the file that is appended to it as ``--json FILE``.

    Args:
        command: Words.
        timeout: In seconds.

    Returns:
        Plain values; where the process fails, the line that says why as ``error``.

    Raises:
        subprocess.TimeoutExpired: it takes longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        words = [*command, "--json", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            return {"error": _why(done.stderr) or f"exit status {done.returncode}"}
        return json.loads(path.read_text())


def _why(stderr: str) -> str:
    """The last line that names an error, other than torchrun's own; else the last."""
    lines = stderr.strip().splitlines()
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception): .", line)
    ]
    return (errors or lines or [""])[-1]
