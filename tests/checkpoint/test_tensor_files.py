"""Tensor files: exact rows, only the bytes asked for, and errors that name file and tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastshard.checkpoint.errors import CheckpointError
from fastshard.checkpoint.tensor_files import SafetensorsFile, TorchFile

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {f"t{i}": torch.randn(7, 3, generator=generator).to(d) for i, d in enumerate(DTYPES)}
    return made | {"empty": torch.empty(0, 3), "vector": torch.arange(5.0)}


@pytest.fixture
def path(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def write(path: Path, header, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def bytes_read() -> int:
    """Bytes that this process asked the kernel for, from any file."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_rows_are_those_that_safetensors_wrote(path, tensors):
    file = SafetensorsFile(path)
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(file.read_rows(name, 0, len(tensor)), tensor)
        stop = min(4, len(tensor))
        assert torch.equal(file.read_rows(name, stop // 2, stop), tensor[stop // 2 : stop])


def test_rows_of_a_torch_file(tmp_path, tensors):
    torch.save(tensors, tmp_path / "a.pt")
    file = TorchFile(tmp_path / "a.pt")
    for name, tensor in tensors.items():
        assert file.tensors[name].dtype == tensor.dtype
        assert torch.equal(file.read_rows(name, 1, 3), tensor[1:3])
    assert torch.equal(file.read_rows("t1", 2, 6, range(1, 3)), tensors["t1"][2:6, 1:3])


def test_a_sample_is_the_middle(path, tmp_path, tensors):
    torch.save(tensors | {"whole": torch.arange(3)}, tmp_path / "a.pt")
    torch_file, file = TorchFile(tmp_path / "a.pt"), SafetensorsFile(path)
    for name, tensor in tensors.items():
        whole = bytes(tensor.view(torch.uint8).flatten().tolist())
        middle = whole[max(0, len(whole) - 64) // 2 :][:64]
        assert file.sample(name) == torch_file.sample(name) == middle
    assert torch_file.sample("whole") == b""


def test_a_sample_is_all_that_is_read(tmp_path):
    save_file({"x": torch.zeros(1000, 1000)}, tmp_path / "a")
    file = SafetensorsFile(tmp_path / "a")
    before = bytes_read()
    file.sample("x")
    assert bytes_read() - before < 1000  # with this measurement


@pytest.mark.parametrize("columns", [range(0, 3), range(0, 1), range(1, 3), range(2, 2)])
def test_columns_are_those_that_safetensors_wrote(path, tensors, columns):
    file = SafetensorsFile(path)
    for name in ("t0", "t1", "t2", "t3", "empty"):
        expected = tensors[name][2:6, columns.start : columns.stop]
        actual = file.read_rows(name, 2, 2 + len(expected), columns)
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)


def test_only_the_rows_are_read(tmp_path):
    save_file({"x": torch.zeros(1000, 1000), "y": torch.zeros(1000, 1000)}, tmp_path / "a")
    before = bytes_read()
    SafetensorsFile(tmp_path / "a").read_rows("x", 10, 20)
    read = bytes_read() - before
    assert 40_000 <= read < 60_000  # 10 rows of 4,000 bytes; the header and this measurement


def test_only_the_columns_are_read(tmp_path):
    save_file({"x": torch.zeros(1000, 1000)}, tmp_path / "a")
    before = bytes_read()
    SafetensorsFile(tmp_path / "a").read_rows("x", 0, 1000, range(600, 700))
    read = bytes_read() - before
    assert 400_000 <= read < 420_000  # 1000 times 400 bytes; the header and this measurement


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "got 0"),
        (b"\x05\0\0", "got 5"),
        ((1 << 40).to_bytes(8, "little") + b"{}", f"got {1 << 40}"),
        (b"\x01" + bytes(7) + b"{}", "got 1"),
    ],
)
def test_corrupt_header_length_raises(tmp_path, content, found):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"a.safetensors: corrupt safetensors header.*{found}"
    ):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff\xfe\xfd",
        [1, 2],
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    ],
)
def test_corrupt_header_raises(tmp_path, header):
    path = write(tmp_path / "a.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: corrupt safetensors header, "):
        SafetensorsFile(path)


def test_truncated_file_raises(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: \w+ is truncated, its bytes end at 356, .* at 355"
    ):
        SafetensorsFile(path)


def test_file_that_shrinks_later_raises(path):
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: t1 ends early, the file was trunc"):
        file.read_rows("t1", 0, 7)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: t1 ends early, the file was trunc"):
        file.read_rows("t1", 0, 7, range(0, 2))


def test_bytes_that_do_not_fit_the_shape_raise(tmp_path):
    header = {"x": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 10]}}
    with pytest.raises(
        CheckpointError, match=r"x of shape \[2, 3\] and torch.float16 must have 12 bytes, got 10"
    ):
        SafetensorsFile(write(tmp_path / "a.safetensors", header, bytes(10)))


def test_dtype_of_a_tensor_that_nobody_reads_is_no_error(tmp_path):
    header = {"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    assert SafetensorsFile(write(tmp_path / "a", header, bytes(2))).tensors["x"].dtype is None


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": {"b": torch.zeros(1)}}])
def test_torch_file_without_a_flat_dict_raises(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"a\.pt: must hold a flat dict of tensors, got <class"
    ):
        TorchFile(tmp_path / "a.pt")


def test_torch_file_that_would_execute_code_raises(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: no plain state dict, UnpicklingError"):
        TorchFile(tmp_path / "a.pt")


def test_torch_file_that_is_none_raises(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"a\.pt: no state dict, "):
        TorchFile(tmp_path / "a.pt")
