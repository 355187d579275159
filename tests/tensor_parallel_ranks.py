"""What the ranks of the tests of tensor parallelism run, as processes of their own."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from recorded_graphs import pretend_to_capture
from tiny_checkpoints import FAMILIES

import fastshard
from fastshard import Shard, generate_batch
from fastshard.decode.shard_step import ShardStep
from fastshard.dist import TensorParallel, World, join_world

NUM_LAYERS = 3
PROMPTS = [[40, 41, 42, 43, 44], [7, 3, 60, 21, 5, 33, 9, 14, 2, 71, 50], [68, 12, 30]]
NEW_TOKENS = 12
TOKENS = torch.randint(72, (2, 23), generator=torch.Generator().manual_seed(1))


def share_all_families(folder: Path) -> None:
    """Save what each way to share the families' models gives this one of four ranks."""
    results = {}
    with join_world(tp=2) as world:
        assert not world.tensor_parallel.is_capturable
        for family in FAMILIES:
            path = folder / family
            for ranks in (world.tensor_parallel, TensorParallel.of()):
                results[family, ranks.size] = whole(path, ranks)
            results[family, "stages"] = two_stages(path, world)
            results[family, "graph"] = in_a_graph(path, world.tensor_parallel)
        torch.save(results, folder / f"{world.rank}.pt")


def whole(path: Path, ranks: TensorParallel) -> dict:
    """Logits and greedy tokens of a model whose layers are all here."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = fastshard.load(path, device="cpu", dtype=dtype, tensor_parallel=ranks)
        results[dtype] = model.generate(TOKENS)[1]
        if dtype == torch.float32:
            results["tokens"] = generate_batch(model, PROMPTS, max_new_tokens=NEW_TOKENS)
    return results


def two_stages(path: Path, world: World) -> list[int]:
    """Greedy tokens after the first prompt, from layer 0 on ranks 0, 1 and the rest on 2, 3."""
    is_first = world.is_first_stage
    shard = Shard("tiny", 0, 0, NUM_LAYERS) if is_first else Shard("tiny", 1, 2, NUM_LAYERS)
    ranks = world.tensor_parallel
    model = fastshard.load(path, shard=shard, device="cpu", tensor_parallel=ranks)
    other = world.next_rank
    token, held, tokens = torch.tensor([PROMPTS[0]]), 0, []
    for _ in range(NEW_TOKENS):
        length = len(PROMPTS[0]) if held == 0 else 1
        if is_first:
            hidden, _ = model.generate(token, curr_pos=held)
            dist.send(hidden, other)
            token = torch.empty(1, 1, dtype=torch.int64)
            dist.recv(token, other)
        else:
            hidden = torch.empty(1, length, model.config.hidden_size)
            dist.recv(hidden, other)
            _, logits = model.generate(hidden_state=hidden, curr_pos=held)
            token = logits[:, -1:].argmax(-1)
            dist.send(token, other)
        held += length
        tokens.append(token.item())
    return tokens


def in_a_graph(path: Path, ranks: TensorParallel) -> tuple[list[list[int]], int]:
    """Greedy tokens by steps that are recorded and run again, and how many were recorded."""
    model = fastshard.load(path, device="cpu", tensor_parallel=ranks)
    with pytest.MonkeyPatch.context() as patch:
        made = pretend_to_capture(patch)
        patch.setattr(TensorParallel, "is_capturable", True)
        rows = generate_batch(model, PROMPTS, max_new_tokens=NEW_TOKENS, decode="graph")
    return rows, len(made)


def models_on_gpus(folder: Path, world: World):
    """Every family in both halves: ``(family, dtype)`` and this rank's part."""
    for family in FAMILIES:
        for dtype in (torch.float16, torch.bfloat16):
            yield (
                (family, dtype),
                fastshard.load(
                    folder / family,
                    device=world.device,
                    dtype=dtype,
                    tensor_parallel=world.tensor_parallel,
                ),
            )


def share_on_gpus(folder: Path, device: str) -> None:
    """Save what one of two ranks gives of each family; ``cuda`` is a GPU of its own for each."""
    results = {}
    with join_world(tp=2, device=device) as world:
        for key, model in models_on_gpus(folder, world):
            tokens = TOKENS.to(world.device)
            pieces = [model.generate(tokens[:, :20])[1]]
            for i in range(20, tokens.shape[1]):
                pieces.append(model.generate(tokens[:, i : i + 1], curr_pos=i)[1])
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                rows = generate_batch(model, PROMPTS, max_new_tokens=NEW_TOKENS)
            results[key] = {
                "logits": torch.cat(pieces, 1).cpu(),
                "tokens": rows,
                "warnings": [str(warning.message) for warning in warned],
            }
        torch.save(results, folder / f"{world.rank}.pt")


def step_on_gpus(folder: Path) -> None:
    """Save what one of two ranks gives of each family after a prompt, a launch a step."""
    results = {}
    with join_world(tp=2, device="cuda", sums="one_shot") as world:
        for key, model in models_on_gpus(folder, world):
            results[key] = launched_logits(model, TOKENS.to(world.device))
        torch.save(results, folder / f"{world.rank}.pt")


@torch.no_grad()
def launched_logits(model, tokens: torch.Tensor, num_prompt: int = 15) -> torch.Tensor:
    """``[b, s, vocab_size]``, of the tokens after the prompt by ``ops.decode_step``."""
    pieces = [model.generate(tokens[:, :num_prompt])[1]]
    held = torch.full((len(tokens),), num_prompt, device=tokens.device)
    lengths = held + 1
    step = ShardStep(model, held, held, lengths, None)
    for i in range(num_prompt, tokens.shape[1]):
        pieces.append(step.persistent(tokens[:, i].contiguous())[:, None].clone())
        held += 1
        lengths += 1
    return torch.cat(pieces, 1).cpu()
