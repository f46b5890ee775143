"""How `make gpu` shares its time and keeps its results; the steps themselves need a GPU."""

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_files import BENCHMARKS, load

from pyft.bench.problems import OPS


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load("gpu")


@pytest.fixture(scope="module")
def runner(gpu: ModuleType) -> ModuleType:
    return sys.modules["gpu_run"]


class Machine:
    """Time that passes only while a step runs; ``needs`` says how long each would take."""

    def __init__(self, needs: dict[str, float], codes: dict[str, int] | None = None) -> None:
        self.now, self.needs, self.codes = 1000.0, needs, codes or {}
        self.ran: list[tuple[str, float]] = []

    def clock(self) -> float:
        return self.now

    def execute(
        self, command: Sequence[str], seconds: float, environment: dict[str, str], log: Path
    ) -> tuple[int | None, str]:
        name = command[0]
        self.ran.append((name, seconds))
        self.now += min(seconds, self.needs[name])
        if self.needs[name] > seconds:
            return None, f"{name} began\n"
        return self.codes.get(name, 0), f"{name} began\n{name} ended\n"


def go(
    runner: ModuleType, machine: Machine, steps: list[Any], output: Path, total: float = 100.0
) -> tuple[bool, dict[str, Any]]:
    run = runner.Run(output, {}, total, machine.clock, machine.execute, {"gpu": "none"})
    passed = run.go(steps)
    return passed, json.loads((output / "gpu.json").read_text(encoding="utf-8"))


def test_a_step_gets_what_later_steps_are_not_sure_of(runner, tmp_path):
    step = runner.Step
    steps = [step("a", ["a"], 80, 10), step("b", ["b"], 80, 30), step("c", ["c"], 80)]
    machine = Machine({"a": 500.0, "b": 500.0, "c": 500.0})
    passed, found = go(runner, machine, steps, tmp_path)
    assert machine.ran == [("a", 70.0), ("b", 30.0)]
    assert not passed
    assert [entry["status"] for entry in found["steps"]] == ["stopped", "stopped", "no time"]
    assert found["steps"][2]["reason"] == "0 s were left for it"


def test_time_not_used_goes_to_the_others(runner, tmp_path):
    step = runner.Step
    steps = [step("a", ["a"], 80, 10), step("b", ["b"], 80, 30), step("c", ["c"], 80)]
    machine = Machine({"a": 5.0, "b": 20.0, "c": 1.0})
    passed, found = go(runner, machine, steps, tmp_path)
    assert passed
    assert machine.ran == [("a", 70.0), ("b", 80.0), ("c", 75.0)]
    assert [entry["seconds"] for entry in found["steps"]] == [5.0, 20.0, 1.0]
    assert found["state"] == "done"


def test_a_step_not_begun_for_lack_of_time_is_no_success(runner, tmp_path):
    steps = [runner.Step("a", ["a"], 98), runner.Step("b", ["b"], 50)]
    machine = Machine({"a": 97.0, "b": 1.0})
    passed, found = go(runner, machine, steps, tmp_path)
    assert [entry["status"] for entry in found["steps"]] == ["ok", "no time"]
    assert machine.ran == [("a", 98.0)]
    assert not passed


@pytest.mark.parametrize(("seconds", "status"), [(1.0, "failed"), (99.0, "stopped")])
def test_what_needs_a_failed_step_is_not_begun(runner, tmp_path, seconds, status):
    steps = [
        runner.Step("build", ["build"], 20),
        runner.Step("tests", ["tests"], 50, needs="build"),
        runner.Step("environment", ["environment"], 50),
    ]
    machine = Machine({"build": seconds, "tests": 1.0, "environment": 1.0}, {"build": 1})
    passed, found = go(runner, machine, steps, tmp_path)
    assert not passed
    assert [name for name, _ in machine.ran] == ["build", "environment"]
    blocked = found["steps"][1]
    assert blocked["status"] == "blocked"
    assert blocked["reason"] == f"needs build: {status}"


def test_what_is_needed_and_not_asked_for_is_there(runner, tmp_path):
    """With --only, a step runs over what an earlier run built."""
    steps = [runner.Step("tests", ["tests"], 50, needs="build")]
    passed, found = go(runner, Machine({"tests": 1.0}), steps, tmp_path)
    assert passed
    assert found["steps"][0]["status"] == "ok"


