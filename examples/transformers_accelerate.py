"""Accelerate a Hugging Face model in place, let it write, and put it back as it was.

    python examples/transformers_accelerate.py [MODEL] [PROMPT]

MODEL is a directory or a hub id of a Llama, Mistral, Qwen2 or Qwen3 model; by default it is the
small model that comes with fastshard.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastshard
from fastshard.integrations.transformers import accelerate, undo

EMBEDDED = f"{fastshard.__path__[0]}/demo"


def write(model, tokens: torch.Tensor, max_new_tokens: int) -> tuple[torch.Tensor, float]:
    """Generate greedily over a static cache; returns the text and its tokens a second."""
    start = time.perf_counter()
    settings = {"do_sample": False, "cache_implementation": "static"}
    text = model.generate(tokens, max_new_tokens=max_new_tokens, **settings)[0]
    return text, (len(text) - tokens.shape[1]) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=EMBEDDED)
    parser.add_argument("prompt", nargs="?", default="def ")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device)
    tokens = tokenizer(arguments.prompt, return_tensors="pt").input_ids.to(device)

    accelerate(model)
    write(model, tokens, arguments.max_new_tokens)  # what is set up once is not counted
    text, speed = write(model, tokens, arguments.max_new_tokens)
    print(tokenizer.decode(text, skip_special_tokens=True))
    print(f"accelerated: {speed:.1f} tokens/s on {device}")
    undo(model)  # the same weights, by transformers' own code


if __name__ == "__main__":
    main()
