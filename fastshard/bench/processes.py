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
        Plain values; where the process fails or takes longer, the line that says so as ``error``.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        words = [*command, "--json", str(path)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"it took more than {timeout:g} s"}
        if done.returncode:
            return {"error": _why(done.stderr) or f"exit status {done.returncode}"}
        return json.loads(path.read_text())


def _why(stderr: str) -> str:
    """Our own line of an error; else the last that names one, but torchrun's; else the last."""
    lines = stderr.strip().splitlines()
    own = [line for line in lines if line.startswith("fastshard: error: ")]
    if own:
        return own[-1].removeprefix("fastshard: error: ")
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception): .", line)
    ]
    return (errors or lines or [""])[-1]
