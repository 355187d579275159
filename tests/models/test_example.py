"""The documented example, at its real size, against a plain float32 decoder."""

import pytest
import torch

import decoder_reference as reference
from fastshard import GeneralMHA, ModelConfig, Shard, ShardedGeneralModel

CONFIG = {
    "vocab_size": 32000,
    "embed_dim": 4096,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
    "max_seq_len": 2048,
    "rope_base": 10000,
    "rope_scaling_factor": 1.0,
    "intermediate_dim": 11008,
    "num_layers": 32,
    "norm_eps": 1e-5,
    "attn_dropout": 0.0,
}
ON_CPU_AND_GPU = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)


@ON_CPU_AND_GPU
def test_first_two_layers(device):
    config = CONFIG
    shard = Shard(model_id="llama", start_layer=0, end_layer=1, n_layers=32)
    model = ShardedGeneralModel(config, shard, device, torch.float16)
    tokens = torch.randint(0, 32000, (1, 10), device=device)
    mask = torch.ones(1, 10, 10, device=device)
    input_pos = torch.arange(10, device=device)[None]
    hidden, logits = model.generate(tokens=tokens, mask=mask, input_pos=input_pos)

    assert logits is None
    assert (hidden.shape, hidden.dtype) == ((1, 10, 4096), torch.float16)
    golden = reference.hidden_states(
        {name: value.cpu() for name, value in model.model.state_dict().items()},
        ModelConfig.from_dict(config, "llama"),
        tokens.cpu(),
        range(2),
        bias=torch.zeros(1, 10, 10),  # float ones add 1 to every score: all attend to all
        dtype=torch.float32,
    )
    # Each of 2 x 7 intermediate results is rounded to float16 (2^-11 of its size), and each sum
    # of thousands of products averages the roundings of its terms: a few ulps of the largest value.
    error = (hidden.float().cpu() - golden).abs().max()
    assert error < 4 * 2**-11 * golden.abs().max()
    assert golden.std() > 0.3


@ON_CPU_AND_GPU
def test_last_layer(device):
    shard = Shard(model_id="llama", start_layer=31, end_layer=31, n_layers=32)
    decoder = GeneralMHA(CONFIG, shard, device=device, dtype=torch.float16)
    hidden = torch.randn(1, 10, 4096, device=device).half()
    logits = decoder(hidden_state=hidden)
    assert (logits.shape, logits.dtype) == ((1, 10, 32000), torch.float32)
    config = ModelConfig.from_dict(CONFIG, "llama")
    state = {name: value.cpu() for name, value in decoder.state_dict().items()}
    causal = torch.full((1, 10, 10), -torch.inf).triu(1)
    x = reference.layer(
        state, "layers.31.", hidden.float().cpu(), causal, torch.arange(10)[None], config
    )
    golden = reference.logits(state, config, x)
    error = (logits.cpu() - golden).abs().max()  # bound as above
    assert error < 4 * 2**-11 * golden.abs().max()
