"""The pipeline over real processes: the tokens of one process, on any ranks, beside any others."""

import functools
import math
import shutil

import pytest
import torch
from pipeline_programs import Case
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FAMILIES, SIZES, make_reference

import fastshard
from fastshard import generate_batch
from fastshard.dist import Sent
from fastshard.sampling import Sampling

NUM_LAYERS = 4
PROMPTS = ((40, 41, 42, 43, 44), (7,), (9, 8, 7, 6, 5, 4, 3), (11, 12))
NUM_TOKENS = 6
GREEDY = tuple((prompt, NUM_TOKENS) for prompt in PROMPTS)
SAMPLED = tuple(
    (prompt, NUM_TOKENS, Sampling(temperature=1.0 + i, top_k=60 - i, top_p=0.9, min_p=0.01, seed=i))
    for i, prompt in enumerate(PROMPTS)
)
SETTINGS = {"context": 16, "dtype": torch.float32, "in_flight": 3, "chunk_size": 4}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A checkpoint of four layers of each family."""
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "num_hidden_layers", NUM_LAYERS)
        for family in FAMILIES:
            make_reference(family).save_pretrained(root / family)
    return {family: str(root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def alone(paths):
    """Tokens of requests, each alone in one process."""
    models = {family: fastshard.load(path, device="cpu") for family, path in paths.items()}

    @functools.cache
    def tokens(family, requests):
        settings = [
            {"max_new_tokens": num_tokens, "sampling": sampling[0] if sampling else None}
            for _, num_tokens, *sampling in requests
        ]
        return [
            generate_batch(models[family], [prompt], **of_request)[0]
            for (prompt, *_), of_request in zip(requests, settings, strict=True)
        ]

    return tokens


@pytest.mark.parametrize(
    ("size", "cuts"),
    [
        (1, [None]),
        (2, [(range(0, 1), range(1, 4)), (range(0, 3), range(3, 4))]),
        (3, [None]),
        (4, [None]),  # a layer each
    ],
)
def test_any_number_of_ranks_gives_the_tokens_of_one_process(paths, alone, size, cuts):
    """More prompts than slots; prompts in chunks of four tokens."""
    expected = {(family, GREEDY): alone(family, GREEDY) for family in paths}
    expected["llama", SAMPLED] = alone("llama", SAMPLED)
    assert len({str(rows) for rows in expected.values()}) == len(expected)
    asked = [
        (family, requests, Case(paths[family], SETTINGS | {"layers": layers}, [requests]))
        for family, requests in expected
        for layers in cuts
    ]
    cases = [case for _, _, case in asked]
    outcomes = run_ranks(size, "pipeline_programs:run_cases", cases)[0]
    for (family, requests, case), outcome in zip(asked, outcomes, strict=True):
        assert outcome.tokens == [expected[family, requests]]
        assert len(outcome.layers) == size
        assert [i for part in outcome.layers for i in part] == list(range(NUM_LAYERS))
        if case.settings["layers"] is not None:
            assert outcome.layers == list(case.settings["layers"])


def test_slots_and_chunks_change_nothing(paths, alone):
    """One slot, more slots than prompts, a token at a time, all at once; read late, as on a GPU."""
    expected = alone("llama", SAMPLED)
    cases = [
        Case(
            paths["llama"],
            SETTINGS | {"in_flight": in_flight, "chunk_size": chunk_size},
            [SAMPLED],
            lag,
        )
        for in_flight, chunk_size in ((1, 3), (2, 1), (4, 2), (8, 9))
        for lag in (0, 1)
    ]
    outcomes = run_ranks(2, "pipeline_programs:run_cases", cases)[0]
    for outcome in outcomes:
        assert outcome.tokens == [expected]
    for outcome in outcomes[:2]:
        assert outcome.order[0] == [i for i in range(len(PROMPTS)) for _ in range(NUM_TOKENS)]
    for outcome in outcomes[-2:]:
        assert outcome.order[0] == list(range(len(PROMPTS))) * NUM_TOKENS


def until(row, ends):
    """Up to the first end token, itself included."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


def test_an_end_token_ends_its_request_alone(paths, alone):
    """The next prompt takes its slot; nobody else's tokens change."""
    free = alone("mistral", GREEDY)
    ends = {free[0][1]}
    expected = [until(row, ends) for row in free]
    assert min(map(len, expected)) < max(map(len, expected)) == NUM_TOKENS
    run = [(*request, None, tuple(ends)) for request in GREEDY]
    cases = [
        Case(paths["mistral"], SETTINGS | {"in_flight": in_flight}, [run, GREEDY], lag)
        for in_flight in (1, 2)
        for lag in (0, 1)
    ]
    num_run = sum(
        len(prompt) + len(row) - 1
        for rows in (expected, free)
        for prompt, row in zip(PROMPTS, rows, strict=True)
    )
    num_ended = sum(len(row) < NUM_TOKENS for row in expected)
    outcomes = run_ranks(3, "pipeline_programs:run_cases", cases)[0]
    for case, outcome in zip(cases, outcomes, strict=True):
        assert outcome.tokens == [expected, free]
        num_tokens = num_run + case.lag * num_ended  # read late, one step of each is in vain
        assert [sent.num_tokens for sent in outcome.hops] == [num_tokens] * 2


