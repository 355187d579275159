"""The spaces of variants: what is legal, why the rest is not, and that the kernels agree."""

import re
from pathlib import Path

import pytest
import torch

from fastshard.bench.presets import PRESETS, preset
from fastshard.ops.variants import COUNTS, read_table
from fastshard.tune import inputs, menu, model, shapes, space
from fastshard.tune.problem import AUTO, SIZES, Problem
from fastshard.tune.space import MENU, OPEN
from fastshard.tune.tile import tile_named
from helpers import KERNELS_ONLY

CSRC = Path(__file__).parents[2] / "csrc"
DECODE = Problem("cached_attention", "bfloat16", (1, 1, 4096, 32, 8, 128))
PROMPT = Problem("attention", "bfloat16", (1, 2048, 2048, 32, 8, 128))


def reasons(problem):
    return {each.variant: each.why_illegal for each in MENU.candidates(problem)}


def test_menus_are_those_of_the_sources():
    rows = lines_of_menu(CSRC / "norm" / "row.h", "kRowMenu")
    assert [f"{threads}x{vecs}" for threads, vecs in rows] == list(menu.ROW_CONFIGS)
    tiles = lines_of_menu(CSRC / "gemm" / "choose_tile.h", "kGemmMenu")
    assert [name for name, *_ in tiles] == list(menu.TILES)
    for name, *config, _speed in tiles:
        assert tile_named(name).config == tuple(map(int, config))
        assert tile_named(name).why_illegal() is None


def lines_of_menu(path, name):
    """The values of each line between the braces."""
    text = path.read_text().split(f"{name}[] = {{\n")[1].split("\n};")[0]
    return [re.findall(r"\w+", line.split("//")[0]) for line in text.split("\n")]


@pytest.mark.parametrize(
    ("problem", "variant", "why"),
    [
        (Problem("rms_norm", "float16", (1, 4096)), "16x2", "not compiled"),
        (Problem("rms_norm", "float16", (1, 4096)), "128x2", "holds 4096 bytes of a row of 8192"),
        (Problem("rms_norm", "float16", (1, 128)), "128x2", "room for 4096 bytes"),
        (Problem("rms_norm", "float16", (1, 4096)), "128x4", None),
        (Problem("linear", "float16", (17, 64, 64)), "library", "more than 16 rows"),
        (Problem("linear", "float16", (16, 64, 64)), "library", None),
        (DECODE, "library", "lengths that are on the device"),
        (PROMPT, "library", None),
        (PROMPT, "decode", "8192 query rows a key/value head, decode takes 16"),
        (DECODE, "decode/8", None),
        (Problem("attention", "float16", (1, 1, 64, 4, 4, 80)), "decode", "not compiled for head"),
        (Problem("attention", "float16", (1, 64, 64, 4, 4, 256)), "prefill", "the same kernel as"),
        (Problem("attention", "float16", (1, 1, 64, 4, 4, 64)), "few/6", "more splits than tiles"),
        (Problem("attention", "float16", (1, 1, 64, 4, 4, 64)), "few/4", None),
    ],
)
def test_reasons(problem, variant, why):
    found = reasons(problem)[variant]
    assert found is None if why is None else why in found


NORM = Problem("rms_norm", "float16", (1, 4096))
MLP = Problem("fused_mlp", "float16", (64, 64, 64))


@pytest.mark.parametrize(
    ("problem", "variant", "why"),
    [
        (NORM, "192x3", None),
        (NORM, "128x4", None),
        (NORM, "1024x1", "1024 threads, at most 512 outside the menu"),
        (NORM, "512x7", "about 136 registers a thread, at most 128"),
        (NORM, "320x1", "holds 5120 bytes of a row of 8192"),
        (NORM, "512x5", "has room for 40960 bytes"),
        (MLP, "tiles_128x192_32x4_4x2", None),
        (MLP, "tiles_128x256", None),
        (MLP, "tiles_16x32_32x2_1x1", "32 threads, not 64 to 512"),
        (MLP, "tiles_128x192_64x4_4x2", "163840 bytes of shared memory, at most 101376"),
        (MLP, "tiles_128x192_32x2_2x2", "about 320 registers a thread, at most 255"),
        (MLP, "tiles_128x256_32x2_4x4", "about 160 registers a thread, at most 128"),
        (MLP, "tiles_32x64_32x2_1x2", "64 threads copy 16 rows of a stage at a time"),
        (MLP, "tiles_64x96_64x2_4x1", "128 threads copy 16 rows"),
        (MLP, "tiles_64x128_32x2_4x4", "512 threads copy 128 rows .* divide 64 and 128"),
    ],
)
def test_reasons_outside_the_menu(problem, variant, why):
    found = {each.variant: each.why_illegal for each in OPEN.candidates(problem)}
    assert found[variant] is None if why is None else re.search(why, found[variant])


def test_the_open_space_has_the_menu_and_more():
    for problem in (NORM, MLP, PROMPT, DECODE):
        both = MENU.legal_variants(problem), OPEN.legal_variants(problem)
        assert set(both[0]) <= set(both[1])
        assert all(menu.has(problem.op, name) for name in both[0])
        added = [name for name in both[1] if name not in both[0]]
        assert not any(menu.has(problem.op, name) for name in added)
        assert (len(added) > 30) == (problem in (NORM, MLP))


