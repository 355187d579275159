"""The peer ``torchtune``: its own modules on our weights, in eager PyTorch as its recipes run them;
and the same modules accelerated.

Needs the ``torchtune`` extra; where it is missing, variants are skipped with that reason.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from fastshard.bench.case import Unavailable
from fastshard.models import ModelConfig
from fastshard.models.decoder import ShardTransformerDecoder


def feed_forward(gate_up: Tensor, down: Tensor) -> nn.Module:
    """torchtune's ``FeedForward``, silu, of shared weights.

    Args:
        gate_up: ``[2 * intermediate_size, hidden_size]``, all of gate, then all of up.
        down: ``[hidden_size, intermediate_size]``.

    Raises:
        Unavailable: torchtune is not installed.
    """
    with _torchtune() as modules:
        module = _feed_forward(modules, *down.shape)
    gate, up = gate_up.chunk(2)
    weights = {"w1.weight": gate, "w3.weight": up, "w2.weight": down}
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False)


def rms_norm(weight: Tensor, eps: float) -> nn.Module:
    """torchtune's ``RMSNorm`` of a shared ``weight``.

    Raises:
        Unavailable: torchtune is not installed.
    """
    with _torchtune() as modules:
        module = modules.RMSNorm(len(weight), eps)
    module.load_state_dict({"scale": weight}, assign=True)
    return module.requires_grad_(False)


class TorchtuneDecoder:
    """torchtune's ``TransformerDecoder`` of a whole model, with caches as its ``setup_caches`` has.

    Args:
        model: Of all layers, with caches. Weights are shared; of MLPs, which it packs, copied.
        batch_size: b.
        slots: Of the caches, which hold what the model's first ones hold.
        is_accelerated: By ``fastshard.integrations.torchtune``: weights are copied once more.
        is_captured: Then steps go through its ``CapturedStep``.

    Raises:
        Unavailable: torchtune is not installed, or has no such model.
    """

    def __init__(
        self,
        model: ShardTransformerDecoder,
        batch_size: int,
        slots: int,
        *,
        is_accelerated: bool = False,
        is_captured: bool = False,
    ):
        self._decoder = decoder(model.config, model.device)
        state = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        self._decoder.load_state_dict(state, assign=True)
        self._decoder.requires_grad_(False).eval()
        self._is_accelerated = is_accelerated
        self._run: Callable[..., Tensor] = self._decoder
        if is_accelerated:
            from fastshard.integrations.torchtune import CapturedStep, accelerate

            accelerate(self._decoder)
            if is_captured:
                self._run = partial(CapturedStep().logits, self._decoder)
        with model.device:
            self._decoder.setup_caches(batch_size, model.dtype, decoder_max_seq_len=slots)
        # Rows of one tensor: all layers go back by one copy, not by one each
        self._positions = torch.zeros(len(self._decoder.layers), slots, dtype=torch.int64)
        self._positions = self._positions.to(model.device)
        for ours, layer, row in zip(
            model.layers.values(), self._decoder.layers, self._positions, strict=True
        ):
            cache, held = layer.attn.kv_cache, ours.attn.kv_cache
            cache.k_cache.copy_(held.k_cache[:batch_size, :, :slots])
            cache.v_cache.copy_(held.v_cache[:batch_size, :, :slots])
            cache.cache_pos = row
        self._all = torch.arange(slots, device=model.device)
        visible = self._all[:, None] >= self._all
        self._mask = visible.expand(batch_size, -1, -1)  # [b, slots, slots]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits of the last slot's tokens: ``[b]`` int64 to ``[b, vocab_size]`` float32."""
        last = len(self._all) - 1
        self._start_at(last)
        mask, positions = self._mask[:, last:], self._all[None, last:]
        logits = self._run(tokens=tokens[:, None], mask=mask, input_pos=positions)
        return logits[:, 0]

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits of the last position of ``[b, slots]`` int64: ``[b, vocab_size]`` float32."""
        self._start_at(0)
        x = self._decoder.tok_embeddings(tokens)  # [b, slots, hidden_size]
        for layer in self._decoder.layers:
            x = layer(x, mask=self._mask, input_pos=self._all[None])
        return self._decoder.unembed(x[:, -1:])[:, 0]

    def _start_at(self, slot: int) -> None:
        """Let the caches hold ``slot`` tokens."""
        self._positions.copy_(self._all + slot)
        if self._is_accelerated:
            for layer in self._decoder.layers:
                layer.attn.kv_cache.assume(slot)


@contextmanager
def _torchtune() -> Iterator[ModuleType]:
    """``torchtune.modules``, whose parameters are built without memory."""
    try:
        from torchtune import modules
    except ImportError as error:
        raise Unavailable(
            f"torchtune cannot be imported ({error}): pip install 'fastshard[torchtune]'"
        ) from None
    with torch.device("meta"):
        yield modules


def decoder(config: ModelConfig, device: torch.device) -> nn.Module:
    """A ``TransformerDecoder`` as torchtune's component builders make it, with weights on meta.

    Args:
        config: Of the model.
        device: Of what is not in its state dict.

    Raises:
        Unavailable: torchtune is not installed, or has no such model.
    """
    if config.hidden_act != "silu" or config.qk_norm or config.rotary_dim != config.head_dim:
        raise Unavailable("torchtune has no such model")
    with _torchtune() as modules:
        with device:
            rope = _rope(modules, config)
        tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            from torchtune.modules.tied_linear import TiedLinear

            head: Callable = TiedLinear(tokens)
        else:
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        return modules.TransformerDecoder(
            tok_embeddings=tokens,
            layers=nn.ModuleList(_layer(modules, config, rope) for _ in range(config.num_layers)),
            max_seq_len=config.max_seq_len,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            norm=modules.RMSNorm(config.hidden_size, config.norm_eps),
            output=head,
        )


def _layer(modules: ModuleType, config: ModelConfig, rope: nn.Module) -> nn.Module:
    hidden_size, eps = config.hidden_size, config.norm_eps
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = modules.MultiHeadAttention(
        embed_dim=hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        q_proj=nn.Linear(hidden_size, q_rows, bias=config.qkv_bias),
        k_proj=nn.Linear(hidden_size, kv_rows, bias=config.qkv_bias),
        v_proj=nn.Linear(hidden_size, kv_rows, bias=config.qkv_bias),
        output_proj=nn.Linear(q_rows, hidden_size, bias=config.output_bias),
        pos_embeddings=rope,
        max_seq_len=config.max_seq_len,
    )
    return modules.TransformerSelfAttentionLayer(
        attn=attention,
        mlp=_feed_forward(modules, hidden_size, config.intermediate_size),
        sa_norm=modules.RMSNorm(hidden_size, eps),
        mlp_norm=modules.RMSNorm(hidden_size, eps),
    )


def _feed_forward(modules: ModuleType, hidden_size: int, intermediate_size: int) -> nn.Module:
    return modules.FeedForward(
        gate_proj=nn.Linear(hidden_size, intermediate_size, bias=False),
        up_proj=nn.Linear(hidden_size, intermediate_size, bias=False),
        down_proj=nn.Linear(intermediate_size, hidden_size, bias=False),
    )


def _rope(modules: ModuleType, config: ModelConfig) -> nn.Module:
    from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
    from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings

    sizes = (config.head_dim, config.max_seq_len, config.rope_base)
    scaling = config.rope_scaling
    if scaling is None:
        if config.rope_interleaved:
            return modules.RotaryPositionalEmbeddings(*sizes)
        return Qwen2RotaryPositionalEmbeddings(*sizes)
    if scaling.rope_type != "llama3" or not config.rope_interleaved:
        raise Unavailable("torchtune has no such model")
    return Llama3ScaledRoPE(
        *sizes,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
