"""config.json and generation_config.json: what they mean, and what is said where they are wrong."""

import json

import pytest
from tiny_checkpoints import edit_json, make_reference, write_tokenizer

import fastshard
from fastshard import CheckpointError, Shard
from fastshard.checkpoint import Checkpoint, GenerationDefaults


@pytest.fixture
def path(tmp_path):
    make_reference("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=None)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, GenerationDefaults()),
        ({"eos_token_id": 5}, GenerationDefaults((5,))),
        ({"eos_token_id": [5, 7]}, GenerationDefaults((5, 7))),
        ({"temperature": 0.5, "top_k": 3}, GenerationDefaults()),
        ({"do_sample": True}, GenerationDefaults(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
            GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1),
        ),
    ],
)
def test_generation_config(path, written, expected):
    (path / "generation_config.json").write_text(json.dumps(written))
    assert Checkpoint(path).generation_defaults == expected


def test_end_token_comes_from_the_first_place_that_has_one(path):
    write_tokenizer(path)
    assert Checkpoint(path).generation_defaults.eos_tokens == (1,)
    edit_json(path / "config.json", eos_token_id=9)
    assert Checkpoint(path).generation_defaults.eos_tokens == (9,)
    (path / "generation_config.json").write_text('{"eos_token_id": 11}')
    assert Checkpoint(path).generation_defaults.eos_tokens == (11,)


def test_missing_config_raises(tmp_path):
    with pytest.raises(CheckpointError, match=r": config\.json is missing"):
        fastshard.load(tmp_path)


def test_missing_config_keys_raise(path):
    edit_json(path / "config.json", hidden_size=None, rms_norm_eps=None)
    with pytest.raises(
        CheckpointError, match=r"config\.json: config must have hidden_size, rms_norm_eps, got only"
    ):
        fastshard.load(path)


def test_config_values_that_cannot_be_raise(path):
    edit_json(path / "config.json", num_key_value_heads=3)
    with pytest.raises(
        CheckpointError,
        match=r"config\.json: num_heads must be a multiple of num_kv_heads=3, got 4",
    ):
        fastshard.load(path)


def test_unknown_family_raises(path):
    edit_json(path / "config.json", model_type="mamba")
    with pytest.raises(CheckpointError, match=r"config\.json: model_type must be .*, got 'mamba'"):
        fastshard.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_corrupt_config_raises(path, text):
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: must be (a )?JSON"):
        fastshard.load(path)


def test_shard_of_another_model_raises(path):
    with pytest.raises(ValueError, match=r"shard must be of \S+'s 3 layers, got n_layers=32"):
        fastshard.load(path, shard=Shard("llama", 0, 1, 32))
