"""Loading a shard's tensors: exactly these, nothing else, and every defect is an error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json, edit_tensors, make_reference

import fastshard
from fastshard import CheckpointError, Shard
from fastshard.checkpoint import weights
from fastshard.dist import TensorParallel

Q = "model__layers__1__self_attn__q_proj__weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_reference("llama").save_pretrained(path)
    return path


@pytest.fixture
def single(original, tmp_path):
    """A checkpoint of one file that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def indexed(single):
    """The same with one file a layer and an index."""
    tensors = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    files = {name: f"{name.split('.')[2]}.safetensors" for name in tensors if ".layers." in name}
    files |= {name: "ends.safetensors" for name in tensors if ".layers." not in name}
    for file in set(files.values()):
        save_file({k: v for k, v in tensors.items() if files[k] == file}, single / file)
    (single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return single


def load(path, start=0, end=2, **settings):
    return fastshard.load(path, shard=Shard("tiny", start, end, 3), device="cpu", **settings)


def state(path, start=0, end=2, **settings):
    return load(path, start, end, **settings).model.state_dict()


def test_tensors_of_other_files_are_not_read(indexed, original):
    expected = state(original, 1, 1)
    for name in ("0.safetensors", "ends.safetensors"):
        (indexed / name).unlink()
    (indexed / "2.safetensors").write_bytes(b"corrupt")
    actual = state(indexed, 1, 1)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("block_bytes", [4096, 1 << 26])
def test_only_the_shards_bytes_of_one_file_are_read(single, monkeypatch, block_bytes):
    """Another layer's tensor is a hundred times the shard's; its bytes stay on the disk."""
    path = single / "model.safetensors"
    edit_tensors(path, model__layers__2__mlp__up_proj__weight=torch.zeros(1 << 20))

    monkeypatch.setattr(weights, "_BLOCK_BYTES", block_bytes)

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    load(single, 1, 1)  # everything lazy is imported
    before = bytes_read()
    loaded = load(single, 1, 1)
    read = bytes_read() - before
    needed = sum(t.numel() * 4 for t in loaded.model.state_dict().values())
    assert needed <= read < needed + 65536


@pytest.mark.parametrize("block_bytes", [4096, 1 << 26])
@pytest.mark.parametrize("index", [0, 1])
def test_only_a_ranks_part_of_each_matrix_is_read(tmp_path, monkeypatch, index, block_bytes):
    """Of rows and of columns, each half of a matrix being larger than all else that is read."""
    sizes = {"hidden_size": 256, "head_dim": 128, "intermediate_size": 512, "vocab_size": 512}
    make_reference("llama", **sizes).save_pretrained(tmp_path)
    monkeypatch.setattr(weights, "_BLOCK_BYTES", block_bytes)
    settings = {"shard": Shard("tiny", 1, 2, 3), "device": "cpu"}
    settings["tensor_parallel"] = TensorParallel(index, 2)

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    fastshard.load(tmp_path, **settings)  # everything lazy is imported
    before = bytes_read()
    loaded = fastshard.load(tmp_path, **settings)
    read = bytes_read() - before
    needed = sum(t.nbytes for t in loaded.model.state_dict().values())
    smallest = 4 * 256 * 128  # half of k's and v's rows
    assert needed <= read < needed + smallest // 2


@pytest.mark.parametrize("step", [1, 100, 2000])
def test_blocks_of_rows_are_whole_tensors(original, monkeypatch, step):
    expected = state(original)
    monkeypatch.setattr(weights, "_BLOCK_BYTES", step)
    actual = state(original)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_cast_once(single, original, file_dtype, dtype):
    path = single / "model.safetensors"
    save_file({k: v.to(file_dtype) for k, v in load_file(path).items()}, path)
    expected = {k: v.to(file_dtype).to(dtype) for k, v in state(original).items()}
    actual = state(single, dtype=dtype)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_torchtune_names_load(original, single, kind):
    expected = {k: v.clone() for k, v in state(original).items()}
    (single / "model.safetensors").unlink()
    if kind == "pt":
        torch.save(expected, single / "hf_model_0001_0.pt")
    else:
        save_file(expected, single / "ft-model.safetensors")
    actual = state(single)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_converted_by_torchtune_is_loaded_by_us(original):
    from torchtune.models.convert_weights import hf_to_tune

    config = json.loads((original / "config.json").read_text())
    expected = hf_to_tune(
        load_file(original / "model.safetensors"),
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        dim=config["hidden_size"],
        head_dim=config["head_dim"],
    )
    actual = state(original)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_tied_head_may_be_repeated(tmp_path):
    make_reference("llama-3.2").save_pretrained(tmp_path)
    expected = state(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lm_head__weight=torch.zeros(72, 48))
    assert all(torch.equal(state(tmp_path)[name], tensor) for name, tensor in expected.items())


def test_derived_buffers_are_ignored(single):
    name = "model__layers__1__self_attn__rotary_emb__inv_freq"
    edit_tensors(single / "model.safetensors", **{name: torch.zeros(8)})
    load(single)


def test_missing_tensor_raises(single):
    edit_tensors(single / "model.safetensors", **{Q: None})
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: missing tensors model\.layers\.1\.self_attn\.q_proj\.weight "
        r"for layers 0-2 of a llama model of 3 layers",
    ):
        load(single)
    load(single, 0, 0)


