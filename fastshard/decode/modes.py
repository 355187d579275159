"""Which of the decode modes a model runs in, and why not another."""

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastshard import ops
from fastshard.environment import decode_mode
from fastshard.models import ModelConfig, ShardedGeneralModel, divided

MODES = ("auto", "persistent", "graph", "eager")


class WholeModel(Protocol):
    """A ``ShardedGeneralModel`` of all layers, or a chain of several, its ``models``."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    def generate(
        self,
        tokens: Tensor,
        *,
        curr_pos: int = ...,
        first_key: Tensor | None = ...,
        num_logits: int | None = ...,
    ) -> tuple[Tensor | None, Tensor | None]: ...


def shards_of(model: WholeModel) -> list[ShardedGeneralModel]:
    """The shards that together are ``model``, in order."""
    return getattr(model, "models", [model])


def check_mode(mode: str | None) -> str:
    """Return ``mode``, by default what ``FASTSHARD_DECODE`` says.

    Raises:
        ValueError: it is none of ``MODES``.
    """
    name, value = ("FASTSHARD_DECODE", decode_mode()) if mode is None else ("decode", mode)
    if value not in MODES:
        raise ValueError(f"{name} must be one of {', '.join(MODES)}, got {value!r}")
    return value


def choose_mode(
    mode: str, models: Sequence[ShardedGeneralModel], batch: int
) -> tuple[str, str | None]:
    """Decide how these shards decode ``batch`` rows.

    Args:
        mode: One of ``MODES``. ``auto`` is persistent on a GPU, graph where ranks share layers and
            do not add up in one shot, and eager on CPUs.

    Returns:
        ``persistent``, ``graph`` or ``eager``, and where that is not what was asked for, why.
    """
    has_gpu = any(is_gpu(model.device) for model in models)
    if mode == "eager" or (mode == "auto" and not has_gpu):
        return "eager", None
    fallback, reason = "graph", None
    if not has_gpu:
        fallback, reason = "eager", "a CUDA graph needs a GPU, got cpu"
    elif not all(model.model.is_capturable for model in models):
        fallback, reason = "eager", "a CUDA graph cannot hold a sum over ranks by other than nccl"
    by_group = any(model.model.launch_refusal for model in models)
    if mode == "graph" or (mode == "auto" and by_group):
        return fallback, reason
    reason = next(filter(None, (_refusal(model, batch) for model in models)), None)
    return ("persistent", None) if reason is None else (fallback, reason)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _refusal(model: ShardedGeneralModel, batch: int) -> str | None:
    """Why ``ops.decode_step`` cannot run this shard, or None."""
    config, parts = model.config, model.model.parts
    if model.model.launch_refusal is not None:
        return model.model.launch_refusal
    if parts:
        config = divided(config, next(iter(parts.values())).count)
    if model.device.type == "cuda":
        if model.dtype == torch.float32:
            return "weights must be float16 or bfloat16 on CUDA, got torch.float32"
        if not torch._C._dispatch_has_kernel_for_dispatch_key("fastshard::decode_step", "CUDA"):
            return "this build of fastshard has no CUDA kernel of decode_step"
    return ops.decode_step_refusal(
        batch=batch,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_layers=model.shard.get_layer_count(),
        activation=config.hidden_act,
    )


def warn_of_fallback(mode: str, fallback: str, reason: str) -> None:
    text = f"decode mode {mode} is not possible, falling back to {fallback}: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)
