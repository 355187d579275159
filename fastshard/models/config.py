"""ModelConfig: the sizes and switches of a decoder, read from an exo dict or a Hugging Face config.

Which switches a family sets is in ``_FAMILIES``; every number comes from the config.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastshard.nn.rope import RopeScaling

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face's ``hidden_act`` -> activation of ``ops.fused_mlp``."""


@dataclass(frozen=True)
class _Family:
    """What the model class of a family fixes in torchtune and in Hugging Face.

    Attributes:
        interleaved: torchtune's RoPE pairs (2i, 2i + 1) rather than (i, i + head_dim / 2).
        qk_norm: RMSNorm over head_dim on q and k, before RoPE.
        qkv_bias: Where a config does not say.
        has_bias_flag: Hugging Face's class reads ``attention_bias``, for the output too.
    """

    interleaved: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    has_bias_flag: bool = True


_FAMILIES = {
    "llama": _Family(interleaved=True),
    "mistral": _Family(interleaved=True, has_bias_flag=False),
    "qwen2": _Family(interleaved=False, qkv_bias=True, has_bias_flag=False),
    "qwen3": _Family(interleaved=False, qk_norm=True),
    "generic": _Family(interleaved=True),
}

# exo's key -> Hugging Face's; a dict with the first of them is read as exo's
_EXO_NAMES = {
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "attn_bias": "attention_bias",
    "attn_dropout": "attention_dropout",
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model, whole (a ``Shard`` says which layers).

    Attributes:
        model_type: llama, mistral, qwen2, qwen3, or generic (llama's layout, nothing assumed).
        hidden_size: Width of the residual stream; ``num_heads * head_dim`` may differ from it.
        max_seq_len: Positions that the RoPE table holds.
        rope_interleaved: Pairs (2i, 2i + 1), torchtune's llama layout: q and k rows of a Hugging
            Face checkpoint are permuted at load. Otherwise pairs (i, i + rotary_dim / 2), as is.
        rotary_dim: Leading dims of a head that rotate; at most ``head_dim``.
        qkv_bias: The q, k and v projections have a bias.
        output_bias: The attention's output projection has one.
        qk_norm: RMSNorm over ``head_dim`` on q and k before RoPE.
        sliding_window: A query sees this many last keys, itself included; None: all before it.
        windowed_layers: Layers with the window, global indices; empty where there is none.
        hidden_act: silu, gelu, gelu_tanh or relu.
        attn_dropout: Read and checked; inference drops nothing.

    Raises:
        ValueError: sizes that no model can have; each message names the key and its value.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = True
    rotary_dim: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    attn_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rotary_dim == 0:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "max_seq_len"):
            _check_positive_integer(name, getattr(self, name))
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            _check_positive_integer(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {self.head_dim}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim must be even and at most head_dim={self.head_dim}, "
                f"got {self.rotary_dim}"
            )
        for name in ("norm_eps", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.attn_dropout <= 1:
            raise ValueError(f"attn_dropout must be in [0, 1], got {self.attn_dropout!r}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be positive or None, got {self.sliding_window}")

    def window(self, layer: int) -> int | None:
        """Sliding window of the layer with this global index, or None."""
        return self.sliding_window if layer in self.windowed_layers else None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], model_id: str = "") -> "ModelConfig":
        """Read exo's keys (``embed_dim`` ...) or those of a Hugging Face ``config.json``.

        Args:
            config: Plain dict, as parsed. Keys that inference does not need are ignored.
            model_id: Decides what an exo dict without ``model_type``, tie or bias flags means; a
                flag of the config wins over it.

        Raises:
            ValueError: keys are missing (all are named), or one says something that the decoder
                cannot compute.
        """
        is_exo = "embed_dim" in config
        values = {_EXO_NAMES.get(key, key): value for key, value in config.items()}
        model_type = _model_type(values, model_id, is_exo)
        _require_keys(config, values, model_type, is_exo)
        _reject_unsupported(values)
        family = _FAMILIES[model_type]

        num_heads, hidden_size = values["num_attention_heads"], values["hidden_size"]
        default_head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
        head_dim = values.get("head_dim") or default_head_dim
        bias = values.get("attention_bias") if is_exo or family.has_bias_flag else None
        tie = values.get("tie_word_embeddings")
        rope = _rope_parameters(values)
        return cls(
            model_type=model_type,
            vocab_size=values["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            max_seq_len=values["max_position_embeddings"],
            norm_eps=values["rms_norm_eps"],
            rope_base=rope.get("rope_theta") or 10000.0,
            rope_scaling=_rope_scaling(rope),
            rope_interleaved=family.interleaved,
            rotary_dim=int(head_dim * (rope.get("partial_rotary_factor") or 1.0)),
            qkv_bias=family.qkv_bias if bias is None else bool(bias),
            output_bias=bool(bias) and not is_exo,
            qk_norm=family.qk_norm,
            tie_word_embeddings=is_exo and _ties_by_id(model_id) if tie is None else bool(tie),
            hidden_act=ACTIVATIONS[values.get("hidden_act") or "silu"],
            sliding_window=values.get("sliding_window"),
            windowed_layers=_windowed_layers(values, model_type),
            attn_dropout=values.get("attention_dropout") or 0.0,
        )


def _check_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _model_type(values: Mapping, model_id: str, is_exo: bool) -> str:
    """The config's own word, else the family that the id names, else generic for an exo dict."""
    model_type = values.get("model_type")
    if model_type is None:
        named = [name for name in ("qwen3", "mistral", "llama") if name in model_id.lower()]
        named += ["qwen2"] if "qwen" in model_id.lower() else []
        model_type = named[0] if named else "generic" if is_exo else None
    if model_type not in _FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(_FAMILIES)}, got {model_type!r}")
    return model_type


