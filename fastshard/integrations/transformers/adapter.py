"""``accelerate`` and ``undo``: what is replaced in a model, and what must hold before."""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from fastshard.integrations.replacement import Replacements
from fastshard.integrations.transformers.layers import fused
from fastshard.integrations.transformers.modules import (
    ACTIVATIONS,
    CAPTURING_HOOK,
    MLP,
    Attention,
    Projection,
    RMSNorm,
    Rotary,
)
from fastshard.integrations.transformers.settings import Settings
from fastshard.ops.attention import MAX_HEAD_DIM

MODELS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


def accelerate(model: PreTrainedModel) -> PreTrainedModel:
    """Let a transformers model run by the kernels of fastshard: changes it in place.

    Attention, MLPs, norms, rotary embedding and output layer are replaced by modules with the same
    parameters, under the same names: nothing is kept twice, and the state dict stays as it is.
    ``generate``, every cache, ``save_pretrained``, ``.to()`` and ``deepcopy`` go on working. The
    model is for inference then: no parameter requires a gradient. Single tokens over a static cache
    are one op, and ``generate`` does not compile of itself where it would with such a cache. A
    model that is accelerated is left as it is.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 model with any head, in eval mode, all on one
            device. An MLP with a bias or another activation is left to transformers, with a
            warning.

    Returns:
        The model.

    Raises:
        TypeError: the model is of another class, one of its modules is not transformers' own, or a
            linear layer not torch's own, as with adapters or quantised weights.
        ValueError: the model is in training mode, spread over devices, set to return attention
            weights, or one of its modules has a hook, a ``forward`` of its own or a shape that the
            kernels do not take.
    """
    if Replacements.of(model) is not None:
        return model
    decoder = _checked(model)
    before, done = Settings(model), Replacements()
    try:
        _replace(model, decoder, done)
    except Exception:
        done.undo(model)
        raise
    before.change(model)
    done.keep_in(model)
    return model


def undo(model: PreTrainedModel) -> PreTrainedModel:
    """Put back what ``accelerate`` replaced, with the present values: changes ``model`` in place.

    Returns:
        The model; one that is not accelerated is left as it is.
    """
    done = Replacements.of(model)
    if done is None:
        return model
    done.undo(model)
    Settings.restore(model)
    return model


def _replace(model: PreTrainedModel, decoder: nn.Module, done: Replacements) -> None:
    for layer in decoder.layers:
        done.put(layer, "self_attn", Attention(layer.self_attn))
        if _refusal(layer.mlp, decoder.config) is None:
            done.put(layer, "mlp", MLP(layer.mlp, ACTIVATIONS[decoder.config.hidden_act]))
        for name in ("input_layernorm", "post_attention_layernorm"):
            done.put(layer, name, RMSNorm(layer.get_submodule(name)))
    for index, layer in enumerate(decoder.layers):
        done.put(decoder.layers, str(index), fused(layer))
    done.put(decoder, "norm", RMSNorm(decoder.norm))
    done.put(decoder, "rotary_emb", Rotary(decoder.rotary_emb))
    if type(model.get_output_embeddings()) is nn.Linear:
        done.put(model, "lm_head", Projection(model.lm_head))


def _checked(model: PreTrainedModel) -> nn.Module:
    """The decoder of ``model``, or the error that says why it cannot be accelerated."""
    decoder = getattr(model, "base_model", None)
    if not isinstance(model, PreTrainedModel) or type(decoder) not in MODELS:
        names = ", ".join(cls.__name__ for cls in MODELS)
        raise TypeError(
            f"model must be a transformers model with one of {names}, got {type(model).__name__}"
        )
    if model.training:
        raise ValueError("model must be in eval mode: call model.eval() first, got training mode")
    config = decoder.config
    if config.output_attentions:
        raise ValueError("config.output_attentions must be False: the kernels keep no weights")
    _check_classes(decoder)
    head_dim = decoder.layers[0].self_attn.head_dim
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    _check_hooks(model, decoder)
    for index, layer in enumerate(decoder.layers):
        for child, module in layer.named_modules():
            if child.endswith("_proj"):
                _check_linear(f"layers.{index}.{child}", module)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"model must be on one device, got {', '.join(devices)}")
    reason = _refusal(decoder.layers[0].mlp, config)
    if reason is not None:
        warnings.warn(f"the MLPs are left to transformers: {reason}", RuntimeWarning, stacklevel=3)
    return decoder


def _check_hooks(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Raise where a hook would not run any more, or not see what it was made for."""
    kept = {model, decoder, model.get_input_embeddings(), *decoder.layers}
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                "model must have no hooks of the package accelerate, as device_map and offloading "
                f"set them, got {type(module._hf_hook).__name__} of {name or 'the model'}"
            )
        if module in kept:
            continue
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # But for transformers' own, which capture weights: accelerated layers keep none.
        if any(getattr(hook, "__name__", "") != CAPTURING_HOOK for hook in hooks):
            raise ValueError(f"{name} must have no forward hooks to be replaced, got {len(hooks)}")
        if "forward" in module.__dict__:
            raise ValueError(
                f"{name} must have the forward of its class to be replaced, "
                f"got {module.__dict__['forward']!r}"
            )


def _check_classes(decoder: nn.Module) -> None:
    """Raise where a module computes something else than transformers' own of this family."""
    family = type(decoder).__module__
    for index, layer in enumerate(decoder.layers):
        names = ["", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
        names += [f"self_attn.{n}" for n in ("q_norm", "k_norm") if hasattr(layer.self_attn, n)]
        for name in names:
            kind = type(layer.get_submodule(name))
            if kind.__module__ != family:
                raise TypeError(
                    f"{f'layers.{index}.{name}'.rstrip('.')} must be of {family}, "
                    f"got {kind.__module__}.{kind.__name__}"
                )
    if type(decoder.norm).__module__ != family:
        kind = type(decoder.norm)
        raise TypeError(f"norm must be of {family}, got {kind.__module__}.{kind.__name__}")


def _check_linear(name: str, module: nn.Module) -> None:
    if type(module) is not nn.Linear:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise TypeError(f"{name} must be torch.nn.Linear, not quantised or adapted, got {kind}")
    if type(module.weight) is not nn.Parameter or type(module.weight.data) is not torch.Tensor:
        kind = type(module.weight.data).__name__
        raise TypeError(f"{name}.weight must be a plain tensor, not quantised, got {kind}")


def _refusal(mlp: nn.Module, config) -> str | None:
    """Why ``ops.fused_mlp`` cannot compute ``mlp``, or None."""
    if config.hidden_act not in ACTIVATIONS:
        return f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}"
    if mlp.gate_proj.bias is not None:
        return "their projections must have no bias, got mlp_bias=True"
    return None
