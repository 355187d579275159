"""Tensor parallelism: groups of 2 and 4 processes give what one process gives.

Heads are 8 over 4 key/value heads, so that 4 ranks have groups of two heads each.
"""

import pytest
import torch
import torch.multiprocessing
from tensor_parallel_ranks import NEW_TOKENS, PROMPTS, TOKENS, run
from tiny_checkpoints import FAMILIES, make_reference

import decoder_reference as reference
import fastshard
from fastshard import generate_batch
from helpers import assert_as_accurate

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of every family in folders of their names, which four ranks have run."""
    folder = tmp_path_factory.mktemp("ranks")
    for family in FAMILIES:
        make_reference(family, **HEADS).save_pretrained(folder / family)
    torch.multiprocessing.spawn(run, (4, folder), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What each rank has saved."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def golden_logits(path, dtype):
    """Of the weights as they are in ``dtype``, in float64."""
    model = fastshard.load(path, device="cpu", dtype=dtype)
    state, config = model.model.state_dict(), model.config
    x, s = state["tok_embeddings.weight"].double()[TOKENS], TOKENS.shape[1]
    causal = torch.ones(1, s, s).tril()
    for i in range(config.num_layers):
        window = config.window(i)
        bias = (causal if window is None else causal.triu(1 - window)).log().double()
        x = reference.layer(state, f"layers.{i}.", x, bias, torch.arange(s)[None], config)
    return reference.logits(state, config, x)


@torch.no_grad()
def naive_logits(family, dtype):
    return make_reference(family, **HEADS).to(dtype)(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_accurate_as_pytorchs(results, folder, family, size, dtype):
    golden, naive = golden_logits(folder / family, dtype), naive_logits(family, dtype)
    first, *others = (result[family, size][dtype] for result in results)
    assert all(torch.equal(logits, first) for logits in others)  # both pairs, too
    assert first.dtype == torch.float32
    assert_as_accurate(first.to(dtype), golden, naive)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_one_process(results, folder, family, size):
    model = fastshard.load(folder / family, device="cpu")
    expected = generate_batch(model, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [result[family, size]["tokens"] for result in results] == [expected] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_two_stages_of_two_ranks_give_the_tokens_of_one_process(results, folder, family):
    model = fastshard.load(folder / family, device="cpu")
    (expected,) = generate_batch(model, PROMPTS[:1], max_new_tokens=NEW_TOKENS)
    assert [result[family, "stages"] for result in results] == [expected] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_a_graph_give_the_tokens_of_one_process(results, folder, family):
    model = fastshard.load(folder / family, device="cpu")
    expected = generate_batch(model, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [result[family, "graph"] for result in results] == [(expected, 1)] * 4
