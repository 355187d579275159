"""Tables of variants: their files, what counts of several, and that kernels are chosen by them."""

import json
import os
import warnings
from dataclasses import asdict
from importlib import metadata, resources
from importlib.metadata import version
from itertools import product

import pytest
import torch

from emulator import runtime
from fastshard import ops
from fastshard.ops import variants
from fastshard.ops.variants import Entry, Table, bucket, read_table, read_tables, write_table
from helpers import CUDA_ONLY, cuda_kernel_names

EMULATOR = "SIMT emulator"
ENTRY = Entry("rms_norm", "float16", (3, 4096), "512x1")


def table(*entries: Entry, device: str = EMULATOR, origin: str = "measured") -> Table:
    return Table(device, origin, version("fastshard"), entries)


def test_a_bucket_is_the_power_of_two_above():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 2048]


def test_a_written_table_is_read(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    written = table(ENTRY, Entry("fused_mlp", "bfloat16", (2048, 64, 128), "library"))
    write_table(path, written)
    assert read_table(path) == written
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_table(path, table(ENTRY))

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_table(path, table())
    assert read_table(path) == table(ENTRY)
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_wheel_for_another_cuda_reads_its_tables(monkeypatch):
    local = version("fastshard") + "+cu12"
    monkeypatch.setattr(metadata, "version", lambda name: local)
    folder = resources.files("fastshard") / "tune" / "tables"
    assert read_table(folder / "h200.json").device == "NVIDIA H200"


CONTENT = {"format": 1, **asdict(table(ENTRY))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("\xff", "must be JSON"),
        ("[]", "must be a table of variants of format 1"),
        (json.dumps(CONTENT | {"format": 2}), "must be a table of variants of format 1"),
        (json.dumps(CONTENT | {"fastshard": "0.0.1"}), "must be of fastshard .*, got 0.0.1"),
        (json.dumps(CONTENT | {"origin": "guessed"}), "must have device, origin, and entries"),
        (json.dumps(CONTENT | {"device": "a\tb"}), "must have device, origin, and entries"),
        (json.dumps(CONTENT | {"entries": [{}]}), "must have device, origin, and entries"),
        *(
            (json.dumps(CONTENT | {"entries": [asdict(ENTRY) | {"shape": shape}]}), "must have")
            for shape in ([], [0], [1.5], ["1"], 3)
        ),
        (json.dumps(CONTENT | {"entries": [asdict(ENTRY) | {"variant": "a\nb"}]}), "must have"),
    ],
)
def test_other_files_are_ignored_with_one_warning(text, message, tmp_path):
    (tmp_path / "bad.json").write_text(text, encoding="latin-1")
    write_table(tmp_path / "good.json", table(ENTRY))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "bad.json")
    with pytest.warns(UserWarning, match="a table of variants is ignored") as caught:
        assert read_tables([tmp_path]) == [table(ENTRY)]
    assert len(caught) == 1


def test_the_user_counts_more_than_the_wheel_and_a_name_more_than_a_capability(
    tmp_path, monkeypatch
):
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(cache))
    monkeypatch.setattr(variants, "shipped_tables_dir", lambda: shipped)
    folders = shipped, cache / "tables"
    for folder, (name, device) in product(folders, (("a", "NVIDIA A10"), ("b", "8.6"))):
        write_table(folder / f"{name}.json", table(device=device, origin="model"))
    write_table(cache / "tables" / "c.json", table(ENTRY, device="NVIDIA A10"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_tables()
    devices = ["8.6", "NVIDIA A10", "8.6", "NVIDIA A10", "NVIDIA A10"]
    assert [each.device for each in found] == devices
    assert found[-1].entries == (ENTRY,)


# The kernels, on the emulator. 64x2 holds rows of 2 KiB: an entry that sends a longer one there is
# an error, and shows that it was found.
TOO_SHORT = Entry("rms_norm", "float16", (3, 2048), "64x2")


def norm_of(device, rows=3, hidden_size=2048, dtype=torch.float16):
    x = torch.randn(rows, hidden_size, dtype=dtype, device=device)
    return ops.rms_norm(x, torch.ones(hidden_size, dtype=dtype, device=device))


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
@pytest.mark.parametrize("name", [EMULATOR, "8.6"])
def test_kernels_are_chosen_by_entries(name, device):
    with runtime.variants(variants.table_lines([table(TOO_SHORT, device=name)])):
        for rows in (3, 4):
            with pytest.raises(RuntimeError, match="no variant 64x2 holds rows of 4096 bytes"):
                norm_of(device, rows)
        # another bucket, hidden_size, dtype
        norm_of(device, 2)
        norm_of(device, 5)
        norm_of(device, 3, 1032)
        norm_of(device, 3, 2048, torch.bfloat16)
    norm_of(device)


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
def test_entries_of_other_devices_do_not_count(device):
    others = [table(TOO_SHORT, device=name) for name in ("NVIDIA A10", "9.0", "8.60")]
    with runtime.variants(variants.table_lines(others)):
        norm_of(device)


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
def test_the_last_entry_counts(device):
    good = Entry("rms_norm", "float16", (4, 2048), "512x1")
    lines = variants.table_lines([table(TOO_SHORT, device="8.6"), table(good)])
    with runtime.variants(lines):
        norm_of(device)
    lines = "".join(reversed(lines.splitlines(keepends=True)))
    with runtime.variants(lines), pytest.raises(RuntimeError, match="no variant 64x2"):
        norm_of(device)


def mlp_of(device, rows=48):
    x, gate_up, down = (
        torch.randn(shape, device=device).half() for shape in ((rows, 64), (256, 64), (64, 128))
    )
    return ops.fused_mlp(x, gate_up, down)


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("fast", "variant must be auto, .*, got fast"),
        ("tiles_fp16_accumulation", "a table must not choose tiles_fp16_accumulation"),
    ],
)
def test_an_mlp_is_chosen_by_its_entry(variant, message, device):
    entry = Entry("fused_mlp", "float16", (64, 64, 128), variant)
    with runtime.variants(variants.table_lines([table(entry)])):
        with pytest.raises(RuntimeError, match=message):
            mlp_of(device)
        mlp_of(device, 65)


