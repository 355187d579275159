"""Every op of the package is whole: its kernels, its cost, its gradient or the error, its tests."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from fastshard import ops

TESTS = Path(__file__).parent


def op_names(namespace: str = "fastshard") -> list[str]:
    """Registered ops, without the namespace."""
    prefix = f"{namespace}::"
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)})


def named_by_a_test(check: str, op_name: str, sources: list[str]) -> bool:
    """Whether a test that calls ``check``, or a module-level name it uses, names the op."""
    for source in sources:
        tree = ast.parse(source)
        definitions = {}
        for node in tree.body:
            if isinstance(node, ast.Assign):
                definitions.update({t.id: node for t in node.targets if isinstance(t, ast.Name)})
            elif isinstance(node, ast.FunctionDef):
                definitions[node.name] = node
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            read = [node, *(definitions[name] for name in used & definitions.keys())]
            text = "\n".join(map(ast.unparse, read))
            if re.search(rf"\b{check}\(", text) and re.search(rf"\b{op_name}\b", text):
                return True
    return False


def missing_parts(op_name: str, namespace: str = "fastshard") -> list[str]:
    """What the op lacks, as words for the message."""
    qualified = f"{namespace}::{op_name}"

    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)

    sources = [path.read_text() for path in sorted(TESTS.glob("test_*.py"))]

    def tested(check: str) -> bool:
        return named_by_a_test(check, op_name, sources)

    has_formula = has("Autograd")
    is_inference_only = op_name in ops.INFERENCE_ONLY
    parts = {
        "fake kernel": has("Meta"),
        "CPU reference": has("CPU"),
        "cost entry": op_name in ops.COSTS,
        "opcheck in tests/ops": tested("opcheck"),
        "autograd formula or inference_only, not both": has_formula != is_inference_only,
        "gradients or their refusal in tests/ops": tested(
            "assert_gradients_as_accurate" if has_formula else "assert_refuses_gradients"
        ),
        "symbolic sizes in tests/ops": tested("assert_compiles_once"),
        "kernel under autocast": has("AutocastCPU") and has("AutocastCUDA"),
        "autocast in tests/ops": tested("assert_ignores_autocast"),
        "CUDA kernel": has("CUDA") or not ops.HAS_KERNELS,
    }
    return [part for part, present in parts.items() if not present]


@pytest.mark.parametrize("op_name", op_names())
def test_op_is_whole(op_name):
    assert missing_parts(op_name) == []


def test_finds_the_ops():
    assert {"rms_norm", "attention", "sample", "rope_append"} <= set(op_names())


@pytest.mark.parametrize("op_name", op_names())
def test_cost_takes_the_arguments_of_the_op(op_name):
    schema = getattr(torch.ops.fastshard, op_name).default._schema
    inspect.signature(ops.COSTS[op_name]).bind(*schema.arguments)  # TypeError where they do not fit


def test_every_cost_has_an_op():
    assert set(op_names()) == set(ops.COSTS)


def test_a_bare_op_lacks_every_part():
    library = torch.library.Library("fastshard_bare", "DEF")
    library.define("nothing_at_all(Tensor x) -> Tensor")
    parts = ["fake kernel", "CPU reference", "cost entry", "opcheck in tests/ops"]
    parts += ["autograd formula or inference_only, not both"]
    parts += ["gradients or their refusal in tests/ops", "symbolic sizes in tests/ops"]
    parts += ["kernel under autocast", "autocast in tests/ops"]
    if ops.HAS_KERNELS:
        parts.append("CUDA kernel")
    assert op_names("fastshard_bare") == ["nothing_at_all"]
    assert missing_parts("nothing_at_all", "fastshard_bare") == parts


def test_named_by_a_test_reads_the_test_and_what_it_uses():
    source = """
ARGUMENTS = {"first": 1, "other_second": 2}
UNUSED = {"third": 3}
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.fastshard, name).default, ARGUMENTS[name])
def test_fourth():
    torch.ops.fastshard.fourth.default(1)
"""
    assert named_by_a_test("opcheck", "first", [source])
    assert not named_by_a_test("check", "first", [source])
    for name in ("second", "third", "fourth"):
        assert not named_by_a_test("opcheck", name, [source])
