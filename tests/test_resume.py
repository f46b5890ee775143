"""Interrupted runs end like unbroken ones; the whole job at small scale, from files to an adapter.

Run as a program, this file is the driver of the kill test: it imports everything once and forks one
process per run, which it kills with SIGKILL, at random moments and inside chosen file operations.
"""

import errno
import gc
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pyft.errors import PyftError, UsageError
from pyft.finetune import checkpoint, loop, train
from pyft.finetune.config import Config

KILLS = 10
KILLED_WRITES = 6


def make_files(directory: Path) -> None:
    """A tiny base model with a byte tokenizer, 40 rows of questions and answers, general text."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(directory / "base")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "base")
    rows = [{"prompt": f"what is {n} + {n}?", "completion": str(2 * n)} for n in range(40)]
    texts = [{"text": f"passage {n} tells of {n * n} things that happened"} for n in range(12)]
    for name, lines in (("data", rows), ("general", texts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def job_config(directory: Path, output: str = "out", **changes: Any) -> Config:
    base: dict[str, Any] = {
        "model": directory / "base",
        "data": directory / "data.jsonl",
        "general": directory / "general.jsonl",
        "output": directory / output,
        "method": "lora",
        "dtype": "fp32",
        "dropout": 0.1,
        "max_length": 128,
        "validation": 0.2,
        "gradient_accumulation": 2,
        "learning_rate": 5e-3,
        "max_steps": 8,
        "eval_every": 3,
        "save_every": 2,
        "log_every": 3,
        "prompts": 1,
        "max_new_tokens": 4,
    }
    return Config(**{**base, **changes})


def finetune(config: Config) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=100)
    report = train.finetune(config, console)
    assert isinstance(console.file, io.StringIO)
    return report, console.file.getvalue()


def outcome(output: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on interruptions."""
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    timed = {"seconds"}
    curve = [{k: v for k, v in point.items() if k not in timed} for point in report["curve"]]
    weights = next(output.glob("*model.safetensors")).read_bytes()
    return {
        "curve": curve,
        "evaluations": report["evaluations"],
        "forgetting": report["forgetting"]["points"],
        "answers": report["answers"],
        "tokens": report["performance"]["tokens"],
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def broken_files(output: Path) -> list[str]:
    """Files with a final name that cannot be read whole, or a configuration without its weights."""
    broken = []
    for path in sorted(output.rglob("*")):
        if checkpoint.TEMPORARY in str(path.relative_to(output)) or not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix in (".pt", ".pth"):
                torch.load(path, weights_only=path.name != "rng_state.pth")
        except Exception as error:
            broken.append(f"{path}: {error}")
        if (
            path.name == "adapter_config.json"
            and not path.with_name("adapter_model.safetensors").is_file()
        ):
            broken.append(f"{path}: has no weights")
    return broken


# The driver


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a fork; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def slow_steps() -> None:
    step = loop.Loop.training_step

    def slowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return step(self, *args, **kwargs)

    loop.Loop.training_step = slowed  # type: ignore[method-assign]


def watch_writes(watcher: Callable[[], None]) -> None:
    """From now on call `watcher` before each flush, rename and replacement of a file."""

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            watcher()
            return original(*args)

        return call

    checkpoint.flush = watched(checkpoint.flush)
    for name in ("rename", "replace"):
        setattr(Path, name, watched(getattr(Path, name)))


def die_at_write(at: int) -> None:
    """Kill this process before its `at`-th write."""
    seen = [0]

    def watcher() -> None:
        seen[0] += 1
        if seen[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(watcher)


def drive(directory: Path) -> None:
    """Do all runs and write what came out to results.json."""
    torch.set_num_threads(1)
    make_files(directory)
    finetune(job_config(directory, "first", max_steps=1))  # all lazy imports are done once, here
    gc.freeze()
    slow_steps()
    generator = random.Random(0)
    counter = directory / "writes"

    def unbroken() -> None:
        with counter.open("w") as file:
            watch_writes(lambda: print(end=".", file=file))
            finetune(job_config(directory, "unbroken"))

    began = time.monotonic()
    assert forked(unbroken) == 0
    whole = time.monotonic() - began
    results = []

    def job(name: str, **changes: Any) -> Callable[[], None]:
        def work() -> None:
            finetune(job_config(directory, name, **changes))

        return work

    def finish(name: str, kind: str, ended: int) -> None:
        output = directory / name
        broken = broken_files(output) if output.is_dir() else []
        status = forked(job(name, resume=True))
        found = outcome(output) if status == 0 else None
        left = [str(path) for path in output.rglob(f"{checkpoint.TEMPORARY}*")]
        results.append(
            {
                "kind": kind,
                "ended": ended,
                "status": status,
                "outcome": found,
                "broken": broken + broken_files(output) + left,
            }
        )

    for trial in range(KILLS):
        delay, status, tried = generator.uniform(0, whole), 0, 0
        while status == 0:  # the run was faster than the one that was timed
            name = f"random{trial}-{tried}"
            status = forked(job(name), delay)
            tried, delay = tried + 1, delay * 0.8
        finish(name, f"killed after {delay / 0.8:.2f} s of {whole:.2f}", status)

    def dying(name: str, at: int, **changes: Any) -> Callable[[], None]:
        def work() -> None:
            die_at_write(at)
            finetune(job_config(directory, name, **changes))

        return work

    ends = [forked(dying("again", generator.randint(1, 12), resume=True)) for _ in range(KILLS)]
    finish("again", "killed again and again in one run", max(ends))
    writes = len(counter.read_text())
    for at in [*generator.sample(range(1, writes), KILLED_WRITES), writes - 2, writes]:
        name = f"write{at}"
        finish(name, f"killed before write {at} of {writes}", forked(dying(name, at)))
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.slow
def test_killed_runs_end_like_the_unbroken_one(tmp_path: Path) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True)
    expected = outcome(tmp_path / "unbroken")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results) == KILLS + 1 + KILLED_WRITES + 2
    for result in results:
        assert result["ended"] == -signal.SIGKILL, result["kind"]
        assert result["broken"] == [], result["kind"]
        assert result["status"] == 0, result["kind"]
        assert result["outcome"] == expected, result["kind"]


