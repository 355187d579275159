"""Where rows come from: the hub, parquet files, a folder of them; kept in the user's cache.

``fetch`` copies whole files into a folder of their own and names it in ``archive.json`` once all of
them were found good: what was there before stays until then. Lists read the short columns alone.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastshard.archive import schema
from fastshard.archive.schema import KINDS, LIGHT, SPLITS, Row
from fastshard.environment import cache_dir
from fastshard.files import replace_text

REPOSITORY = "SakanaAI/AI-CUDA-Engineer-Archive"
FORMAT = 1
HOW_TO_FETCH = "fastshard archive fetch, or fastshard archive fetch --source DIR without network"


@dataclass(frozen=True)
class Archive:
    """What was fetched.

    Attributes:
        source: Hub id, or the path of what was copied.
        revision: Commit on the hub; None of local files.
        folder: Of the parquet files.
        files: Their names.
        num_rows: Of all files.
    """

    source: str
    revision: str | None
    folder: Path
    files: tuple[str, ...]
    num_rows: int


def archive_dir() -> Path:
    """Where all of the archive is kept: data, verdicts, promoted kernels."""
    return cache_dir() / "archive"


def fetch(
    source: Path | None = None, *, splits: Sequence[str] = SPLITS, revision: str | None = None
) -> Archive:
    """Copy the archive into the cache, in the place of what was fetched before.

    Args:
        source: A parquet file or a folder with some; by default the hub.
        splits: Of ``SPLITS``: files of others are left out.
        revision: On the hub: a commit, tag or branch.

    Raises:
        ValueError: a split is unknown; a file is no whole parquet file, or has not the columns, or
            values of other kinds; there are no files.
        FileNotFoundError: ``source`` does not exist.
        RuntimeError: pyarrow is not installed, or the hub cannot be reached.
    """
    _pyarrow()
    for split in splits:
        _check_split(split)
    if source is not None and revision is not None:
        raise ValueError(f"a revision is of the hub, got {revision!r} for {source}")
    archive_dir().mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".fetch-", dir=archive_dir()))
    try:
        if source is None:
            name = REPOSITORY
            commit = _download(staged, splits, revision)
        else:
            name, commit = str(source.resolve()), None
            _copy(source, staged, splits)
        files = tuple(sorted(path.name for path in staged.iterdir()))
        num_rows = sum(1 for file in files for _ in _read(staged / file, LIGHT))
        folder = archive_dir() / f"data-{_digest(staged, files)[:16]}"
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    found = Archive(name, commit, folder, files, num_rows)
    content = {"format": FORMAT, **asdict(found), "folder": folder.name}
    replace_text(_index(), json.dumps(content, indent=1) + "\n")
    for old in archive_dir().glob("data-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return found


def load() -> Archive:
    """What was fetched last.

    Raises:
        RuntimeError: nothing was, or it is not there any more.
        ValueError: the file that says so is unreadable.
    """
    if not _index().is_file():
        raise RuntimeError(f"no archive has been fetched to {archive_dir()}: {HOW_TO_FETCH}")
    try:
        content = json.loads(_index().read_text())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        content["folder"] = archive_dir() / content["folder"]
        content["files"] = tuple(content["files"])
        archive = Archive(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{_index()} must be of fastshard archive fetch, got {error!r}: {HOW_TO_FETCH}"
        ) from None
    for name in archive.files:
        if not (archive.folder / name).is_file():
            raise RuntimeError(f"{archive.folder / name} is not there any more: {HOW_TO_FETCH}")
    return archive


def rows(archive: Archive) -> list[Row]:
    """Every row without its long texts, in the order of the files.

    Raises:
        ValueError: a file is damaged.
        RuntimeError: pyarrow is not installed.
    """
    return [row for row, _, _ in _located(archive)]


def whole_row(archive: Archive, identity: str) -> Row:
    """One row with all its columns.

    Raises:
        ValueError: there is none of this ID.
    """
    for row, file, number in _located(archive):
        if row.id == identity:
            values = _read_one(archive.folder / file, number)
            return schema.row_of(values, identity, file)
    raise ValueError(f"id must be one of the archive, got {identity!r}")


def _located(archive: Archive) -> Iterator[tuple[Row, str, int]]:
    """Rows, each with its file and its number in it. A name that repeats gets its index."""
    found = [
        (values, file, number)
        for file in archive.files
        for number, values in enumerate(_read(archive.folder / file, LIGHT))
    ]
    names = [_name(values, number) for values, _, number in found]
    counts, given = Counter(names), Counter()
    for name, (values, file, number) in zip(names, found, strict=True):
        index = values.get("__index_level_0__")
        repeats = counts[name] > 1
        identity = f"{name}@{number if index is None else f'{index:g}'}" if repeats else name
        given[identity] += 1
        if given[identity] > 1:  # the index repeats too
            identity += f".{given[identity]}"
        yield schema.row_of(values, identity, file), file, number


def _name(values: dict, number: int) -> str:
    level, task, kernel = (values.get(key) for key in ("Level_ID", "Task_ID", "Kernel_Name"))
    ends = ["-" if value is None else f"{value:g}" for value in (level, task)]
    return "/".join([*ends, kernel or f"row-{number}"])


def _read(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    """The values of each row of a file, by column.

    Raises:
        ValueError: it is no whole parquet file, or lacks columns, or holds other kinds of values.
    """
    pyarrow, parquet = _pyarrow()
    name = path.name.split("-", 1)[1]  # as it was before it was copied
    try:
        with parquet.ParquetFile(path) as file:
            schema.check_columns(file.schema_arrow.names, name)
            for batch in file.iter_batches(columns=list(columns)):
                for values in batch.to_pylist():
                    schema.row_of(values, "", name)
                    yield values
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} must be a whole parquet file, it is damaged or cut off: {reason}"
        ) from None


def _read_one(path: Path, number: int) -> dict:
    pyarrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number < size:
                    table = file.read_row_group(group, columns=list(KINDS))
                    return table.slice(number, 1).to_pylist()[0]
                number -= size
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}: {HOW_TO_FETCH}") from None
    raise AssertionError(f"{path} has no row {number}")


def _copy(source: Path, staged: Path, splits: Sequence[str]) -> None:
    if not source.exists():
        raise FileNotFoundError(f"source must be a parquet file or a folder, {source} is not there")
    found = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    taken = [path for path in found if _is_taken(path.name, splits)]
    if not taken:
        raise ValueError(f"{source} must hold parquet files of {', '.join(splits)}, found none")
    for number, path in enumerate(taken):
        # Files of other folders may have one name.
        shutil.copyfile(path, staged / f"{number:03d}-{path.name}")


def _download(staged: Path, splits: Sequence[str], revision: str | None) -> str:
    """The commit whose files are in ``staged`` from now on."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().dataset_info(REPOSITORY, revision=revision)
        names = sorted(file.rfilename for file in info.siblings or ())
        names = [name for name in names if name.endswith(".parquet") and _is_taken(name, splits)]
        cached = [
            hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=info.sha)
            for name in names
        ]
    except Exception as error:  # of the hub's HTTP library, which differs by its version
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(
            f"{REPOSITORY} cannot be fetched from the hub, {reason}; where its files are at hand: "
            "fastshard archive fetch --source DIR"
        ) from error
    if not names:
        raise ValueError(f"{REPOSITORY} must hold parquet files of {', '.join(splits)}, found none")
    for number, path in enumerate(cached):
        shutil.copyfile(path, staged / f"{number:03d}-{Path(path).name}")
    return info.sha


def _is_taken(name: str, splits: Sequence[str]) -> bool:
    """Whether a file is of one of the splits, by its name; one that names none holds all.

    Raises:
        ValueError: it names a split that there is not, or none where some must be chosen.
    """
    found = re.search(r"level_\d+", name)
    if found is not None:
        _check_split(found[0])
        return found[0] in splits
    if set(splits) != set(SPLITS):
        raise ValueError(f"{name} must name its split, like level_1.parquet, to be chosen by it")
    return True


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _digest(folder: Path, files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode())
        with (folder / name).open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _index() -> Path:
    return archive_dir() / "archive.json"


def _pyarrow():
    """pyarrow and its parquet module.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise RuntimeError(
            "the archive is read by pyarrow, which is not installed: "
            "pip install 'fastshard[archive]'"
        ) from None
    return pyarrow, parquet
