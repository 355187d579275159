"""Benchmarks that measure in a process of their own, which leaves its result as JSON."""

import json
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
        Plain values; where the process fails, its last line as ``error``.

    Raises:
        subprocess.TimeoutExpired: it takes longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        words = [*command, "--json", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            return {"error": " ".join(last) or f"exit status {done.returncode}"}
        return json.loads(path.read_text())