def test_a_failed_step_does_not_stop_the_others(runner, tmp_path):
    steps = [runner.Step("a", ["a"], 50), runner.Step("b", ["b"], 50)]
    passed, found = go(runner, Machine({"a": 1.0, "b": 1.0}, {"a": 3}), steps, tmp_path)
    assert not passed
    assert [(entry["status"], entry["code"]) for entry in found["steps"]] == [
        ("failed", 3),
        ("ok", 0),
    ]


def test_a_step_that_cannot_run_says_why_and_keeps_no_time(runner, tmp_path):
    steps = [
        runner.Step("a", ["a"], 100),
        runner.Step("b", None, 60, 50, missing="no such tool"),
    ]
    machine = Machine({"a": 1.0})
    passed, found = go(runner, machine, steps, tmp_path)
    assert passed
    assert machine.ran == [("a", 100.0)]
    assert found["steps"][1] == {
        "name": "b",
        "status": "skipped",
        "seconds": 0.0,
        "reason": "no such tool",
    }


def test_results_are_on_disk_after_each_step(runner, tmp_path):
    """Cut off in the second step, the first one's result is there."""

    class CutOff(Machine):
        def execute(self, command: Sequence[str], *rest: Any) -> tuple[int | None, str]:
            if command[0] == "b":
                raise SystemExit(143)
            return super().execute(command, *rest)

    steps = [
        runner.Step("a", ["a"], 50, result=lambda text: text.split()),
        runner.Step("b", ["b"], 50),
    ]
    with pytest.raises(SystemExit):
        go(runner, CutOff({"a": 1.0}), steps, tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["state"] == "running"
    (only,) = found["steps"]
    assert only["name"] == "a"
    assert only["result"] == ["a", "began", "a", "ended"]


def test_what_a_stopped_step_wrote_is_read(runner, tmp_path):
    steps = [runner.Step("a", ["a"], 10, result=lambda text: text)]
    _, found = go(runner, Machine({"a": 99.0}), steps, tmp_path)
    assert found["steps"][0]["status"] == "stopped"
    assert found["steps"][0]["result"] == "a began\n"


def test_an_unreadable_result_is_noted(runner, tmp_path):
    steps = [runner.Step("a", ["a"], 10, result=json.loads)]
    _, found = go(runner, Machine({"a": 1.0}), steps, tmp_path)
    assert found["steps"][0]["result"] is None
    assert found["steps"][0]["reason"].startswith("no result to read: ")


def test_a_real_command_is_stopped_with_all_it_started(runner, tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('started', flush=True)\ntime.sleep(60)\n"
    )
    began = time.monotonic()
    code, text = runner.execute([sys.executable, "-c", parent], 0.7, {}, tmp_path / "log.txt")
    assert code is None
    assert time.monotonic() - began < 10
    assert text in ("started\n", "")  # a machine under load may not get that far
    time.sleep(1.5)
    assert not mark.exists()


def test_a_real_command_and_its_log(runner, tmp_path):
    log = tmp_path / "log.txt"
    for code in (0, 4):
        line = f"import sys; print('out {code}'); print('err', file=sys.stderr); sys.exit({code})"
        found, text = runner.execute([sys.executable, "-u", "-c", line], 30, {}, log)
        assert found == code
        assert text == f"out {code}\nerr\n"
    assert log.read_text(encoding="utf-8").count("== ") == 2


def test_the_plan_is_most_valuable_first(gpu, tmp_path):
    steps = gpu.plan(tmp_path, "python3", True, True, "/usr/bin/compute-sanitizer")
    names = [step.name for step in steps]
    assert names[:3] == ["build", "environment", "tests of kernels"]
    benches = ["bench of attention", "bench of the loss", "bench of layers", "bench"]
    assert names[3:7] == benches
    assert names[7:9] == ["memory", "compute-sanitizer memcheck"]
    assert all(step.command for step in steps)
    assert sum(step.least for step in steps) < gpu.SECONDS < 9 * 60
    assert "-n" in steps[2].command
    assert "--shapes" not in steps[3].command
    assert {step.name for step in steps if step.needs != "build"} == {"build", "environment"}


def test_every_op_is_measured_once_and_drawn(gpu, tmp_path):
    steps = {step.name: step for step in gpu.plan(tmp_path, "python3", True, False, None)}
    benches = [steps[name].command for name in gpu.BENCHES]
    measured = [word for command in benches for word in command if word in OPS]
    assert sorted(measured) == sorted(OPS)
    for name, command in zip(gpu.BENCHES, benches, strict=True):
        results = command[command.index("--json") + 1]
        assert results in steps[f"chart of {name}"].command


def test_every_test_file_is_run_once(gpu, tmp_path):
    files = [
        word
        for step in gpu.plan(tmp_path, "python3", True, False, None)
        for word in step.command or ()
        if word.startswith("tests/")
    ]
    there = sorted(f"tests/{path.name}" for path in Path(__file__).parent.glob("test_*.py"))
    assert sorted(files) == there
    assert files[0] == "tests/test_devices.py"
    for name in ("kernels_quantize", "kernels_norm", "lora_mlp", "rope"):
        assert files.index(f"tests/test_{name}.py") < files.index("tests/test_cli.py")


def test_without_gpu_or_tool_the_sanitizer_says_why(gpu, tmp_path):
    without = {step.name: step for step in gpu.plan(tmp_path, "python3", True, False, None)}
    assert without["compute-sanitizer memcheck"].command is None
    assert "not on this machine" in without["compute-sanitizer memcheck"].missing
    no_gpu = {step.name: step for step in gpu.plan(tmp_path, "python3", False, False, "/x")}
    assert "no GPU" in no_gpu["compute-sanitizer racecheck"].missing


def test_what_steps_write_is_read(gpu, tmp_path):
    assert gpu.errors("x\n========= ERROR SUMMARY: 3 errors\n") == {"errors": 3}
    assert gpu.errors("==== RACECHECK SUMMARY: 0 hazards displayed") == {"errors": 0}
    assert gpu.errors("killed") == {"errors": -1}
    assert gpu.json_line('noise\n{"a": 1}\n') == {"a": 1}
    row = {"op": "quantize", "shape": "2x2", "variant": "", "status": "ok"}
    wrong = {**row, "status": "WRONG", "reason": "error 1"}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"results": [row, wrong]}), encoding="utf-8")
    found = gpu.timed(path)
    assert (found["timed"], found["not timed"]) == (1, 1)
    assert found["reasons"] == ["quantize 2x2 : WRONG: error 1"]