def attention_of(device, *, b=1, s_q=5, s_kv=6, heads=2, kv_heads=1, head_dim=64, **rules):
    q = torch.randn(b, s_q, heads, head_dim, device=device).half()
    k, v = torch.randn(2, b, s_kv, kv_heads, head_dim, device=device).half()
    return ops.attention(q, k, v, **rules)


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
@pytest.mark.parametrize("op", ["attention", "cached_attention"])
def test_attention_is_chosen_by_its_entry(op, device):
    lengths = torch.tensor([4], device=device)
    kept = {"kv_lengths": lengths} if op == "cached_attention" else {}
    entry = Entry(op, "float16", (1, 7, 8, 2, 1, 64), "fast")
    with runtime.variants(variants.table_lines([table(entry)])):
        for s_q, s_kv in ((5, 5), (8, 8), (5, 8), (8, 5)):
            with pytest.raises(RuntimeError, match=r"variant must be .*, got fast"):
                attention_of(device, s_q=s_q, s_kv=s_kv, **kept)
        # other buckets and sizes
        for sizes in ({"b": 2}, {"s_q": 4}, {"s_q": 9}, {"s_kv": 4}, {"s_kv": 9}):
            if kept:
                kept = {"kv_lengths": torch.ones(sizes.get("b", 1)).int().to(device)}
            attention_of(device, **sizes, **kept)
        for sizes in ({"heads": 4}, {"heads": 2, "kv_heads": 2}, {"head_dim": 72}):
            kept = {"kv_lengths": lengths} if kept else {}
            attention_of(device, **sizes, **kept)
        # other rules, and the other op
        attention_of(device, softcap=1.0, **kept)
        attention_of(device, first_key=lengths, **kept)
        attention_of(device, causal=True, window=3, **kept)
        mask = torch.ones(1, 5, 6, dtype=torch.bool, device=device)
        attention_of(device, mask=mask, **kept)
        attention_of(device, **({} if kept else {"kv_lengths": lengths}))


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
def test_an_entry_that_does_not_serve_a_call_of_its_bucket_is_left_out(device):
    entries = [
        Entry("attention", "float16", (1, 8, 16, 2, 1, 64), "library"),
        Entry("attention", "float16", (1, 32, 32, 2, 1, 64), "decode"),
    ]
    with runtime.variants(variants.table_lines([table(*entries)])):
        attention_of(device, s_q=5, s_kv=9, causal=True)  # PyTorch aligns it top left
        attention_of(device, s_q=17, s_kv=17)  # more rows than decode holds


@pytest.mark.parametrize("device", ["emulator"], indirect=True)
def test_a_linear_layer_is_chosen_by_its_entry(device):
    x, weight = torch.randn(3, 64, device=device).half(), torch.randn(24, 64, device=device).half()
    entry = Entry("linear", "float16", (4, 64, 24), "fast")
    with runtime.variants(variants.table_lines([table(entry)])):
        with pytest.raises(RuntimeError, match="variant must be auto, library or stream, got fast"):
            ops.linear(x, weight)
        ops.linear(x[:2], weight)
        ops.linear(x, weight[:16])
        ops.linear(x, weight, norm_weight=weight[0])  # a norm before it is another call


@CUDA_ONLY
@pytest.mark.parametrize("variant", ["decode/2", "few", "small", "prefill"])
def test_an_entry_launches_its_attention(variant, device, tmp_path):
    name = torch.cuda.get_device_name(device)
    configs = {"few": "<64, 1, 1, 4", "small": "<64, 4, 1, 1", "prefill": "<64, 4, 2, 1"}
    entry = Entry("attention", "float16", (1, 5, 6, 2, 1, 64), variant)
    try:
        write_table(tmp_path / "a.json", table(entry, device=name))
        ops.use_tables([tmp_path])
        names = cuda_kernel_names(lambda: attention_of(device))
        (kernel,) = [name for name in names if "attention_kernel" in name]
        assert configs.get(variant, "decode_attention_kernel") in kernel
    finally:
        ops.use_tables()


@CUDA_ONLY
def test_an_entry_chooses_the_products(device, tmp_path):
    name = torch.cuda.get_device_name(device)
    try:
        for variant, are_ours in (("library", False), ("tiles_64x128", True)):
            entry = Entry("fused_mlp", "float16", (64, 64, 128), variant)
            write_table(tmp_path / "a.json", table(entry, device=name))
            ops.use_tables([tmp_path])
            names = cuda_kernel_names(lambda: mlp_of(device))
            assert any("gemm_kernel" in n and "fastshard" in n for n in names) == are_ours
    finally:
        ops.use_tables()


@CUDA_ONLY
def test_an_entry_launches_its_variant(device, tmp_path):
    name = torch.cuda.get_device_name(device)
    try:
        for variant in ("512x1", "256x4"):
            entry = Entry("rms_norm", "float16", (4, 2048), variant)
            write_table(tmp_path / "a.json", table(entry, device=name))
            ops.use_tables([tmp_path])
            (kernel,) = [n for n in cuda_kernel_names(lambda: norm_of(device)) if "rms_norm" in n]
            threads, vecs = variant.split("x")
            assert f"RowConfig<{threads}, 1, {vecs}>" in kernel
    finally:
        ops.use_tables()
