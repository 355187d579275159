"""Kernels for torchtune 0.6.1's decoders, and its builders as configs; needs the extra `torchtune`.

``accelerate(model)`` changes a model in place and ``undo(model)`` changes it back.
``CapturedStep()`` makes decode steps of its ``generate`` one CUDA graph. ``config_of(builder)``
gives the config of its shards.
"""

try:
    import torchtune as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastshard.integrations.torchtune needs torchtune ({error}): pip install "
        "'fastshard[torchtune]'"
    ) from error

from fastshard.integrations.torchtune.adapter import accelerate, undo
from fastshard.integrations.torchtune.captured import CapturedStep
from fastshard.integrations.torchtune.config import config_of

__all__ = ["CapturedStep", "accelerate", "config_of", "undo"]
