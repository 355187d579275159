"""``generate`` as one of torchrun's processes: rank 0 reads prompts and writes, all compute."""

import argparse
import sys

import torch

from fastshard.checkpoint import Checkpoint
from fastshard.decode import check_mode
from fastshard.devices import check_device, check_dtype, default_device, default_dtype
from fastshard.dist import (
    RunError,
    Sent,
    Steps,
    Watch,
    World,
    check_same,
    join_world,
    local_device,
    torchrun_store,
)
from fastshard.environment import launched_rank
from fastshard.generate_command import (
    describe_texts,
    model_name,
    open_checkpoint,
    read_prompts,
    text_settings,
    write_texts,
)
from fastshard.pipeline.facts import describe_rank
from fastshard.pipeline.pipeline import Pipeline, Settings
from fastshard.pipeline.texts import TextRequest, text_requests
from fastshard.progress import Progress


def run(args: argparse.Namespace) -> int:
    """Run the parsed command on this rank; returns its exit status.

    Where any rank fails, this process ends in here, see ``Watch``.
    """
    launched, store = launched_rank(), torchrun_store()
    with Watch(store, launched.rank, launched.size, timeout=args.timeout) as watch:
        if args.shards is not None:
            raise RunError(
                "--shards cuts one process, with torchrun each rank is a shard: leave it out"
            )
        device = local_device(args.device or default_device())
        check_device(device)
        watch.steps.begin("opening the checkpoint", is_patient=True)  # it may have to be fetched
        checkpoint = open_checkpoint(args)
        facts = describe_rank(checkpoint, args)
        watch.steps.begin("comparing the ranks")
        check_same(store, launched.rank, launched.size, facts)
        watch.steps.begin("connecting")
        world = join_world(tp=args.tp, device=device, store=store)
        watch.steps.begin("reading the prompts", is_patient=True)  # someone may be typing them
        if world.rank == 0:
            _lead(args, world, checkpoint, watch.steps)
        else:
            _follow(world, checkpoint, watch.steps)
        world.close()
    return 0


def _lead(args: argparse.Namespace, world: World, checkpoint: Checkpoint, steps: Steps) -> None:
    """Rank 0: everything that a user sees."""
    prompts = read_prompts(args)
    requests = text_requests(
        prompts, checkpoint.tokenizer, checkpoint.generation_defaults, **text_settings(args)
    )
    settings = _settings(args, world, checkpoint, requests)
    with Progress(f"loading {model_name(args, checkpoint)}") as progress:
        pipeline = Pipeline(checkpoint, world, settings, report=progress.update, steps=steps)
    texts = pipeline.generate_many(requests)
    write_texts(texts, prompts, as_lines=args.prompts_file is not None)
    pipeline.stop()
    print(f"{describe_texts(texts)}{_describe_hops(pipeline.hops())}", file=sys.stderr)


def _follow(world: World, checkpoint: Checkpoint, steps: Steps) -> None:
    """Any other rank: silent."""
    pipeline = Pipeline(checkpoint, world, steps=steps)
    pipeline.serve()
    pipeline.hops()


def _settings(
    args: argparse.Namespace,
    world: World,
    checkpoint: Checkpoint,
    requests: list[TextRequest],
) -> Settings:
    """What all ranks agree on: room for the longest text, and no more slots than prompts."""
    longest = max(len(request.prompt) for request in requests) + args.max_new_tokens
    dtype = default_dtype(checkpoint.raw_config, world.device)
    if args.dtype is not None:
        dtype = getattr(torch, args.dtype)
    check_dtype(dtype, world.device)
    in_flight = args.in_flight or 2 * world.num_stages
    return Settings(
        context=min(longest, checkpoint.config.max_seq_len),
        dtype=dtype,
        in_flight=min(in_flight, len(requests)),
        layers=args.layers and tuple(args.layers),
        chunk_size=args.prefill_chunk_size,
        mode=check_mode(args.decode),
    )


def _describe_hops(hops: list[Sent]) -> str:
    """What went over each hop a token, counted where it was sent."""
    payloads = sorted({sent.num_bytes / sent.num_tokens for sent in hops if sent.num_tokens})
    sizes = " to ".join(f"{size:g}" for size in payloads)
    return f", {sizes} bytes a token over each of {len(hops)} hops" if payloads else ""
