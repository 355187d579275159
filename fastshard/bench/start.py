"""``bench start``: from the start of a process to its first token, weights in the page cache."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fastshard import build_record
from fastshard.bench.case import Settings
from fastshard.bench.checkpoints import write_checkpoint
from fastshard.bench.presets import PRESETS
from fastshard.devices import loaded_code
from fastshard.loading import demo_model

MODEL = "llama-3.2-1b"
PROMPT = "Once upon a time"
TIMEOUT = 300  # seconds of one process
RUNS = ("first run", "second run")
"""Of one folder for what the driver compiles: the first run compiles PTX, where that is needed."""


def run(settings: Settings) -> Iterator[dict]:
    """Measure the models asked for, by default the 1B one: facts as plain values."""
    for name in settings.models or (MODEL,):
        config = PRESETS[name]
        if settings.num_layers is not None:
            config = config | {"num_hidden_layers": settings.num_layers}
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config)
            shutil.copy(demo_model() / "tokenizer.json", folder)
            for label in RUNS:
                yield {"model": name, "run": label} | _first_token(folder)


def text(result: dict) -> str:
    """One line, aligned with those of the other benchmarks."""
    case = f"{'start':<10} {'fastshard':<20} {result['model'] + ', ' + result['run']:<36}"
    if "error" in result:
        return f"{case} none: {result['error']}"
    return f"{case} {result['seconds']:>14.2f} s to the first token, code {result['code']}"


def _first_token(folder: str) -> dict:
    """Seconds from the start of ``fastshard generate`` to the first byte of its output."""
    command = [sys.executable, "-m", "fastshard", "generate", PROMPT, "--model", folder]
    command += ["--device", "cuda", "--max-new-tokens", "1"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,  # not a checkout, which -m would import
        env=os.environ | {"CUDA_CACHE_PATH": str(Path(folder) / "compiled")},
    )
    process.stdout.read(1)  # of the text, or the line's end where the token is no whole character
    seconds = time.perf_counter() - begin
    _, errors = process.communicate(timeout=TIMEOUT)
    if process.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        return {"error": " ".join(last) or f"exit status {process.returncode}"}
    code = loaded_code(build_record.CUDA_ARCHS, torch.cuda.get_device_capability())
    return {"seconds": seconds, "code": code}
