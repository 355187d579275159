"""ShardTransformerDecoder: names, shards, ties, and parity with torchtune's decoders."""

import copy
import dataclasses

import pytest
import torch
from torchtune.models.llama3_1._component_builders import llama3_1
from torchtune.models.qwen2._component_builders import qwen2

import decoder_reference as reference
from fastshard import GeneralMHA, ModelConfig, Shard, ShardTransformerDecoder
from helpers import assert_as_accurate

EXO = {
    "vocab_size": 96,
    "embed_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_seq_len": 64,
    "rope_base": 10000,
    "rope_scaling_factor": 1.0,
    "intermediate_dim": 80,
    "num_layers": 4,
    "norm_eps": 0.01,  # large: a norm that drops it must fail
    "attn_dropout": 0.0,
}
IDS = {"llama": "llama-3.1-8b", "qwen2": "qwen-2.5-7b", "qwen3": "qwen3-8b"}
# Norms, softmax and sums of up to 80 products in another order: some ulps of values of size 1-10.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def build(model_id: str, start: int = 0, end: int = 3, **keys) -> ShardTransformerDecoder:
    config = ModelConfig.from_dict(EXO | keys, model_id)
    shard = Shard(model_id, start, end, config.num_layers)
    return GeneralMHA(config, shard, dtype=torch.float32)


def filled(model_id: str, **keys) -> tuple[ShardTransformerDecoder, dict]:
    torch.manual_seed(0)
    model = build(model_id, **keys)
    state = reference.random_state(model)
    model.load_state_dict(state)
    return model, state


def cut(state: dict, model: torch.nn.Module) -> dict:
    return {name: state[name] for name in model.state_dict()}


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(0, EXO["vocab_size"], (2, 11))


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("model_id", IDS.values())
def test_matches_the_written_out_decoder(model_id, head_dim, tokens):
    model, state = filled(model_id, head_dim=head_dim)  # 4 * 24 is not the hidden size
    hidden = reference.hidden_states(state, model.config, tokens, range(4))
    golden = reference.logits(state, model.config, hidden)
    actual = model(tokens)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), golden, **CLOSE)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu", "relu"])
def test_every_switch_of_the_config_reaches_the_layers(hidden_act, tokens):
    torch.manual_seed(0)
    config = dataclasses.replace(
        ModelConfig.from_dict(EXO, "llama"),
        qkv_bias=True,
        output_bias=True,
        hidden_act=hidden_act,
        sliding_window=3,
        windowed_layers=(1, 3),
    )
    model = GeneralMHA(config, Shard("m", 0, 3, 4), dtype=torch.float32)
    state = reference.random_state(model)
    assert {"layers.0.attn.q_proj.bias", "layers.0.attn.output_proj.bias"} <= set(state)
    model.load_state_dict(state)
    s = tokens.shape[1]
    causal = torch.ones(1, s, s).tril()
    windowed = causal.triu(-2)
    x = state["tok_embeddings.weight"].double()[tokens]
    for i in range(4):
        bias = (windowed if i in (1, 3) else causal).log().double()  # log 0 = -inf
        x = reference.layer(state, f"layers.{i}.", x, bias, torch.arange(s)[None], config)
    golden = reference.logits(state, config, x)
    torch.testing.assert_close(model(tokens).double(), golden, **CLOSE)


def torchtune_twin(model_id: str, **keys) -> torch.nn.Module:
    sizes = {
        "vocab_size": EXO["vocab_size"],
        "num_layers": EXO["num_layers"],
        "num_heads": EXO["num_heads"],
        "num_kv_heads": EXO["num_kv_heads"],
        "embed_dim": EXO["embed_dim"],
        "intermediate_dim": EXO["intermediate_dim"],
        "max_seq_len": EXO["max_seq_len"],
        "norm_eps": EXO["norm_eps"],
        "rope_base": EXO["rope_base"],
    }
    build_theirs = qwen2 if model_id.startswith("qwen") else llama3_1
    return build_theirs(**sizes, **keys).eval()


TWINS = [
    ("llama-3.1-8b", {"rope_scaling_factor": 8.0}, {"scale_factor": 8}),
    ("qwen-2.5-7b", {}, {}),
    ("qwen-2.5-0.5b", {}, {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("model_id", "ours", "theirs"), TWINS)
def test_exchanges_state_dicts_and_logits_with_torchtune(model_id, ours, theirs, tokens):
    model, state = filled(model_id, **ours)
    twin = torchtune_twin(model_id, **theirs)
    assert set(state) == set(twin.state_dict())
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), twin(tokens), **CLOSE)


@pytest.mark.parametrize(("model_id", "ours", "theirs"), TWINS[:2])
def test_cached_decode_matches_torchtune(model_id, ours, theirs, tokens):
    model, state = filled(model_id, **ours)
    twin = torchtune_twin(model_id, **theirs)
    twin.load_state_dict(state)
    s = tokens.shape[1]
    for decoder in (model, twin):
        decoder.setup_caches(2, torch.float32, decoder_max_seq_len=16)
        assert decoder.caches_are_setup()
        assert decoder.caches_are_enabled()
    causal = torch.ones(16, 16, dtype=torch.bool).tril()[None].repeat(2, 1, 1)
    for _ in range(2):  # twice: a reset cache starts over
        for start, end in [(0, 4), (4, 5), (5, 6), (6, s)]:
            call = {"mask": causal[:, start:end], "input_pos": torch.arange(start, end)}
            with torch.no_grad():
                golden = twin(tokens[:, start:end], **call)
            torch.testing.assert_close(model(tokens[:, start:end], **call), golden, **CLOSE)
        for decoder in (model, twin):
            decoder.reset_caches()


