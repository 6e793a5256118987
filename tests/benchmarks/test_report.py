"""The report: what it says of synthetic results, and that docs/measured.md is what it writes."""

import csv
import dataclasses

import pytest

from benchmarks.harness import history
from benchmarks.harness.records import OK, OURS, Row, Writer, version_of
from benchmarks.ops import source_of
from benchmarks.report import main

SOURCE = "cgkernels.ops.add_noise"
CPU = {
    "device": "A processor", "date": "2026-01-02", "commit": "abc1234", "time": "10:00:00",
    "command": "python -m benchmarks.run", "torch": "2.13.0", "python": "3.11.7", "threads": 2,
    "ceilings": "copy 10 GB/s",
}  # fmt: skip
GPU = CPU | {"device": "A GPU, 80 GB", "cuda": "13.0", "clocks": "1980 MHz"}
NO_GPU = "No kernel of this version has been run on a GPU yet"


def row(provider=OURS, p50=100.0, **changes):
    times = {} if p50 is None else {
        "p20": 0.99 * p50, "p50": p50, "p80": 1.01 * p50, "low": p50, "high": p50, "n": 50,
        "host": 7.5, "launch_bound": False, "syncs": 0, "floor": 50.0, "of_floor": 50 / p50,
        "bound": "memory",
    }  # fmt: skip
    made = Row("ops", "add_noise", "v", "big", "pixels (32, 3, 512, 512)", "float32", provider, OK,
               **times, source=SOURCE, version=version_of(SOURCE))  # fmt: skip
    return dataclasses.replace(made, **changes)


def missing(provider, status, **changes):
    return row(provider, p50=None, status=status, **changes)


def sweep(exponent, sizes=(64, 128, 256, 512), **changes):
    return [
        row(suite="growth", size=f"b{n}", p50=n**exponent, extent="elements", extent_value=n,
            extent_limit=1.0, **changes)
        for n in sizes
    ]  # fmt: skip


@pytest.fixture
def report(tmp_path):
    """Writes files of (environment, rows), and returns the report on all so far and its plots."""
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()

    def write(*files):
        for environment, rows in files:
            writer = Writer(results, environment)
            for one in rows:
                writer.write(one)
        assert main(["--results", str(results), "--docs", str(docs)]) == 0
        plots = sorted(file.name for file in (docs / "measured").glob("*"))
        return (docs / "measured.md").read_text(), plots

    return write


