"""``fastshard generate``: text on stdout as it comes, progress and figures on stderr."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastshard.checkpoint import Checkpoint
from fastshard.dist import even_split
from fastshard.environment import launched_rank
from fastshard.generate import ShardChain, TextStream
from fastshard.loading import demo_model, load_chain
from fastshard.progress import Progress

if TYPE_CHECKING:
    from fastshard.pipeline import Texts


def run(args: argparse.Namespace) -> int:
    """Run the parsed command; returns the exit status."""
    launched = launched_rank()
    if launched is not None and launched.size > 1:
        from fastshard.pipeline import command

        return command.run(args)
    if args.tp > 1:
        raise ValueError(
            f"--tp {args.tp} shares layers over processes, and there is one: start it by torchrun "
            f"--nproc-per-node {args.tp} -m fastshard generate"
        )
    prompts = read_prompts(args)
    checkpoint = open_checkpoint(args)
    layers = args.layers or even_split(checkpoint.config.num_layers, args.shards or 1)
    with Progress(f"loading {model_name(args, checkpoint)}") as progress:
        chain = load_chain(
            checkpoint,
            layers,
            device=args.device,
            dtype=args.dtype and getattr(torch, args.dtype),
            max_generated_tokens=args.max_new_tokens,
            report=progress.update,
        )
    settings = text_settings(args) | {
        "decode": args.decode,
        "prefill_chunk_size": args.prefill_chunk_size,
    }
    if args.prompts_file is None:
        figures = _write_stream(chain, chain.stream(*prompts, **settings))
    else:
        texts = chain.generate_many(prompts, in_flight=args.in_flight or 1, **settings)
        write_texts(texts, prompts, as_lines=True)
        figures = describe_texts(texts)
    print(figures, file=sys.stderr)
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The one prompt of the command line or of stdin, or those of a file.

    Raises:
        ValueError: the file holds none, or a line of a .jsonl is no JSON string.
    """
    if args.prompts_file is None:
        return [sys.stdin.read() if args.prompt == "-" else args.prompt]
    path = Path(args.prompts_file)
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        prompts = [_json_string(path, i, line) for i, line in enumerate(lines) if line.strip()]
    else:
        prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path}: must hold at least one prompt, got none")
    return prompts


def _json_string(path: Path, index: int, line: str) -> str:
    try:
        prompt = json.loads(line)
    except ValueError:
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f"{path}: line {index + 1} must be a JSON string, got {line[:40]!r}")
    return prompt


def open_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint, which has a tokenizer.

    Raises:
        ValueError: it has none.
    """
    checkpoint = Checkpoint(demo_model() if args.model is None else args.model)
    if checkpoint.tokenizer is None:
        raise ValueError(f"{checkpoint.name}: tokenizer.json is missing")
    return checkpoint


def model_name(args: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """As a progress bar says it."""
    return checkpoint.name if args.model else "demo model"


def text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of each text."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "chat")
    return {name: getattr(args, name) for name in names}


def write_texts(texts: "Texts", prompts: Sequence[str], *, as_lines: bool) -> None:
    """Write one text as it comes, or many as lines of JSON, each once it is whole."""
    if not as_lines:
        for _, piece in texts:
            _write(piece)
        _write("\n")
        return
    whole: list[str] = []
    with Progress("generating") as progress:
        for index, piece in texts:
            if index == len(whole):
                _write_lines(prompts, whole)
                whole.append("")
            whole[index] += piece
            progress.update(texts.num_ended, texts.num_prompts)
        _write_lines(prompts, whole)


def _write_lines(prompts: Sequence[str], whole: Sequence[str]) -> None:
    """The last of the texts that are whole."""
    if whole:
        line = {"prompt": prompts[len(whole) - 1], "text": whole[-1]}
        _write(json.dumps(line, ensure_ascii=False) + "\n")


def describe_texts(texts: "Texts") -> str:
    """One line: how many tokens, and how fast."""
    if texts.num_prompts == 1:
        return _describe_stream(
            texts.num_prompt_tokens,
            texts.first_seconds,
            texts.num_tokens,
            texts.seconds - texts.first_seconds,
        )
    text = f"{texts.num_prompts} prompts of {texts.num_prompt_tokens} tokens, "
    text += f"{texts.num_tokens} new tokens in {texts.seconds:.2f} s"
    if texts.seconds > 0:
        text += f" at {texts.num_tokens / texts.seconds:.1f} tokens/s"
    return text


def _write_stream(chain: ShardChain, stream: TextStream) -> str:
    """Write the text as it comes; returns one line of figures, with what is read of the weights."""
    for piece in stream:
        _write(piece)
    _write("\n")
    text = _describe_stream(
        stream.num_prompt_tokens, stream.prefill_seconds, stream.num_tokens, stream.decode_seconds
    )
    steps = stream.num_tokens - 1
    if steps > 0 and stream.decode_seconds > 0:
        rate = steps / stream.decode_seconds
        text += f", {rate * chain.decode_bytes / 1e9:.2f} GB/s of weights"
    return text


def _describe_stream(
    num_prompt_tokens: int, prefill_seconds: float, num_tokens: int, decode_seconds: float
) -> str:
    text = f"{num_prompt_tokens} prompt tokens in {prefill_seconds:.2f} s, {num_tokens} new tokens"
    steps = num_tokens - 1  # the first token belongs to the prompt
    if steps > 0 and decode_seconds > 0:
        text += f" at {steps / decode_seconds:.1f} tokens/s"
    return text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
