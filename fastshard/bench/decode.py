"""``bench decode``: one whole decode step of a model, tokens in, logits out; and with sampling.

Weights and cache are random. Without sampling every variant computes the token at slot
``context - 1``, over and over: the appended key is overwritten, and each step reads ``context``
keys a row. With sampling the peers do the same on the token that they chose last, while ours are
the steps that ``generate`` takes: they go on to the next slots, at most ``GREEDY_STEPS``, and start
again.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastshard.bench.case import Bench, Call, Case, Problem, Unavailable, Variant
from fastshard.bench.plain_decoder import PlainDecoder
from fastshard.bench.presets import preset
from fastshard.bench.timing import BurstRun
from fastshard.bench.torchtune_peer import TorchtuneDecoder
from fastshard.decode import start_decoding
from fastshard.decode.modes import choose_mode
from fastshard.decode.shard_step import ShardStep
from fastshard.models import ModelConfig, Shard, ShardedGeneralModel
from fastshard.nn import KVCache
from fastshard.sampling import Sampling

PROBLEMS = (("llama-3.2-1b", 1), ("llama-3.2-1b", 8), ("llama-3.1-8b", 1), ("qwen2.5-0.5b", 1))
"""Models and batches of the goals."""
COMPILED = (("llama-3.2-1b", 1), ("qwen2.5-0.5b", 1))
"""Where peers are compiled, which takes long, unless all are asked for."""
COMPILERS = {
    "compile": {"mode": "reduce-overhead"},
    # gpt-fast's settings: products of one row become reductions, which are tuned one by one
    "autotune": {"options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}},
}
CONTEXT = 1024
GREEDY_STEPS = 128

Step = Callable[[Tensor], Tensor]
"""Tokens, ``[b]`` int64, to logits, ``[b, vocab_size]`` float32."""


def problems(bench: Bench) -> Iterator[Problem]:
    """The goal shapes, or the models, batches and contexts asked for."""
    models, batches = bench.settings.models, bench.settings.batches
    pairs = PROBLEMS
    if models is not None or batches is not None:
        models = models or tuple(dict.fromkeys(model for model, _ in PROBLEMS))
        pairs = tuple(itertools.product(models, batches or (1,)))
    layers = bench.settings.num_layers
    for (name, batch), context in itertools.product(pairs, bench.settings.contexts or (CONTEXT,)):
        cut = "" if layers is None else f", {layers} layers"
        shape = f"{name}{cut}, b{batch}, {context} keys"
        yield Problem("decode", shape, partial(_cases, bench, shape, name, batch, context))


def decode_bytes(config: ModelConfig, batch: int, context: int, itemsize: int) -> int:
    """Least traffic of a step: every weight read once, every key and value read or written once.

    Of an embedding that is not the head, the rows of the tokens; the logits are written in float32.
    """
    hidden_size, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    matrices = hidden_size * (2 * q_rows + 2 * kv_rows + 3 * config.intermediate_size)
    vectors = 2 * hidden_size + config.qk_norm * 2 * head_dim
    vectors += config.qkv_bias * (q_rows + 2 * kv_rows) + config.output_bias * hidden_size
    keys = 2 * batch * context * kv_rows
    layers = config.num_layers * (matrices + vectors + keys)
    ends = hidden_size + config.vocab_size * hidden_size + batch * hidden_size
    return (layers + ends) * itemsize + 4 * batch * config.vocab_size


def decode_flops(config: ModelConfig, batch: int, context: int) -> int:
    """Of the matrices and the attention of a step; a multiply-add counts as two."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * q_rows + 2 * kv_rows + 3 * config.intermediate_size)
    layer += 2 * q_rows * context
    return 2 * batch * (config.num_layers * layer + config.vocab_size * config.hidden_size)


def random_model(
    config: ModelConfig, batch: int, slots: int, device: torch.device, dtype: torch.dtype
) -> ShardedGeneralModel:
    """All layers with random weights, and caches of random keys and values in all slots."""
    shard = Shard("random", 0, config.num_layers - 1, config.num_layers)
    model = ShardedGeneralModel(config, shard, device, dtype, use_cache=True)
    model.model.setup_caches(batch, dtype, decoder_max_seq_len=slots)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # matrices are random already
                parameter.normal_(1.0 if name.endswith("scale") else 0.0, 0.1)
        for cache in _caches(model):
            cache.k_cache.normal_()
            cache.v_cache.normal_()
    return model


def _caches(model: ShardedGeneralModel) -> list[KVCache]:
    return [layer.attn.kv_cache for layer in model.model.layers.values()]