def test_each_rank_reads_its_own_layers_alone(paths, alone, tmp_path):
    """Each rank's copy of the checkpoint has no others."""
    layers = (range(0, 1), range(1, 3), range(3, 4))
    for rank, part in enumerate(layers):
        copy = tmp_path / f"rank {rank}"
        shutil.copytree(paths["qwen2"], copy)
        own = tuple(f"model.layers.{i}." for i in part)
        own += {0: ("model.embed_tokens.",), 2: ("model.norm.", "lm_head.")}.get(rank, ())
        weights = load_file(copy / "model.safetensors")
        kept = {name: weight for name, weight in weights.items() if name.startswith(own)}
        save_file(kept, copy / "model.safetensors")
        assert len(kept) < len(weights) / 2 + 3
    case = Case(str(tmp_path / "rank {rank}"), SETTINGS | {"layers": layers}, [GREEDY])
    (outcome,) = run_ranks(3, "pipeline_programs:run_cases", [case])[0]
    assert outcome.tokens == [alone("qwen2", GREEDY)]


def test_a_hop_carries_one_hidden_state_a_token(paths):
    """Whatever the context: no masks, no positions, no tokens."""
    dtypes = (torch.float32, torch.bfloat16)
    cases = [Case(paths["llama"], SETTINGS | {"dtype": dtype}, [GREEDY]) for dtype in dtypes]
    outcomes = run_ranks(3, "pipeline_programs:run_cases", cases)[0]
    # The last token of each is not run.
    num_tokens = sum(len(prompt) + NUM_TOKENS - 1 for prompt in PROMPTS)
    for dtype, outcome in zip(dtypes, outcomes, strict=True):
        size = SIZES["hidden_size"] * dtype.itemsize
        assert outcome.hops == [Sent(num_tokens * size, num_tokens)] * 2


def test_stages_of_two_ranks_that_share_layers(paths, alone):
    """By hand with a tied head alone on its stage; read late, too."""
    asked = [("llama", None, 0), ("llama", None, 1), ("llama-3.2", (range(0, 3), range(3, 4)), 0)]
    asked += [("mistral", None, 0), ("qwen2", (range(0, 1), range(1, 4)), 0)]
    cases = [
        Case(paths[family], SETTINGS | {"layers": cut}, [SAMPLED], lag)
        for family, cut, lag in asked
    ]
    outcomes = run_ranks(4, "pipeline_programs:run_cases", cases, 2)[0]
    for (family, cut, _), outcome in zip(asked, outcomes, strict=True):
        first, last = cut or (range(0, 2), range(2, 4))
        assert outcome.tokens == [alone(family, SAMPLED)]
        assert outcome.layers == [first, first, last, last]
        num_tokens = sum(len(prompt) + NUM_TOKENS - 1 for prompt in PROMPTS)
        assert [sent.num_tokens for sent in outcome.hops] == [num_tokens]  # each rank's to its own


def alone_in(weight, name, index):
    """``weight`` with NaN in the half that is for the other of two ranks."""
    by_rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    halves = weight.clone().chunk(2, 0 if any(part in name for part in by_rows) else -1)
    if any(part in name for part in (*by_rows, "o_proj.weight", "down_proj")):
        halves[1 - index].fill_(math.nan)
    return halves[0]._base


def test_each_rank_reads_its_part_of_shared_layers_alone(paths, alone, tmp_path):
    """Each rank's copy of the checkpoint has nothing in the other's part."""
    for rank in range(2):
        copy = tmp_path / f"rank {rank}"
        shutil.copytree(paths["qwen2"], copy)
        weights = load_file(copy / "model.safetensors")
        kept = {name: alone_in(weight, name, rank) for name, weight in weights.items()}
        save_file(kept, copy / "model.safetensors")
        assert sum(bool(weight.isnan().any()) for weight in kept.values()) > len(kept) / 2
    case = Case(str(tmp_path / "rank {rank}"), SETTINGS, [GREEDY])
    (outcome,) = run_ranks(2, "pipeline_programs:run_cases", [case], 2)[0]
    assert outcome.tokens == [alone("qwen2", GREEDY)]


def test_shared_layers_in_graphs(paths, alone):
    """One for each slot, let go of before the groups end: NCCL would wait for that for ever."""
    case = Case(paths["llama-3.2"], SETTINGS, [SAMPLED])
    first, *others = run_ranks(4, "pipeline_programs:run_in_graphs", case, 2)
    assert first[0] == alone("llama-3.2", SAMPLED)
    for _, num_recorded, recorded in (first, *others):
        assert num_recorded == SETTINGS["in_flight"]
        assert recorded == [True] * num_recorded + [False] * num_recorded


def test_layers_that_cannot_be_shared_raise_on_every_rank(paths):
    message = "num_kv_heads must be a multiple of tp=2, got 1"
    ranks = run_ranks(2, "pipeline_programs:error_of", paths["qwen3"], SETTINGS, 2)
    assert ranks == [message, message]


def test_a_run_that_was_given_up(paths, alone):
    """What it left on its way is taken by the next, or at the end; and it cannot go on."""
    expected = list(alone("llama", GREEDY))
    expected[0] = [*expected[0], "the texts cannot go on: their pipeline got others"]
    expected[1] = [*expected[1], "2 on their way", "0 on their way"]
    ranks = run_ranks(2, "pipeline_programs:give_up_and_go_on", paths["llama"], SETTINGS, GREEDY)
    assert ranks == [expected, [[1]]]


def test_the_others_know_that_rank_0_failed(paths):
    assert run_ranks(3, "pipeline_programs:fail", paths["llama"], SETTINGS) == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (range(0, 4),)}, "layers must be one range for each of 2 ranks, got 0-3"),
        (
            {"layers": (range(0, 2), range(3, 4))},
            "layers must hold each of 0-3 once, in order, got 0-1,3-3",
        ),
        ({"context": 99}, "context must be 1 to max_seq_len=64, got 99"),
    ],
)
def test_settings_that_cannot_be_raise_on_every_rank(paths, changes, message):
    ranks = run_ranks(2, "pipeline_programs:error_of", paths["llama"], SETTINGS | changes)
    assert ranks == [message, message]