def test_wheels_are_unpacked_beside(gpu, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "peer-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("peer/__init__.py", "VERSION = 1\n")
    assert gpu.unpack(wheels, tmp_path / "site") == ["peer-1.0-py3-none-any.whl"]
    assert (tmp_path / "site" / "peer" / "__init__.py").is_file()
    assert gpu.unpack(None, tmp_path / "site") == []


def test_a_line_for_each_test(gpu, tmp_path):
    """The plugin under pytest itself, and what is read from its lines, a broken file included."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_not(): pytest.skip('not here')\n",
        encoding="utf-8",
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n", encoding="utf-8")
    log = tmp_path / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_log", "--rootdir", "."]
    command += ["--continue-on-collection-errors", f"--test-log={log}", "--chunk=some tests", "."]
    environment = {"PYTHONPATH": str(BENCHMARKS.parent), "PATH": "/usr/bin:/bin"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    found = gpu.tally(log, "some tests")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    messages = {failure["test"]: failure["message"] for failure in found["failures"]}
    assert "no_such_module" in messages["test_broken.py"]
    assert "assert 1 == 2" in messages["test_some.py::test_wrong"]
    assert gpu.tally(log, "other tests") == {"failures": []}


def test_the_command_line(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(BENCHMARKS / "gpu.py"),
            "--output",
            str(tmp_path),
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith("build (at most 150 s")
    assert list(tmp_path.iterdir()) == []
    done = run("--dry-run", "--only", "benches")
    assert done.returncode == 2
    assert done.stderr == "make gpu: --only: no step is called benches\n"