def _cases(bench: Bench, shape: str, name: str, batch: int, context: int) -> Iterator[Case]:
    """The step without and with sampling, of one model that is built once."""
    settings, device = bench.settings, bench.device
    slots = min(context + GREEDY_STEPS, preset(name).max_seq_len)
    config = preset(name, num_layers=settings.num_layers, max_seq_len=slots)
    num_bytes = decode_bytes(config, batch, context, settings.dtype.itemsize)
    bench.limits.read(num_bytes)  # while memory is free
    model = random_model(config, batch, slots, device, settings.dtype)
    plain = PlainDecoder(model.model, batch, context)
    tokens = torch.randint(config.vocab_size, (batch,), device=device)
    position = torch.full((1,), context - 1, device=device)
    golden = plain.golden(tokens, position)
    steps: dict[str, Step] = {}  # of the peers, prepared without sampling, for both

    def peer(kind: str, sampled: bool) -> Call:
        if kind not in steps:
            if sampled:
                raise Unavailable("see the step without sampling")
            if kind == "compile" and (name, batch) not in COMPILED and not settings.compiles_all:
                raise Unavailable("compiled for this model and batch only with --compile-all")
            if kind == "eager":
                steps[kind] = lambda tokens: plain(tokens, position)
            elif kind.endswith("torchtune"):
                how = {"is_accelerated": kind != "torchtune", "is_captured": "captured" in kind}
                steps[kind] = TorchtuneDecoder(model.model, batch, context, **how).step
            else:
                steps[kind] = _compiled(bench, plain, tokens, position, **COMPILERS[kind])
        return _call(steps[kind], tokens, sampled)

    def ours(mode: str, sampled: bool) -> Call:
        chosen, reason = choose_mode(mode, [model], batch)
        if chosen != mode:
            raise Unavailable(reason)
        if sampled:
            return Generating(model, tokens, context, mode)
        return _call(own_step(model, mode, batch, context), tokens, False)

    peers = ("eager", *COMPILERS, "torchtune")
    own = {f"fastshard {mode}": partial(ours, mode) for mode in settings.modes}
    if "torchtune" in settings.peers:
        own["fastshard torchtune"] = partial(peer, "accelerated torchtune")
        own["fastshard torchtune graph"] = partial(peer, "captured torchtune")
    for sampled in (False, True):
        yield Case(
            name="decode",
            shape=f"{shape}, greedy" if sampled else shape,
            dtype=settings.dtype,
            num_bytes=num_bytes,
            flops=decode_flops(config, batch, context),
            golden=lambda sampled=sampled: golden.amax(-1) if sampled else golden,
            variants=[
                *(
                    Variant(name, partial(prepare, sampled), is_peer=False)
                    for name, prepare in own.items()
                ),
                *bench.peers({kind: partial(peer, kind, sampled) for kind in peers}),
            ],
            make_run=BurstRun,
            # of chosen tokens, how far float64's logits of them are below the largest
            compared=(lambda out: _logits_of(out, golden)) if sampled else (lambda out: out),
        )


def _logits_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Of ``logits``, ``[b, vocab_size]``, those of ``tokens``, ``[b]``."""
    return logits.gather(1, tokens[:, None])[:, 0]


def _call(step: Step, tokens: Tensor, sampled: bool) -> Call:
    """Logits of the same tokens each time; or each time of the likeliest tokens, which it gives."""
    state = tokens

    @torch.no_grad()
    def call(index: int) -> Tensor:
        nonlocal state
        logits = step(state)
        if not sampled:
            return logits
        state = logits.argmax(-1)
        return state

    return call


def _compiled(
    bench: Bench, plain: PlainDecoder, tokens: Tensor, position: Tensor, **settings
) -> Step:
    """The step as gpt-fast has it: static caches, one graph, attention left to the compiler."""
    function = bench.compiled(plain.copied("matmul"), **settings)

    def step(tokens: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return function(tokens, position)

    with torch.no_grad():
        for _ in range(3):  # compile, record, replay
            step(tokens)
    return step


def own_step(model: ShardedGeneralModel, mode: str, batch: int, context: int) -> Step:
    """The step of one of our modes at slot ``context - 1``, without sampling.

    On a GPU ``persistent`` and ``graph`` are replays of a CUDA graph, as in ``generate``.
    """
    slots = torch.full((batch,), context - 1, device=model.device)
    shard_step = ShardStep(model, slots, slots, slots + 1, None)
    if mode == "eager":
        return shard_step.by_layers
    launch = shard_step.persistent if mode == "persistent" else shard_step.by_layers
    return Captured(launch, batch, model.device) if model.device.type == "cuda" else launch


class Generating:
    """The steps of ``generate``, from slot ``context - 1`` until the cache is full, then anew."""

    def __init__(self, model: ShardedGeneralModel, tokens: Tensor, context: int, mode: str):
        self._caches, self._mode = _caches(model), mode
        self._num_held, self._num_steps = context - 1, 0
        self._room = self._caches[0].max_seq_len - self._num_held
        self._start = partial(
            start_decoding,
            model,
            tokens,
            num_held=self._num_held,
            sampling=Sampling(),
            mode=mode,
        )
        model.model.advance(len(tokens), 0)  # the prompt's rows
        self._decoding = self._start()

    def __call__(self, index: int) -> Tensor:
        """Tokens ``[b]`` of the next step."""
        if self._num_steps == self._room:
            self._decoding, self._num_steps = self._start(), 0
        held = self._num_held + self._num_steps
        for cache in self._caches:  # other variants count in the same caches
            cache.size = held
        self._num_steps += 1
        tokens = self._decoding.step()
        if self._decoding.mode != self._mode:
            raise Unavailable(f"it fell back to {self._decoding.mode}")
        return tokens


class Captured:
    """``step`` in a CUDA graph. It is held: the graph reads and writes its buffers."""

    def __init__(self, step: Step, batch: int, device: torch.device):
        self._step = step
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            step(self.tokens)
            with torch.cuda.graph(self.graph):
                self._logits = step(self.tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self._logits