PARTITIONS = [[(0, 3)], [(0, 0), (1, 3)], [(0, 1), (2, 3)], [(0, 2), (3, 3)],
              [(0, 0), (1, 1), (2, 2), (3, 3)]]  # fmt: skip


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_any_partition_equals_the_whole_bit_for_bit(partition, is_tied, tokens):
    whole, state = filled("llama", tie_word_embeddings=is_tied)
    expected = whole(tokens)
    golden = reference.hidden_states(state, whole.config, tokens, range(partition[0][1] + 1))
    h = None
    for start, end in partition:
        shard = build("llama", start, end, tie_word_embeddings=is_tied)
        shard.load_state_dict(cut(state, shard))
        h = shard(tokens) if h is None else shard(hidden_state=h)
        if start == 0 and end < 3:  # after the shard's last layer, and not before
            torch.testing.assert_close(h.double(), golden, **CLOSE)
    assert torch.equal(h, expected)


def test_a_shard_holds_its_own_parts_only():
    def top(start, end, **keys):
        names = build("llama", start, end, **keys).state_dict()
        return {name for name in names if not name.startswith("layers")}, {
            int(name.split(".")[1]) for name in names if name.startswith("layers")
        }

    embedding, norm, head = "tok_embeddings.weight", "norm.scale", "output.weight"
    assert top(0, 3) == ({embedding, norm, head}, {0, 1, 2, 3})
    assert top(0, 1) == ({embedding}, {0, 1})
    assert top(1, 2) == (set(), {1, 2})
    assert top(2, 3) == ({norm, head}, {2, 3})
    assert top(0, 3, tie_word_embeddings=True) == ({embedding, norm}, {0, 1, 2, 3})
    assert top(1, 2, tie_word_embeddings=True) == (set(), {1, 2})
    assert top(3, 3, tie_word_embeddings=True) == ({embedding, norm}, {3})


def test_a_tied_head_is_the_embedding_itself(tokens):
    model, state = filled("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(2)
    state["tok_embeddings.weight"] *= 2
    hidden = reference.hidden_states(state, model.config, tokens, range(4))
    golden = reference.logits(state, model.config, hidden)
    torch.testing.assert_close(model(tokens).double(), golden, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("model_id", IDS.values())
def test_meta_build_then_to_empty_equals_a_direct_build(model_id, tokens):
    direct, state = filled(model_id)
    with torch.device("meta"):
        model = build(model_id)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(tokens), direct(tokens))
    assigned = GeneralMHA(direct.config, direct.shard, device="meta")
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(tokens), direct(tokens))


def test_missing_weights_do_not_load():
    model, state = filled("qwen-2.5-7b")
    del state["layers.2.attn.k_proj.bias"]
    state["layers.2.attn.out_proj.weight"] = state.pop("layers.2.attn.output_proj.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.2\.attn\.k_proj\.bias"):
        model.load_state_dict(state)


def test_random_weights_keep_activations_in_range(tokens):
    torch.manual_seed(0)
    model = GeneralMHA(EXO, Shard("llama", 0, 3, 4), dtype=torch.float16)
    out = model(tokens)
    assert out.isfinite().all()
    assert 0.3 < out.std() < 3
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_deepcopy_is_independent(tokens):
    model, _ = filled("qwen-2.5-0.5b")
    expected = model(tokens)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(tokens), expected)


def test_config_and_shard_must_agree():
    with pytest.raises(ValueError, match=r"must be the config's num_layers=4, got 5"):
        GeneralMHA(EXO, Shard("llama", 0, 1, 5))
    with pytest.raises(ValueError, match="config must have vocab_size"):
        GeneralMHA({k: v for k, v in EXO.items() if k != "vocab_size"}, Shard("llama", 0, 1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_id", IDS.values())
def test_16_bit_prefill_and_decode_err_no_more_than_eager_pytorch(model_id, dtype, device):
    torch.manual_seed(0)
    sizes = {"head_dim": 64, "num_layers": 2}
    config = ModelConfig.from_dict(EXO | sizes, model_id)
    shard = Shard(model_id, 0, 1, 2)
    model = GeneralMHA(config, shard, device=device, dtype=dtype)
    state = reference.random_state(model)
    model.load_state_dict(state)
    tokens = torch.randint(0, EXO["vocab_size"], (2, 6))
    golden, naive = (
        reference.logits(
            state, config, reference.hidden_states(state, config, tokens, range(2), dtype=kind)
        )
        for kind in (torch.float64, dtype)
    )
    model.setup_caches(2, dtype, decoder_max_seq_len=8)
    parts = [model(part.to(device)).cpu() for part in tokens.split([4, 1, 1], 1)]
    assert_as_accurate(torch.cat(parts, 1), golden, naive.float())
