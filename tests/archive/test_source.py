"""Fetching and reading: whole or not at all, from files and from the hub; every wrong input."""

import builtins
import json
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pytest
from pyarrow import parquet

from archive.parquet_rows import ROW, write_rows
from fastshard.archive import schema, source


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "archive"


def ids() -> list[str]:
    return [row.id for row in source.rows(source.load())]


def content(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_file_is_kept_whole(tmp_path, cache):
    path = write_rows(tmp_path / "level_1.parquet", {}, {"Kernel_Name": "b"})
    found = source.fetch(path)
    assert found == source.load()
    assert (found.source, found.revision, found.num_rows) == (str(path), None, 2)
    path.unlink()
    assert ids() == ["1/36/rms_norm_rows", "1/36/b"]
    assert [path.name for path in cache.iterdir() if path.name[0] == "."] == []


def test_a_folder_of_splits(tmp_path):
    write_rows(tmp_path / "in" / "data" / "level_2-00000-of-00001.parquet", {"Level_ID": 2})
    write_rows(tmp_path / "in" / "level_1.parquet", {})
    (tmp_path / "in" / "README.md").write_text("no data")
    source.fetch(tmp_path / "in")
    assert sorted(ids()) == ["1/36/rms_norm_rows", "2/36/rms_norm_rows"]
    source.fetch(tmp_path / "in", splits=["level_2"])
    assert ids() == ["2/36/rms_norm_rows"]


def test_what_was_fetched_before_is_gone(tmp_path, cache):
    source.fetch(write_rows(tmp_path / "a.parquet", {"Kernel_Name": "a"}))
    source.fetch(write_rows(tmp_path / "b.parquet", {"Kernel_Name": "b"}))
    assert ids() == ["1/36/b"]
    assert len(list(cache.glob("data-*"))) == 1
    source.fetch(tmp_path / "b.parquet")
    assert ids() == ["1/36/b"]


def test_a_name_that_repeats_gets_its_index(tmp_path):
    rows = [{"__index_level_0__": index} for index in (4, 9, 9, None)]
    source.fetch(write_rows(tmp_path / "a.parquet", *rows, {"Kernel_Name": "other"}))
    name = "1/36/rms_norm_rows"
    assert ids() == [f"{name}@4", f"{name}@9", f"{name}@9.2", f"{name}@3", "1/36/other"]


def test_a_row_full_of_nulls(tmp_path):
    source.fetch(write_rows(tmp_path / "a.parquet", {}, dict.fromkeys(schema.KINDS)))
    assert ids() == ["1/36/rms_norm_rows", "-/-/row-1"]
    row = source.whole_row(source.load(), "-/-/row-1")
    assert set(vars(row).values()) == {"-/-/row-1", None}


def test_long_texts_are_read_of_one_row_alone(tmp_path):
    rows = [{"Kernel_Name": f"k{i}", "CUDA_Code": f"code {i}"} for i in range(7)]
    write_rows(tmp_path / "in" / "level_1.parquet", *rows[:5], row_group_size=2)
    write_rows(tmp_path / "in" / "level_2.parquet", *rows[5:])
    source.fetch(tmp_path / "in")
    assert {row.cuda_code for row in source.rows(source.load())} == {None}
    for number in (0, 2, 4, 5, 6):
        row = source.whole_row(source.load(), f"1/36/k{number}")
        assert row.cuda_code == f"code {number}"
        assert row.ncu_profile == ROW["NCU_Profile"]
    with pytest.raises(ValueError, match=r"^id must be one of the archive, got '1/36/k9'$"):
        source.whole_row(source.load(), "1/36/k9")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the archive; what was asked of it is kept."""
    write_rows(tmp_path / "hub" / "level_1-00000-of-00001.parquet", {})
    write_rows(tmp_path / "hub" / "level_3-00000-of-00001.parquet", {"Level_ID": 3})
    files = ["README.md", *(f"data/{p.name}" for p in sorted((tmp_path / "hub").iterdir()))]
    asked = []

    def dataset_info(self, name, revision=None):
        asked.append((name, revision))
        siblings = [SimpleNamespace(rfilename=file) for file in files]
        return SimpleNamespace(sha="c0ffee" * 6, siblings=siblings)

    def download(name, file, *, repo_type, revision):
        assert (name, repo_type, revision) == (source.REPOSITORY, "dataset", "c0ffee" * 6)
        return str(tmp_path / "hub" / file.removeprefix("data/"))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_the_hub_and_its_revision(hub):
    found = source.fetch()
    assert (found.source, found.revision) == ("SakanaAI/AI-CUDA-Engineer-Archive", "c0ffee" * 6)
    assert ids() == ["1/36/rms_norm_rows", "3/36/rms_norm_rows"]
    source.fetch(splits=["level_3"], revision="v1")
    assert ids() == ["3/36/rms_norm_rows"]
    assert hub == [(source.REPOSITORY, None), (source.REPOSITORY, "v1")]
    with pytest.raises(ValueError, match="must hold parquet files of level_2, found none"):
        source.fetch(splits=["level_2"])
    assert ids() == ["3/36/rms_norm_rows"]


def test_no_network(monkeypatch):
    def offline(*arguments, **settings):
        raise type("ConnectError", (Exception,), {})("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(
        RuntimeError,
        match=r"^SakanaAI/AI-CUDA-Engineer-Archive cannot be fetched from the hub, Name or service "
        r"not known; where its files are at hand: fastshard archive fetch --source DIR$",
    ):
        source.fetch()


def damaged(path, how: str):
    """A file of one row, damaged."""
    write_rows(path, *[{}] * 2000, compression="none")
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "middle":
        at = parquet.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
        path.write_bytes(data[:at] + b"\xff" * 64 + data[at + 64 :])
    else:
        path.write_text("Op_Name,Level_ID\n")
    return path


WRONG = {
    "cut": (
        ValueError,
        r"^level_1\.parquet must be a whole parquet file, it is damaged or cut off",
    ),
    "empty": (ValueError, r"^level_1\.parquet must be a whole parquet file"),
    "middle": (ValueError, r"^level_1\.parquet must be a whole parquet file"),
    "text": (ValueError, r"^level_1\.parquet must be a whole parquet file"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_damaged_file_leaves_what_was_there(how, tmp_path, cache):
    source.fetch(write_rows(tmp_path / "good.parquet", {}))
    before = content(cache)
    write_rows(tmp_path / "in" / "level_2.parquet", {})
    damaged(tmp_path / "in" / "level_1.parquet", how)
    error, message = WRONG[how]
    with pytest.raises(error, match=message):
        source.fetch(tmp_path / "in")
    assert content(cache) == before


def test_missing_columns_leave_what_was_there(tmp_path, cache):
    path = write_rows(tmp_path / "level_1.parquet", {}, without=("Task_ID", "Clang_Tidy"))
    with pytest.raises(
        ValueError,
        match=r"^level_1\.parquet must have the columns of the archive, Task_ID, Clang_Tidy are",
    ):
        source.fetch(path)
    assert content(cache) == {}


def test_values_of_another_kind(tmp_path, cache):
    path = write_rows(tmp_path / "level_1.parquet", {})
    table = parquet.read_table(path)
    at = table.column_names.index("Task_ID")
    parquet.write_table(table.set_column(at, "Task_ID", pa.array(["x"])), path)
    with pytest.raises(
        ValueError, match=r"^Task_ID must be an integer or null, got 'x' in level_1"
    ):
        source.fetch(path)
    assert content(cache) == {}


def test_a_wrong_split(tmp_path):
    with pytest.raises(
        ValueError, match=r"^split must be one of level_1, level_2, level_3, got 'level_4'$"
    ):
        source.fetch(splits=["level_1", "level_4"])
    path = write_rows(tmp_path / "level_12.parquet", {})
    with pytest.raises(ValueError, match=r"^split must be one of .*, got 'level_12'$"):
        source.fetch(path)
    path = write_rows(tmp_path / "rows.parquet", {})
    with pytest.raises(
        ValueError, match=r"^rows\.parquet must name its split, like level_1\.parquet, to be chosen"
    ):
        source.fetch(path, splits=["level_1"])


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^source must be a parquet file or a folder, "):
        source.fetch(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must hold parquet files of level_1, level_2, lev"):
        source.fetch(tmp_path / "empty")


def test_a_revision_of_files(tmp_path):
    path = write_rows(tmp_path / "a.parquet", {})
    with pytest.raises(ValueError, match=r"^a revision is of the hub, got 'v1' for .*a\.parquet$"):
        source.fetch(path, revision="v1")


def test_nothing_fetched(cache):
    with pytest.raises(
        RuntimeError,
        match=r"^no archive has been fetched to .*archive: fastshard archive fetch, or "
        r"fastshard archive fetch --source DIR without network$",
    ):
        source.load()


def test_what_was_fetched_is_gone_or_another(tmp_path, cache):
    found = source.fetch(write_rows(tmp_path / "a.parquet", {}))
    (found.folder / found.files[0]).rename(tmp_path / "away")
    with pytest.raises(RuntimeError, match=r"a\.parquet is not there any more: fastshard archive"):
        source.load()
    index = cache / "archive.json"
    for text in ("[1]", "{", json.dumps({**json.loads(index.read_text()), "format": 0}), "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"archive\.json must be of fastshard archive fetch"):
            source.load()


def test_damaged_after_it_was_fetched(tmp_path):
    found = source.fetch(write_rows(tmp_path / "a.parquet", {}))
    file = found.folder / found.files[0]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="must be a whole parquet file, it is damaged or cut off"):
        source.rows(source.load())


def test_no_pyarrow(monkeypatch, tmp_path, cache):
    path = write_rows(tmp_path / "a.parquet", {})
    true_import = builtins.__import__

    def without(name, *arguments, **more):
        if name == "pyarrow":
            raise ImportError(name)
        return true_import(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        RuntimeError,
        match=r"^the archive is read by pyarrow, which is not installed: pip install 'fastshard\[",
    ):
        source.fetch(path)
    assert not cache.exists()
