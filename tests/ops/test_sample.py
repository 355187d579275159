"""sample: the kept set against transformers' own filters, the drawn distribution, and purity."""

import math

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process

from fastshard import ops
from fastshard.ops.sample import MASK, philox4x32, sample_reference
from helpers import (
    CUDA_ONLY,
    KERNELS_ONLY,
    assert_compiles_once,
    assert_ignores_autocast,
    assert_refuses_gradients,
    assert_replays_in_a_graph,
    cuda_kernel_names,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Below and at one vector of 4, 8 elements; one, several and many rounds of a block; odd sizes.
VOCAB_SIZES = [1, 3, 8, 50, 1000, 4099, pytest.param(50257, marks=pytest.mark.large)]
QWEN_VOCAB_SIZE = pytest.param(151936, marks=pytest.mark.large)
FILTERS = [
    {"temperature": 0.7},
    {"temperature": 3.0, "top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"temperature": 2.5, "top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"temperature": 4.0, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.3, "top_k": 3, "top_p": 0.99},
    {"top_k": 2000, "top_p": 0.999, "min_p": 0.001},
    {"temperature": 3.0, "top_k": 40, "min_p": 0.6},
]


def kept_by_transformers(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """Bool ``[b, vocab_size]`` from the library's logits warpers, in the order it applies them."""
    scores = logits.float() / temperature
    if top_k:
        scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = logits_process.MinPLogitsWarper(min_p)(None, scores)
    kept = scores > -math.inf
    # Of tokens that tie at its bound, top-p's sort keeps any; ours keeps all.
    return logits >= logits.masked_fill(~kept, math.inf).amin(dim=1, keepdim=True)


def make_logits(b: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Rows of one spread in random orders; no ties but for those that rounding to 16 bit makes.

    The quantiles of a normal distribution, as logits are: a thin top over a wide bulk.
    """
    spread = 3 * torch.special.ndtri((torch.arange(vocab_size) + 0.5).double() / vocab_size)
    return torch.stack([spread[torch.randperm(vocab_size)] for _ in range(b)]).to(dtype)


def at_step(step: int, device: torch.device) -> Tensor:
    return torch.tensor(step, device=device)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    # The vectors that Random123 publishes for philox4x32-10.
    words = tuple(torch.tensor(word) for word in counter)
    assert tuple(philox4x32(words, key).tolist()) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_what_transformers_keeps_and_the_reference_picks(filters, vocab_size, dtype, device):
    logits = make_logits(6, vocab_size, dtype)
    step, seed = 2**33 + 5, 2**40 + 77  # high words that matter
    tokens = ops.sample(logits.to(device), at_step(step, device), seed=seed, **filters).cpu()
    assert tokens.dtype == torch.int64
    assert kept_by_transformers(logits, **filters).gather(1, tokens[:, None]).all()
    # Equal, not close: of two tokens, the chance to tie within rounding is below 1e-5 a row.
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    assert torch.equal(tokens, sample_reference(logits, torch.tensor(step), seed, **full))


def assert_distributed(tokens: Tensor, logits: Tensor, filters: dict) -> None:
    """Fail if the tokens, drawn from one row of logits, are no sample of its filtered softmax."""
    kept = kept_by_transformers(logits[None], **filters)[0]
    scaled = logits.double() / filters.get("temperature", 1.0)
    probs = scaled.masked_fill(~kept, -math.inf).softmax(0)
    counts = torch.bincount(tokens.cpu(), minlength=len(probs))
    assert counts[~kept].sum() == 0
    expected = len(tokens) * probs[kept]
    chi_square = ((counts[kept] - expected).square() / expected).sum().item()
    degrees = kept.sum().item() - 1  # the mean of chi_square; its variance is twice that
    assert chi_square <= degrees + 5 * math.sqrt(2 * degrees)


LOGITS = torch.tensor([1.0, -0.5, 0.25, 2.0, 1.5, -1.0, 0.0, 0.75, 1.25, -0.25, 0.5])


@pytest.mark.large
@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_distribution_over_rows(filters, device):
    logits = LOGITS.to(device).expand(20000, -1)
    tokens = ops.sample(logits, at_step(0, device), **filters)
    assert_distributed(tokens, LOGITS, filters)


@pytest.mark.large
@pytest.mark.parametrize("vary", ["step", "seed"])
def test_distribution_over_steps_and_seeds(vary, device):
    logits, filters = LOGITS.to(device)[None], {"top_p": 0.9}
    tokens = [
        ops.sample(
            logits,
            at_step(i if vary == "step" else 0, device),
            seed=i if vary == "seed" else 0,
            **filters,
        )
        for i in range(1500)
    ]
    assert_distributed(torch.cat(tokens), LOGITS, filters)


@pytest.mark.parametrize("filters", [{}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_a_row_does_not_depend_on_its_batch(filters, device):
    logits = make_logits(7, 300, torch.float32).to(device)
    together = ops.sample(logits, at_step(4, device), seed=3, **filters)
    for b in range(1, 7):
        assert torch.equal(
            ops.sample(logits[:b], at_step(4, device), seed=3, **filters), together[:b]
        )
    other_rows = torch.cat((torch.zeros_like(logits[:6]), logits[6:]))
    assert ops.sample(other_rows, at_step(4, device), seed=3, **filters)[6] == together[6]


def test_draws_depend_on_row_step_and_seed(device):
    logits = torch.zeros(64, 1000, device=device)  # by chance, 0.06 of 64 rows agree

    def draw(step, seed, rows=slice(None)):
        return ops.sample(logits, at_step(step, device), seed=seed)[rows]

    assert torch.equal(draw(5, 6), draw(5, 6))
    assert draw(5, 6).unique().numel() > 50  # rows
    for step, seed in ((6, 6), (5 + 2**32, 6), (5, 7), (5, 6 + 2**32), (6, 5)):
        assert (draw(step, seed) != draw(5, 6)).sum() > 60


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, *FILTERS[:4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_draw_as_their_float32_values(dtype, filters, device):
    logits = make_logits(4, 777, dtype).to(device)
    expected = ops.sample(logits.float(), at_step(1, device), **filters)
    assert torch.equal(ops.sample(logits, at_step(1, device), **filters), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "filters", [{"temperature": 0.0}, {"temperature": 2.0, "top_k": 9}], ids=str
)
def test_strided_and_unaligned_rows(filters, dtype, device):
    wide = torch.full((3, 4, 1030), torch.inf, dtype=dtype, device=device)  # drawn if ever read
    for start, stop in ((0, 1024), (1, 1025), (3, 1026), (8, 9)):
        logits = wide[:, -1, start:stop]
        logits.copy_(make_logits(3, stop - start, dtype))
        expected = ops.sample(logits.clone(), at_step(0, device), **filters)
        assert torch.equal(ops.sample(logits, at_step(0, device), **filters), expected)
        logits.fill_(torch.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, QWEN_VOCAB_SIZE])
def test_greedy_takes_the_first_largest(vocab_size, dtype, device):
    logits = -torch.rand(4, vocab_size).to(dtype) - 1
    first = [0, vocab_size // 3, vocab_size // 2, vocab_size - 1]
    for row, index in enumerate(first):
        logits[row, index] = logits[row, vocab_size - 1] = 5.0
    tokens = ops.sample(logits.to(device), at_step(0, device), temperature=0.0, top_k=2, top_p=0.1)
    assert tokens.tolist() == first


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, FILTERS[7]], ids=str)
def test_infinite_and_nan_logits(filters, device):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [-inf, -inf, -inf, -inf, -inf],
            [nan, nan, nan, nan, nan],
            [nan, -inf, nan, -3.0, -inf],
            [nan, 1.0, inf, nan, 5.0],
            [-inf, nan, -inf, nan, inf],
            [1e38, 3e38, nan, -3e38, -inf],
        ],
        device=device,
    )
    tokens = ops.sample(logits, at_step(0, device), **filters)
    assert tokens.tolist() == [0, 0, 3, 2, 4, 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_small_temperature_is_greedy(temperature, device):
    logits = make_logits(8, 100, torch.float32).to(device)
    tokens = ops.sample(logits, at_step(0, device), temperature=temperature)
    assert torch.equal(tokens, logits.argmax(dim=1))


@pytest.mark.parametrize("temperature", [1e10, 3e38, 1e300])
def test_a_large_temperature_is_uniform(temperature, device):
    logits = torch.linspace(-1, 1, 10, device=device).expand(300, -1)
    tokens = ops.sample(logits, at_step(0, device), temperature=temperature)
    assert torch.bincount(tokens.cpu(), minlength=10).min() > 10


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}], ids=str)
def test_ties_at_the_bound_are_kept(filters, device):
    # 6 equal logits hold all the mass; whichever bound falls among them keeps them all.
    logits = torch.tensor([0.0] + [30.0] * 6 + [0.0], device=device).expand(200, 8)
    tokens = ops.sample(logits, at_step(0, device), **filters)
    assert tokens.unique().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("filters", "kept"), [({"temperature": 0.0}, [1]), ({"top_k": 1}, [1, 2])])
def test_both_zeros_are_one_value(filters, kept, device):
    logits = torch.tensor([-1.0, -0.0, 0.0, -2.0], device=device).expand(100, 4)
    assert ops.sample(logits, at_step(0, device), **filters).unique().tolist() == kept


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 3}, {"top_k": 1000, "top_p": 0.2}, {"top_p": 0.5}, {"min_p": 0.9}],
    ids=str,
)
def test_more_ties_than_the_kernel_lists(filters, device):
    # 5000 logits tie at the largest, above the 4096 that fit in shared memory, and 999 are less.
    logits = torch.cat((torch.full((5000,), 1.5), torch.linspace(-9, 1, 999)))[torch.randperm(5999)]
    logits = logits.expand(2, -1).contiguous()
    tokens = ops.sample(logits.to(device), at_step(7, device), seed=1, **filters)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    assert tokens.tolist() == sample_reference(logits, torch.tensor(7), 1, **full).tolist()
    assert (logits.gather(1, tokens.cpu()[:, None]) == 1.5).all()


def test_empty_batch(device):
    tokens = ops.sample(torch.zeros(0, 5, device=device), at_step(0, device))
    assert tokens.shape == (0,)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("temperature", math.nan, ValueError, "temperature must be a finite number >= 0, got nan"),
        ("temperature", -0.5, ValueError, "temperature must be a finite number >= 0, got -0.5"),
        ("temperature", math.inf, ValueError, "temperature must be a finite number >= 0, got inf"),
        ("top_p", 1.5, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
        ("top_p", math.nan, ValueError, r"top_p must be in \[0, 1\], got nan"),
        ("min_p", -0.1, ValueError, r"min_p must be in \[0, 1\], got -0.1"),
        ("top_k", -1, ValueError, r"top_k must be in \[0, 2\*\*63\), got -1"),
        ("top_k", 2.0, TypeError, "top_k must be an int, got 2.0"),
        ("top_k", True, TypeError, "top_k must be an int, got True"),
        ("seed", 2**63, ValueError, r"seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
        ("seed", None, TypeError, "seed must be an int, got None"),
    ],
)
def test_rejects_wrong_numbers(name, value, error, message, device):
    logits, step = torch.zeros(2, 5, device=device), at_step(0, device)
    with pytest.raises(error, match=message):
        ops.sample(logits, step, **{name: value})


def test_rejects_wrong_tensors(device):
    logits, step = torch.zeros(2, 5, device=device), at_step(0, device)
    for wrong in (logits[0], logits[:, :0], logits.expand(3, 2, 5), logits.T):
        with pytest.raises(ValueError, match=r"logits must be \[batch, vocab_size >= 1\] with"):
            ops.sample(wrong, step)
    too_wide = torch.zeros(1, device="meta").as_strided((1, 2**24 + 1), (1, 1))
    with pytest.raises(ValueError, match="logits must have at most 16777216 columns, got 16777217"):
        ops.sample(too_wide, step.to("meta"))
    with pytest.raises(TypeError, match=r"logits must be float32, float16 or bfloat16, got to"):
        ops.sample(logits.int(), step)
    with pytest.raises(TypeError, match=r"step must be torch.int64, got torch.int32"):
        ops.sample(logits, step.int())
    with pytest.raises(ValueError, match=r"step must have shape \[\], got \[1\]"):
        ops.sample(logits, step[None])
    with pytest.raises(ValueError, match=r"step must be on \w+(:0)?, got meta"):
        ops.sample(logits, step.to("meta"))


@KERNELS_ONLY
def test_raw_op_guards_memory(device):
    logits, step = torch.zeros(2, 5, device=device), at_step(0, device)
    raw = torch.ops.fastshard.sample.default
    for arguments, message in (
        ((logits.T, step, 0, 1.0, 0, 1.0, 0.0), "2 dimensions and unit last stride"),
        ((logits[:, :0], step, 0, 1.0, 0, 1.0, 0.0), "1 to 16777216 columns, got 0"),
        ((logits, step.int(), 0, 1.0, 0, 1.0, 0.0), "step must be one int64 on the device"),
        ((logits, step.expand(0), 0, 1.0, 0, 1.0, 0.0), "step must be one int64 on the device"),
        ((logits.int(), step, 0, 1.0, 0, 1.0, 0.0), "logits must be float32, .* got Int"),
        ((logits, step, 0, math.nan, 0, 1.0, 0.0), "temperature, top_k, top_p and min_p must be"),
        ((logits, step, 0, 1.0, -1, 1.0, 0.0), "temperature, top_k, top_p and min_p must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw(*arguments)


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_traces_without_a_graph_break(filters, device):
    logits, step = torch.randn(3, 50, device=device), at_step(2, device)

    def draw(logits, step):
        return ops.sample(logits * 2, step + 1, seed=9, **filters)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, step), draw(logits, step))


def test_compiles_once_for_all_sizes(device):
    def draw(logits, step):
        return ops.sample(logits, step), ops.sample(logits, step, temperature=0.5, top_k=5)

    sizes = [(3, 50), (7, 50), (2, 60)]
    calls = [
        {"logits": torch.randn(s, device=device), "step": at_step(s[0], device)} for s in sizes
    ]
    assert_compiles_once(draw, calls)


def test_ignores_autocast(device):
    logits = {"logits": torch.randn(3, 50, device=device), "step": at_step(2, device)}
    assert_ignores_autocast(ops.sample, logits)


def test_refuses_gradients(device):
    logits = {"logits": torch.randn(3, 50, device=device), "step": at_step(2, device)}
    assert_refuses_gradients(ops.sample, logits)


def test_opcheck(device):
    arguments = (torch.randn(3, 50, device=device), at_step(2, device), 9, 0.8, 10, 0.9, 0.01)
    torch.library.opcheck(torch.ops.fastshard.sample.default, arguments)


@CUDA_ONLY
@pytest.mark.parametrize("vocab_size", [1000, 32000])
@pytest.mark.parametrize("filters", [{"temperature": 0.0}, *FILTERS], ids=str)
def test_replays_in_a_graph(filters, vocab_size, device):
    logits = torch.randn(3, vocab_size, device=device)
    step = at_step(0, device)
    assert_replays_in_a_graph(lambda: ops.sample(logits, step, **filters), logits)


@CUDA_ONLY
def test_a_replay_reads_step(device):
    logits, step = torch.zeros(64, 1000, device=device), at_step(0, device)
    ops.sample(logits, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = ops.sample(logits, step)
    step += 1
    graph.replay()
    assert torch.equal(tokens, ops.sample(logits, at_step(1, device)))
    assert (tokens != ops.sample(logits, at_step(0, device))).sum() > 60


@CUDA_ONLY
@pytest.mark.parametrize("filters", [{"temperature": 0.0}, FILTERS[7]], ids=str)
def test_runs_one_kernel_of_ours(filters, device):
    logits, step = torch.randn(3, 32000, device=device), at_step(0, device)
    names = cuda_kernel_names(lambda: ops.sample(logits, step, **filters))
    assert len(names) == 1
    assert "fastshard::sample_kernel" in names[0]


def test_cost():
    logits, step = torch.zeros(2, 5, dtype=torch.float16), torch.tensor(0)
    cost = ops.COSTS["sample"](logits, step, 0, 1.0, 0, 1.0, 0.0)
    assert cost == ops.Cost(bytes=2 * 5 * 2 + 2 * 8, flops=10)
