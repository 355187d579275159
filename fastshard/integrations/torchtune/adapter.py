"""accelerate and undo: which modules of a torchtune model are replaced, and why others are not."""

import warnings
from collections import Counter

import torch
from torch import nn
from torchtune import modules

from fastshard.integrations.replacement import Replacements
from fastshard.integrations.torchtune.attention import Attention, ForwardPass
from fastshard.integrations.torchtune.kv_cache import KVCache
from fastshard.integrations.torchtune.layers import FeedForward, Layer, RMSNorm
from fastshard.integrations.torchtune.rope import ROPES, rope_of
from fastshard.nn.rope import RotaryEmbedding
from fastshard.ops.attention import MAX_HEAD_DIM
from fastshard.ops.norm import MAX_ROW_BYTES

CACHES = (modules.KVCache, KVCache)
_TRAINED = "_fastshard_trained"
LAYER = modules.TransformerSelfAttentionLayer
LAYER_PARTS = ("attn", "mlp", "sa_norm", "mlp_norm")


def accelerate(model: nn.Module) -> nn.Module:
    """Let attention, MLPs and norms of a torchtune model run on fastshard's ops, in place.

    Names and values of its state dict stay, nothing is kept twice, and caches that are set up stay
    with what they hold. Modules that the ops cannot compute (LoRA, quantised or biased layers,
    other activations and norms, modules with hooks, subclasses) stay as they are, and one warning
    names them. The model is for inference then: no parameter requires a gradient. A model that is
    accelerated is left as it is.

    Args:
        model: A ``TransformerDecoder``, or a module that holds one.

    Returns:
        The model.

    Raises:
        ValueError: nothing in it can be replaced.
    """
    if Replacements.of(model) is not None:
        return model
    chosen, left = _choose(model)
    if not chosen:
        raise ValueError(
            "model must have attention, MLPs or norms of torchtune that fastshard can compute, "
            f"got {type(model).__name__}: {_text(left) or 'it has none of them'}"
        )
    done = Replacements()
    done.keep_in(model)
    model.__dict__[_TRAINED] = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        _replace(model, chosen, done)
    except Exception:
        undo(model)
        raise
    model.requires_grad_(False)
    if left:
        warnings.warn(f"left to torchtune: {_text(left)}", RuntimeWarning, stacklevel=2)
    return model


def undo(model: nn.Module) -> nn.Module:
    """Put back what ``accelerate`` replaced, with the present values and caches, in place.

    Returns:
        The model; one that is not accelerated is left as it is.
    """
    done = Replacements.of(model)
    if done is None:
        return model
    ours = {path: part for path, part in model.named_modules() if type(part) is Attention}
    done.undo(model)
    for path, attention in ours.items():
        theirs = model.get_submodule(path)
        theirs.kv_cache, theirs.cache_enabled = attention.kv_cache, attention.cache_enabled
    for name in model.__dict__.pop(_TRAINED):
        model.get_parameter(name).requires_grad_(True)
    return model


def _choose(model: nn.Module) -> tuple[list[str], dict[str, list[str]]]:
    """Paths of what can be replaced, and reason -> paths of what cannot."""
    chosen, left, dtype = [], {}, _dtype(model)
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path, theirs in _parts(model).items():
        reason = reason_against(theirs, dtype)
        if any(places[id(parameter)] > 1 for parameter in theirs.parameters()):
            reason = "its weights have several places in the model"
        if reason is None:
            chosen.append(path)
        else:
            left.setdefault(reason, []).append(path)
    return chosen, left


def _replace(model: nn.Module, paths: list[str], done: Replacements) -> None:
    shared = _Shared()
    for path in paths:
        parent, _, name = path.rpartition(".")
        done.put(model.get_submodule(parent), name, shared.stand_in(model.get_submodule(path)))
    for decoder in model.modules():
        if isinstance(decoder, modules.TransformerDecoder):
            _put_layers(done, decoder, shared.forward_pass)


class _Shared:
    """Makes stand-ins that share what a model's layers share."""

    def __init__(self):
        self.forward_pass = ForwardPass()
        self._ropes: dict[int, RotaryEmbedding] = {}

    def stand_in(self, theirs: nn.Module) -> nn.Module:
        if isinstance(theirs, modules.RMSNorm):
            return RMSNorm(theirs)
        if isinstance(theirs, modules.FeedForward):
            return FeedForward(theirs)
        key = id(theirs.pos_embeddings)
        if key not in self._ropes:
            self._ropes[key] = rope_of(theirs.pos_embeddings)
        attention = Attention(theirs, self._ropes[key], self.forward_pass)
        theirs.kv_cache = None  # until undo
        return attention


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> what might be replaced: torchtune's parts, and whatever its layers have for them."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, tuple(_REASONS)) and path:
            found[path] = module
        if isinstance(module, LAYER):
            for name in LAYER_PARTS:
                part = getattr(module, name)
                if not isinstance(part, nn.Identity):
                    found[f"{path}.{name}" if path else name] = part
    return found


