"""``fastshard generate``: text on stdout as it comes, progress and figures on stderr."""

import argparse
import sys

import torch

from fastshard.checkpoint import Checkpoint
from fastshard.dist import even_split
from fastshard.generate import TextStream
from fastshard.loading import demo_model, load_chain
from fastshard.progress import Progress


def run(args: argparse.Namespace) -> int:
    """Run the parsed command; returns the exit status."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    checkpoint = Checkpoint(demo_model() if args.model is None else args.model)
    if checkpoint.tokenizer is None:
        raise ValueError(f"{checkpoint.name}: tokenizer.json is missing")
    layers = args.layers or even_split(checkpoint.config.num_layers, args.shards or 1)
    name = checkpoint.name if args.model else "demo model"
    with Progress(f"loading {name}") as progress:
        chain = load_chain(
            checkpoint,
            layers,
            device=args.device,
            dtype=args.dtype and getattr(torch, args.dtype),
            max_generated_tokens=args.max_new_tokens,
            report=progress.update,
        )
    stream = chain.stream(
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        chat=args.chat,
        decode=args.decode,
        prefill_chunk_size=args.prefill_chunk_size,
    )
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(_figures(stream, chain.decode_bytes), file=sys.stderr)
    return 0


def _figures(stream: TextStream, decode_bytes: int) -> str:
    """One line: how many tokens, how fast, and what that reads of the weights."""
    steps = stream.num_tokens - 1  # the first token belongs to the prompt
    text = (
        f"{stream.num_prompt_tokens} prompt tokens in {stream.prefill_seconds:.2f} s, "
        f"{stream.num_tokens} new tokens"
    )
    if steps > 0 and stream.decode_seconds > 0:
        rate = steps / stream.decode_seconds
        text += f" at {rate:.1f} tokens/s, {rate * decode_bytes / 1e9:.2f} GB/s of weights"
    return text
