"""The embedded model: small, whole, equal to transformers, and the first thing a newcomer runs."""

import inspect
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import fastshard
from fastshard.checkpoint import Checkpoint
from fastshard.dist import even_split
from fastshard.loading import demo_model, load_chain
from helpers import CUDA_ONLY, assert_as_accurate

NUM_LAYERS = 5
MAX_LOSS = 3.0


@pytest.fixture(scope="module")
def model():
    return fastshard.load(device="cpu")


def run_generate(tmp_path, *arguments):
    """``fastshard generate`` in a process of its own."""
    command = [sys.executable, "-m", "fastshard", "generate", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)


def test_files_are_small_enough_for_the_wheel():
    files = list(demo_model().iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE.txt"} <= {
        file.name for file in files
    }
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def test_shape():
    config = Checkpoint(demo_model()).config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (NUM_LAYERS, 256, 2048)
    assert config.tie_word_embeddings
    assert config.num_heads // config.num_kv_heads == 2


def test_logits_equal_transformers(model):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    tokens = torch.tensor([model.tokenizer.encode("class Parser:\n    def __init__(self")])
    with torch.no_grad():
        expected = reference(tokens).logits
    torch.testing.assert_close(model.generate(tokens)[1], expected, atol=1e-4, rtol=0)


def test_tokenizer_equals_transformers(model):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(demo_model())
    text = "def f(x):\n\treturn 'Grüße' * 3  # \N{FIRE}\n"
    assert model.tokenizer.encode(text) == reference(text).input_ids
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_it_knows_the_language(model):
    """Its loss on a text of the kind it was trained on; a random model has ln(2048) = 7.6."""
    tokens = torch.tensor([model.tokenizer.encode(inspect.getsource(textwrap.dedent))])
    _, logits = model.generate(tokens[:, :-1])
    assert torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]) < MAX_LOSS


def test_generate_prints_text_and_shards_print_the_same(tmp_path):
    whole = run_generate(tmp_path, "def ")
    expected = "".join(fastshard.load(device="cpu").stream("def "))
    assert whole.stdout == expected + "\n"
    assert len(expected) > 100
    assert "tokens/s" in whole.stderr
    cut = run_generate(tmp_path, "--shards", "2", "def ")
    assert cut.stdout == whole.stdout


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 1}])
def test_token_by_token_equals_full_recompute(model, settings):
    from fastshard.sampling import Sampling

    sampling = Sampling(**settings)
    prompt = model.tokenizer.encode("def ")
    (actual,) = fastshard.generate_batch(model, [prompt], max_new_tokens=40, sampling=sampling)
    without_cache = fastshard.load(device="cpu", use_cache=False)
    tokens = list(prompt)
    for step in range(40):
        _, logits = without_cache.generate(torch.tensor([tokens]), num_logits=1)
        tokens.append(sampling.choose(logits[:, -1], torch.tensor(step)).item())
    assert actual == tokens[len(prompt) :]


@pytest.mark.large
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_decode_mode_gives_the_same_greedy_tokens(num_shards, device):
    chain = load_chain(Checkpoint(demo_model()), even_split(NUM_LAYERS, num_shards), device=device)
    prompts = [chain.tokenizer.encode(text) for text in ("def ", "import os\n\n", "x")]
    modes = ["eager", "persistent"] + ["graph"] * (device.type == "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a mode that fell back
        eager, *others = (
            fastshard.generate_batch(chain, prompts, max_new_tokens=150, decode=mode)
            for mode in modes
        )
    assert all(other == eager for other in others)
    assert len({token for row in eager for token in row}) > 20


def test_a_cold_start_imports_no_compiler():
    """PyTorch's takes longer to import than the model to load."""
    code = (
        "import fastshard, sys; list(fastshard.load(device='cpu').stream('a', max_new_tokens=2)); "
        "assert not {'torch._dynamo', 'torch._inductor', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@CUDA_ONLY
def test_logits_on_a_gpu_are_as_accurate_as_transformers(device):
    from transformers import AutoModelForCausalLM

    loaded = fastshard.load(device=device)
    assert loaded.dtype == torch.float16  # the checkpoint's own
    tokens = torch.tensor([loaded.tokenizer.encode(inspect.getsource(textwrap.dedent))])
    golden, naive = (
        AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype).to(place)
        for dtype, place in ((torch.float64, "cpu"), (torch.float16, device))
    )
    with torch.no_grad():
        expected = golden(tokens).logits
        eager = naive(tokens.to(device)).logits.float().cpu()
    assert_as_accurate(loaded.generate(tokens.to(device))[1].cpu(), expected, eager)


@CUDA_ONLY
def test_shards_on_a_gpu_stream_the_same_text(device):
    chains = [
        load_chain(Checkpoint(demo_model()), even_split(NUM_LAYERS, count), device=device)
        for count in (1, 2, NUM_LAYERS)
    ]
    streams = [chain.stream("def ", max_new_tokens=200) for chain in chains]
    texts = ["".join(stream) for stream in streams]
    assert texts[0] == texts[1] == texts[2]
    assert 30 < streams[0].num_tokens <= 200
    stop = texts[0][20:24]
    for chain in chains:  # a step of the next token is under way when a text stops
        stream = chain.stream("def ", max_new_tokens=200, stop=stop)
        assert "".join(stream) == texts[0][: texts[0].index(stop)]
        assert stream.num_tokens < streams[0].num_tokens
