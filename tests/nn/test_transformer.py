"""TransformerSelfAttentionLayer, alone, as a drop-in for torchtune's."""

import pytest
import torch
from torchtune.models.llama3_1._component_builders import llama3_mlp
from torchtune.modules import MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings
from torchtune.modules import TransformerSelfAttentionLayer as TorchtuneLayer

from fastshard import nn

D, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 64, 4, 2, 16, 80
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # some ulps of values below 10


def ours() -> nn.TransformerSelfAttentionLayer:
    attn = nn.MultiHeadAttention(
        embed_dim=D,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        pos_embeddings=nn.RotaryEmbedding(HEAD_DIM, 128),
    )
    norms = {"sa_norm": nn.RMSNorm(D, 0.1), "mlp_norm": nn.RMSNorm(D, 0.2)}
    return nn.TransformerSelfAttentionLayer(attn, nn.FeedForward(D, HIDDEN), **norms)


def theirs() -> TorchtuneLayer:
    attn = MultiHeadAttention(
        embed_dim=D,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        q_proj=torch.nn.Linear(D, HEADS * HEAD_DIM, bias=False),
        k_proj=torch.nn.Linear(D, KV_HEADS * HEAD_DIM, bias=False),
        v_proj=torch.nn.Linear(D, KV_HEADS * HEAD_DIM, bias=False),
        output_proj=torch.nn.Linear(D, D, bias=False),
        pos_embeddings=RotaryPositionalEmbeddings(HEAD_DIM, 128),
    )
    norms = {"sa_norm": RMSNorm(D, 0.1), "mlp_norm": RMSNorm(D, 0.2)}
    return TorchtuneLayer(attn, llama3_mlp(D, HIDDEN), **norms).eval()


@pytest.fixture
def layers():
    torch.manual_seed(0)
    a, b = ours(), theirs()
    for name, tensor in b.state_dict().items():
        if name.endswith("scale"):
            tensor.normal_(1, 0.5)
    a.load_state_dict(b.state_dict())
    return a, b


@torch.no_grad()
def test_prefill_and_masks(layers):
    a, b = layers
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(a(x), b(x), **CLOSE)
    mask = torch.rand(2, 9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)  # torchtune gives NaN where nothing may be attended to
    positions = torch.randint(0, 128, (2, 9))
    call = {"mask": mask, "input_pos": positions}
    torch.testing.assert_close(a(x, **call), b(x, **call), **CLOSE)


@torch.no_grad()
def test_decode_with_a_cache(layers):
    a, b = layers
    x = torch.randn(2, 9, D)
    mask = torch.ones(1, 9, 12, dtype=torch.bool).tril().repeat(2, 1, 1)
    for layer in layers:
        layer.setup_caches(2, torch.float32, encoder_max_seq_len=None, decoder_max_seq_len=12)
        assert layer.caches_are_setup()
        assert layer.caches_are_enabled()
    for start, end in [(0, 4), (4, 5), (5, 9)]:
        call = {"mask": mask[:, start:end], "input_pos": torch.arange(start, end)}
        h = x[:, start:end]
        torch.testing.assert_close(a(h, **call), b(h, **call), **CLOSE)
    assert a.attn.kv_cache.size == b.attn.kv_cache.size == 9
    for layer in layers:
        layer.reset_cache()
    call = {"mask": mask[:, :4], "input_pos": torch.arange(4)}
    torch.testing.assert_close(a(x[:, :4], **call), b(x[:, :4], **call), **CLOSE)


def test_the_residual_stream_is_the_models_dtype(layers):
    a, _ = layers
    x = torch.randn(2, 9, D)
    golden = a(x)
    for dtype, ulp in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
        out = a.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        # About ten roundings of values up to the largest; an unscaled error would be of size 1.
        assert (out.float() - golden).abs().max() < 10 * ulp * golden.abs().max()
