"""Sampling of the next token, on the device.

CUDA kernel: csrc/sample, bound in csrc/ops/sample.cpp. The CPU reference is the specification; it
draws the same random bits, so that it picks the same token but for ties within rounding.
"""

import math

import torch
from torch import Tensor

from fastshard.ops._autograd import inference_only, refuse_gradients
from fastshard.ops._checks import check_device, check_dtype, check_floating, check_shape
from fastshard.ops._library import Cost, cost, define

MAX_VOCAB_SIZE = 2**24  # the kernel sums 40-bit masses in 64 bits: csrc/sample/sample.h
MASK = 0xFFFFFFFF  # a word of 32 bits

define(
    "sample(Tensor logits, Tensor step, int seed, float temperature, int top_k, float top_p,"
    " float min_p) -> Tensor"
)
inference_only("sample", "torch.multinomial")


def sample(
    logits: Tensor,
    step: Tensor,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one token a row, from the softmax of the logits after the filters.

    The token is a pure function of the row's logits, the row's index, ``seed``, ``step`` and the
    filters; neither the batch around the row nor the launch changes it. Filters apply in Hugging
    Face's order: temperature, top-k, top-p, min-p. Each is a lower bound on the logit, so logits
    that tie with the last kept one are kept too, and the largest logit is always kept.

    NaN counts as -inf, which is never drawn; a row of nothing else gives token 0. Where a logit is
    +inf, only such logits are drawn.

    Args:
        logits: ``[b, vocab_size]``, float32, float16 or bfloat16; any strides, the last 1.
        step: ``[]``, int64, on the device of ``logits``: index of the draw, e.g. of the token.
        seed: Of the random bits, in ``[0, 2**63)``.
        temperature: Divides the logits. 0 takes the largest logit (the lowest index of several)
            and ignores the filters.
        top_k: Keep the ``top_k`` largest logits; 0 keeps all.
        top_p: Keep the fewest largest probabilities whose sum reaches ``top_p``; 1 keeps all.
        min_p: Keep probabilities of at least ``min_p`` times the largest; 0 keeps all.

    Returns:
        ``[b]``, int64.

    Raises:
        ValueError: ``logits`` is no matrix with unit last stride, or has no or above 2**24 columns;
            ``step`` is not ``[]`` or not on the device of ``logits``; a number is out of range or
            not finite.
        TypeError: ``logits`` or ``step`` has another dtype, or ``seed`` or ``top_k`` is no int.
        RuntimeError: ``logits`` require a gradient, which tokens do not have.

    Source: Gumbel-max as in Maddison, Tarlow & Minka 2014; bits from Philox4x32-10, Salmon et al.
    2011; min-p from Nguyen et al. 2024.
    """
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(
            "logits must be [batch, vocab_size >= 1] with unit last stride, "
            f"got shape {list(logits.shape)} and strides {list(logits.stride())}"
        )
    if logits.shape[1] > MAX_VOCAB_SIZE:
        raise ValueError(
            f"logits must have at most {MAX_VOCAB_SIZE} columns, got {logits.shape[1]}"
        )
    check_dtype("step", step, torch.int64)
    check_device("step", step, logits.device)
    check_shape("step", step, ())
    _check_filters(seed, temperature, top_k, top_p, min_p)
    if torch.is_grad_enabled():
        refuse_gradients("sample", logits=logits)
    return torch.ops.fastshard.sample.default(
        logits, step, seed, float(temperature), top_k, float(top_p), float(min_p)
    )


def _check_filters(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    for name, value in (("seed", seed), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} must be in [0, 2**63), got {value}")
    # Written so that NaN, of which every comparison is false, raises too.
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


@torch.library.register_fake("fastshard::sample")
def _(
    logits: Tensor,
    step: Tensor,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def sample_reference(
    logits: Tensor,
    step: Tensor,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    x = logits.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if temperature == 0:
        return _first_maximum(x)
    largest = x.amax(dim=1, keepdim=True)
    # The largest becomes 0, also where it is infinite: then inf - inf counts as 0. Temperatures
    # above 2**125 act as 2**125, whose inverse is a normal float32.
    inverse_temperature = 1 / min(temperature, 2.0**125)
    scaled = torch.where(x == largest, 0.0, (x - largest) * inverse_temperature)
    scaled = scaled.masked_fill(x == -math.inf, -math.inf)
    if 0 < top_k < x.shape[1]:
        kth_largest = scaled.topk(top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth_largest, -math.inf)
    if top_p < 1:
        scaled = scaled.masked_fill(scaled < _top_p_bound(scaled, top_p), -math.inf)
    if min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(min_p), -math.inf)
    row = torch.arange(x.shape[0])
    bits = random_bits(seed, int(step), row, x.shape[1])
    return _first_maximum(scaled + _gumbel(bits))


torch.library.impl("fastshard::sample", "cpu", sample_reference)


def _first_maximum(x: Tensor) -> Tensor:
    """Index of the first largest element of each row."""
    index = torch.arange(x.shape[1]).expand_as(x)
    largest = x.amax(dim=1, keepdim=True)
    return index.masked_fill(x != largest, x.shape[1]).amin(dim=1)


def _top_p_bound(scaled: Tensor, top_p: float) -> Tensor:
    """The smallest kept value of each row: the mass strictly above it is less than ``top_p``."""
    descending = scaled.sort(dim=1, descending=True).values
    probs = descending.double().softmax(dim=1)
    mass_before = probs.cumsum(dim=1) - probs
    num_kept = (mass_before < top_p).sum(dim=1, keepdim=True).clamp(min=1)
    return descending.gather(1, num_kept - 1)


def random_bits(seed: int, step: int, row: Tensor, num_tokens: int) -> Tensor:
    """32 random bits for each token of each row.

    Args:
        seed: The key of Philox, 64 bits.
        step: Words 2 and 3 of its counter, 64 bits.
        row: ``[b]``, int64, word 1 of its counter.
        num_tokens: Token ``t`` takes output word ``t % 4`` of the counter whose word 0 is
            ``t // 4``.

    Returns:
        ``[b, num_tokens]``, int64 in ``[0, 2**32)``.
    """
    word0, word1 = torch.broadcast_tensors(torch.arange((num_tokens + 3) // 4), row[:, None])
    words = (word0, word1, torch.full_like(word0, step & MASK), torch.full_like(word0, step >> 32))
    return philox4x32(words, (seed & MASK, seed >> 32)).flatten(1)[:, :num_tokens]


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 on int64 tensors whose values are words of 32 bits.

    Args:
        counter: Four words, each ``[...]``.
        key: Two words.

    Returns:
        ``[..., 4]``, int64 in ``[0, 2**32)``.

    Source: Salmon et al. 2011, section 4.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``factor * x``, both of 32 bits, without leaving 63 bits."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    total = high + (low >> 16)
    return total >> 16, (total & 0xFFFF) << 16 | low & 0xFFFF


def _gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise of 32 random bits, in float32.

    The largest noise decides, and it comes from u near 0, where float32 is finest.
    """
    u = bits.float() * 2.0**-32 + 2.0**-33
    u = u.clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


@cost("sample")
def _(
    logits: Tensor,
    step: Tensor,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Cost:
    return Cost(
        bytes=logits.numel() * logits.element_size() + 8 * logits.shape[0],
        flops=logits.numel(),
    )
