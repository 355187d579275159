"""MultiHeadAttention: masks, GQA, caches and padding, against attention written out."""

import math

import pytest
import torch
from torch import Tensor

from fastshard.nn import MultiHeadAttention, RMSNorm, RotaryEmbedding

EMBED = 64
# float32 sums of up to 64 products in another order: some ulps of values below 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def build(num_heads=6, num_kv_heads=2, head_dim=24, norms=False, **keys) -> MultiHeadAttention:
    torch.manual_seed(0)
    if norms:
        keys["q_norm"], keys["k_norm"] = RMSNorm(head_dim, 0.1), RMSNorm(head_dim, 0.1)
    attn = MultiHeadAttention(
        embed_dim=EMBED,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qkv_bias=True,
        output_bias=True,
        max_seq_len=64,
        **keys,
    )
    for parameter in attn.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_()
    return attn


def golden(
    attn: MultiHeadAttention, x: Tensor, bias: Tensor, positions: Tensor | None = None
) -> Tensor:
    """x [b, s, d] over itself in float64; bias [b | 1, s, s] is added to the scores."""

    def project(layer, x):
        return x @ layer.weight.double().T + layer.bias.double()

    def norm(layer, x):
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * layer.scale.double()

    x = x.double()
    q, k, v = (
        project(layer, x).unflatten(-1, (-1, attn.head_dim))
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if attn.q_norm is not None:  # before RoPE, as Hugging Face's Qwen3
        q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
    if attn.pos_embeddings is not None:
        half = attn.head_dim // 2
        theta = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        positions = torch.arange(x.shape[1]) if positions is None else positions
        positions = positions.expand(x.shape[0], -1)
        angle = (positions[..., None] * theta)[:, :, None]
        turn = torch.polar(torch.ones_like(angle), angle)
        pairs = (t.unflatten(-1, (half, 2)).contiguous() for t in (q, k))
        q, k = (torch.view_as_real(torch.view_as_complex(t) * turn).flatten(-2) for t in pairs)
    group = attn.num_heads // attn.num_kv_heads
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(attn.head_dim)
    weights = (scores + bias.double()[:, None]).softmax(-1).nan_to_num()
    return project(attn.output_proj, torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def causal(s: int) -> Tensor:
    return torch.full((1, s, s), -math.inf).triu(1)


def as_bias(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 9, EMBED)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (4, 1), (6, 2), (10, 2), (7, 1)])
def test_grouped_heads(heads, x):
    attn = build(*heads)
    torch.testing.assert_close(attn(x, x).double(), golden(attn, x, causal(9)), **CLOSE)


POSITIONS = torch.tensor([[5, 9, 11, 12, 13, 20, 40, 41, 63], list(range(9))])


# 5 tokens of groups of 3 are few enough for queries to be rotated beside their keys.
@pytest.mark.parametrize("num_tokens", [5, 9])
@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS[0], None], ids=["2d", "1d", "none"])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("is_cached", [False, True])
def test_rope_and_norms(is_cached, norms, positions, num_tokens, x):
    attn = build(norms=norms, pos_embeddings=RotaryEmbedding(24, 64))
    x = x[:, :num_tokens]
    if is_cached:
        attn.setup_cache(2, torch.float32, 9)
    if positions is not None:
        positions = positions[..., :num_tokens]
    actual = attn(x, x, input_pos=positions)
    expected = golden(attn, x, causal(num_tokens), positions)
    torch.testing.assert_close(actual.double(), expected, **CLOSE)


