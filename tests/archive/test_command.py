"""The commands that only read, as a user types them."""

import hashlib

import pytest

from archive.parquet_rows import ROW, write_rows
from fastshard import cli
from fastshard.archive import catalog, verdict


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Run ``fastshard archive`` in this process: (status, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = cli.main(["archive", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def fetched(run, tmp_path):
    rows = [{}, {"Op_Name": "40_LayerNorm", "Task_ID": 40, "CUDA_Speedup_Native": 1.25}]
    path = write_rows(tmp_path / "level_1.parquet", *rows)
    return run("fetch", "--source", path)


def test_fetch_says_what_and_whose(fetched, tmp_path):
    status, out, err = fetched
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"2 kernels of {tmp_path / 'level_1.parquet'} kept in {tmp_path}")
    assert lines[1] == f"licence: {catalog.LICENCE}; by {catalog.ATTRIBUTION}"
    assert lines[2] == "Their times and speed-ups are claims: fastshard archive verify measures."


def test_the_state(run, fetched, tmp_path):
    status, out, _ = run()
    assert status == 0
    assert out.startswith(f"2 kernels of {tmp_path / 'level_1.parquet'} in {tmp_path / 'cache'}")
    assert catalog.ATTRIBUTION in out


def test_list(run, fetched):
    status, out, _ = run("list")
    assert status == 0
    header, *lines, last = out.splitlines()
    assert header == catalog.HEADER
    assert [line.split()[0] for line in lines] == ["1/36/rms_norm_rows", "1/40/rms_norm_rows"]
    assert last == "2 of 2 kernels; all figures are the authors' claims"
    for filters in (["--op", "rmsnorm"], ["--min-speedup", "2"]):
        out = run("list", *filters)[1]
        assert [line.split()[0] for line in out.splitlines()[1:]] == ["1/36/rms_norm_rows", "1"]
    assert run("list", "--level", "2")[1].splitlines()[1:] == [
        "0 of 2 kernels; all figures are the authors' claims"
    ]


def test_show(run, fetched):
    status, out, err = run("show", "1/36")
    assert (status, err) == (0, "")
    assert ROW["CUDA_Code"] in out
    assert f"licence      {catalog.LICENCE}\n" in out


def keep(identity, name, code=ROW["CUDA_Code"], **values):
    digest = hashlib.sha256(code.encode()).hexdigest() if code else ""
    verdict.save(verdict.Verdict(identity, name, code_sha256=digest, **values))


def test_verdicts_are_shown(run, fetched):
    assert "verdicts     none: fastshard archive verify\n" in run()[1]
    keep("1/36/rms_norm_rows", verdict.WRONG, reason="off by\x1b 2")
    keep("1/40/rms_norm_rows", verdict.VERIFIED)
    keep("1/41/not_of_this_archive", verdict.VERIFIED)
    assert "verdicts     2 verified, 1 wrong\n" in run()[1]
    lines = run("list")[1].splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == ["wrong", "verified"]
    assert "verdict here wrong: off by\\x1b 2\n" in run("show", "1/36")[1]
    assert "verdict here verified\n" in run("show", "1/40")[1]


def test_a_verdict_of_other_code_is_none(run, fetched):
    keep("1/36/rms_norm_rows", verdict.VERIFIED, code="earlier code")
    expected = "verdict here none of this code, only of an earlier one: fastshard archive verify\n"
    assert expected in run("show", "1/36")[1]
    keep("1/36/rms_norm_rows", verdict.INCOMPLETE, code="")
    assert expected in run("show", "1/36")[1]


def test_a_verdict_of_no_code(run, tmp_path):
    run("fetch", "--source", write_rows(tmp_path / "a.parquet", {"CUDA_Code": None}))
    keep("1/36/rms_norm_rows", verdict.INCOMPLETE, code="", reason="CUDA_Code is null")
    assert "verdict here incomplete row: CUDA_Code is null\n" in run("show", "1/36")[1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["show", "9/"], 1, "id must be one of the archive, or its beginning, got '9/': fastshard"),
        (["show", "1/"], 1, "id '1/' must be of one row, 2 begin so: 1/36/rms_norm_rows, 1/40/"),
        (["show"], 2, "the following arguments are required: ID"),
        (["list", "--op", "conv"], 2, "argument --op: invalid choice: 'conv'"),
        (
            ["list", "--level", "4"],
            2,
            "--level: must be a level of the archive, 1, 2 or 3, got '4'",
        ),
        (["list", "--min-speedup", "x"], 2, "must be a finite number of at least 0, got 'x'"),
        (["fetch", "--split", "level_9"], 1, "split must be one of level_1, level_2, level_3, got"),
        (["fetch", "--source", "/no/where"], 1, "folder, /no/where is not there"),
        (["nothing"], 2, "unrecognized arguments: nothing"),
    ],
)
def test_bad_input_is_one_line(run, fetched, arguments, status, message):
    found, out, err = run(*arguments)
    assert (found, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["list"], ["show", "1/"]])
def test_nothing_fetched_is_one_line(run, arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("fastshard: error: no archive has been fetched to ")
    assert err.count("\n") == 1
