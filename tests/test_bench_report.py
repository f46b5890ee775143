"""What the harness writes, and the command `pyft bench`."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_clock import CPU, TINY, rows_of

from pyft.bench import plot, report
from pyft.bench.command import Options, bench, to_request
from pyft.bench.problem import Case, Request
from pyft.bench.problems import OPS
from pyft.bench.run import check_request
from pyft.errors import UsageError


@pytest.fixture(scope="module")
def small_rows() -> list[dict[str, Any]]:
    return rows_of(["dequantize", "qlinear"], TINY)


@pytest.fixture
def small_report(small_rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = report.describe(CPU, "pyft bench dequantize")
    found["results"] = [dict(row) for row in small_rows]
    return found


def test_the_json_says_where_it_comes_from(small_report):
    read = json.loads(report.to_json(small_report))
    assert read["schema"] == 1
    assert read["command"] == "pyft bench dequantize"
    assert {"pyft", "python", "torch", "triton", "bitsandbytes", "torchao", "peft"} <= set(
        read["versions"]
    )
    assert read["device"]["type"] == "cpu"
    assert read["device"]["threads"] == torch.get_num_threads()
    assert {"date", "commit", "uncommitted_changes"} <= set(read)
    row = read["results"][0]
    assert row["sizes"] == {"N": 64, "K": 128}
    assert {"median_ms", "p10_ms", "p90_ms", "rounds", "gb_s", "copy_gb_s", "error"} <= set(row)


def test_the_json_holds_no_nan():
    assert json.loads(report.to_json({"a": [float("nan"), (float("inf"), 1.5)]})) == {
        "a": [None, [None, 1.5]]
    }


def test_the_markdown_has_a_table_per_op(small_report):
    lines = report.markdown(small_report).splitlines()
    assert [line for line in lines if line.startswith("###")] == [
        "### dequantize, bf16, nf4",
        "### qlinear, bf16, nf4",
    ]
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 * 2 + len(small_report["results"])
    assert "TFLOP/s" not in tables[0]  # a column nobody fills is left out
    assert "torch frozen linear 1.00 (1.0–1.0)" in tables[-1]


def test_the_table_is_one_line_a_row_at_160_columns(small_report, small_rows):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.tables(small_report))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 160
    assert not any("…" in line for line in lines)
    assert sum("64x128" in line for line in lines) == len(small_rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1234"), (12.345, "12.3"), (1.0, "1.00"), (0.01234, "0.0123"), (0, "0")],
)
def test_figures_are_short(value, text):
    assert report.figure(value) == text


def test_writing_replaces_the_whole_file(tmp_path):
    path = tmp_path / "deep" / "results.json"
    report.write(path, "one")
    report.write(path, "two")
    assert path.read_text(encoding="utf-8") == "two"
    assert list(path.parent.iterdir()) == [path]


def test_the_chart_is_a_png(small_report, tmp_path):
    pytest.importorskip("matplotlib")
    small_report["results"][0]["status"] = "WRONG"
    plot.draw(small_report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="nothing was timed"):
        plot.draw({**small_report, "results": []}, tmp_path / "none.png")


def test_peers_of_a_panel_have_colours_of_their_own():
    names = [f"peer {index}" for index in range(9)]
    panels = [[names[i], names[(i + 1) % 9], names[(i + 4) % 9]] for i in range(9)]
    colours = plot.colours_of(panels)
    assert set(colours) == set(names)
    assert all(len({colours[name] for name in panel}) == 3 for panel in panels)
    assert len(set(plot.colours_of([names]).values())) == len(plot.COLOURS)


def test_a_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--plot needs matplotlib: pip install"):
        plot.require()


def test_files_are_written_as_results_come_in(tmp_path, monkeypatch):
    def breaks(case: Case, request: Request) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setitem(OPS, "quantize", replace(OPS["quantize"], problems=breaks))
    options = Options(["dequantize", "quantize"], shape=["64x64"], budget=0.01,
                      json=tmp_path / "a.json", markdown=tmp_path / "a.md")  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        bench(options, "pyft bench", lambda line: None)
    assert len(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["results"]) == 2
    assert "### dequantize" in (tmp_path / "a.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ["matmul"]}, "bench: op 'matmul' is unknown; use one of dequantize, "),
        ({"dtype": "bf16,int8"}, "--dtype: 'int8' is not one of bf16, fp16, fp32"),
        ({"format": "nf5"}, "--format: 'nf5' is not one of nf4"),
        ({"backend": "gpu"}, "--backend: 'gpu' is not one of auto, all, reference"),
        ({"backend": "cuda"}, "backend 'cuda' cannot run quantize on device cpu"),
        ({"device": "tpu"}, "--device: 'tpu' is not one of auto, cpu, cuda"),
        ({"tokens": "512,many"}, "--tokens: 'many' is not a number of tokens"),
        ({"threads": 0}, "--threads: 0 is not above 0"),
        ({"budget": -1.0}, "--budget: -1.0 is not above 0"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    given = Options(**{"ops": ["dequantize"], "device": "cpu", **options})
    with pytest.raises(UsageError) as error:
        check_request(given.ops, to_request(given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_from_a_shell():
    command = [sys.executable, "-m", "pyft.cli", "bench", "dequantize", "--shape", "64x64"]
    command += ["--device", "cpu", "--budget", "0.1", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["command"].endswith("--json -")
    assert [row["variant"] for row in read["results"]] == ["reused buffer", "fresh buffer"]
    assert "reused buffer" in done.stderr


def test_a_wrong_option_in_a_shell():
    command = [sys.executable, "-m", "pyft.cli", "bench", "--shape", "big"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr == "pyft: --shape: 'big' is not NxK, as in 14336x4096\n"