def masks(b: int, s: int) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Mask -> what it adds to the scores."""
    torch.manual_seed(2)
    allowed = torch.rand(b, s, s) < 0.5
    allowed[0, 3] = False  # a query that may attend to nothing
    scores = torch.randn(b, s, s)
    scores[:, :, 2] = -math.inf
    ones = torch.ones(1, s, s)
    return {
        "none is causal": (None, causal(s)),
        "bool: True attends": (allowed, as_bias(allowed)),
        "bool, one for all rows": (allowed[:1], as_bias(allowed[:1])),
        "bool ones attend everywhere": (ones.bool(), 0 * ones),
        "float ones attend everywhere": (ones, 0 * ones),
        "float is added": (scores, scores),
        "float16 is added": (scores.half(), scores.half()),
        "bfloat16 is added": (scores.bfloat16(), scores.bfloat16()),
        "float64 is added": (scores.double(), scores),
    }


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("name", masks(2, 9))
def test_masks(name, is_cached, x):
    attn = build()
    mask, bias = masks(2, 9)[name]
    if is_cached:
        attn.setup_cache(3, torch.float32, 12)
        attn.kv_cache.k_cache.fill_(math.nan)  # what no token wrote must not be seen
        attn.kv_cache.v_cache.fill_(math.nan)
        if mask is not None:  # the whole width of the cache, with anything beyond
            beyond = torch.ones(*mask.shape[:2], 3).to(mask.dtype)
            mask = torch.cat([mask, beyond], -1)
    actual = attn(x, x, mask=mask)
    torch.testing.assert_close(actual.double(), golden(attn, x, bias), **CLOSE)
    if name == "bool: True attends":  # zeros, through the output projection
        torch.testing.assert_close(actual[0, 3], attn.output_proj.bias.data)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [3, 1, 4, 1]], ids=str)
def test_chunked_prefill_equals_one_shot(chunks, is_masked, x):
    attn = build(pos_embeddings=RotaryEmbedding(24, 64))
    mask, bias = masks(2, 9)["bool: True attends" if is_masked else "none is causal"]
    expected = golden(attn, x, bias if mask is None else bias + causal(9))
    if mask is not None:
        mask = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    attn.setup_cache(2, torch.float32, 9)
    attn.kv_cache.v_cache.fill_(math.nan)
    for _ in range(2):  # twice: the second prompt must not see the first
        out = []
        for rows, chunk in zip(torch.arange(9).split(chunks), x.split(chunks, 1), strict=True):
            out.append(attn(chunk, chunk, mask=None if mask is None else mask[:, rows]))
        torch.testing.assert_close(torch.cat(out, 1).double(), expected, **CLOSE)
        assert attn.kv_cache.size == 9
        attn.reset_cache()
        x, expected = x.flip(0), expected.flip(0)
        mask = None if mask is None else mask.flip(0)


@pytest.mark.parametrize("is_cached", [False, True])
def test_left_padding_is_a_first_key(is_cached, x):
    attn = build(pos_embeddings=RotaryEmbedding(24, 64))
    first_key = torch.tensor([4, 0])
    positions = (torch.arange(9) - first_key[:, None]).clamp(min=0)
    x[0, :4] = 1e4  # what the padding holds does not matter
    if is_cached:
        attn.setup_cache(2, torch.float32, 9)
    actual = attn(x, x, input_pos=positions, first_key=first_key)
    torch.testing.assert_close(actual[:1, 4:].double(), golden(attn, x[:1, 4:], causal(5)), **CLOSE)
    torch.testing.assert_close(actual[1:].double(), golden(attn, x[1:], causal(9)), **CLOSE)


@pytest.mark.parametrize("is_cached", [False, True])
def test_sliding_window(is_cached, x):
    attn = build(window=3)
    allowed = torch.ones(1, 9, 9, dtype=torch.bool).tril().triu(-2)
    full = torch.ones(1, 9, 9, dtype=torch.bool)
    if is_cached:
        attn.setup_cache(2, torch.float32, 9)
    torch.testing.assert_close(attn(x, x).double(), golden(attn, x, as_bias(allowed)), **CLOSE)
    if is_cached:
        attn.reset_cache()
    actual = attn(x, x, mask=full)  # a mask replaces the causal rule and the window
    torch.testing.assert_close(actual.double(), golden(attn, x, as_bias(full)), **CLOSE)


def test_second_input_gives_keys_and_values(x):
    attn, y = build(is_causal=False), torch.randn(2, 5, EMBED)
    both = torch.cat([y, x], 1)
    allowed = torch.ones(1, 14, 14, dtype=torch.bool)
    allowed[:, :, 5:] = False
    expected = golden(attn, both, as_bias(allowed))[:, 5:]
    torch.testing.assert_close(attn(x, y).double(), expected, **CLOSE)
    torch.testing.assert_close(attn(x, x.clone()), attn(x, x))
    attn.setup_cache(2, torch.float32, 9)
    attn(y, y)
    torch.testing.assert_close(attn(x).double(), expected, **CLOSE)  # y from the cache
    assert attn.kv_cache.size == 5


def test_a_disabled_cache_is_left_alone(x):
    attn = build()
    attn.setup_cache(2, torch.float32, 20)
    attn.cache_enabled = False
    torch.testing.assert_close(attn(x, x).double(), golden(attn, x, causal(9)), **CLOSE)
    assert attn.kv_cache.size == 0


def test_cache_of_another_batch_and_length(x):
    attn = build()
    expected = golden(attn, x, causal(9))
    attn.setup_cache(4, torch.float32, 20)
    torch.testing.assert_close(attn(x, x).double(), expected, **CLOSE)  # 2 of its 4 rows
    attn.setup_cache(2, torch.float32, 9)  # set up again: replaced
    assert attn.kv_cache.k_cache.shape == (2, 2, 9, 24)
    torch.testing.assert_close(attn(x, x).double(), expected, **CLOSE)


def test_rejects_wrong_arguments(x):
    attn = build()
    with pytest.raises(ValueError, match="y must be given where no cache is enabled, got None"):
        attn(x)
    with pytest.raises(RuntimeError, match="the key value cache is not set up"):
        attn.reset_cache()
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads=3, got 4"):
        build(4, 3)
    with pytest.raises(ValueError, match="q_norm and k_norm must be given together"):
        build(q_norm=RMSNorm(24))
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32, got torch\.float16"):
        attn.setup_cache(1, torch.float16, 8)
    with pytest.raises(ValueError, match="max_seq_len must be at most 64, got 65"):
        attn.setup_cache(1, torch.float32, 65)
    with pytest.raises(ValueError, match=r"mask must be \[1 or 2, 9, S\], got shape \[2, 8, 9\]"):
        attn(x, x, mask=torch.ones(2, 8, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool or floating, got torch\.int64"):
        attn(x, x, mask=torch.ones(2, 9, 9, dtype=torch.int64))
    attn.setup_cache(2, torch.float32, 12)
    with pytest.raises(ValueError, match=r"y must have the 9 tokens of x with a cache, got 8"):
        attn(x, x[:, :8])
    with pytest.raises(ValueError, match="batch must be at most the cache's 2, got 4"):
        attn(x.repeat(2, 1, 1), x.repeat(2, 1, 1))
    attn(x, x)
    with pytest.raises(ValueError, match="9 of its 12 slots are used, got 4 tokens more"):
        attn(x[:, :4], x[:, :4])
    assert attn.kv_cache.size == 9
