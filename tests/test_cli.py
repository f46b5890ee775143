"""The command line as a user meets it: help, exit codes, one line for each error."""

import importlib.metadata
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from pyft import cli, doctor, embedded

ROOT = Path(__file__).parents[1]


def pyft(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyft.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pyft: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [
        {"prompt": f"What is {i} plus {i + 1}?", "completion": f"It is {2 * i + 1}."}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys\nsys.argv = ['pyft', '--help']\nfrom pyft.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'triton'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "finetune" in done.stdout
    assert done.stdout.strip().endswith("heavy: []")


def test_help_is_quick():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert pyft("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize("command", ["finetune", "eval", "doctor", "demo", "data", "bench"])
def test_each_command_has_help(command):
    done = pyft(command, "--help")
    assert done.returncode == 0
    assert command == "data" or "Example: pyft" in done.stdout


def test_every_configuration_key_is_an_option():
    from pyft.finetune.config import Config

    done = pyft("finetune", "--help")
    for name in Config.model_fields:
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_version():
    assert pyft("--version").stdout.startswith("pyft 0.")


def test_unknown_option_and_command():
    refused(pyft("finetune", "--rnk", "3"), 2, "--rnk", "--rank")
    refused(pyft("finetun"), 2, "finetun")


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"learning_rat": 1e-4}), encoding="utf-8")
    refused(pyft("finetune", "--config", path), 2, "learning_rat", "learning_rate", "line 1")


def test_missing_and_wrong_model(rows, tmp_path):
    job = ("--data", rows, "--output", tmp_path / "out")
    refused(pyft("finetune", "--model", tmp_path / "no", *job), 2, "no", "does not exist")
    refused(pyft("finetune", "--model", tmp_path, *job), 2, "not a model directory")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(rows, tmp_path):
    model = tmp_path / "pickled"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    done = pyft("finetune", "--model", model, "--data", rows, "--output", tmp_path / "out")
    refused(done, 2, "pytorch_model.bin", "safetensors")


def test_missing_and_broken_data(tmp_path):
    job = ("--model", embedded.MODEL_DIR, "--output", tmp_path / "out")
    refused(pyft("finetune", "--data", tmp_path / "no.jsonl", *job), 2, "no.jsonl")
    broken = tmp_path / "latin.jsonl"
    broken.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    refused(pyft("finetune", "--data", broken, *job), 2, "latin.jsonl", "line 2", "UTF-8")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    refused(pyft("finetune", "--data", empty, *job), 2, "empty.jsonl")
    assert not (tmp_path / "out").exists()


def test_output_that_holds_something_else_is_refused(rows, tmp_path):
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work", encoding="utf-8")
    job = ("--model", embedded.MODEL_DIR, "--data", rows, "--output", output)
    refused(pyft("finetune", *job), 2, "precious", "thesis.txt", "empty directory")
    refused(pyft("finetune", *job, "--overwrite"), 2, "precious", "not overwritten")
    assert (output / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_data_check_as_json_and_strict(rows, tmp_path):
    done = pyft("data", "check", rows, "--json")
    assert done.returncode == 0, done.stderr
    assert "findings" in json.loads(done.stdout)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(rows.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert pyft("data", "check", twice).returncode == 0
    refused(pyft("data", "check", twice, "--strict"), 2, "twice.jsonl")


def test_doctor_as_json():
    done = pyft("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["ready"]
    assert found["availability"]["lora_linear"]["cpu"] == "yes"


@pytest.mark.parametrize(
    ("failure", "package"),
    [
        ("import transformers", "transformers"),
        ("raise ImportError('cannot import', name='peft.tuners.lora')", "peft"),
        ("raise ImportError('tokenizers>=0.22 is required, but found 0.19')", "tokenizers"),
    ],
)
def test_missing_extra_is_named(monkeypatch, capsys, failure, package):
    def command(**options):
        exec(failure)

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["pyft"])
    monkeypatch.setattr(cli, "_register_finetune", lambda with_options: None)
    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    expected = f"pyft: {package} is missing or too old: pip install 'pyft[finetune]'\n"
    assert capsys.readouterr().err == expected


def test_other_import_errors_stay_unexpected():
    assert cli._extra_package(ImportError("no", name="pyft.nothing")) is None
    assert cli._extra_package(ImportError()) is None


@pytest.mark.parametrize(
    ("installed", "old"),
    [("4.57.1", True), ("5.9", True), ("5.17", False), ("5.17.0.dev0", False), ("6.0+cpu", False)],
)
def test_doctor_compares_versions_with_the_floors(monkeypatch, installed, old):
    real = importlib.metadata.version
    floors = ["torch>=2.0.0", 'transformers>=5.17; extra == "finetune"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: floors)
    versions = {"transformers": installed, "torch": "2.0"}
    monkeypatch.setattr("importlib.metadata.version", lambda n: versions.get(n) or real(n))
    found = doctor.examine()
    line = f"transformers {installed} is too old: needs >=5.17: pip install 'pyft[finetune]'"
    assert (line in found["advice"]) == old
    assert sum("too old" in advice for advice in found["advice"]) == old
    assert found["ready"] != old


@pytest.mark.parametrize(("threads", "words"), [(1, "CPU: 1 thread,"), (2, "CPU: 2 threads,")])
def test_doctor_counts_threads(threads, words):
    found = {
        "versions": {},
        "cpu": {"threads": threads, "isa": "avx2"},
        "gpus": [],
        "availability": {"op": {"cpu": "yes"}},
        "advice": [],
        "ready": True,
    }
    lines = [item for item in doctor.show(found).renderables if isinstance(item, str)]
    assert lines[0].startswith(words)


def test_extras_named_are_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "pyft").rglob("*.py"))
    named = set(re.findall(r"'pyft\[(\w+)\]'", sources)) | set(doctor.EXTRAS)
    assert named <= set(project["optional-dependencies"])


@pytest.mark.slow
def test_finetune_then_eval(rows, tmp_path):
    output = tmp_path / "out"
    job = ("--model", embedded.MODEL_DIR, "--data", rows, "--output", output, "--max-steps", 4)
    small = ("--max-length", 64, "--gradient-accumulation", 1, "--learning-rate", 0.003)
    few = ("--general-rows", 4, "--prompts", 1, "--max-new-tokens", 8, "--dtype", "fp32")
    done = pyft("finetune", *job, *small, *few)
    assert done.returncode == 0, done.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json", "report.json", "report.html"):
        assert (output / name).is_file()
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["parity"], "no fused op was compared"
    assert all(row["passed"] for row in report["parity"])
    assert report["task"]["after"]["loss"] < report["task"]["before"]["loss"]

    data = ("--model", embedded.MODEL_DIR, "--data", rows, "--json", "--max-new-tokens", 8)
    base = json.loads(pyft("eval", *data).stdout)
    tuned = json.loads(pyft("eval", *data, "--adapter", output).stdout)
    assert tuned["loss"]["mean"] < base["loss"]["mean"]
    assert len(tuned["answers"]) == 4
