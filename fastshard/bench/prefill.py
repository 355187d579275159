"""``bench prefill``: the attention, the MLP and all layers of a model on a prompt.

Of a whole model every variant computes the logits of the last position only, and fills a cache.
"""

import itertools
from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastshard.bench import mlp, prefill_attention
from fastshard.bench.attention import BACKENDS, HEADS
from fastshard.bench.case import Bench, Call, Case, Problem, Unavailable, Variant
from fastshard.bench.decode import decode_bytes, random_model
from fastshard.bench.plain_decoder import PlainDecoder
from fastshard.bench.plain_prefill import PlainPrefill
from fastshard.bench.presets import preset
from fastshard.bench.timing import BurstRun
from fastshard.bench.torchtune_peer import TorchtuneDecoder
from fastshard.decode.static import capture
from fastshard.models import ModelConfig

ATTENTIONS = (
    ("causal", 2048, HEADS),
    ("causal", 8192, HEADS),
    ("causal", 2048, (32, 8, 64)),
    ("full", 2048, HEADS),
    ("mask", 2048, HEADS),
)
"""Rules, tokens and ``(num_qo_heads, num_kv_heads, head_dim)`` of the goals."""
MLPS = ((4096, 14336), (2048, 8192))
"""``(hidden_size, intermediate_size)`` of the goals."""
MODELS = ("llama-3.1-8b", "llama-3.2-1b")
TOKENS = 2048


def problems(bench: Bench) -> Iterator[Problem]:
    """The goal shapes, or the models, batches and lengths of prompts (contexts) asked for."""
    settings = bench.settings
    lengths, batches = settings.contexts or (TOKENS,), settings.batches or (1,)
    attentions, mlps = ATTENTIONS, MLPS
    if settings.models is not None:
        configs = [preset(name) for name in settings.models]
        heads = [(config.num_heads, config.num_kv_heads, config.head_dim) for config in configs]
        attentions = itertools.product(prefill_attention.RULES, lengths, heads)
        mlps = [(config.hidden_size, config.intermediate_size) for config in configs]
    elif settings.contexts is not None:
        attentions = itertools.product(prefill_attention.RULES, lengths, [HEADS])

    for (rule, tokens, heads), batch in itertools.product(attentions, batches):
        rows = "" if batch == 1 else f", b{batch}"
        shape = "attn {} {}/{} d{}, {} tokens{}".format(rule, *heads, tokens, rows)
        make = partial(prefill_attention.case, bench, shape, rule, batch, tokens, *heads)
        yield Problem("prefill", shape, lambda make=make: [make()])
    for (hidden_size, intermediate_size), batch, tokens in itertools.product(
        mlps, batches, lengths
    ):
        shape = f"mlp {batch * tokens} x {hidden_size} x {intermediate_size}"
        make = partial(
            mlp.case,
            bench,
            shape,
            batch * tokens,
            hidden_size,
            intermediate_size,
            name="prefill",
            limit="mma",
        )
        yield Problem("prefill", shape, lambda make=make: [make()])
    cut = "" if settings.num_layers is None else f", {settings.num_layers} layers"
    for name, batch, tokens in itertools.product(settings.models or MODELS, batches, lengths):
        shape = f"{name}{cut}, b{batch}, {tokens} tokens"
        make = partial(_model_case, bench, shape, name, batch, tokens)
        yield Problem("prefill", shape, lambda make=make: [make()])


def prefill_flops(config: ModelConfig, batch: int, num_tokens: int) -> int:
    """Of the matrices, the causal attention, and the head of the last position."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * q_rows + 2 * kv_rows + 3 * config.intermediate_size)
    layer = num_tokens * layer + num_tokens * (num_tokens + 1) // 2 * 2 * q_rows
    return 2 * batch * (config.num_layers * layer + config.vocab_size * config.hidden_size)


def memory_goal(config: ModelConfig, batch: int, num_tokens: int, itemsize: int) -> int:
    """Bytes above weights and cache: residual, normed input and the MLP's hidden, and 10 %."""
    row = 2 * config.hidden_size + config.intermediate_size
    return batch * num_tokens * row * itemsize * 11 // 10


def _model_case(bench: Bench, shape: str, name: str, batch: int, num_tokens: int) -> Case:
    settings = bench.settings
    config = preset(name, num_layers=settings.num_layers, max_seq_len=num_tokens)
    model = random_model(config, batch, num_tokens, bench.device, settings.dtype)
    plain = PlainPrefill(PlainDecoder(model.model, batch, num_tokens))
    tokens = torch.randint(config.vocab_size, (batch, num_tokens), device=bench.device)
    backend = cache(partial(_fastest_backend, bench, config, batch, num_tokens))

    def ours(index: int) -> Tensor:
        return model.generate(tokens, num_logits=1)[1][:, 0]

    def graph() -> Call:
        """What the GPU takes alone: the calls of one captured prompt."""
        if bench.device.type == "cpu":
            raise Unavailable("a CUDA graph needs a GPU, got cpu")
        outputs = []
        ours(0)  # what is set up on a first call must not be captured
        replay = capture(lambda: outputs.append(ours(0)), bench.device)

        def call(index: int) -> Tensor:
            replay()
            return outputs[0]

        return call

    def torchtune() -> Call:
        decoder = TorchtuneDecoder(model.model, batch, num_tokens)
        return lambda index: decoder.prefill(tokens)

    def peer(kind: str) -> Call:
        peer = plain.using(backend())
        function = peer if kind == "eager" else bench.compiled(peer)

        @torch.no_grad()
        def call(index: int) -> Tensor:
            return function(tokens)

        return call

    return Case(
        name="prefill",
        shape=shape,
        dtype=settings.dtype,
        num_bytes=decode_bytes(config, batch, num_tokens, settings.dtype.itemsize),
        flops=prefill_flops(config, batch, num_tokens),
        golden=lambda: plain.golden(tokens),
        variants=[
            Variant("fastshard", lambda: ours, is_peer=False),
            Variant("fastshard graph", graph, is_peer=False),
            *bench.peers(
                {kind: partial(peer, kind) for kind in ("eager", "compile")}
                | {"torchtune": torchtune}
            ),
        ],
        make_run=BurstRun,
        limit="mma",
        memory_goal=memory_goal(config, batch, num_tokens, settings.dtype.itemsize),
    )


def _fastest_backend(
    bench: Bench, config: ModelConfig, batch: int, num_tokens: int
) -> SDPBackend | None:
    """Of PyTorch's attention on this shape; None, its own choice, where not on a GPU."""
    if bench.device.type != "cuda":
        return None
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    case = prefill_attention.case(bench, "", "causal", batch, num_tokens, *heads)
    runs = {}
    for variant in case.variants:
        backend = BACKENDS.get(variant.name.removeprefix("sdpa "))
        if backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                runs[backend] = case.make_run(variant.prepare())
            except RuntimeError:  # not on this device, or not of this head_dim
                continue
    times = bench.stopwatch.measure(runs, rounds=5)
    return min(times, key=lambda backend: times[backend].us, default=None)
