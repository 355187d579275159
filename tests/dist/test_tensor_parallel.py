"""Tensor parallelism: groups of 2 and 4 processes give what one process gives.

Heads are 8 over 4 key/value heads, so that 4 ranks have groups of two heads each.
"""

import pytest
import torch
from ranks import run_ranks
from tensor_parallel_ranks import NEW_TOKENS, NUM_LAYERS, PROMPTS, TOKENS
from tiny_checkpoints import FAMILIES, make_reference

import decoder_reference as reference
import fastshard
from fastshard import ModelConfig, Shard, ShardedGeneralModel, generate_batch
from fastshard.decode.shard_step import ShardStep
from fastshard.dist import TensorParallel
from fastshard.dist.one_shot import OneShotSum
from helpers import CUDA_ONLY, NCCL_LIMIT, TWO_PLACES, assert_as_accurate, check_place

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
ROWS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias")
ROWS += ("v_proj.bias", "w1.weight", "w3.weight", "output.weight")
COLUMNS = ("output_proj.weight", "w2.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of every family in folders of their names, which four ranks have run."""
    folder = tmp_path_factory.mktemp("ranks")
    for family in FAMILIES:
        make_reference(family, **HEADS).save_pretrained(folder / family)
    run_ranks(4, "tensor_parallel_ranks:share_all_families", folder)
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
def naive_logits(family, dtype, **changes):
    return make_reference(family, **HEADS | changes).to(dtype)(TOKENS).logits


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


@TWO_PLACES
@CUDA_ONLY
def test_two_ranks_on_gpus_are_as_accurate_as_pytorch(device, place, tmp_path):
    """A prompt, then steps, of sizes that the kernels take. Gloo's sums cannot be captured."""
    check_place(place)
    sizes = HEADS | {"hidden_size": 512, "head_dim": 64, "intermediate_size": 768}
    for family in FAMILIES:
        make_reference(family, **sizes).save_pretrained(tmp_path / family)
    run_ranks(2, "tensor_parallel_ranks:share_on_gpus", tmp_path, place, limit=3 * NCCL_LIMIT)
    warning = "decode mode persistent is not possible, falling back to eager: a CUDA graph cannot "
    warning += "hold a sum over ranks by other than nccl"
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (family, dtype), result in first.items():
        other = second[family, dtype]
        assert torch.equal(result["logits"], other["logits"])
        assert result["tokens"] == other["tokens"]
        assert result["warnings"] == other["warnings"] == ([warning] if place == "cuda:0" else [])
        golden = golden_logits(tmp_path / family, dtype)
        naive = naive_logits(family, dtype, **sizes)
        assert_as_accurate(result["logits"].to(dtype), golden, naive)


@CUDA_ONLY
def test_launches_of_two_gpus_are_as_accurate_as_pytorch(device, tmp_path):
    """Steps of which each is one launch a rank, with the sums in it."""
    check_place("cuda")
    sizes = HEADS | {"hidden_size": 512, "head_dim": 64, "intermediate_size": 768}
    for family in FAMILIES:
        make_reference(family, **sizes).save_pretrained(tmp_path / family)
    run_ranks(2, "tensor_parallel_ranks:step_on_gpus", tmp_path, limit=2 * NCCL_LIMIT)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (family, dtype), logits in first.items():
        assert torch.equal(logits, second[family, dtype])
        golden = golden_logits(tmp_path / family, dtype)
        naive = naive_logits(family, dtype, **sizes)
        assert_as_accurate(logits.to(dtype), golden, naive)


@pytest.mark.parametrize("span", [(0, 2), (0, 0), (2, 2)])
def test_a_launch_takes_the_part_of_its_rank(folder, span, monkeypatch):
    memory = {}

    def share(num_words):
        memory[num_words] = [torch.zeros(num_words, dtype=torch.int64) for _ in range(2)]
        return memory[num_words]

    one_shot = OneShotSum(torch.empty(0), lambda part, out: None, share)
    ranks = TensorParallel(1, 2, one_shot=one_shot)
    model = fastshard.load(
        folder / "llama",
        shard=Shard("tiny", *span, NUM_LAYERS),
        device="cpu",
        tensor_parallel=ranks,
    )
    model.model.setup_caches(1, torch.float32)
    asked = []

    def decode_step(x, weights, **given):
        given["out"].fill_(3)
        asked.append((weights, given))

    monkeypatch.setattr(fastshard.ops, "decode_step", decode_step)
    monkeypatch.setattr(TensorParallel, "gather", lambda self, x: torch.stack([x, x + 1]))
    zeros = torch.zeros(1, dtype=torch.int64)
    step = ShardStep(model, zeros, zeros, zeros + 1, None)
    is_first, is_last = model.shard.is_first_layer(), model.shard.is_last_layer()
    x = zeros if is_first else torch.zeros(1, model.config.hidden_size)
    out = step.persistent(x)
    (weights, given), config = asked[0], model.config
    assert given["rank"] == 1
    assert given["rank_sums"] is memory[fastshard.ops.decode_rank_sums_size(2, config.hidden_size)]
    assert given["num_heads"] == config.num_heads // 2
    heads = config.num_heads + 2 * config.num_kv_heads
    assert len(weights.qkv_weight[0]) == heads // 2 * config.head_dim
    assert tuple(out.shape) == (1, config.vocab_size if is_last else config.hidden_size)
    if is_last:
        assert given["out"].shape == (1, config.vocab_size // 2)
        assert torch.equal(out, torch.cat([given["out"], given["out"] + 1], 1))
    else:
        assert out is given["out"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("span", [(0, 2), (0, 0), (1, 1), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_together_are_the_whole_under_its_names(folder, family, span, size):
    """Also what is random at first has these shapes, and on meta nothing has values."""
    shard = Shard("tiny", *span, NUM_LAYERS)
    settings = {"shard": shard, "device": "cpu", "dtype": torch.float16}
    whole = fastshard.load(folder / family, **settings)
    ranks = [TensorParallel(index, size) for index in range(size)]
    models = [fastshard.load(folder / family, tensor_parallel=r, **settings) for r in ranks]
    states = [model.model.state_dict() for model in models]
    by_rows = ROWS if 0 in shard.layers else (*ROWS, "tok_embeddings.weight")
    for name, tensor in whole.model.state_dict().items():
        held = [state.pop(name) for state in states]
        if name.endswith(by_rows + COLUMNS):
            assert torch.equal(torch.cat(held, 0 if name.endswith(by_rows) else 1), tensor), name
        else:
            assert all(torch.equal(part, tensor) for part in held), name
    assert states == [{}] * size
    for model, part in zip(models, ranks, strict=True):
        assert model.config == whole.config
        for device in ("cpu", "meta"):
            built = part.build(model.config, shard, device=device, dtype=torch.float16)
            assert {tensor.device.type for tensor in built.parameters()} == {device}
            assert not any(tensor.requires_grad for tensor in built.parameters())
            assert {name: tensor.shape for name, tensor in built.state_dict().items()} == {
                name: tensor.shape for name, tensor in model.model.state_dict().items()
            }


def test_weights_stay_packed(folder):
    """q, k and v are rows of one tensor, w1 and w3 of another: of the part, as of the whole."""
    model = fastshard.load(folder / "qwen2", device="cpu", tensor_parallel=TensorParallel(1, 2))
    layer = model.model.layers["1"]
    q, k, v = layer.attn.q_proj.weight, layer.attn.k_proj.weight, layer.attn.v_proj.weight
    assert torch.equal(layer.attn.packed_weight, torch.cat([q, k, v]))
    assert q.untyped_storage().data_ptr() == layer.attn.packed_weight.data_ptr()
    w1, w3 = layer.mlp.w1.weight, layer.mlp.w3.weight
    assert torch.equal(layer.mlp.packed_weight, torch.stack([w1, w3], 1).flatten(0, 1))
    assert w1.untyped_storage().data_ptr() == layer.mlp.packed_weight.data_ptr()


def test_a_dict_is_a_config_as_for_the_whole(folder):
    raw = make_reference("qwen3", **HEADS).config.to_dict()
    model = ShardedGeneralModel(
        raw, Shard("tiny", 0, 0, 3), "meta", build=TensorParallel(0, 4).build
    )
    assert model.config == ModelConfig.from_dict(raw)
    assert model.model.layers["0"].attn.num_kv_heads == 1


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {}, "num_heads must be a multiple of tp=3, got 8"),
        (8, {}, "num_kv_heads must be a multiple of tp=8, got 4"),
        (4, {"intermediate_size": 82}, "intermediate_size must be a multiple of tp=4, got 82"),
        (4, {"vocab_size": 74}, "vocab_size must be a multiple of tp=4, got 74"),
    ],
)
def test_what_does_not_divide_raises(size, changes, message):
    config = ModelConfig.from_dict(make_reference("llama", **HEADS | changes).config.to_dict())
    for shard in (Shard("tiny", 0, 2, 3), Shard("tiny", 1, 1, 3)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            TensorParallel(0, size).build(config, shard, device="meta")


@pytest.mark.parametrize(("index", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_part_that_is_none_raises(index, size):
    with pytest.raises(
        ValueError, match=rf"^index must be 0 to size - 1 = {size - 1}, got {index}"
    ):
        TensorParallel(index, size)


@pytest.mark.parametrize(
    ("backends", "expected"),
    [("cuda:nccl", True), ("cpu:gloo,cuda:nccl", True), ("cpu:gloo,cuda:gloo", False)],
)
def test_sums_of_nccl_alone_can_be_captured(monkeypatch, backends, expected):
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: backends)
    ranks = TensorParallel(0, 2)
    assert ranks.is_capturable is expected
    config = ModelConfig.from_dict(make_reference("llama", **HEADS).config.to_dict())
    decoder = ranks.build(config, Shard("tiny", 0, 0, 3), device="meta")
    assert decoder.is_capturable is expected