def _require_keys(config: Mapping, values: Mapping, model_type: str, is_exo: bool) -> None:
    """Raise one error that names every missing key as the config would spell it."""
    required = list(_REQUIRED)
    if model_type in ("mistral", "qwen2", "qwen3"):  # only llama's class defaults it to num_heads
        required.append("num_key_value_heads")
    spelling = {theirs: exo for exo, theirs in _EXO_NAMES.items()} if is_exo else {}
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise ValueError(
            f"config must have {', '.join(spelling.get(key, key) for key in missing)}, "
            f"got only {', '.join(sorted(config))}"
        )
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):  # computed with below
        _check_positive_integer(spelling.get(key, key), values[key])


def _reject_unsupported(values: Mapping) -> None:
    if values.get("mlp_bias"):
        raise ValueError(f"mlp_bias must be false, got {values['mlp_bias']!r}")
    if values.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config must be absent (quantized weights are not supported), "
            f"got {values['quantization_config']!r}"
        )
    act = values.get("hidden_act") or "silu"
    if act not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


def _ties_by_id(model_id: str) -> bool:
    """Whether the published model of this id ties its head, e.g. ``llama-3.2-1b``."""
    model_id = model_id.lower()
    sizes = re.findall(r"(\d+(?:\.\d+)?)b(?![a-z])", model_id)
    limits = {"qwen3": 8, "qwen-3": 8, "qwen": 7, "llama-3.2": 11, "llama3.2": 11}
    limit = next((limit for name, limit in limits.items() if name in model_id), 0)
    return bool(sizes) and float(sizes[-1]) < limit


def _rope_parameters(values: Mapping) -> dict:
    """One dict of rope_theta, rope_type and its numbers, from any of the places they are kept."""
    rope = dict(values.get("rope_parameters") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, values.get(key))
    if "rope_scaling" in values:  # the config's own word, even None, wins over exo's factor
        rope.update(values["rope_scaling"] or {})
    elif values.get("rope_scaling_factor", 1) != 1:
        rope |= {"rope_type": "llama3", "factor": values["rope_scaling_factor"]}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
    return rope


def _rope_scaling(rope: Mapping) -> RopeScaling | None:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return None
    if rope_type not in ("llama3", "linear"):
        raise ValueError(f"rope_type must be default, linear or llama3, got {rope_type!r}")
    keys = ["factor"]
    if rope_type == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [key for key in keys if rope.get(key) is None]
    if missing:
        raise ValueError(f"rope_scaling of type {rope_type} must have {', '.join(missing)}")
    return RopeScaling(rope_type, **{key: rope[key] for key in keys})


def _windowed_layers(values: Mapping, model_type: str) -> tuple[int, ...]:
    """Global indices of the layers with a sliding window, by each family's own rule."""
    layers = range(values["num_hidden_layers"])
    if values.get("sliding_window") is None:
        return ()
    if model_type == "mistral":
        return tuple(layers)
    if not model_type.startswith("qwen") or not values.get("use_sliding_window"):
        return ()
    if values.get("layer_types") is not None:
        return tuple(i for i in layers if values["layer_types"][i] == "sliding_attention")
    return tuple(i for i in layers if i >= values.get("max_window_layers", 0))