def test_missing_head_raises(single):
    edit_tensors(single / "model.safetensors", lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"missing tensors lm_head\.weight for layers 2-2"):
        load(single, 2, 2)
    load(single, 0, 1)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",  # the config says that there is none
        "model.layers.1.mlp.experts.0.weight",
        "model.layers.3.mlp.up_proj.weight",  # the model ends at layer 2
        "score.weight",
    ],
)
def test_unexpected_tensor_raises(single, name):
    edit_tensors(single / "model.safetensors", **{name.replace(".", "__"): torch.zeros(4)})
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: unexpected tensors {name} for"
    ):
        load(single)


def test_unexpected_tensor_of_another_shard_is_its_problem(single):
    edit_tensors(single / "model.safetensors", model__layers__1__extra__weight=torch.zeros(4))
    load(single, 0, 0)
    with pytest.raises(
        CheckpointError, match=r"unexpected tensors model\.layers\.1\.extra\.weight"
    ):
        load(single, 1, 1)


def test_long_lists_of_names_are_cut(single):
    edit_json(single / "config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"unexpected tensors (\S+, ){7}\S+ and 1 more for"):
        fastshard.load(single, device="cpu")


def test_wrong_shape_raises(single):
    edit_tensors(single / "model.safetensors", **{Q: torch.zeros(63, 48)})
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: model\.layers\.1\.self_attn\.q_proj\.weight must have shape "
        r"\[64, 48\] for layers\.1\.attn\.q_proj\.weight, got \[63, 48\]",
    ):
        load(single)


@pytest.mark.parametrize("index", [0, 1])
def test_wrong_shape_of_what_is_read_in_part_raises(single, index):
    """What the file must have is the whole tensor, though half of it is asked for."""
    edit_tensors(single / "model.safetensors", **{Q: torch.zeros(32, 48)})
    with pytest.raises(
        CheckpointError,
        match=r"q_proj\.weight must have shape \[64, 48\] for layers\.1\.attn\.q_proj\.weight, "
        r"got \[32, 48\]",
    ):
        load(single, tensor_parallel=TensorParallel(index, 2))


def test_integer_weights_raise(single):
    edit_tensors(single / "model.safetensors", **{Q: torch.zeros(64, 48, dtype=torch.int8)})
    with pytest.raises(
        CheckpointError, match=r"q_proj\.weight must be float64, float32, float16 or bfloat16"
    ):
        load(single)


def test_truncated_file_raises(indexed):
    path = indexed / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"1\.safetensors: model\.layers\.1\S+ is truncated"):
        load(indexed)


def test_missing_file_raises(indexed):
    (indexed / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model: 1\.safetensors is missing"):
        load(indexed)


def test_index_that_lists_what_its_file_lacks_raises(indexed):
    edit_tensors(indexed / "1.safetensors", **{Q: None})
    with pytest.raises(
        CheckpointError,
        match=r"1\.safetensors: model\.layers\.1\.self_attn\.q_proj\.weight is missing, though "
        r"\S+index\.json lists it",
    ):
        load(indexed)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": "../secret"}}'],
)
def test_corrupt_index_raises(indexed, index):
    (indexed / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: .*weight_map"):
        load(indexed)


def test_no_weights_raise(single):
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model: must have .*\*\.pt, got none"):
        load(single)


def test_one_name_in_two_files_raises(single):
    tensor = {"norm.scale": torch.zeros(1)}
    (single / "model.safetensors").unlink()
    save_file(tensor, single / "a.safetensors")
    save_file(tensor, single / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"norm\.scale is in a\.safetensors and in b\.safetensors"
    ):
        load(single)


def test_nothing_is_copied_before_everything_is_checked(single):
    """The last tensor is wrong; the first ones keep what they held."""
    edit_tensors(single / "model.safetensors", lm_head__weight=torch.zeros(2, 2))
    from fastshard.checkpoint import Checkpoint

    checkpoint = Checkpoint(single)
    model = fastshard.ShardedGeneralModel(
        checkpoint.config, Shard("tiny", 0, 2, 3), "cpu", torch.float32
    )
    targets = model.model.state_dict()
    before = {name: tensor.clone() for name, tensor in targets.items()}
    with pytest.raises(CheckpointError, match="lm_head"):
        weights.load_weights(targets, checkpoint.weights, checkpoint.config, model.shard)
    assert all(torch.equal(targets[name], tensor) for name, tensor in before.items())
