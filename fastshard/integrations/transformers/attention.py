"""Attention and mask function ``fastshard`` of transformers' interfaces.

Any model that reads ``ALL_ATTENTION_FUNCTIONS`` can ask for them: ``attn_implementation=
"fastshard"``. What the mask function gives is one of these:

* None: causal. Of more keys than queries, and more than one query, only the first keys count: a new
  prompt in a static cache. (So ``sdpa`` means it, too.)
* A span, ``[b, 1, 1, 2]`` int64: causal from the first key to the end, the last query's own key,
  without a tensor of queries by keys.
* A bool mask ``[b, 1, s, S]``, True = attend: all else.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from fastshard import ops

NAME = "fastshard"
# Model types whose layers pass their masks and sliding windows on to the attention function.
WINDOWED = {"llama", "mistral", "qwen2", "qwen3"}
_UNSUPPORTED = ("position_bias", "s_aux", "cu_seq_lens_q", "block_table")


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do, for inference.

    Args:
        module: Its ``is_causal`` counts where the argument is None.
        query: ``[b, num_qo_heads, s, head_dim]``.
        key: ``[b, num_kv_heads, S, head_dim]``.
        value: Shape of ``key``.
        attention_mask: What ``mask`` gave, or ``[b | 1, 1, s, S]``, bool or floating (added).
        dropout: 0.
        scaling: By default ``head_dim ** -0.5``.
        is_causal: What no mask means.
        sliding_window: Keys that a query sees; a part of the causal rule, not of a mask.
        softcap: As in :func:`fastshard.ops.attention`.

    Returns:
        ``[b, s, num_qo_heads, head_dim]`` and None, as no weights are kept.

    Raises:
        ValueError: dropout, attention weights or another feature that the kernels lack is asked
            for; or a mask of another form.
        RuntimeError: a gradient is asked for.
    """
    if dropout:
        raise ValueError(f"dropout must be 0 for attention {NAME!r}, got {dropout}{_OTHERS}")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None for attention {NAME!r}{_OTHERS}")
    check_no_weights(kwargs)
    check_no_gradient(query, key, value)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    options = {"softcap": softcap, "softmax_scale": scaling}
    return attend(q, k, v, attention_mask, is_causal, window=sliding_window, **options), None


_OTHERS = "; attn_implementation 'eager' or 'sdpa' can do it"


def check_no_weights(kwargs: dict) -> None:
    """Raise where the caller wants attention weights."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"output_attentions must be False for attention {NAME!r}, which keeps no weights"
            "; attn_implementation 'eager' can do it"
        )


def check_no_gradient(*tensors: Tensor) -> None:
    """Raise where autograd would have to go through a kernel."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"attention {NAME!r} computes no gradients: call it under torch.no_grad(), "
            "or train with attn_implementation 'eager' or 'sdpa'"
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool = True,
    *,
    window: int | None = None,
    kv_lengths: Tensor | None = None,
    **options,
) -> Tensor:
    """Attend by the rules that a mask of this module stands for.

    Args:
        q: ``[b, s, num_qo_heads, head_dim]``.
        k: ``[b, S, num_kv_heads, head_dim]``.
        v: Shape of ``k``.
        mask: As ``attention_mask`` of :func:`attention`.
        is_causal: What None means.
        window: Counts where the rule is causal.
        kv_lengths: ``[b]``, keys in use where a static cache knows them; else a span says it.
        options: Further keywords of :func:`fastshard.ops.attention`.

    Returns:
        ``[b, s, num_qo_heads, head_dim]``.
    """
    b, s = q.shape[:2]
    if mask is None:
        if is_causal and kv_lengths is None and 1 < s < k.shape[1]:
            k, v = k[:, :s], v[:, :s]
        window = window if is_causal else None
        return ops.attention(
            q, k, v, causal=is_causal, kv_lengths=kv_lengths, window=window, **options
        )
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask must be [1 or {b}, 1, {s}, keys], one for all heads, "
            f"got shape {list(mask.shape)}"
        )
    if mask.dtype != torch.int64:
        return ops.attention(q, k, v, mask=mask[:, 0], kv_lengths=kv_lengths, **options)
    if mask.shape[2:] != (1, 2):
        raise ValueError(f"attention_mask must be bool or floating, got {mask.dtype}")
    first_key, end = mask[:, 0, 0].expand(b, 2).unbind(1)
    kv_lengths = end if kv_lengths is None else kv_lengths
    rules = {"kv_lengths": kv_lengths, "first_key": first_key, "window": window}
    return ops.attention(q, k, v, causal=True, **rules, **options)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> Tensor | None:
    """Make a mask as transformers' mask functions do, but as little of it as the kernels need.

    A read from the device finds padding on the left, once a call where there is an
    ``attention_mask``; not while a compiler or a CUDA graph records.

    Args:
        batch_size: b.
        q_length: s.
        kv_length: S, the keys that attention gets.
        q_offset: Tokens before the first query; on the device for a static cache.
        kv_offset: Tokens before the first of those keys.
        mask_function: The rule; of another than the causal one a full mask is made.
        attention_mask: ``[b, tokens]``, False = padding.
        local_size: Size of the sliding window, or of a chunk.
        allow_is_causal_skip: False where the caller changed the rule.
        device: Of the mask.
        config: The model's.

    Returns:
        See the head of this module.
    """
    full = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "device": device,
        **kwargs,
    }
    is_causal = mask_function is causal_mask_function
    is_known = getattr(config, "model_type", None) in WINDOWED
    if q_length == 1:
        if not is_causal:
            return sdpa_mask(**full, allow_is_causal_skip=False)
        # transformers wants a whole mask for a static cache, for the sake of its compiler.
        may_be_short = allow_is_causal_skip or is_known
        of_keys = (attention_mask, may_be_short, device)
        return _single_query_mask(batch_size, kv_length, q_offset, *of_keys)
    is_windowed = local_size is not None and is_known
    is_plain = allow_is_causal_skip and (is_causal or is_windowed)
    is_traced = any(isinstance(t, Tensor) and is_tracing(t) for t in (q_offset, attention_mask))
    if is_traced or not is_plain:
        return sdpa_mask(**full, allow_is_causal_skip=allow_is_causal_skip)
    sizes = (batch_size, q_length, kv_length, int(q_offset), kv_offset)
    is_short, short = _short_mask(*sizes, attention_mask, device)
    return short if is_short else sdpa_mask(**full, allow_is_causal_skip=False)


