"""Files about the project agree with the package: versions, places, and pages that are linked."""

import re
from fnmatch import fnmatch
from pathlib import Path

import fastshard

ROOT = Path(__file__).resolve().parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_versions_agree():
    assert re.search(r"^version: (\S+)$", text("CITATION.cff"), re.M)[1] == fastshard.__version__
    assert (
        re.search(r'^version = "(\S+)"$', text("pyproject.toml"), re.M)[1] == fastshard.__version__
    )
    first, second = re.findall(r"^## \[(.+?)\]", text("CHANGELOG.md"), re.M)[:2]
    assert (first, second) == ("Unreleased", fastshard.__version__)


def test_the_changelog_names_every_op_and_command():
    from fastshard import cli, ops

    changelog = text("CHANGELOG.md")
    missing = [name for name in ops.COSTS if f"`{name}`" not in changelog]
    help_ = cli.build_parser().format_help()
    commands = re.findall(r"^    (\w[\w ]*?)  ", help_, re.M)
    assert len(commands) > 5
    assert missing + [name for name in commands if f"`{name}`" not in changelog] == []


def test_the_files_that_contributing_names_are_there():
    words = re.findall(r"`((?:csrc|tests|docs|fastshard|\.ci)/[\w./]*)`", text("CONTRIBUTING.md"))
    words += ["csrc/common/launch.cuh"]
    assert len(words) > 6
    assert [word for word in words if not (ROOT / word).exists()] == []


def test_every_page_is_in_the_index():
    index = text("docs/README.md")
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert len(pages) > 4
    assert {page for page in pages if f"({page})" not in index} == set()
    for example in ROOT.glob("examples/*.py"):
        assert f"`{example.name}`" in index


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """By default pytest does not look into a folder called dist."""
    folders = {path.parent.name for path in ROOT.glob("tests/**/test_*.py")}
    assert "dist" in folders
    skipped = pytestconfig.getini("norecursedirs")
    assert [name for name in folders if any(fnmatch(name, skip) for skip in skipped)] == []