@pytest.mark.parametrize(
    "name", ["320x3", "128x192", "128x192_32x4_3x2", "64x128_32x4_2x2", "0x0_1x1_1x1"]
)
def test_names_that_are_no_tile(name):
    with pytest.raises(ValueError, match=f"must have a name like 128x192_32x4_4x2, got '{name}'"):
        tile_named(name)


@pytest.mark.parametrize("space", [MENU, OPEN], ids=["menu", "open"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_problem_has_legal_variants_that_are_modelled(name, space):
    for problem in shapes.problems(preset(name), "bfloat16"):
        legal = space.legal_variants(problem)
        assert legal
        assert AUTO not in legal
        assert len(set(legal)) == len(legal)
        for variant in legal:
            assert model.modelled_us(problem, variant, model.A10) > 0
        for variant in legal if space is MENU else legal[-3:]:
            genes = space.genes_of(problem, variant)
            assert space.candidate(problem, genes).variant == variant
        left_out = model.pruned(problem, legal, model.A10)
        assert left_out.keys() < set(legal), "what is best on paper is never left out"
        assert problem.sizes().keys() == set(SIZES[problem.op])
        assert COUNTS.get(problem.op, 1) < len(problem.shape)


def test_problems_of_a_model_end_at_its_context():
    short = preset("llama-2-7b")
    found = shapes.problems(short, "float16")
    assert max(p.sizes()["s_kv"] for p in found if "s_kv" in p.sizes()) == short.max_seq_len
    assert {p.op for p in found} <= SIZES.keys()


# All kinds of problems that a kernel is emulated of in a second.
SMALL = [
    Problem("rms_norm", "bfloat16", (3, 512)),
    Problem("add_layer_norm", "float16", (2, 1032)),
    Problem("fused_mlp", "float16", (20, 64, 64)),
    Problem("linear", "float16", (3, 64, 40)),
    Problem("attention", "float16", (1, 20, 20, 4, 2, 64)),
    Problem("cached_attention", "float16", (2, 2, 40, 4, 2, 64)),
]


@KERNELS_ONLY
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_kernels_take_every_legal_variant_and_give_the_answer(problem, device):
    made = inputs.make(problem, device, 1, seed=0)
    golden, plain = made.golden(), made.plain()
    allowed = 2 * (plain.double() - golden).norm()
    for variant in [AUTO, *MENU.legal_variants(problem)]:
        if variant == "library" and problem.op == "attention" and device.type == "cpu":
            continue  # PyTorch's own, which the emulator does not stand in for
        out = made.sample(made.call(0, variant))
        assert (out.double() - golden).norm() <= allowed, variant


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_inputs(problem):
    cpu = torch.device("cpu")
    made, same, other = (inputs.make(problem, cpu, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(made.golden(), same.golden())
    assert not torch.equal(made.golden(), other.golden())
    assert made.golden().dtype == torch.float64
    assert made.golden().shape == made.plain().shape == made.sample(made.call(1, AUTO)).shape
    assert not torch.equal(made.sample(made.call(1, AUTO)), made.sample(made.call(0, AUTO)))
    assert inputs.least_bytes(problem) == made.num_bytes > 0
    assert made.flops > 0


def test_inputs_are_sampled():
    made = inputs.make(Problem("linear", "float16", (2, 8, 10000)), torch.device("cpu"), 1, 0)
    assert made.golden().shape == (2, 3334)
    made = inputs.make(Problem("rms_norm", "float16", (500, 8)), torch.device("cpu"), 1, 0)
    assert made.golden().shape == (64, 8)


TABLES = sorted((Path(space.__file__).parent / "tables").glob("*.json"))


def test_tables_are_shipped():
    assert {read_table(path).origin for path in TABLES} == {"measured", "model"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_shipped_tables_are_legal(path):
    table = read_table(path)
    for entry in table.entries:
        problem = Problem(entry.op, entry.dtype, entry.shape)
        assert entry.variant in MENU.legal_variants(problem), entry


NORM = Problem("rms_norm", "float16", (16, 4096))


def test_promoted_kernels_are_further_variants():
    for base in (MENU, OPEN):
        wider = space.with_promoted(base, {"rms_norm": ["promoted_a", "promoted_b"]})
        legal = base.legal_variants(NORM)
        assert sorted(wider.legal_variants(NORM)) == sorted([*legal, "promoted_a", "promoted_b"])
        for variant in wider.legal_variants(NORM):
            genes = wider.genes_of(NORM, variant)
            assert genes.keys() == {"threads", "vecs", "promoted"}
            assert wider.candidate(NORM, genes).variant == variant
        others = [each for each in wider.candidates(NORM) if each.variant == "promoted_a"]
        assert [each.why_illegal for each in others].count(None) == 1
        assert {each.why_illegal for each in others} == {
            None,
            "a promoted kernel has nothing to choose",
        }
        for other in (PROMPT, Problem("add_rms_norm", "float16", (16, 4096))):
            assert wider.legal_variants(other) == base.legal_variants(other)
        assert space.with_promoted(base, {"rms_norm": []}).genes == base.genes


def test_what_may_stand_in_a_table():
    assert menu.has("rms_norm", "promoted_a")
    assert menu.is_promoted("promoted_a")
    assert not menu.is_promoted("256x2")
