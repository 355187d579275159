"""The table: what a search starts from, what stays in it, what an interruption leaves."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastshard import cli
from fastshard.environment import shipped_tables_dir
from fastshard.ops import variants
from fastshard.ops.variants import Entry, OtherVersion, Table, read_table, write_table
from fastshard.tune import command, recorded, table
from fastshard.tune.problem import Measurement, Problem, rejected
from fastshard.tune.search import Found
from fastshard.tune.space import MENU, with_promoted

SHAPES = [(rows, 4096, 6144) for rows in (1, 4, 8, 16)]  # q, k and v of llama-3.1-8b
PROBLEM = Problem("linear", "bfloat16", (4, 4096, 6144))


def timed(us) -> Measurement:
    """Beside 10 us of ``auto``, which is near its limit: one generation is enough."""
    return Measurement(us, us, us, 10.0, 9.9, 1e-3, None, 1.0)


def of_version(number, *entries, device="GPU") -> Table:
    return Table(device, "measured", number, entries)


def of_gpu(*entries, device="GPU") -> Table:
    return of_version(version("fastshard"), *entries, device=device)


def linear(shape, variant="library") -> Entry:
    return Entry("linear", "bfloat16", shape, variant)


def test_a_table_of_another_device_or_origin_is_refused(tmp_path):
    path = tmp_path / "a.json"
    assert table.read(path, "GPU") == of_gpu()
    write_table(path, of_gpu(linear((4, 8, 8))))
    assert table.read(path, "GPU") == of_gpu(linear((4, 8, 8)))
    with pytest.raises(ValueError, match=r"a.json must be a measured table of X, got a measured"):
        table.read(path, "X")


def test_a_stale_table_gives_way_only_where_that_is_allowed(tmp_path):
    path = tmp_path / "a.json"
    write_table(path, of_version("0.0.1", linear((4, 8, 8))))
    with pytest.raises(OtherVersion, match=r"must be of fastshard .*, got 0.0.1"):
        table.read(path, "GPU")
    assert table.read(path, "GPU", is_stale_allowed=True) == of_gpu()
    path.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        table.read(path, "GPU", is_stale_allowed=True)


def test_the_wheels_table_of_the_device_is_known_and_the_old_one_counts_more(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "shipped_tables_dir", lambda: tmp_path)
    write_table(tmp_path / "a.json", of_gpu(*(linear((4, n, 8)) for n in (8, 16))))
    write_table(tmp_path / "b.json", of_gpu(linear((4, 24, 8)), device="other"))
    known = table.chosen(of_gpu(linear((3, 16, 8), "stream")))
    assert known == {
        ("linear", "bfloat16", (4, 8, 8)): "library",
        ("linear", "bfloat16", (4, 16, 8)): "stream",
    }


@pytest.mark.parametrize(
    ("measured", "is_kept"),
    [
        ({}, True),
        ({"library": rejected(recorded.UNKNOWN, 0.0)}, True),
        ({"library": timed(9.9)}, False),
        ({"library": rejected("not confirmed: 0.990 of auto's time", 1.0)}, False),
    ],
)
def test_an_old_entry_goes_where_a_measurement_speaks_against_it(measured, is_kept):
    old = of_gpu(linear((3, 4096, 6144)))
    assert table.merged(old, [(Found(PROBLEM, measured), None)]) == (old if is_kept else of_gpu())
    assert table.merged(old, []) == old


def test_old_entries_go_that_are_replaced_or_that_no_kernel_takes():
    other, new = linear((4, 8, 8)), linear(PROBLEM.shape)
    old = of_gpu(other, linear((3, 4096, 6144)))
    assert table.merged(old, [(Found(PROBLEM), new)]) == of_gpu(other, new)
    assert (
        table.merged(of_gpu(linear((3, 4096, 6144), "gone")), [(Found(PROBLEM), None)]) == of_gpu()
    )


class Gpu:
    """In the place of the GPU's measurer: every variant wins; keeps what it was asked."""

    device = "GPU"
    interrupted_at = None  # the confirmation at which Ctrl-C comes
    asked: list

    def __init__(self, *, seed):
        Gpu.asked, self.confirmed = [], 0

    def __call__(self, problem, names):
        Gpu.asked.append((problem, names))
        return [timed(8.0) for _ in names]

    def confirm(self, problem, variant):
        self.confirmed += 1
        if self.confirmed == self.interrupted_at:
            raise KeyboardInterrupt
        return timed(8.1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(command, "GpuMeasurer", Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


def tune(*arguments) -> int:
    return cli.main(["tune", *arguments])


def test_an_interruption_of_the_confirmations_keeps_those_before_it(gpu, tmp_path, capsys):
    gpu.setattr(Gpu, "interrupted_at", 3)
    output = tmp_path / "table.json"
    others = [linear((8, 4096, 6144)), linear((16, 4096, 6144))]
    write_table(output, of_gpu(*others))
    assert tune("--op", "linear", "--output", str(output)) == 130
    entries = read_table(output).entries
    assert set(entries) == {*others, linear((1, 4096, 6144)), linear((4, 4096, 6144))}
    assert "interrupted: what was timed once more is kept" in capsys.readouterr().out


def test_the_search_begins_with_the_wheels_table(gpu):
    gpu.setattr(Gpu, "device", "NVIDIA H200")
    assert tune("--op", "cached_attention") == 0
    first = {problem.shape: names for problem, names in reversed(Gpu.asked)}
    assert "decode/8" in first[1, 4, 4096, 32, 8, 128]
    assert "small/8" in first[1, 64, 4096, 32, 8, 128]


def test_the_wheels_table_is_what_the_study_gives(tmp_path):
    """Every legal variant of every problem, and the confirmations as they were."""
    study, output = Path(__file__).parent / "data" / "h200.json", tmp_path / "table.json"
    of = ("--replay", "--study", str(study), "--strategy", "all", "--budget", "60m")
    assert tune(*of, "--output", str(output)) == 0
    assert output.read_bytes() == (shipped_tables_dir() / "h200.json").read_bytes()


def test_the_users_own_files_of_another_version_are_replaced(gpu, tmp_path):
    own = variants.user_tables_dir() / "gpu.json"
    write_table(own, of_version("0.0.1", linear((4, 8, 8))))
    assert tune("--op", "linear") == 0
    assert set(linear(shape) for shape in SHAPES) < set(read_table(own).entries)
    assert linear((4, 8, 8)) not in read_table(own).entries
    (study,) = (tmp_path / "studies").iterdir()
    assert study.name == f"gpu-{version('fastshard')}.json"
    elsewhere = tmp_path / "elsewhere.json"
    write_table(elsewhere, of_version("0.0.1"))
    assert tune("--op", "linear", "--output", str(elsewhere)) == 1


def test_an_entry_of_a_promoted_kernel_stays_while_it_is_there():
    problem = Problem("rms_norm", "float16", (16, 4096))
    old = of_gpu(Entry("rms_norm", "float16", (16, 4096), "promoted_a"))
    wider = with_promoted(MENU, {"rms_norm": ["promoted_a"]})
    unknown = Found(problem)
    assert table.merged(old, [(unknown, None)], wider) == old
    assert table.merged(old, [(unknown, None)]).entries == ()
    assert table.merged(old, []) == old
    slow = Found(problem, {"promoted_a": timed(11.0)})
    assert table.merged(old, [(slow, None)], wider).entries == ()