def _put_layers(done: Replacements, decoder: nn.Module, forward_pass: ForwardPass) -> None:
    """Replace the layers whose parts all were: what stands in for them does more in a kernel."""
    whole = [i for i, layer in enumerate(decoder.layers) if is_replaced(layer)]
    for i in whole:
        frame = {"is_first": i == whole[0], "is_last": i == whole[-1]}
        done.put(decoder.layers, str(i), Layer(decoder.layers[i], forward_pass, **frame))


def is_replaced(layer: nn.Module) -> bool:
    """Whether all parts of a plain layer were replaced."""
    if type(layer) is not LAYER or _has_hooks(layer):
        return False
    kinds = {"attn": Attention, "mlp": FeedForward, "sa_norm": RMSNorm, "mlp_norm": RMSNorm}
    kinds |= {"sa_scale": nn.Identity, "mlp_scale": nn.Identity}
    return all(type(getattr(layer, name)) is kind for name, kind in kinds.items())


def _dtype(model: nn.Module) -> torch.dtype | None:
    """That of most weights."""
    counts = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    return max(counts, key=counts.get) if counts else None


def reason_against(module: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """Why ``module`` cannot be replaced; None where it can.

    Args:
        module: Anything.
        dtype: Of the model; None: any.
    """
    kind = next((kind for kind in _REASONS if isinstance(module, kind)), None)
    if type(module) is not kind:
        return f"a {type(module).__name__} is none of torchtune's own modules"
    if any(_has_hooks(child) for child in module.modules()):
        return "hooks would not be called"
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            return f"{name} is a {type(parameter.data).__name__}"
        if parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{name} is {parameter.dtype}"
        if dtype is not None and parameter.dtype != dtype:
            return f"{name} is {parameter.dtype} in a model of {dtype}"
    return _REASONS[kind](module)


def _reason_against_norm(norm: modules.RMSNorm) -> str | None:
    size = norm.scale.numel()
    if size % 8 or 4 * size > MAX_ROW_BYTES:
        return f"it is over {size} elements, no multiple of 8 up to {MAX_ROW_BYTES // 4}"
    return None


def _reason_against_mlp(mlp: modules.FeedForward) -> str | None:
    if mlp.w3 is None:
        return "it has no w3"
    if type(mlp.activation) is not nn.SiLU:
        return f"its activation is {type(mlp.activation).__name__}"
    if any(getattr(layer, "bias", None) is not None for layer in (mlp.w1, mlp.w2, mlp.w3)):
        return "it has biases"
    return _reason_against_linears(mlp, ("w1", "w3")) or _reason_against_linears(mlp, ("w2",))


def _reason_against_attention(attn: modules.MultiHeadAttention) -> str | None:
    rope, cache, head_dim = attn.pos_embeddings, attn.kv_cache, attn.head_dim
    if rope is not None and type(rope) not in ROPES:
        return f"its pos_embeddings are {type(rope).__name__}"
    if cache is not None and type(cache) not in CACHES:
        return f"its kv_cache is a {type(cache).__name__}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"its head_dim is {head_dim}, no multiple of 8 up to {MAX_HEAD_DIM}"
    return _reason_against_linears(attn, ("q_proj", "k_proj", "v_proj")) or (
        _reason_against_linears(attn, ("output_proj",))
    )


def _reason_against_linears(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Whether some are no plain layers, or not such that they can be packed."""
    layers = {name: getattr(module, name) for name in names}
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            return f"{name} is a {type(layer).__name__}"
        kinds = [(of.in_features, of.bias is None) for of in (layer, layers[names[0]])]
        if kinds[0] != kinds[1]:
            return f"{name} has not the inputs or the bias of {names[0]}"
    return None


_REASONS = {
    modules.MultiHeadAttention: _reason_against_attention,
    modules.FeedForward: _reason_against_mlp,
    modules.RMSNorm: _reason_against_norm,
}


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _text(left: dict[str, list[str]]) -> str:
    """Reasons, each with the first module that it is about and the number of others."""
    parts = []
    for reason, paths in left.items():
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        parts.append(f"{paths[0]}{others} ({reason})")
    return "; ".join(parts)
