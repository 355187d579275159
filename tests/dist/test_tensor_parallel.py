"""Tensor parallelism: groups of 2 and 4 processes give what one process gives.

Heads are 8 over 4 key/value heads, so that 4 ranks have groups of two heads each.
"""

import pytest
import torch
import torch.multiprocessing
from tensor_parallel_ranks import NEW_TOKENS, PROMPTS, TOKENS, run
from tiny_checkpoints import FAMILIES, make_reference

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


@torch.no_grad()
def reference_logits(family, dtype, golden=False):
    model = make_reference(family, **HEADS).to(dtype)
    return (model.double() if golden else model)(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_accurate_as_those_of_one_process(results, family, size, dtype):
    golden = reference_logits(family, dtype, golden=True)
    naive = reference_logits(family, dtype)
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