def _short_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> tuple[bool, Tensor | None]:
    """Whether None or a span says the causal rule with this padding; and which."""
    end = q_offset + q_length - kv_offset
    first_key, is_padded = torch.zeros(batch_size, dtype=torch.int64, device=device), False
    if attention_mask is not None:
        is_kept = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        is_kept = is_kept[:, kv_offset : kv_offset + end].bool()
        first_key, is_left, is_padded = _padding(is_kept, end)
        if not is_left:
            return False, None
    if q_offset == 0 and not is_padded:
        return True, None
    return True, _span(first_key, end, batch_size)


def _padding(is_kept: Tensor, end: int | Tensor) -> tuple[Tensor, bool, bool]:
    """The first key of each row, whether all padding is on the left, and whether there is any.

    Args:
        is_kept: ``[b, S]``, False = padding, and from ``end`` on.
        end: One past the last key.
    """
    keys = torch.arange(is_kept.shape[1], device=is_kept.device)
    first_key = end - is_kept.sum(-1)
    is_left = is_kept == ((keys >= first_key[:, None]) & (keys < end))
    return first_key, *torch.stack([is_left.all(), first_key.any()]).tolist()


def _single_query_mask(
    batch_size: int,
    kv_length: int,
    q_offset: int | Tensor,
    attention_mask: Tensor | None,
    may_be_short: bool,
    device: torch.device | str,
) -> Tensor | None:
    """The causal rule and padding of one query a row, ``[b, 1, 1, S]`` bool, a span or None."""
    is_last = isinstance(q_offset, int) and q_offset + 1 >= kv_length
    end = kv_length if is_last else q_offset + 1
    first_key, is_padded = torch.zeros((), dtype=torch.int64, device=device), False
    if attention_mask is not None or not may_be_short:
        is_kept = torch.arange(kv_length, device=device) < end
        if attention_mask is not None:
            is_kept = is_kept & prepare_padding_mask(attention_mask, kv_length, 0)[:, :kv_length]
        is_kept = is_kept.expand(batch_size, kv_length)
        if not may_be_short or _is_recorded(q_offset, attention_mask):
            return is_kept[:, None, None]
        first_key, is_left, is_padded = _padding(is_kept, end)
        if not is_left:
            return is_kept[:, None, None]
    return None if is_last and not is_padded else _span(first_key, end, batch_size)


def _span(first_key: Tensor, end: int | Tensor, batch_size: int) -> Tensor:
    """``[b, 1, 1, 2]`` int64, from ``first_key``, ``[b]`` or 0-d, and ``end``, 0-d."""
    end = torch.as_tensor(end, device=first_key.device, dtype=torch.int64)
    both = [tensor.expand(batch_size) for tensor in (first_key, end)]
    return torch.stack(both, dim=-1)[:, None, None]


def _is_recorded(*tensors: Tensor | int | None) -> bool:
    """Whether a compiler or a CUDA graph records this: nothing may be read back."""
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if any(is_tracing(tensor) for tensor in tensors):
        return True
    return any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()
