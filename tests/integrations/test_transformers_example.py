"""The example runs, and writes what the embedded model writes by itself."""

import subprocess
import sys
from pathlib import Path

import fastshard

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers_accelerate.py"


def test_the_example_writes_what_the_embedded_model_writes():
    command = [sys.executable, str(EXAMPLE), "--max-new-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *text, speed = done.stdout.splitlines()
    stream = fastshard.load().stream("def ", max_new_tokens=12, temperature=0)
    assert "\n".join(text).rstrip() == ("def " + "".join(stream)).rstrip()
    assert speed.startswith("accelerated: ")
