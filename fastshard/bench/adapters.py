"""``bench adapters``: tokens a second that other libraries' ``generate`` makes, as it is and
accelerated by ``fastshard.integrations``.

Each library and model has a process of its own and random weights. One prompt is continued
greedily over a static cache, without a compiler, by the untouched model and by an accelerated copy
of it in turn. The time of a token is that of ``NEW_TOKENS`` less that of one, over their
difference: the prompt and what ``generate`` sets up are not in it; its loop is.

Of a few layers, or on a CPU:

    python -m fastshard.bench.adapters transformers --layers 2 [--device cpu] [--json FILE]
"""

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fastshard.bench import processes
from fastshard.bench.case import Settings
from fastshard.bench.presets import PRESETS
from fastshard.bench.timing import Timing, relative_error
from fastshard.integrations.replacement import Replacements

MODEL = "llama-3.2-1b"
PROMPT_TOKENS = 128
NEW_TOKENS = 65
ROUNDS = 7
TIMEOUT = 600  # seconds of one process


class Library(Protocol):
    """A library whose models are generated from, with and without our adapter for it."""

    def build(self, config: Mapping, device: str, dtype: torch.dtype) -> nn.Module:
        """A model with random weights, of a Hugging Face ``config.json``."""

    def generate(self, model: nn.Module, prompt: Tensor, num_tokens: int) -> Tensor:
        """Continue ``prompt``, ``[1, s]`` int64, greedily: ``[1, s + num_tokens]``."""

    def logits(self, model: nn.Module, prompt: Tensor) -> Tensor:
        """Of the last position: ``[1, vocab_size]``."""


class Transformers:
    """Hugging Face transformers: ``generate`` with ``cache_implementation="static"``."""

    def build(self, config: Mapping, device: str, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
        return model.eval()

    def generate(self, model: nn.Module, prompt: Tensor, num_tokens: int) -> Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            disable_compile=True,
        )

    def logits(self, model: nn.Module, prompt: Tensor) -> Tensor:
        return model(prompt, logits_to_keep=1, use_cache=False).logits[:, -1]


class Torchtune:
    """torchtune: ``generation.generate`` over the caches of ``setup_caches``.

    An accelerated model is given the ``CapturedStep`` that goes with it.
    """

    def build(self, config: Mapping, device: str, dtype: torch.dtype) -> nn.Module:
        from fastshard.bench.torchtune_peer import decoder
        from fastshard.models import ModelConfig

        model = decoder(ModelConfig.from_dict(config), torch.device(device))
        state = {
            name: torch.empty(weight.shape, device=device, dtype=dtype).normal_(std=0.02)
            for name, weight in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()

    def generate(self, model: nn.Module, prompt: Tensor, num_tokens: int) -> Tensor:
        from torchtune.generation import generate

        slots = PROMPT_TOKENS + NEW_TOKENS
        if model.caches_are_setup():
            model.reset_caches()
        else:
            with prompt.device:
                model.setup_caches(1, model.tok_embeddings.weight.dtype, decoder_max_seq_len=slots)
        options = {}
        if Replacements.of(model) is not None:
            options["custom_generate_next_token"] = self._captured_step
        tokens, _ = generate(model, prompt, max_generated_tokens=num_tokens, top_k=1, **options)
        return tokens

    @cached_property
    def _captured_step(self):
        from fastshard.integrations.torchtune import CapturedStep

        return CapturedStep()

    def logits(self, model: nn.Module, prompt: Tensor) -> Tensor:
        return model(prompt)[:, -1]


LIBRARIES: dict[str, Library] = {"transformers": Transformers(), "torchtune": Torchtune()}


def run(settings: Settings, device: str = "cuda") -> Iterator[dict]:
    """Measure the models asked for, by default the 1B one, in each library: plain values."""
    for name in settings.models or (MODEL,):
        for library in LIBRARIES:
            command = [sys.executable, __file__, library]  # -m would prefer a checkout
            command += ["--model", name, "--device", device]
            command += ["--dtype", str(settings.dtype).removeprefix("torch.")]
            if settings.num_layers is not None:
                command += ["--layers", str(settings.num_layers)]
            yield {"library": library, "model": name} | processes.result_of(command, TIMEOUT)


def text(result: dict) -> str:
    """One line, aligned with those of the other benchmarks."""
    case = f"{'adapters':<10} {result['library']:<20} {result['model']:<36}"
    if "error" in result:
        return f"{case} none: {result['error']}"
    plain, ours = (result[name] for name in ("untouched", "accelerated"))
    holds = ours["relative_error"] <= 2 * plain["relative_error"]
    return (
        f"{case} {result['dtype']:<8} {1e6 / plain['us']:.1f} tokens/s untouched, "
        f"{1e6 / ours['us']:.1f} accelerated, {plain['us'] / ours['us']:.2f}x; "
        f"p20-p80 {ours['p20'] / 1e3:.3f}-{ours['p80'] / 1e3:.3f} ms a token; error "
        f"{ours['relative_error']:.1e} ({plain['relative_error']:.1e})"
        f"{'' if holds else ' BROKEN'}, {result['same_tokens']} of {NEW_TOKENS} tokens the same"
    )


@torch.no_grad()
def measure(library: str, config: Mapping, device: str, dtype: torch.dtype) -> dict:
    """Generate with one library in this process, and say what it took.

    Args:
        library: Of ``LIBRARIES``.
        config: As a Hugging Face ``config.json``.
        device: cpu or cuda.
        dtype: Of the weights.
    """
    of = LIBRARIES[library]
    adapter = importlib.import_module(f"fastshard.integrations.{library}")
    torch.manual_seed(0)
    plain = of.build(config, device, dtype)
    prompt = torch.randint(1, config["vocab_size"], (1, PROMPT_TOKENS), device=device)
    golden = of.logits(copy.deepcopy(plain).double(), prompt)
    models = {"untouched": plain, "accelerated": adapter.accelerate(copy.deepcopy(plain))}
    errors = {
        name: relative_error(of.logits(model, prompt), golden) for name, model in models.items()
    }
    tokens = [of.generate(model, prompt, NEW_TOKENS) for model in models.values()]
    same = (tokens[0] == tokens[1])[0, PROMPT_TOKENS:].long().cumprod(0).sum().item()

    def seconds(model: nn.Module, num_tokens: int) -> float:
        _wait_for(device)
        begin = time.perf_counter()
        of.generate(model, prompt, num_tokens)
        _wait_for(device)
        return time.perf_counter() - begin

    samples: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            whole, first = seconds(model, NEW_TOKENS), seconds(model, 1)
            samples[name].append((whole - first) * 1e6 / (NEW_TOKENS - 1))
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else device,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("fastshard", "torch", library)},
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "same_tokens": same,
        **{
            name: asdict(Timing.of(samples[name])) | {"relative_error": errors[name]}
            for name in models
        },
    }


def _wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--model", choices=PRESETS, default=MODEL)
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    config = PRESETS[args.model]
    if args.layers:
        config = config | {"num_hidden_layers": args.layers}
    result = measure(args.library, config, args.device, getattr(torch, args.dtype))
    print(text({"library": args.library, "model": args.model} | result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
