"""``fastshard plan``: the table, its numbers, exit statuses and one-line errors."""

import json

import pytest
import torch
from tiny_checkpoints import edit_json, make_reference

import fastshard
from fastshard import Shard, ShardedGeneralModel, cli, dist
from fastshard.bench.presets import PRESETS, preset


@pytest.fixture
def run(capsys):
    """Run ``fastshard plan`` in this process: (status, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = cli.main(["plan", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def path(tmp_path):
    """A checkpoint of which there is nothing but config.json."""
    make_reference("qwen2").config.save_pretrained(tmp_path)
    return tmp_path


def test_the_table(run):
    """By hand: a layer of Llama 3.1 8B is 218,112,000 weights, embedding and head 525,336,576 each,
    the cache 4096 bytes a token and layer, the table 131072 x 512 bytes."""
    status, out, err = run("--model", "llama-3.1-8b", "--gpus", "24,24,16")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "llama-3.1-8b in bfloat16, batch 1, context 4096; sizes in GB of 10^9 bytes",
        "rank  layers  weights  cache  other    all     of   share",
        "   0    0-11     6.29   0.20   1.07   7.55  24.00  31.5 %  fits",
        "   1   12-25     6.11   0.23   1.07   7.41  24.00  30.9 %  fits",
        "   2   26-31     3.67   0.10   1.07   4.84  16.00  30.2 %  fits",
        " sum            16.06   0.54   3.20  19.80  64.00  30.9 %",
        "other: the RoPE table, and 1.00 GB kept for the CUDA context, libraries and activations "
        "(--reserve)",
    ]


def test_the_table_of_gpus_that_share_layers(run):
    """By hand: half of the 218,103,808 weights of a layer's matrices, its two norms of 4096, all of
    the embedding, half of the head; a cache of 2048 bytes a token and layer."""
    arguments = ["--gpus", "24,24,16,24", "--tp", "2", "--layers", "0-18,19-31"]
    status, out, err = run("--model", "llama-3.1-8b", *arguments)
    assert (status, err) == (0, "")
    title, _, *rows, sums, _ = out.splitlines()
    assert title == (
        "llama-3.1-8b in bfloat16, batch 1, context 4096, 2 GPUs share each layer; "
        "sizes in GB of 10^9 bytes"
    )
    assert [" ".join(row.split()) for row in (*rows, sums)] == [
        "0 0-18 5.19 0.16 1.07 6.42 24.00 26.8 % fits",
        "1 0-18 5.19 0.16 1.07 6.42 24.00 26.8 % fits",
        "2 19-31 3.36 0.11 1.07 4.54 16.00 28.4 % fits",
        "3 19-31 3.36 0.11 1.07 4.54 24.00 18.9 % fits",
        "sum 17.11 0.54 4.27 21.92 88.00 24.9 %",
    ]
    # The split by itself goes by the smaller GPU of each two.
    facts = json.loads(run("--model", "llama-3.1-8b", *arguments[:-2], "--json")[1])
    assert facts["tp"] == 2
    spans = [(rank["start_layer"], rank["end_layer"]) for rank in facts["ranks"]]
    assert spans == [(0, 19), (0, 19), (20, 31), (20, 31)]


def test_what_does_not_fit_is_in_the_table_and_status_1(run):
    """By hand: 17 layers of 218,112,000 weights, norm and head of 131,076,096, two bytes each; 4096
    cached tokens of 4096 bytes a layer; a table of 32768 x 512 bytes; and the reserve."""
    arguments = ["--model", "mistral-7b", "--gpus", "16,8.5", "--layers", "0-14,15-31"]
    status, out, err = run(*arguments)
    assert status == 1
    _, _, first, last, *_ = out.splitlines()
    assert first.split()[:2] == ["0", "0-14"]
    assert first.endswith("  fits")
    assert last.split()[:2] == ["1", "15-31"]
    assert last.endswith("  does not fit")
    assert err.startswith(
        "fastshard: error: the model does not fit: rank 1 needs 8,979,950,080 bytes for layers "
        "15-31 and has 8,500,000,000 free"
    )
    assert err.count("\n") == 1
    status, out, err = run(*arguments, "--json")
    assert status == 1
    facts = json.loads(out)
    assert facts["fits"] is False
    assert [rank["fits"] for rank in facts["ranks"]] == [True, False]
    assert "rank 1 needs" in err


@pytest.mark.parametrize("name", PRESETS)
def test_json_is_of_the_models_that_would_be_built(run, name):
    arguments = ["--gpus", "24,12,24", "--batch", 2, "--context", 512, "--reserve", 0.5, "--json"]
    status, out, _ = run("--model", name, *arguments)
    facts = json.loads(out)
    assert status == 0
    ranks = facts.pop("ranks")
    assert facts == {
        "model": name,
        "dtype": "bfloat16",
        "batch": 2,
        "context": 512,
        "tp": 1,
        "reserve_bytes": 500_000_000,
        "fits": True,
    }
    config = preset(name)
    for i, rank in enumerate(ranks):
        shard = Shard(name, rank["start_layer"], rank["end_layer"], config.num_layers)
        model = ShardedGeneralModel(config, shard, "meta", torch.bfloat16).model
        model.setup_caches(2, torch.bfloat16, decoder_max_seq_len=512)
        caches = [layer.attn.kv_cache for layer in model.layers.values()]
        parts = ("weight_bytes", "cache_bytes", "table_bytes")
        assert rank["rank"] == i
        assert rank["weight_bytes"] == sum(weight.nbytes for weight in model.parameters())
        assert rank["cache_bytes"] == sum(c.k_cache.nbytes + c.v_cache.nbytes for c in caches)
        assert rank["needed_bytes"] == sum(rank[part] for part in parts) + 500_000_000
        assert rank["free_bytes"] == (24, 12, 24)[i] * 10**9
        assert rank["share"] == rank["needed_bytes"] / rank["free_bytes"]
    assert [i for r in ranks for i in range(r["start_layer"], r["end_layer"] + 1)] == list(
        range(config.num_layers)
    )


def test_a_checkpoint_needs_only_its_config(run, path):
    assert [file.name for file in path.iterdir()] == ["config.json"]
    status, out, err = run("--model", path, "--gpus", "2,2", "--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert facts["context"] == 64  # all that the model takes
    config = fastshard.ModelConfig.from_dict(json.loads((path / "config.json").read_text()))
    shares = dist.plan(config, [2 * 10**9] * 2, dtype=torch.bfloat16, context=64, reserve=10**9)
    assert [rank["weight_bytes"] for rank in facts["ranks"]] == [s.weight_bytes for s in shares]


def test_dtype_is_the_checkpoints(run, path):
    def dtype(*arguments):
        return json.loads(run("--model", path, "--gpus", 2, "--json", *arguments)[1])["dtype"]

    edit_json(path / "config.json", dtype="float16")
    assert dtype() == "float16"
    assert dtype("--dtype", "bfloat16") == "bfloat16"
    edit_json(path / "config.json", dtype="float32")  # which no GPU runs
    assert dtype() == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "24,,16"], "argument --gpus: must be positive sizes in GB, like 24,24,16, got"),
        (["--gpus", "24,0"], "argument --gpus: must be positive sizes in GB, like 24,24,16, got"),
        (["--gpus", "inf"], "argument --gpus: must be positive sizes in GB, like 24,24,16, got"),
        (["--gpus", "24GB"], "argument --gpus: must be positive sizes in GB, like 24,24,16, got"),
        ([], "the following arguments are required: --gpus"),
        (["--gpus", "24", "--batch", "0"], "argument --batch: must be a positive integer, got '0'"),
        (["--gpus", "24", "--layers", "3-1"], "argument --layers: must be ranges of layers with"),
        (["--gpus", "24", "--dtype", "float32"], "argument --dtype: invalid choice: 'float32'"),
        (["--gpus", "24", "--tp", "0"], "argument --tp: must be a positive integer, got '0'"),
        (["--gpus", "24", "--reserve", "-1"], "argument --reserve: must be a finite number of at"),
    ],
)
def test_wrong_command_lines_are_status_2_and_one_line(run, arguments, message):
    status, out, err = run("--model", "llama-3.2-1b", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", ",".join(["9"] * 17)], "ranks must be 1 to the model's 16 layers, got 17"),
        (
            ["--gpus", "9,9", "--layers", "0-15"],
            "layers must be one range for each of 2 ranks, got 0-15",
        ),
        (
            ["--gpus", "9,9", "--layers", "0-8,10-15"],
            "layers must hold each of 0-15 once, in order, got 0-8,10-15",
        ),
        (
            ["--gpus", "9", "--context", "131073"],
            "context must be 1 to max_seq_len=131072, got 131073",
        ),
        (["--gpus", "9,9,9", "--tp", "2"], "ranks must be a multiple of tp=2, got 3"),
        (
            ["--gpus", ",".join(["9"] * 16), "--tp", "16"],
            "num_kv_heads must be a multiple of tp=16, got 8",
        ),
        (["--gpus", "1e-10"], "free bytes of every rank must be positive, got [0]"),
        (["--gpus", "9", "--model", "llama"], "model must be a folder, a hub id like owner/name, "),
        (["--gpus", "9", "--model", "/no/such/folder"], "source must be a directory or a hub id "),
    ],
)
def test_what_cannot_be_planned_is_status_1_and_one_line(run, arguments, message):
    status, out, err = run("--model", "llama-3.2-1b", *arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("fastshard: error: ")
    assert message in err
