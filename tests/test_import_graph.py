"""The import graph of the package: a module imports only from the layers below its own."""

import ast
from pathlib import Path

import pytest

import fastshard

PACKAGE = Path(fastshard.__file__).parent
# From the bottom up; what is in none of them sits on top and may import anything but the entry
# points. Modules of one layer do not import each other: dist and checkpoint know only the models.
LAYERS = [
    {"_C", "_build_info"},  # files only where the package is built
    {"build_record", "environment", "files"},
    {"ops"},
    {"nn"},
    {"models"},
    {"checkpoint", "dist"},
]
# -> who may import it
ENTRY_POINTS = {"cli": {"__main__"}, "__main__": set(), "integrations": {"bench"}}


def parts_of(package: Path) -> dict[Path, str]:
    """Every module file -> the folder or module directly below the package that it belongs to."""
    files = sorted(package.rglob("*.py"))
    return {file: file.relative_to(package).with_suffix("").parts[0] for file in files}


def imported_parts(file: Path, package: Path) -> set[str]:
    """Parts of the package that a file imports; ``__init__`` for names of the package itself."""
    here = [package.name, *file.relative_to(package).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for module in modules:
            if module[0] == package.name:
                part = module[1] if len(module) > 1 else "__init__"
                is_file = (package / part).exists() or (package / f"{part}.py").exists()
                found.add(part if is_file or part in LAYERS[0] else "__init__")
    return found


def layer_of(part: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), len(LAYERS))


def wrong_imports(package: Path) -> list[str]:
    """``importer -> imported`` for every import that goes up or sideways."""
    wrong = []
    for file, part in parts_of(package).items():
        for imported in sorted(imported_parts(file, package) - {part}):
            is_below = layer_of(imported) < layer_of(part) or layer_of(part) == len(LAYERS)
            if not is_below or part not in ENTRY_POINTS.get(imported, {part}):
                wrong.append(f"{file.relative_to(package)} -> {imported}")
    return wrong


def test_imports_go_down():
    assert {"ops", "nn", "models", "checkpoint", "dist"} <= set(parts_of(PACKAGE).values())
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "statement", "imported"),
    [
        ("ops/norm.py", "from fastshard.nn import x", "nn"),
        ("nn/mlp.py", "import fastshard.models.decoder", "models"),
        ("nn/mlp.py", "from ..models import decoder", "models"),
        ("nn/mlp.py", "from .. import models", "models"),
        ("models/decoder.py", "def f():\n    from fastshard.generate import x", "generate"),
        ("models/decoder.py", "import torch, fastshard.dist", "dist"),
        ("models/decoder.py", "from fastshard import Shard", "__init__"),
        ("checkpoint/index.py", "from fastshard import dist", "dist"),
        ("dist/pipeline.py", "from fastshard.checkpoint import index", "checkpoint"),
        ("dist/pipeline.py", "if TYPE_CHECKING:\n    from fastshard.generate import x", "generate"),
        ("environment.py", "from fastshard import ops", "ops"),
        ("generate.py", "from fastshard import cli", "cli"),
        ("generate.py", "from fastshard.integrations import torchtune", "integrations"),
        ("nn/mlp.py", "import fastshard.integrations.transformers.modules", "integrations"),
    ],
)
def test_finds_a_planted_import(tmp_path, file, statement, imported):
    package = tmp_path / "fastshard"
    sources = {
        "__init__.py": "from fastshard.models import decoder",
        "__main__.py": "from fastshard.cli import main",
        "cli.py": "from fastshard import Shard\nfrom fastshard.generate import x",
        "environment.py": "import os",
        "generate.py": "from fastshard import dist, models\nfrom fastshard.checkpoint import index",
        "integrations/torchtune.py": "from fastshard import nn\nfrom . import x",
        "dist/pipeline.py": "from fastshard.models import decoder",
        "checkpoint/index.py": "from fastshard.models import decoder\nfrom . import names",
        "checkpoint/names.py": "",
        "models/decoder.py": "from fastshard import nn\nfrom fastshard.environment import x",
        "nn/mlp.py": "from fastshard.ops import norm\nfrom ..ops.norm import y",
        "ops/norm.py": "import torch\nfrom fastshard.ops import _library\nfrom ._library import z",
        "ops/_library.py": "",
    }
    for name, source in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    assert wrong_imports(package) == []
    with (package / file).open("a") as stream:
        stream.write(f"\n{statement}\n")
    assert wrong_imports(package) == [f"{file} -> {imported}"]
