"""Patches of the menus: git applies them, and the tree that they give compiles and is searched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import build
from fastshard.tune.patch import menu_patch
from helpers import emulator_tools

ROOT = Path(__file__).parents[2]
TILE = "tiles_128x192_32x3_4x2"
ADDITIONS = [
    ("add_rms_norm", "320x3"),
    ("fused_mlp", TILE),
    ("layer_norm", "192x4"),
    ("rms_norm", "320x3"),  # one menu for all of them
    ("rms_norm", "256x2"),  # there already
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout with the patch applied."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "fastshard"):
        shutil.copytree(ROOT / name, copy / name)
    (copy / "menu.patch").write_text(menu_patch(copy, ADDITIONS))
    subprocess.run(["git", "apply", "menu.patch"], cwd=copy, check=True)
    return copy


def added(tree, name) -> list[str]:
    """Lines of a file that the checkout's has not, all of which the patched one has too."""
    old, new = ((root / name).read_text().split("\n") for root in (ROOT, tree))
    rest = list(new)
    for line in old:
        rest.remove(line)
    return rest


def test_a_line_for_each_variant(tree):
    assert added(tree, "csrc/norm/row.h") == ["    {320, 3},", "    {192, 4},"]
    line = '    {"128x192_32x3_4x2", 4, 2, 32, 96, 32, 3, 1, 0},'
    assert added(tree, "csrc/gemm/choose_tile.h") == [line]
    lines = ['    "320x3",', '    "192x4",', '    "128x192_32x3_4x2",']
    assert added(tree, "fastshard/tune/menu.py") == lines
    changed = (tree / "menu.patch").read_text().count("\n+++ b/")
    assert changed == 3


SEARCH = """
from fastshard.tune import menu
from fastshard.tune.space import MENU
from fastshard.tune.problem import Problem
print(menu.__file__)
norm = MENU.legal_variants(Problem("rms_norm", "float16", (1, 4096)))
print("320x3" in norm, "192x4" in norm, "192x3" in norm)
print("{tile}" in MENU.legal_variants(Problem("fused_mlp", "float16", (512, 64, 64))))
"""


def test_the_search_of_the_tree_has_them(tree):
    run = subprocess.run(
        [sys.executable, "-c", SEARCH.replace("{tile}", TILE)],
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tree,
    )
    file, norm, tile = run.stdout.split("\n")[:3]
    assert file == str(tree / "fastshard" / "tune" / "menu.py")
    assert (norm, tile) == ("True True False", "True")


# Put at the end of a source: what must hold there, else it does not compile.
CHECKS = {
    "norm/rms_norm.cu": "static_assert(sizeof(row_detail::ConfigOf<kRowMenu[12]>) > 0 && "
    "kRowMenu[11].threads_per_row == 320 && kRowMenu[12].vecs_per_thread == 4);",
    "mlp/tiled_mlp.cu": 'static_assert(gemm_tile_named("128x192_32x3_4x2") == GemmTileSize(3) && '
    "GemmConfigOfMenu<3>::kTileColumns == 192 && "
    "choose_gemm_tile(128 * 72, 192, 72) < GemmTileSize(3));",
}


@pytest.mark.emulator
@pytest.mark.parametrize("name", CHECKS)
def test_the_tree_compiles(tree, name):
    """All instances are made; for the emulator, whose compiler is quick."""
    source = tree / "csrc" / name
    text = source.read_text() + f"\nnamespace fastshard {{ {CHECKS[name]} }}\n"
    roots = [build.HERE / "include", tree / "csrc"]
    with emulator_tools():
        command = [build.compiler(), *build.FLAGS, f"-isystem{build.cuda_include()}"]
    command += [*(f"-I{root}" for root in roots), "-fsyntax-only", "-x", "c++", "-"]
    subprocess.run(command, input=text, text=True, check=True)


def test_nothing_to_add():
    assert menu_patch(ROOT, []) == ""
    assert menu_patch(ROOT, [("layer_norm", "256x2"), ("fused_mlp", "tiles_128x128")]) == ""


@pytest.mark.parametrize("text", ["constexpr RowVariant kRowMenu[] = {\n", "};\n"])
def test_a_menu_that_is_not_there(text, tmp_path):
    (tmp_path / "csrc" / "norm").mkdir(parents=True)
    (tmp_path / "csrc" / "norm" / "row.h").write_text(text)
    message = r"norm/row.h must have a menu that begins with 'constexpr .*\{' and ends with '\};'"
    with pytest.raises(ValueError, match=message):
        menu_patch(tmp_path, [("rms_norm", "320x3")])
    with pytest.raises(OSError, match=r"choose_tile\.h"):
        menu_patch(tmp_path, [("fused_mlp", TILE)])
