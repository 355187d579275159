"""Attention: torchtune's rules of masks, caches, positions and norms, against its own module."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torchtune import modules

from fastshard.integrations.torchtune.attention import Attention, ForwardPass

EMBED, HEAD_DIM = 64, 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, some ulps of values below 10


def both(num_kv_heads=2, rope=True, norms=False, **keys) -> tuple[Attention, nn.Module]:
    """The stand-in, and a copy of what it stands for."""
    torch.manual_seed(0)
    rows = num_kv_heads * HEAD_DIM
    if norms:
        keys |= {"q_norm": modules.RMSNorm(HEAD_DIM, 0.1), "k_norm": modules.RMSNorm(HEAD_DIM, 0.1)}
        for name in ("q_norm", "k_norm"):
            nn.init.normal_(keys[name].scale, 1.0)
    theirs = modules.MultiHeadAttention(
        embed_dim=EMBED,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        q_proj=nn.Linear(EMBED, EMBED),
        k_proj=nn.Linear(EMBED, rows),
        v_proj=nn.Linear(EMBED, rows),
        output_proj=nn.Linear(EMBED, EMBED),
        pos_embeddings=modules.RotaryPositionalEmbeddings(HEAD_DIM, 64) if rope else None,
        max_seq_len=64,
        **keys,
    ).eval()
    return Attention(copy.deepcopy(theirs)).eval(), theirs


def with_caches(pair, rows=2, slots=12):
    for attn in pair:
        attn.setup_cache(rows, torch.float32, slots)
    return pair


def assert_same(pair, *args, **call) -> Tensor:
    out, expected = (attn(*args, **call) for attn in pair)
    torch.testing.assert_close(out, expected, **CLOSE)
    return out


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def x():
    return torch.randn(2, 9, EMBED, generator=torch.Generator().manual_seed(1))


def masks(s: int, keys: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    bools = torch.rand(2, s, keys) < 0.5
    bools[:, :, 0] = True  # torchtune gives NaN to who may see nothing
    floats = torch.randn(2, s, keys)
    floats[:, :, 2] = -torch.inf
    return {
        "bool": bools,
        "bool, one for all rows": bools[:1],
        "bool, one for all queries": bools[:, :1],
        "ones: slots without a token too": torch.ones(1, s, keys).bool(),
        "float": floats,
        "float ones": torch.ones(1, s, keys),
    }


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("name", masks(1, 3))
def test_masks(name, is_cached, x):
    pair = both()
    keys = 9
    if is_cached:
        pair, keys = with_caches(pair), 12
    mask = masks(9, keys)[name]
    assert_same(pair, x, x, mask=mask)
    if is_cached:  # and as a layer that knows where the mask ends
        for attn in pair:
            attn.reset_cache()
        pair[0].forward_pass.begin(mask)
        assert_same(pair, x, x, mask=mask)
        pair[0].forward_pass.end()


def test_where_a_mask_ends():
    mask = torch.zeros(3, 2, 7).bool()
    mask[0, 0, 4] = mask[0, 1, 2] = mask[1, 1, 6] = True
    shared = ForwardPass()
    shared.begin(mask)
    assert shared.mask_ends(mask).tolist() == [5, 7, 0]
    assert shared.mask_ends(mask.clone()) is None
    shared.end()
    assert shared.mask_ends(mask) is None
    floats = mask.float()
    shared.begin(floats)
    assert shared.mask_ends(floats) is None  # zero is added, and attended to


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_norms_come_after_rope(rope, norms, num_kv_heads, x):
    pair = both(num_kv_heads, rope, norms)
    positions = torch.tensor([[5, 9, 11, 12, 13, 20, 40, 41, 63], list(range(9))])
    assert_same(pair, x, x, input_pos=positions)
    with_caches(pair)
    mask = torch.ones(1, 12, 12).bool().tril()
    for start, end in ((0, 7), (7, 8), (8, 9)):
        part, rows = x[:, start:end], slice(start, end)
        assert_same(pair, part, part, mask=mask[:, rows], input_pos=positions[:, rows])
    torch.testing.assert_close(pair[0].kv_cache.k_cache, pair[1].kv_cache.k_cache, **CLOSE)


def test_shapes_of_positions(x):
    pair, one = both(), x[:, :1]
    for positions in (
        torch.tensor(7),
        torch.tensor([7]),
        torch.tensor([[7]]),
        torch.tensor([3, 7]),
    ):
        assert_same(pair, one, one, input_pos=positions)
        assert_same(pair, one, one, input_pos=positions.int())
    assert_same(pair, x, x, input_pos=torch.arange(9, 18))
    with_caches(pair)
    for _ in range(2):  # without positions they start at 0 each time
        assert_same(pair, x[:, :3], x[:, :3])


def test_without_a_mask(x):
    """The causal rule holds only where no cache is set up; with one, all slots are attended to."""
    assert_same(both(is_causal=False), x, x)
    pair = both()
    causal = assert_same(pair, x, x)
    with_caches(pair)
    for attn in pair:
        attn.cache_enabled = False
    full = assert_same(pair, x, x)
    assert not torch.allclose(full[:, :-1], causal[:, :-1])
    for attn in pair:
        attn.cache_enabled = True
    out = assert_same(pair, x, x)
    assert not torch.allclose(out[:, -1], full[:, -1])  # the zeros of 3 slots take their part


@pytest.mark.parametrize("norms", [False, True])
def test_keys_of_another_input(norms, x):
    y = torch.randn(2, 5, EMBED, generator=torch.Generator().manual_seed(3))
    pair = both(norms=norms)
    assert_same(pair, x, x.clone())
    assert_same(pair, x, y)  # causal, aligned top left
    assert_same(both(norms=norms, is_causal=False), x, y)
    assert_same(pair, x, y, mask=masks(9, 5)["bool"])
    with_caches(pair, slots=5)
    assert_same(pair, x, y)
    mask = masks(9, 5)["bool"]
    assert_same(pair, x, mask=mask, input_pos=torch.arange(9))  # keys of the cache
    assert pair[0].kv_cache.size == 5


@pytest.mark.parametrize("s", [1, 7])  # 4 heads for each key/value head: rotated before, or within
def test_a_prompt_longer_than_what_is_rotated_apart(s, x):
    pair = with_caches(both(num_kv_heads=1))
    mask = torch.ones(1, 12, 12).bool().tril()
    assert_same(pair, x[:, :s], x[:, :s], mask=mask[:, :s], input_pos=torch.arange(20, 20 + s))


def test_a_query_that_may_see_nothing_gives_the_bias(x):
    attn, _ = both()
    mask = torch.ones(2, 9, 9).bool()
    mask[0, 3] = False
    out = attn(x, x, mask=mask)
    torch.testing.assert_close(out[0, 3], attn.output_proj.bias.data)


def test_a_cache_is_set_up_once(x, caplog):
    attn, _ = with_caches(both())
    cache = attn.kv_cache
    attn.setup_cache(4, torch.float32, 20)
    assert attn.kv_cache is cache
    assert "You cannot call ``setup_caches()`` twice" in caplog.text
    attn.kv_cache = None
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32, that of the weights, got"):
        attn.setup_cache(1, torch.float16, 8)
    with pytest.raises(RuntimeError, match="caches are not setup"):
        attn.reset_cache()
    with pytest.raises(ValueError, match="y must be given where no cache is enabled, got None"):
        attn(x)


def test_rejects_what_torchtune_would(x):
    attn, _ = both(attn_dropout=0.25)
    attn(x, x)
    attn.train()
    with pytest.raises(RuntimeError, match=r"attn_dropout must be 0 in training mode, got 0\.25"):
        attn(x, x)
    attn.eval()
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, device="cpu")
    with pytest.raises(TypeError, match="mask must be a bool or floating tensor, got BlockMask"):
        attn(x, x, mask=block_mask)
    for shape in ((2, 9, 8), (2, 9, 10), (2, 8, 9), (3, 9, 9), (9, 9)):
        text = rf"mask must be \[1 or 2, 9, 9\], got \[{', '.join(map(str, shape))}\]"
        with pytest.raises(ValueError, match=text):
            attn(x, x, mask=torch.ones(shape).bool())
    for position in (-1, 64):
        text = rf"input_pos must be in the RoPE table's \[0, 64\), got {position}"
        with pytest.raises(ValueError, match=text):
            attn(x, x, input_pos=torch.tensor([*range(8), position]))
    with pytest.raises(ValueError, match=r"must have the 9 or 2 x 9 positions of x, got .*\[8\]"):
        attn(x, x, input_pos=torch.arange(8))
    with pytest.raises(TypeError, match=r"input_pos must be int64 or int32, got torch\.float32"):
        attn(x, x, input_pos=torch.arange(9.0))
    long = x.repeat(1, 8, 1)
    with pytest.raises(ValueError, match="at most the RoPE table's 64 tokens, got 72"):
        attn(long, long)
    attn.setup_cache(2, torch.float32, 12)
    wide = x.repeat(2, 1, 1)
    with pytest.raises(ValueError, match="batch must be at most the cache's 2, got 4"):
        attn(wide, wide)
    attn(x, x)
    with pytest.raises(ValueError, match="9 of its 12 slots are used, got 4 tokens more"):
        attn(x[:, :4], x[:, :4])
    assert attn.kv_cache.size == 9
