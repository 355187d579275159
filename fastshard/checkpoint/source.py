"""Where a checkpoint's files come from: a local directory, or the Hugging Face hub."""

import re
from pathlib import Path
from typing import Protocol

from fastshard.checkpoint.errors import CheckpointError


class Source(Protocol):
    """Files by name.

    Attributes:
        name: What messages call the checkpoint.
    """

    name: str

    def find(self, filename: str) -> Path | None:
        """Local path of the file, fetched where it must be; None where there is none."""
        ...

    def local(self, filename: str) -> Path | None:
        """Local path of the file where it is here already; nothing is fetched."""
        ...

    def list(self, suffix: str) -> list[str]:
        """Names of the files that end so, sorted; top level only."""
        ...


class Directory:
    """A local directory.

    Raises:
        FileNotFoundError: it does not exist.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise FileNotFoundError(f"model directory {path} does not exist")
        self.path = path
        self.name = str(path)

    def find(self, filename: str) -> Path | None:
        path = self.path / filename
        return path if path.is_file() else None

    def local(self, filename: str) -> Path | None:
        return self.find(filename)

    def list(self, suffix: str) -> list[str]:
        return sorted(p.name for p in self.path.iterdir() if p.name.endswith(suffix))


class Hub:
    """A repository on the Hugging Face hub; files are fetched one by one into its own cache."""

    def __init__(self, repo_id: str):
        self.name = repo_id

    def find(self, filename: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, filename))
        except LocalEntryNotFoundError as error:  # no network, and not in the cache
            if try_to_load_from_cache(self.name, filename) is _CACHED_NO_EXIST:
                return None
            raise CheckpointError(
                f"{self.name}: cannot fetch {filename} from the hub and it is not in its cache"
            ) from error
        except EntryNotFoundError:
            return None
        except (OSError, ValueError, HTTPError) as error:  # no such repository, no access, ...
            raise self._unreachable(filename, error) from error

    def local(self, filename: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, filename)
        return Path(path) if isinstance(path, str) else None

    def list(self, suffix: str) -> list[str]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # its HTTP library's, no OSError in all

        try:
            files = HfApi().list_repo_files(self.name)
        except (OSError, ValueError, HTTPError) as error:
            raise self._unreachable("the list of files", error) from error
        return sorted(name for name in files if name.endswith(suffix) and "/" not in name)

    def _unreachable(self, what: str, error: Exception) -> CheckpointError:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return CheckpointError(f"{self.name}: cannot fetch {what} from the hub, {reason}")


def open_source(source: str | Path) -> Source:
    """A directory where there is one of this name, else a hub id ``owner/name``.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(source).expanduser()
    if str(source) and path.is_dir():
        return Directory(path)
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return Hub(source)
    raise FileNotFoundError(
        f"source must be a directory or a hub id like owner/name, got {str(source)!r}"
    )
