"""Kernels for transformers' Llama, Mistral, Qwen2 and Qwen3 models; needs the extra `transformers`.

``accelerate(model)`` changes a model in place and ``undo(model)`` changes it back. The import also
registers ``attn_implementation="fastshard"``, for any model that reads transformers' interfaces.
"""

try:
    import transformers as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fastshard.integrations.transformers needs transformers: pip install "
        "'fastshard[transformers]'"
    ) from error

from fastshard.integrations.transformers.adapter import accelerate, undo
from fastshard.integrations.transformers.attention import register

__all__ = ["accelerate", "register", "undo"]

register()
