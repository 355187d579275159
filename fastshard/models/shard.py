"""Shard: which layers of which model one process holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Shard:
    """Layers ``start_layer`` to ``end_layer``, *both included*, of a model of ``n_layers``.

    Raises:
        TypeError: ``model_id`` is not a string, or a layer number not an integer.
        ValueError: not ``0 <= start_layer <= end_layer < n_layers``.
    """

    model_id: str
    start_layer: int
    end_layer: int
    n_layers: int

    def __post_init__(self) -> None:
        if not isinstance(self.model_id, str):
            raise TypeError(f"model_id must be a string, got {self.model_id!r}")
        for name in ("start_layer", "end_layer", "n_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 0 <= self.start_layer <= self.end_layer < self.n_layers:
            raise ValueError(
                "a shard must have 0 <= start_layer <= end_layer < n_layers (both ends included), "
                f"got start_layer={self.start_layer}, end_layer={self.end_layer}, "
                f"n_layers={self.n_layers}"
            )

    @property
    def layers(self) -> range:
        """Global indices of the layers held."""
        return range(self.start_layer, self.end_layer + 1)

    def is_first_layer(self) -> bool:
        """Whether the shard starts the model: it embeds tokens."""
        return self.start_layer == 0

    def is_last_layer(self) -> bool:
        """Whether the shard ends the model: it gives logits."""
        return self.end_layer == self.n_layers - 1

    def get_layer_count(self) -> int:
        """Number of layers held."""
        return self.end_layer - self.start_layer + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain dict with the constructor's four keys."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Shard":
        """Inverse of ``to_dict``.

        Raises:
            ValueError: a key is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ValueError(f"a shard must have the keys {sorted(names)}, got {sorted(data)}")
        return cls(**data)

    def overlaps(self, other: "Shard") -> bool:
        """Whether both are of one model (same id) and share a layer."""
        return (
            self.model_id == other.model_id
            and self.start_layer <= other.end_layer
            and other.start_layer <= self.end_layer
        )
