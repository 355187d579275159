"""Slots on a GPU: graphs, static buffers, late reads; and two ranks, on one GPU or on two.

NCCL refuses two ranks on one GPU: they talk by gloo, by way of the host. What is compared runs the
same kernels over caches of the same size, so that the tokens are equal and not just likely so.
"""

import pytest
import torch
from pipeline_programs import Case, TokenRequest
from ranks import run_ranks
from tiny_checkpoints import SIZES, write_byte_checkpoint

import fastshard
from fastshard import Shard, ShardChain
from fastshard.dist import Sent, World
from fastshard.pipeline.engine import Engine
from fastshard.pipeline.rank import PipelineRank
from fastshard.sampling import Sampling
from helpers import CUDA_ONLY, NCCL_LIMIT, TWO_PLACES, check_place

MODES = pytest.mark.parametrize("mode", ["persistent", "graph", "eager"])
PROMPTS = ((40, 41, 42, 43, 44), (7,), (9, 8, 7, 6, 5, 4, 3), (11, 12), (13,))
NUM_TOKENS = 12
REQUESTS = [
    (prompt, NUM_TOKENS, Sampling(temperature=i * 0.6, top_k=60, seed=i))
    for i, prompt in enumerate(PROMPTS)
]
SIZE = {"context": 20, "chunk_size": 4}
TEXTS = ["abcde", "fghij", "klmno", "pqrst"]
SAMPLED = {"temperature": 1.2, "top_k": 60, "seed": 3, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    write_byte_checkpoint(path)
    return path


def load(path, device, start, end):
    shard = Shard("tiny", start, end, 3)
    return fastshard.load(path, shard=shard, device=device, max_generated_tokens=0)


def new_engine(models, device, mode, in_flight):
    rank = PipelineRank(World(device=device), models, num_slots=in_flight, mode=mode, **SIZE)
    return Engine(rank)


def run(engine, requests):
    requests = [TokenRequest(*arguments) for arguments in requests]
    for _ in engine.run(requests):
        pass
    return [request.tokens for request in requests]


@MODES
@CUDA_ONLY
def test_texts_of_many_are_those_of_one(device, mode, path):
    """Read a step late, in slots that take one request after another."""
    chain = ShardChain([load(path, device, 0, 0), load(path, device, 1, 2)])
    expected = [
        "".join(chain.stream(text, decode=mode, **SAMPLED | {"seed": 3 + i}))
        for i, text in enumerate(TEXTS)
    ]
    for in_flight in (1, 3):
        whole = [""] * len(TEXTS)
        for i, piece in chain.generate_many(TEXTS, decode=mode, in_flight=in_flight, **SAMPLED):
            whole[i] += piece
        assert whole == expected
    assert len(set(expected)) == len(expected)


@MODES
@CUDA_ONLY
def test_a_step_does_not_wait_for_the_gpu(device, mode, path):
    engine = new_engine([load(path, device, 0, 2)], device, mode, in_flight=3)
    expected = run(engine, REQUESTS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert run(engine, REQUESTS) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(row) for row in expected] == [NUM_TOKENS] * len(PROMPTS)


@MODES
@CUDA_ONLY
def test_an_end_token_wastes_at_most_one_step(device, mode, path):
    engine = new_engine([load(path, device, 0, 2)], device, mode, in_flight=2)
    free = run(engine, REQUESTS)
    ends = (free[2][4],)
    until = [row[: row.index(ends[0]) + 1] if ends[0] in row else row for row in free]
    before = engine._rank.num_done
    assert run(engine, [(*request, ends) for request in REQUESTS]) == until
    # A start, the chunks, and for each token a step (the first has none) and a collection.
    num_chunks = sum(-(-len(prompt) // 4) for prompt in PROMPTS)
    least = len(PROMPTS) + num_chunks + sum(2 * len(row) - 1 for row in until)
    num_ended = sum(len(row) < NUM_TOKENS for row in until)
    assert engine._rank.num_done - before == least + 2 * num_ended


@TWO_PLACES
@CUDA_ONLY
def test_two_ranks(device, place, path):
    """Every step is a replay, on both; the hidden states are bfloat16."""
    check_place(place)
    models = [load(path, device, 0, 0), load(path, device, 1, 2)]
    modes = {"persistent": (True, True), "graph": (False, True), "eager": (False, False)}
    settings = SIZE | {"dtype": torch.bfloat16, "layers": (range(0, 1), range(1, 3))}
    cases = [
        Case(str(path), settings | {"mode": mode, "in_flight": in_flight}, [REQUESTS, REQUESTS])
        for mode in modes
        for in_flight in (1, 4)
    ]
    outcomes = run_ranks(2, "pipeline_programs:run_cases", cases, 1, place, limit=NCCL_LIMIT)[0]
    for case, outcome in zip(cases, outcomes, strict=True):
        mode = case.settings["mode"]
        expected = run(new_engine(models, device, mode, in_flight=2), REQUESTS)
        assert outcome.tokens == [expected, expected]
        assert outcome.modes == [{modes[mode]}] * 2
        num_tokens = 2 * sum(len(prompt) + NUM_TOKENS - 1 for prompt in PROMPTS)
        assert outcome.hops == [Sent(num_tokens * SIZES["hidden_size"] * 2, num_tokens)]


@MODES
@CUDA_ONLY
def test_many_in_flight_on_two_gpus(device, mode, path):
    """More than NCCL has places for, with prompts among the steps: no rank waits in a circle."""
    check_place("cuda")
    requests = [request for request in REQUESTS for _ in range(12)]
    models = [load(path, device, 0, 0), load(path, device, 1, 2)]
    expected = run(new_engine(models, device, mode, in_flight=2), requests)
    settings = SIZE | {"dtype": torch.bfloat16, "layers": (range(0, 1), range(1, 3))}
    case = Case(str(path), settings | {"mode": mode, "in_flight": 24}, [requests])
    (outcome,), _ = run_ranks(2, "pipeline_programs:run_cases", [case], 1, "cuda", limit=NCCL_LIMIT)
    assert outcome.tokens == [expected]


@CUDA_ONLY
def test_two_gpus_that_share_layers(device, path):
    """In graphs or not, however they add up: a sum of two is exact but for one rounding."""
    check_place("cuda")
    kinds = [("graph", 1), ("graph", 4), ("eager", 4)]
    cases = [
        Case(
            str(path),
            SIZE | {"dtype": torch.bfloat16, "mode": mode, "in_flight": in_flight},
            [REQUESTS, REQUESTS],
        )
        for mode, in_flight in kinds
    ]
    expected = None
    for way in ("group", "one_shot"):
        program = ("pipeline_programs:run_cases", cases, 2, "cuda", way)
        for case, outcome in zip(cases, run_ranks(2, *program, limit=NCCL_LIMIT)[0], strict=True):
            expected = expected or outcome.tokens
            assert outcome.tokens == expected
            assert outcome.modes == [{(False, case.settings["mode"] == "graph")}] * 2
            assert outcome.hops == []
    assert [len(row) for row in expected[0]] == [NUM_TOKENS] * len(PROMPTS)
    assert expected[0] == expected[1]
