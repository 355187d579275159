"""Directories and the hub: which files are asked for, and what is said where there are none."""

import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_tensors, make_reference, write_tokenizer

import fastshard
from fastshard import CheckpointError, Shard
from fastshard.checkpoint import Checkpoint
from fastshard.checkpoint.source import Directory, Hub, open_source
from fastshard.checkpoint.tensor_files import SafetensorsFile

REPO = "someone/tiny"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A hub of one repository, weights in three files; returns (directory, names asked)."""
    make_reference("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {}
    for name in tensors:
        layer = (
            name.split(".")[2]
            if ".layers." in name
            else {"model.embed_tokens.weight": "0"}.get(name, "2")
        )
        files[name] = f"model-{layer}.safetensors"
    for file in set(files.values()):
        save_file({k: v for k, v in tensors.items() if files[k] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    asked = []

    def download(repo_id, filename):
        assert repo_id == REPO
        asked.append(filename)
        if not (tmp_path / filename).exists():
            raise errors.EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path, asked


def test_only_the_files_of_the_shard_are_fetched(repository):
    path, asked = repository
    shard = Shard(REPO, 1, 1, 3)
    actual = fastshard.load(REPO, shard=shard, device="cpu").model.state_dict()
    expected = fastshard.load(path, shard=shard, device="cpu").model.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    weights = [name for name in asked if name.endswith(".safetensors")]
    assert weights == ["model-1.safetensors"]
    assert set(asked) - set(weights) <= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    }


def test_a_hub_model_without_tokenizer_does_not_stream(repository):
    (repository[0] / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="stream needs a tokenizer"):
        fastshard.load(REPO, device="cpu").stream("x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "is not in its cache"),
        (ConnectionError("no route"), "no route"),
        (errors.HTTPError("no answer"), "no answer"),  # no OSError where the library is httpx
    ],
)
def test_a_hub_that_cannot_be_reached_raises(monkeypatch, error, message):
    def download(repo_id, filename):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        CheckpointError, match=rf"someone/tiny: cannot fetch config\.json from the hub.*{message}"
    ):
        fastshard.load(REPO, device="cpu")


@pytest.mark.parametrize(
    ("error", "message"),
    [(ConnectionError(), "ConnectionError"), (errors.HTTPError("no answer"), "no answer")],
)
def test_a_list_of_files_that_cannot_be_fetched_raises(monkeypatch, error, message):
    def list_repo_files(self, repo_id):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    with pytest.raises(
        CheckpointError, match=rf"someone/tiny: cannot fetch the list of files .* {message}"
    ):
        Hub(REPO).list(".pt")


def test_only_top_level_files_are_listed(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "list_repo_files",
        lambda self, repo_id: ["b.pt", "a.pt", "c/d.pt", "e.bin"],
    )
    assert Hub(REPO).list(".pt") == ["a.pt", "b.pt"]


def test_a_file_known_to_be_absent_is_none_offline(monkeypatch):
    def download(repo_id, filename):
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_: huggingface_hub._CACHED_NO_EXIST
    )
    assert Hub(REPO).find("chat_template.jinja") is None


def test_a_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source(REPO), Directory)
    monkeypatch.chdir(tmp_path / "someone")
    assert isinstance(open_source(REPO), Hub)


@pytest.mark.parametrize("source", ["/no/such", "./a/b", "../a", "word", "a/b/c", Path("a/b"), ""])
def test_neither_directory_nor_hub_id_raises(source):
    with pytest.raises(
        FileNotFoundError, match="source must be a directory or a hub id like owner/name, got"
    ):
        open_source(source)


def test_tensors_are_described_by_what_is_local(repository, monkeypatch):
    """By headers and samples: nothing is fetched for it, and no row is read."""
    path, asked = repository
    checkpoint = Checkpoint(REPO)
    asked.clear()
    cached = {"model-1.safetensors": str(path / "model-1.safetensors")}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, name: cached.get(name)
    )
    monkeypatch.setattr(SafetensorsFile, "read_rows", None)
    of_hub = checkpoint.weights.describe()
    assert {name for name in asked if name.endswith(".safetensors")} == set(cached)
    of_directory = Checkpoint(path).weights.describe()
    middle = {name for name in of_directory if ".layers.1." in name}
    assert of_hub == {name: of_directory[name] if name in middle else None for name in of_directory}
    name = "model.layers.1.mlp.up_proj.weight"
    assert re.fullmatch(r"\[80, 48\] torch\.float32, 15360 bytes, sample \w{8}", of_directory[name])
    edit_tensors(path / "model-1.safetensors", **{name.replace(".", "__"): torch.zeros(3).int()})
    digest = hashlib.sha256(bytes(12)).hexdigest()[:8]
    said = f"[3] of another type, 12 bytes, sample {digest}"
    assert Checkpoint(path).weights.describe()[name] == said
    edit_tensors(path / "model-1.safetensors", **{name.replace(".", "__"): None})
    assert Checkpoint(path).weights.describe()[name] == "missing"


def test_a_file_known_to_be_absent_is_not_local(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_: huggingface_hub._CACHED_NO_EXIST
    )
    assert Hub(REPO).local("model.safetensors") is None