# In one process


class Interrupt(Exception):
    """Stands for whatever ends a process in the middle of a step."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, forward_pass: int) -> None:
    step, seen = loop.Loop.training_step, [0]

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == forward_pass:
            raise Interrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(loop.Loop, "training_step", interrupted)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small only wait for a second one."""
    torch.set_num_threads(1)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a job; it runs on the CPU, where two runs give the same bits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_files(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("qlora", {}),
        ("full", {"learning_rate": 1e-3, "optimizer": "adamw8bit"}),
        ("lora", {"dtype": "bf16", "replay": 0.3, "batch_size": 2, "schedule": "linear"}),
    ],
)
def test_resumed_run_is_the_unbroken_one_to_the_bit(
    files: Path, monkeypatch: pytest.MonkeyPatch, method: str, changes: dict[str, Any]
) -> None:
    finetune(job_config(files, "unbroken", method=method, **changes))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12)
        with pytest.raises(Interrupt):
            finetune(job_config(files, method=method, **changes))
    _, shown = finetune(job_config(files, method=method, resume=True, **changes))
    place = files / "out" / "checkpoints" / "checkpoint-4"
    assert f"continuing at step 4 of 8, from {place}" in shown
    assert outcome(files / "out") == outcome(files / "unbroken")


def test_resumed_patience_exports_the_same_best(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "patience": 2,
        "max_steps": 40,
        "eval_every": 1,
        "save_every": 3,
        "learning_rate": 8e-2,
        "keep_checkpoints": 1,
    }
    report, _ = finetune(job_config(files, "unbroken", **changes))
    last = report["evaluations"][-1]["step"]
    assert report["outcome"].startswith("stopped: validation loss")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2 * last - 1)
        with pytest.raises(Interrupt):
            finetune(job_config(files, **changes))
    finetune(job_config(files, resume=True, **changes))
    assert outcome(files / "out") == outcome(files / "unbroken")


