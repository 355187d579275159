"""The JSON files of a checkpoint: read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from fastshard.checkpoint.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        CheckpointError: the file holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value