def cells(text, start):
    """Cells of the one line of a table that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# Docs ---------------------------------------------------------------------------------------------
def test_docs_say_what_the_results_say():
    assert main(["--check"]) == 0


def test_check_sees_what_changed(report, tmp_path, capsys):
    report((CPU, [row(), row("eager")]))
    check = ["--check", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    assert main(check) == 0
    plot = tmp_path / "docs" / "measured" / "A-processor_ops.png"
    plot.write_bytes(b"another image")
    assert main(check) == 0
    plot.unlink()
    assert main(check) == 1 and f"{plot} is missing" in capsys.readouterr().err
    text = tmp_path / "docs" / "measured.md"
    text.write_text(text.read_text().replace("copy 10 GB/s", "copy 20 GB/s"))
    before = text.read_text()
    assert main(check) == 1 and "+1. `A-processor" in capsys.readouterr().err
    assert text.read_text() == before and not plot.exists()
    text.unlink()
    assert main(check) == 1 and not text.exists()


def test_no_results(report):
    text, plots = report()
    assert f"{NO_GPU}**, so there is no GPU figure here." in text
    assert "There is no file of results yet" in text and plots == []


def test_files_of_words_are_included(report, tmp_path):
    words = "## By hand\n\n| a | b |\n|---|---|\n| <1 | 2 |\n"
    (tmp_path / "results" / "choices.md").write_text(words)
    assert report()[0].endswith("\n\n" + words)


# A device -----------------------------------------------------------------------------------------
def test_where_numbers_come_from(report):
    text, plots = report((GPU, [row(peak=3 << 20, graph=90.0), row("eager")]))
    assert "## A GPU, 80 GB, 2026-01-02, commit abc1234: 0 of 2 rows stale" in text
    for said in ("torch 2.13.0", "cuda 13.0", "`python -m benchmarks.run`", "copy 10 GB/s", "1980"):
        assert said in text
    assert NO_GPU not in text and "`big` is pixels (32, 3, 512, 512)" in text
    assert plots == ["A-GPU-80-GB_ops.png"] and f"(measured/{plots[0]})" in text
    assert cells(text, "v, big, float32 |") == [
        "v, big, float32", OURS, "100 (99 to 101)", "1", "7.5", "90", "0", "3 MiB", "50 % (memory)",
    ]  # fmt: skip


def test_what_is_faster_stays_and_is_marked(report):
    rows = [row(), row("eager", 150.0), row("compile", 50.0), row("compile-max", 97.0)]
    text, _ = report((CPU, rows))
    assert cells(text, " | eager")[3] == "1.5"
    assert cells(text, " | compile |")[3] == "**0.5**"
    assert cells(text, " | compile-max")[3] == "0.97"  # within 5 %: the same
    assert cells(text, "`add_noise`") == [
        "`add_noise`", "0.5", "0.5: v, big, float32, against compile", "1 of 1",
    ]  # fmt: skip


def test_speed_ups_are_a_geometric_mean_over_the_strongest_baselines(report):
    rows = [row(), row("eager", 800.0), row("compile", 400.0)]
    rows += [dataclasses.replace(r, size="small", p50=100.0) for r in rows[:2]]  # a tie
    rows += [row(size="alone"), row(case="alone", size="alone")]
    text, _ = report((CPU, rows))
    assert cells(text, "`add_noise`")[1:] == ["2", "1: v, small, float32, against eager", "2 of 3"]
    assert cells(text, "`alone`")[1:] == ["none", "none", "0 of 1"]


def test_noise_and_waiting_for_the_host_are_marked(report):
    noisy = row("eager", 100.0, p80=125.0, launch_bound=True)
    text, _ = report((CPU, [row(), noisy]))
    assert cells(text, " | eager")[2] == "100 (99 to 125), noise 26 %"
    assert cells(text, " | eager")[4] == "7.5, launch-bound"


@pytest.mark.parametrize(
    "p50, graph, impossible", [(48.0, None, 0), (47.0, None, 1), (60.0, 48.0, 0), (60.0, 40.0, 1)]
)
def test_what_cannot_be_is_marked_on_a_gpu(report, p50, graph, impossible):
    """The floor is 50."""
    rows = [row(), row("eager", p50, graph=graph), row(size="fine"), row("eager", size="fine")]
    text, _ = report((GPU, rows))
    assert text.count("impossible: check") == impossible
    assert cells(text, "`add_noise`")[-1] == f"{2 - impossible} of 2"


def test_caches_explain_what_cannot_be_on_a_cpu(report):
    text, _ = report((CPU, [row(), row("eager", 47.0)]))
    assert "impossible: check" not in text and cells(text, "`add_noise`")[-1] == "1 of 1"


def test_providers_that_did_not_run(report):
    rows = [
        row(), row("eager"), missing("graphs", "needs CUDA"), missing("max", "needs CUDA"),
        missing("diffusers", "not installed"), missing("compile", "failed: E: a | <b>"),
    ]  # fmt: skip
    text, _ = report((CPU, rows))
    assert "Not run: `graphs`, `max` (needs CUDA); `diffusers` (not installed).\n" in text
    assert "| compile | failed: E: a \\| &lt;b> |" in text
    assert "| graphs" not in text and "0 of 2 rows" in text


def test_what_a_graph_cannot_capture(report):
    rows = [row(), row("eager", graph_error="RuntimeError: waits")]
    assert "Not captured" not in report((CPU, rows))[0]
    assert "Not captured in a graph: `eager` (RuntimeError: waits)." in report((GPU, rows))[0]


def test_ours_failed(report):
    text, plots = report((CPU, [missing(OURS, "failed: E: x"), row("eager")]))
    assert cells(text, " | eager")[2:4] == ["100 (99 to 101)", "7.5"] and plots == []


# Runs ---------------------------------------------------------------------------------------------
def test_each_case_comes_from_the_newest_run_that_has_it(report):
    old = [row(), row("eager", 300.0), row(size="small"), row("eager", 300.0, size="small")]
    new = [row(p50=200.0), row("eager", 250.0)]
    report((CPU, old))
    text, plots = report((CPU | {"time": "11:00:00", "commit": "def5678"}, new), (GPU, new))
    assert text.index("## A GPU") < text.index("## A processor")
    text = text[text.index("## A processor") :]
    assert "commit def5678: 0 of 4 rows stale" in text and "Older runs" not in text
    assert cells(text, "v, big")[2] == "200 (198 to 202)" and cells(text, "v, big")[-1] == "1"
    assert cells(text, "v, small")[2] == "100 (99 to 101)" and cells(text, "v, small")[-1] == "2"
    assert plots == ["A-GPU-80-GB_ops.png", "A-processor_ops.png"]


def test_a_run_that_is_replaced_is_only_named(report):
    same = CPU | {"date": "2025-12-31"}
    text, _ = report((same, [row(p50=300.0)]), (CPU, [row()]), (same, [row(p50=400.0)]))
    names = "`A-processor_2025-12-31_abc1234_2.csv`, `A-processor_2025-12-31_abc1234.csv`"
    assert f"Older runs, replaced by these: {names}." in text
    assert "300 (" not in text and "400 (" not in text


@pytest.mark.parametrize(
    "changes", [{"version": "0123"}, {"source": ""}, {"source": "cgkernels.ops.gone"}]
)
def test_stale_rows(report, changes):
    rows = [row(), row("eager", 300.0), row(size="old", **changes), missing("x", "needs CUDA")]
    rows += [row("eager", 700.0, size="old", **changes)]
    text, _ = report((GPU, rows))
    assert "2 of 4 rows stale" in text and NO_GPU not in text
    assert cells(text, "v, old")[0] == "v, old, float32, **stale**"
    assert text.count("**stale**") == 2  # this case, and the legend
    assert cells(text, "`add_noise`")[1:] == ["3", "3: v, big, float32, against eager", "1 of 2"]


def test_a_gpu_that_only_older_versions_ran_on(report):
    text, _ = report((GPU, [row(version="0123")]))
    assert f"{NO_GPU}**: the GPU figures here are of older versions." in text


# Growth -------------------------------------------------------------------------------------------
def test_growth(report):
    rows = [*sweep(1.0), *sweep(2.0, case="slow"), *sweep(1.0, (64, 128), case="short")]
    text, plots = report((CPU, [*rows, *sweep(1.0, case="old", version="0123")]))
    assert cells(text, "`add_noise`, v, over") == [
        "`add_noise`, v, over elements, float32", "64 to 512", "1.00", "1.00",
    ]  # fmt: skip
    assert cells(text, "`slow`")[2:] == ["2.00", "1.00, **exceeded**"]
    assert cells(text, "`old`")[0] == "`old`, v, over elements, float32, **stale**"
    assert "Fewer than three sizes: `short`, v, over elements, float32.\n" in text
    assert plots == ["A-processor_growth.png"] and "4 of 14 rows stale" in text


def test_a_sweep_is_of_one_run(report):
    report((CPU, sweep(1.0)))
    text, plots = report((CPU | {"time": "11:00:00"}, sweep(1.0, (1024, 2048))))
    assert "Fewer than three sizes: `add_noise`" in text and "64 to" not in text
    assert f"![Time over size, both logarithmic](measured/{plots[0]})" not in text


# Without a device ---------------------------------------------------------------------------------
def test_static_counts(report, tmp_path):
    fields = ["triton", "op", "version", "launch", "kernel", "arch", "instructions", "registers"]
    version = version_of(source_of("philox_normal"))
    lines = [
        ["3.9.0", "philox_normal", version, "plain torch.float32 (16, 10)", "_fwd", 90, 504, 31],
        ["3.9.0", "philox_normal", version, "plain torch.bfloat16 (16, 10)", "_fwd", 90, 524, 32],
        ["3.9.0", "philox_normal", version, "plain torch.float32 (16, 10)", "_fwd", 80, 999, 99],
        ["3.9.0", "philox_normal", "0123", "short rows", "_fwd", 90, 321, 20],
        ["3.9.0", "gone", version, "plain torch.float32", "_fwd", 90, 111, 11],
    ]
    (tmp_path / "results" / "offline").mkdir()
    file = tmp_path / "results" / "offline" / "2026-01-02_abc1234_triton-3.9.0.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([fields, *lines])
    text, _ = report()
    assert "## Static instruction counts, sm_90, Triton 3.9.0: 2 of 3 rows stale" in text
    assert "2026-01-02, commit abc1234" in text and "999" not in text
    assert cells(text, "`philox_normal` | plain (16, 10) | _fwd |  | 504 / 31 | 524 / 32 |  |")
    assert cells(text, "`philox_normal` | short rows | _fwd | stale |  |  | 321 / 20 |")
    assert cells(text, "`gone` | plain | _fwd | stale | 111 / 11")


# Damage -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, damage",
    [
        ("A-processor_2026-01-02_abc1234.csv", lambda text: text[: len(text) - 40]),
        ("A-processor_2026-01-02_abc1234.csv", lambda text: text.rpartition(",")[0]),
        ("A-processor_2026-01-02_abc1234.csv", lambda text: text.replace("# commit", "# nothing")),
        ("A-processor_2026-01-02_abc1234.csv", lambda text: text.replace(",100,", ",,")),
        ("A-processor_2026-01-02_abc1234.csv", lambda text: text.replace("False", "Perhaps")),
        ("other.csv", lambda text: "a,b\n1,2\n"),
        ("offline/2026-01-02_abc1234_triton-3.9.0.csv", lambda text: "a,b\n1,2\n"),
        ("offline/table.csv", lambda text: "triton,op,version,launch,kernel,arch\n"),
    ],
)
@pytest.mark.parametrize("option", [[], ["--check"]])
def test_a_damaged_file_is_named_and_nothing_written(
    name, damage, option, report, tmp_path, capsys
):
    report((CPU, [row(), row("eager")]))
    docs, file = tmp_path / "docs", tmp_path / "results" / name
    (docs / "measured" / "A-processor_ops.png").unlink()
    before = (docs / "measured.md").read_text()
    file.parent.mkdir(exist_ok=True)
    good = file.read_text() if file.exists() else ""
    file.write_text(damage(good))
    assert file.read_text() != good
    assert main(["--results", str(tmp_path / "results"), "--docs", str(docs), *option]) == 2
    assert f"benchmarks.report: {file}: " in capsys.readouterr().err
    assert (docs / "measured.md").read_text() == before
    assert [f.name for f in docs.rglob("*") if f.is_file()] == ["measured.md"]


@pytest.mark.parametrize("option", ["--results", "--docs"])
def test_folders_must_be_there(option, tmp_path, capsys):
    assert main([option, str(tmp_path / "nothing")]) == 2
    assert f"{option} must be a folder" in capsys.readouterr().err


def test_the_oldest_run_is_last(tmp_path):
    for environment in (
        CPU,
        CPU | {"time": "09:00:00", "commit": "b"},
        CPU | {"date": "2026-01-03"},
    ):
        Writer(tmp_path, environment).write(row())
    runs = history.load(tmp_path)
    assert [run.age[:2] for run in runs] == [
        ("2026-01-03", "10:00:00"), ("2026-01-02", "10:00:00"), ("2026-01-02", "09:00:00"),
    ]  # fmt: skip
