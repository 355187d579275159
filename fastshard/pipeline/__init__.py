"""Shards over many processes: torchrun starts them, requests pass through them in turns.

Each rank makes a ``Pipeline`` of the checkpoint and its ``World``. Then rank 0 runs
``generate_many`` and ``stop``, the others ``serve``.
"""

from fastshard.pipeline.pipeline import Pipeline, Settings, generate_in_process
from fastshard.pipeline.texts import TextRequest, Texts, text_requests

__all__ = [
    "Pipeline",
    "Settings",
    "TextRequest",
    "Texts",
    "generate_in_process",
    "text_requests",
]
