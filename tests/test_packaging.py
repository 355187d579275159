"""Files that build, test and release the wheel agree; a linter sees each by itself."""

import fnmatch
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = [ROOT / ".ci" / name for name in ("run", "lint", "check_pairs", "cuda_toolkit")]
SCRIPTS.append(ROOT / "docker" / "build_wheel.sh")

if sys.version_info < (3, 11):
    pytest.skip("pyproject.toml is read with tomllib, of Python 3.11", allow_module_level=True)


@pytest.fixture(scope="module")
def pyproject() -> dict:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def oldest_torch(pyproject) -> str:
    (torch,) = [name for name in pyproject["project"]["dependencies"] if name.startswith("torch>=")]
    return torch.removeprefix("torch>=")


def jobs(workflow: Path) -> dict[str, dict]:
    return yaml.safe_load(workflow.read_text())["jobs"]


def test_an_action_is_pinned_by_one_commit_everywhere():
    pins = {}
    for workflow in WORKFLOWS:
        for use in re.findall(r"uses: (.*)", workflow.read_text()):
            pin = re.fullmatch(r"([\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", use)
            assert pin, f"{workflow.name}: {use}"
            assert pins.setdefault(pin[1], pin.groups()) == pin.groups()
    assert len(pins) >= 5


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_has_its_own_permissions_and_an_end(workflow):
    assert yaml.safe_load(workflow.read_text())["permissions"] == {}
    for name, job in jobs(workflow).items():
        assert job["permissions"], name
        assert 0 < job["timeout-minutes"] <= 120, name


def test_scripts_that_are_called_are_there():
    callers = [
        *WORKFLOWS,
        *SCRIPTS,
        *(ROOT / "docker").glob("*.Dockerfile"),
        ROOT / "pyproject.toml",
    ]
    called = re.compile(r"(?<![\w/.-])(?:\.ci|docker)/(?!dockerfile:)[\w.-]*\w")
    for caller in callers:
        for name in called.findall(caller.read_text()):
            assert (ROOT / name).is_file(), f"{caller.name}: {name}"
    for script in SCRIPTS:
        assert os.access(script, os.X_OK), script


def test_the_oldest_torch_is_the_same_everywhere(pyproject):
    oldest = oldest_torch(pyproject)
    target = re.search(r"^TORCH_TARGET = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text(), re.M)
    assert ".".join(target.groups()) == oldest
    pairs = jobs(ROOT / ".github" / "workflows" / "ci.yml")["cpu"]["strategy"]["matrix"]["include"]
    oldest_python = pyproject["project"]["requires-python"].removeprefix(">=")
    assert {"python": oldest_python, "torch": f"{oldest}.*"} in pairs
    assert f"torch {oldest} or newer" in (ROOT / "README.md").read_text()


def test_the_newest_python_is_the_same_everywhere(pyproject):
    prefix = "Programming Language :: Python :: 3."
    classifiers = pyproject["project"]["classifiers"]
    minors = sorted(int(name[len(prefix) :]) for name in classifiers if name.startswith(prefix))
    pythons = [f"3.{minor}" for minor in minors]
    assert f">={pythons[0]}" == pyproject["project"]["requires-python"]
    pairs = jobs(ROOT / ".github" / "workflows" / "ci.yml")["cpu"]["strategy"]["matrix"]["include"]
    assert {"python": pythons[-1], "torch": "newest"} in pairs
    check_pairs = (ROOT / ".ci" / "check_pairs").read_text()
    assert f"for version in {' '.join(pythons)}; do" in check_pairs


def test_cibuildwheel_builds_the_abi3_wheel_by_the_script(pyproject):
    options = pyproject["tool"]["cibuildwheel"]
    tag = re.search(r'"py_limited_api": "(cp\d+)"', (ROOT / "setup.py").read_text())[1]
    assert options["build"] == f"{tag}-manylinux_x86_64"
    usage = (ROOT / "docker" / "build_wheel.sh").read_text()
    for command in (options["before-build"], options["linux"]["repair-wheel-command"]):
        script, verb, *_ = command.split()
        assert script == "docker/build_wheel.sh"
        assert f"\n{verb}() {{\n" in usage
    passed = options["linux"]["environment-pass"]
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert {"TORCH_CUDA_ARCH_LIST", "SOURCE_DATE_EPOCH"} <= set(passed)
    assert all(name in release for name in ("TORCH_CUDA_ARCH_LIST", "SOURCE_DATE_EPOCH"))


def test_every_architecture_of_the_release_is_compiled_in_ci():
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    archs = re.search(r'TORCH_CUDA_ARCH_LIST: "(.*)"', release)[1].replace("+PTX", "").split(";")
    compiled = jobs(ROOT / ".github" / "workflows" / "ci.yml")["compile"]["strategy"]["matrix"]
    assert [arch.replace("+PTX", "") for arch in compiled["archs"]] == archs


def test_the_images_see_what_a_build_reads(pyproject):
    """The ignore file lets through only what it names."""
    first, *rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert first == "*"
    shown = [rule[1:] for rule in rules if rule.startswith("!")]
    project = pyproject["project"]
    script = (ROOT / "docker" / "build_wheel.sh").read_text()
    check = (ROOT / ".ci" / "check_machine_code.py").read_text()
    read = [
        *("setup.py", "pyproject.toml", "csrc/exports.map", "fastshard/py.typed"),
        *(project["readme"], *project["license-files"]),
        *re.findall(r"\.ci/[\w.]+\w|docker/requirements\.txt", script),
        *(f".ci/{name}" for name in re.findall(r'"\.ci" / "([\w.]+)"', check)),
        "dist/fastshard-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl",
    ]
    for name in read:
        folders = [str(parent) for parent in Path(name).parents][:-1]
        seen = any(fnmatch.fnmatch(path, rule) for rule in shown for path in (name, *folders))
        assert seen, name
