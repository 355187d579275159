"""``bench load``: the host memory and the time that loading a checkpoint takes.

Writes a random checkpoint, one file a layer, then loads it in a fresh process; its files are then
in the page cache. The rule: peak host memory, beyond weights that live on the host, is at most that
of the process with torch imported, plus the largest tensor, plus 1 GiB.

Of another size, on a CPU, or of a shard only:

    python -m fastshard.bench.load --gib 4 [--device cpu] [--shard 0-7] [--json FILE]
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

import fastshard
from fastshard.bench import processes
from fastshard.bench.case import Settings
from fastshard.bench.checkpoints import write_checkpoint
from fastshard.bench.presets import PRESETS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
GIB = 4.0
"""Of the random checkpoint where no model is asked for."""
TIMEOUT = 300  # seconds of one process


def run(settings: Settings, device: str = "cuda") -> Iterator[dict]:
    """Measure the models asked for, by default a checkpoint of ``GIB``: facts as plain values."""
    sizes = {f"random, {GIB:g} GiB": CONFIG | {"num_hidden_layers": num_layers(GIB)}}
    if settings.models is not None:
        sizes = {name: PRESETS[name] for name in settings.models}
    for name, config in sizes.items():
        if settings.num_layers is not None:
            config = config | {"num_hidden_layers": settings.num_layers}
            name = f"{name}, {settings.num_layers} layers"
        yield {"model": name} | _in_a_process(config, device)


def text(result: dict) -> str:
    """One line, aligned with those of the other benchmarks."""
    case = f"{'load':<10} {'fastshard':<20} {result['model']:<36}"
    if "error" in result:
        return f"{case} none: {result['error']}"
    return f"{case} {_figures(result)}"


def _in_a_process(config: Mapping, device: str) -> dict:
    """What ``measure`` finds of a random checkpoint in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config)
        return processes.result_of([*_MEASURE, folder, "--device", device], TIMEOUT)


def num_layers(gib: float) -> int:
    """Layers of ``CONFIG`` that make a checkpoint of about this size."""
    return max(1, round((gib - 0.49) / 0.406))


_MEASURE = [sys.executable, __file__, "--measure"]  # -m would prefer a checkout


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024


def measure(path: Path, device: str, layers: str) -> dict:
    """Load a shard of the checkpoint in this process, and say what it took."""
    n_layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    start, end = map(int, layers.split("-")) if layers else (0, n_layers - 1)
    shard = fastshard.Shard("random", start, end, n_layers)
    torch.zeros(1, device=device)  # the device's context is not the loader's
    before = peak_bytes()
    begin = time.perf_counter()
    model = fastshard.load(path, shard=shard, device=device, dtype=torch.bfloat16)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = peak_bytes()
    sizes = [t.numel() * t.element_size() for t in model.model.state_dict().values()]
    on_host = sum(sizes) if device == "cpu" else 0
    name = torch.cuda.get_device_name(device) if device != "cpu" else platform.machine()
    return {
        "benchmark": "load",
        "device": name,
        "fastshard": fastshard.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "layers": [start, end],
        "weight_bytes": sum(sizes),
        "seconds": seconds,
        "host_peak_beyond_weights_bytes": peak - before - on_host,
        "allowed_bytes": max(sizes) + 2**30,
    }


def _figures(result: dict) -> str:
    size, beyond = result["weight_bytes"], result["host_peak_beyond_weights_bytes"]
    allowed = result["allowed_bytes"]
    return (
        f"{size / 2**30:.2f} GiB of bfloat16 to {result['device']}  "
        f"{result['seconds']:.2f} s  {size / result['seconds'] / 1e9:.2f} GB/s  "
        f"host peak beyond the weights {beyond / 2**20:.0f} MiB  "
        f"allowed {allowed / 2**20:.0f} MiB  {'holds' if beyond <= allowed else 'BROKEN'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=GIB, help="size of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shard", default="", metavar="A-B", help="layers to load, all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        result = measure(args.measure, args.device, args.shard)
        print(f"load  {_figures(result)}")
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), CONFIG | {"num_hidden_layers": num_layers(args.gib)})
        command = [*_MEASURE, folder, "--device", args.device, "--shard", args.shard]
        if args.json:
            command += ["--json", str(args.json)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
