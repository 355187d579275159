"""Ranks that share the layers of ``ops.decode_step``: the part of one, and its process."""

from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch import multiprocessing as mp

from emulator import runtime
from fastshard import ops

PROCESSES = mp.get_context("forkserver")  # one that has imported torch
PROCESSES.set_forkserver_preload(["decode_rank_programs"])


def part_of(given: dict, rank: int, num_ranks: int) -> dict:
    """A rank's part of the arguments of a step: heads, units of the MLP, rows of the head."""
    w = given["weights"]
    num_kv_heads, head_dim = given["k_cache"][0].shape[1], given["k_cache"][0].shape[3]
    sizes = [given["num_heads"] * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]

    def mine(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(num_ranks, dim)[rank].contiguous()

    def my_heads(qkv: Tensor) -> Tensor:
        return torch.cat([mine(rows, 0) for rows in qkv.split(sizes)])

    weights = replace(
        w,
        qkv_weight=[my_heads(tensor) for tensor in w.qkv_weight],
        qkv_bias=[my_heads(tensor) for tensor in w.qkv_bias],
        output_weight=[mine(tensor, 1) for tensor in w.output_weight],
        gate_up_weight=[mine(tensor, 0) for tensor in w.gate_up_weight],
        down_weight=[mine(tensor, 1) for tensor in w.down_weight],
        head=None if w.head is None else mine(w.head, 0),
    )
    num_heads = given["num_heads"] // num_ranks
    return given | {
        "weights": weights,
        "k_cache": [mine(cache, 1) for cache in given["k_cache"]],
        "v_cache": [mine(cache, 1) for cache in given["v_cache"]],
        "workspace": ops.new_decode_workspace(weights, len(given["x"]), num_heads=num_heads),
        "overflow": given["overflow"].clone(),
        "out": given["out"].clone() if w.head is None else mine(given["out"], 1),
        "num_heads": num_heads,
        "rank": rank,
    }


def calls_of(given: dict, xs: list[Tensor]) -> list[dict]:
    """The arguments of each step, of one after another; each has an output of its own."""
    changes = [
        {
            "x": x.to(given["slots"].device),
            "slots": given["slots"] + i,
            "positions": given["positions"] + i,
            "out": given["out"].clone(),
        }
        for i, x in enumerate(xs)
    ]
    return [given | change for change in changes]


def steps(given: dict, xs: list[Tensor]) -> list[Tensor]:
    """What each step gives out."""
    calls = calls_of(given, xs)
    for call in calls:
        ops.decode_step(**call)
    return [call["out"] for call in calls]


def emulated_rank(connection: Connection) -> None:
    """A rank of its own process, on the emulator: steps as they are asked for, until it closes."""

    def missing(op: str) -> None:
        raise RuntimeError(f"csrc has no kernel of {op}")

    torch.set_num_threads(1)
    with runtime.emulated(runtime.kernels(), missing):
        while True:
            try:
                asked = connection.recv()
            except EOFError:
                return
            connection.send(steps(*asked))
