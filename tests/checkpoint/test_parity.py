"""Checkpoints written by transformers give transformers' own numbers, whole, cut and cached.

Tolerance: logits are of size 1 to 10; float32 sums of at most 80 terms in another order, through
three layers, differ by about 1e-6; the rule is 1e-4.
"""

import itertools

import pytest
import torch
from tiny_checkpoints import FAMILIES, SIZES, make_reference

import fastshard
from fastshard import Shard, ShardChain

NUM_LAYERS = SIZES["num_hidden_layers"]
CUTS = [
    cut for n in range(1, NUM_LAYERS) for cut in itertools.combinations(range(1, NUM_LAYERS), n)
]


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    """(reference model, directory that it wrote itself to)"""
    path = tmp_path_factory.mktemp(request.param)
    model = make_reference(request.param)
    model.save_pretrained(path)
    return model, path


def load_cut(path, cut=(), **settings):
    """The model as shards that begin at the layers of ``cut``."""
    bounds = [0, *cut, NUM_LAYERS]
    return ShardChain(
        [
            fastshard.load(
                path, shard=Shard("tiny", a, b - 1, NUM_LAYERS), device="cpu", **settings
            )
            for a, b in itertools.pairwise(bounds)
        ]
    )


@torch.no_grad()
def reference_logits(model, tokens, **inputs):
    return model(tokens, **inputs).logits


def random_tokens(*shape):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cut", [(), *CUTS])
def test_logits_equal_transformers(written, cut):
    model, path = written
    tokens = random_tokens(2, 23)
    _, logits = load_cut(path, cut, use_cache=False).generate(tokens)
    torch.testing.assert_close(logits, reference_logits(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", CUTS)
def test_shards_equal_the_whole_bit_for_bit(written, cut):
    _, path = written
    tokens = random_tokens(2, 9)
    _, whole = fastshard.load(path, device="cpu").generate(tokens)
    _, chained = load_cut(path, cut).generate(tokens)
    assert torch.equal(chained, whole)


@pytest.mark.parametrize("cut", [(), (1,)])
def test_cached_decode_equals_transformers(written, cut):
    """A prompt in two chunks, then token by token, against one full pass."""
    model, path = written
    tokens = random_tokens(2, 20)
    chain = load_cut(path, cut)
    pieces = [chain.generate(tokens[:, :7])[1], chain.generate(tokens[:, 7:12], curr_pos=7)[1]]
    for i in range(12, 20):
        pieces.append(chain.generate(tokens[:, i : i + 1], curr_pos=i)[1])
    expected = reference_logits(model, tokens)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=0)


def test_left_padded_batch_equals_transformers(written):
    """Prefill and one cached step; what the padding rows give is nobody's business."""
    model, path = written
    padding = torch.tensor([0, 4, 7])
    tokens = random_tokens(3, 12)
    kept = torch.arange(12) >= padding[:, None]
    positions = (torch.arange(12) - padding[:, None]).clamp(min=0)
    expected = reference_logits(model, tokens, attention_mask=kept.long(), position_ids=positions)
    loaded = fastshard.load(path, device="cpu")
    _, prefill = loaded.generate(tokens[:, :11], first_key=padding)
    _, step = loaded.generate(tokens[:, 11:], first_key=padding, curr_pos=11)
    actual = torch.cat([prefill, step], dim=1)
    torch.testing.assert_close(actual[kept], expected[kept], atol=1e-4, rtol=0)


def test_indexed_checkpoint_equals_single_file(written, tmp_path):
    model, path = written
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected = fastshard.load(path, device="cpu").model.state_dict()
    actual = load_cut(tmp_path, (1, 2))
    seen = set()
    for shard in actual.models:
        for name, tensor in shard.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
            seen.add(name)
    assert seen == set(expected)


def test_greedy_tokens_equal_transformers(written):
    model, path = written
    prompts = [random_tokens(n).tolist() for n in (5, 11, 3)]
    rows = fastshard.generate_batch(load_cut(path, (2,)), prompts, max_new_tokens=24)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert row == expected[0, len(prompt) :].tolist()
