"""The example engine for exo: two processes give the whole model's tokens; its methods, its errors.

exo is not installed: its ``Shard`` and its downloader are written down here as it uses them.
"""

import asyncio
import inspect
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import SIZES, make_reference, write_tokenizer

import fastshard
from fastshard.loading import demo_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPT = "import os\n\n\ndef "


@dataclass(frozen=True)
class ExoShard:
    """exo's own class: the same fields, another type."""

    model_id: str
    start_layer: int
    end_layer: int
    n_layers: int

    def to_dict(self) -> dict:
        return asdict(self)


FIRST, LAST = ExoShard("demo", 0, 1, 5), ExoShard("demo", 2, 4, 5)


@pytest.fixture(scope="module")
def exo_engine():
    """The example as a module that a spawned process finds too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import exo_engine

        yield exo_engine
        del sys.modules["exo_engine"]


@pytest.fixture(scope="module")
def whole():
    return fastshard.load(device="cpu")


def greedy(model, num_tokens: int) -> list[int]:
    prompt = model.tokenizer.encode(PROMPT)
    (tokens,) = fastshard.generate_batch(model, [prompt], max_new_tokens=num_tokens)
    return tokens


def engines(module, count=2, **settings):
    return [module.FastshardInferenceEngine(device="cpu", **settings) for _ in range(count)]


@pytest.mark.parametrize("cut", [1, 3])
def test_two_processes_give_the_tokens_of_the_whole_model(exo_engine, whole, cut):
    expected = greedy(whole, 16)
    assert len(set(expected)) > 4
    tokens, text = exo_engine.generate(PROMPT, cut, 16)
    assert tokens == expected
    assert text == whole.tokenizer.decode(expected)


def test_a_node_that_dies_ends_the_loop(exo_engine):
    with pytest.raises(EOFError):
        exo_engine.generate(PROMPT, 2, 1, device="cuda:99")


def test_it_has_the_methods_of_an_engine(exo_engine):
    engine = exo_engine.FastshardInferenceEngine
    first_arguments = {
        "encode": ["shard", "prompt"],
        "sample": ["x"],
        "decode": ["shard", "tokens"],
        "infer_tensor": ["request_id", "shard", "input_data", "inference_state"],
        "infer_prompt": ["request_id", "shard", "prompt", "inference_state"],
        "load_checkpoint": ["shard", "path"],
        "ensure_shard": ["shard"],
    }
    for name, arguments in first_arguments.items():
        method = getattr(engine, name)
        assert inspect.iscoroutinefunction(method), name
        found = list(inspect.signature(method).parameters)
        assert found[1 : len(arguments) + 1] == arguments


def test_each_engine_holds_its_own_layers(exo_engine, whole):
    first, last = engines(exo_engine)

    async def run():
        tokens = await first.encode(FIRST, PROMPT)
        hidden, state = await first.infer_tensor("a", FIRST, tokens[None])
        assert json.loads(json.dumps(state)) == {"curr_pos": 0}
        return tokens, hidden, *await last.infer_tensor("a", LAST, hidden, state)

    tokens, hidden, logits, state = asyncio.run(run())
    assert sorted(first.model.model.layers) == ["0", "1"]
    assert sorted(last.model.model.layers) == ["2", "3", "4"]
    assert tokens.tolist() == whole.tokenizer.encode(PROMPT)
    assert state == {"curr_pos": len(tokens)}
    _, expected = whole.generate(torch.from_numpy(tokens[None]), num_logits=1)
    assert hidden.shape == (1, len(tokens), 256)
    np.testing.assert_array_equal(logits, expected.numpy())


def test_bfloat16_travels_without_loss(exo_engine):
    whole = fastshard.load(device="cpu", dtype=torch.bfloat16)
    first, last = engines(exo_engine, dtype=torch.bfloat16)

    async def run():
        hidden, state = await first.infer_prompt("a", FIRST, PROMPT)
        assert hidden.dtype == np.float32
        return (await last.infer_tensor("a", LAST, hidden, state))[0]

    tokens = torch.tensor([whole.tokenizer.encode(PROMPT)])
    _, expected = whole.generate(tokens, num_logits=1)
    np.testing.assert_array_equal(asyncio.run(run()), expected.numpy())


def test_a_request_that_another_one_replaced_is_refused(exo_engine):
    (engine,) = engines(exo_engine, 1)
    shard = ExoShard("demo", 0, 4, 5)

    message = "^request a cannot go on: the cache holds request b$"

    async def run():
        _, state = await engine.infer_prompt("a", shard, PROMPT)
        logits, other = await engine.infer_prompt("b", shard, "x = ")
        token = await engine.sample(logits, temp=0)
        with pytest.raises(RuntimeError, match=message):
            await engine.infer_tensor("a", shard, token[None], state)
        again, _ = await engine.infer_tensor("b", shard, token[None], other)
        return again

    assert asyncio.run(run()).shape == (1, 1, 2048)


def test_sample_draws_anew_and_greedily(exo_engine):
    (engine,) = engines(exo_engine, 1)
    logits = np.zeros((2, 3, 50), dtype=np.float32)
    logits[0, -1, 7] = logits[1, -1, 9] = 1.0
    logits[:, 0, 3] = 9.0  # of an earlier token

    async def run():
        greedy = await engine.sample(logits, temp=0)
        drawn = [tuple(await engine.sample(logits, temp=1.0, top_k=0)) for _ in range(20)]
        two = [int((await engine.sample(logits, temp=1.0, top_k=1))[0]) for _ in range(5)]
        return greedy, drawn, two

    greedy, drawn, one = asyncio.run(run())
    assert greedy.tolist() == [7, 9]
    assert len(set(drawn)) > 10
    assert one == [7] * 5


def test_a_downloader_and_a_checkpoint_say_where_the_weights_are(exo_engine, tmp_path):
    path = tmp_path / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vocab_size", 258)
        make_reference("llama").save_pretrained(path)
    write_tokenizer(path)
    asked = []

    class Downloader:
        async def ensure_shard(self, shard, engine_name):
            asked.append((shard.model_id, engine_name))
            return path

    engine = exo_engine.FastshardInferenceEngine(Downloader(), device="cpu")
    shard = ExoShard("tiny", 0, 2, 3)

    async def run():
        tokens = await engine.encode(shard, "ab")
        assert await engine.decode(shard, tokens) == "ab"
        assert asked == [("tiny", "FastshardInferenceEngine")]
        assert engine.model.config.num_layers == 3
        await engine.load_checkpoint(LAST, str(demo_model()))
        await engine.ensure_shard(LAST)

    asyncio.run(run())
    assert len(asked) == 1
    assert sorted(engine.model.model.layers) == ["2", "3", "4"]