def test_full_disk_keeps_the_previous_checkpoint_and_resumes(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(job_config(files, "unbroken"))
    save = checkpoint.save_torch

    def full(path: Path, value: Any) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_torch", full)
        with pytest.raises(PyftError) as caught:
            finetune(job_config(files))
    message = str(caught.value)
    place = files / "out" / "checkpoints"
    assert "\n" not in message
    assert "no space left on the disk" in message
    assert f"{place / 'checkpoint-3'} is intact" in message or "checkpoint-2 is intact" in message
    assert max(checkpoint.checkpoints(place)) < 4
    finetune(job_config(files, resume=True))
    assert outcome(files / "out") == outcome(files / "unbroken")


def test_output_is_a_stock_adapter_with_tokenizer_and_report(
    files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    report, shown = finetune(job_config(files))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""  # nothing but what goes to the console
    output = files / "out"
    names = {path.name for path in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "pyft.json"} <= names
    assert {"tokenizer.json", "chat_template.jinja", "report.json", "report.html"} <= names
    assert not any(name.startswith((".", "README")) for name in names)
    adapter_config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter_config["base_model_name_or_path"] == str((files / "base").resolve())
    base = AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float32)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(output)("what is 3 + 3?").input_ids])
    with torch.no_grad():
        plain = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, str(output)).eval()(tokens).logits
    assert not torch.allclose(plain, tuned, atol=1e-3)
    marker = json.loads((output / "pyft.json").read_text(encoding="utf-8"))
    assert (marker["state"], marker["exported_step"]) == ("finished", 8)
    assert report["task"]["change"] < 0
    assert report["data"]["train_rows"] + report["data"]["validation_rows"] == 40
    assert "data.jsonl: 40 rows" in shown
    assert "14 x pyft.lora_linear" in shown
    assert shown.splitlines()[-1] == f"finished; written to {output}"


def test_the_same_job_on_the_device_there_is(tmp_path: Path) -> None:
    make_files(tmp_path)
    report, _ = finetune(job_config(tmp_path, method="qlora", dtype="auto"))
    assert report["outcome"] == "finished"
    assert report["task"]["change"] < 0
    peak = report["performance"]["peak_device_bytes"]
    assert (peak is not None) == torch.cuda.is_available()


def test_full_training_writes_a_whole_model(files: Path) -> None:
    finetune(job_config(files, method="full"))
    model = AutoModelForCausalLM.from_pretrained(files / "out")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(files / "out"))


def test_resume_of_nothing_and_of_a_finished_run(files: Path) -> None:
    first, shown = finetune(job_config(files, resume=True))
    assert "no checkpoint to resume from: starting from the beginning" in shown
    written = (files / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    again, shown = finetune(job_config(files, resume=True))
    assert "finished already" in shown
    assert again["evaluations"] == first["evaluations"]
    assert (files / "out" / "adapter_model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="rank is 2 now and was 16"):
        finetune(job_config(files, resume=True, rank=2))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"replay": 0.5}, "replay: no general text is left"),
        ({"tensorboard": True}, "tensorboard: is not installed"),
    ],
)
def test_what_is_refused_leaves_a_finished_output_as_it_was(
    files: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    finetune(job_config(files, max_steps=1))
    places = [path for path in sorted((files / "out").rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in places}
    (files / "general.jsonl").write_text('{"text": "one passage alone"}\n', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=told):
        finetune(job_config(files, overwrite=True, **changes))
    places = [path for path in sorted((files / "out").rglob("*")) if path.is_file()]
    assert {path: path.read_bytes() for path in places} == before


def test_resume_refuses_another_base(files: Path) -> None:
    finetune(job_config(files, max_steps=1))
    model = AutoModelForCausalLM.from_pretrained(files / "base")
    model.model.embed_tokens.weight.data.neg_()
    model.lm_head.weight.data.neg_()
    model.save_pretrained(files / "base")
    with pytest.raises(UsageError, match="the base model has changed since"):
        finetune(job_config(files, max_steps=1, resume=True))


def test_findings_are_fatal_with_strict_before_anything_is_written(files: Path) -> None:
    with (files / "data.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "what?", "completion": ""}\n')
    with pytest.raises(UsageError, match="empty answer") as caught:
        finetune(job_config(files, strict=True))
    assert "\n" not in str(caught.value)
    assert not (files / "out").exists()
    report, _ = finetune(job_config(files))
    assert "empty-answer" in {finding["code"] for finding in report["findings"]}


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
