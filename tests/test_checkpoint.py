"""Checkpoints are whole or absent, also on a bad disk; job identity; adapters and their base."""

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pyft.errors import PyftError, UsageError
from pyft.finetune import checkpoint, export
from pyft.finetune.checkpoint import Progress
from pyft.finetune.config import Config


def tiny_llama(seed: int = 0, hidden: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def with_adapter(base: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, lora)


def job_config(directory: Path, **changes: Any) -> Config:
    data = directory / "data.jsonl"
    if not data.exists():
        data.write_text('{"text": "a"}\n', encoding="utf-8")
    base = {"model": directory / "base", "data": data, "output": directory / "out"}
    return Config(**{**base, **changes})


def test_save_prunes_to_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in range(6):
        progress = Progress({"seed": 0}, step=step)
        checkpoint.save(tmp_path, progress, lambda place: None, keep=2, protected={1})
    assert list(checkpoint.checkpoints(tmp_path)) == [1, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (1, 4, 5)}


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    progress = Progress({"seed": 3}, step=7, curve=[{"step": 7, "loss": 0.1 + 0.2}], seconds=1 / 3)
    path = checkpoint.save(tmp_path, progress, lambda place: None, keep=1)
    assert checkpoint.newest(tmp_path, {"seed": 3}) == (path, progress)
    assert checkpoint.newest(tmp_path / "none", {}) is None


def fails_at(place: Path, code: int) -> None:
    (place / "part").write_bytes(b"half")
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("code", "text"),
    [(errno.ENOSPC, "no space left on the disk"), (errno.EIO, os.strerror(errno.EIO))],
)
def test_failed_save_leaves_the_previous_checkpoint_and_nothing_else(
    tmp_path: Path, code: int, text: str
) -> None:
    whole = checkpoint.save(
        tmp_path, Progress({}, step=1), lambda place: (place / "w").write_bytes(b"1"), keep=1
    )
    with pytest.raises(PyftError) as caught:
        checkpoint.save(tmp_path, Progress({}, step=2), lambda place: fails_at(place, code), keep=1)
    message = str(caught.value)
    assert "\n" not in message
    assert text in message
    assert f"{whole} is intact" in message
    assert list(tmp_path.iterdir()) == [whole]
    assert (whole / "w").read_bytes() == b"1"


def test_full_disk_at_the_flush_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, Progress({}, step=1), lambda place: None, keep=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PyftError, match="no space left on the disk"):
        checkpoint.save(tmp_path, Progress({}, step=2), lambda place: None, keep=1)
    monkeypatch.undo()
    assert list(checkpoint.checkpoints(tmp_path)) == [1]


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_real_writers_that_cannot_write_are_understood(tmp_path: Path, writer: str) -> None:
    """Both wrap the system's error; a limit on the file size stands in for a small disk."""
    model = with_adapter(tiny_llama())

    def fill(place: Path) -> None:
        if writer == "torch":
            checkpoint.save_torch(place / "optimizer.pt", {"a": torch.zeros(100_000)})
        else:
            checkpoint.save_weights(model, place)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(PyftError, match=os.strerror(errno.EFBIG)):
            checkpoint.save(tmp_path, Progress({}, step=3), fill, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_programming_error_is_not_called_a_disk_problem(tmp_path: Path) -> None:
    def fill(place: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        checkpoint.save(tmp_path, Progress({}, step=1), fill, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_directories_are_removed_and_never_resumed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Progress({}, step=1), lambda place: None, keep=1)
    (tmp_path / f"{checkpoint.TEMPORARY}checkpoint-2").mkdir()
    (tmp_path / f"{checkpoint.TEMPORARY}checkpoint-2" / "progress.json").write_text("{}")
    (tmp_path / f"{checkpoint.TEMPORARY}pyft.json").write_text("{")
    found = checkpoint.newest(tmp_path, {})
    assert found is not None
    assert found[1].step == 1
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 8),
        ("seed", 5),
        ("batch_size", 2),
        ("max_length", 64),
        ("learning_rate", 1e-3),
        ("model", "other"),
        ("epochs", 2.0),
    ],
)
def test_checkpoint_of_another_job_is_refused_by_key(tmp_path: Path, key: str, value: Any) -> None:
    job = checkpoint.job(job_config(tmp_path))
    checkpoint.save(tmp_path / "c", Progress(job, step=1), lambda place: None, keep=1)
    other = checkpoint.job(job_config(tmp_path, **{key: value}))
    with pytest.raises(UsageError, match=f"another run: {key} is .* and was "):
        checkpoint.newest(tmp_path / "c", other)


def test_job_is_the_same_where_the_result_is(tmp_path: Path) -> None:
    job = checkpoint.job(job_config(tmp_path))
    free = {"resume": True, "log_every": 1, "save_every": 3, "keep_checkpoints": 5}
    assert checkpoint.job(job_config(tmp_path, **free)) == job
    config = job_config(tmp_path)
    config.data.write_text('{"text": "b"}\n', encoding="utf-8")
    changed = checkpoint.difference(job, checkpoint.job(config))
    assert changed == "data: the content of the file has changed since"
    moved = tmp_path / "moved.jsonl"
    moved.write_text('{"text": "a"}\n', encoding="utf-8")
    assert checkpoint.job(job_config(tmp_path, data=moved)) == job
    with pytest.raises(UsageError, match=r"general: .*: no such file"):
        checkpoint.job(job_config(tmp_path, general=tmp_path / "none"))


def test_damaged_progress_says_what_to_do(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Progress({}, step=1), lambda place: None, keep=1)
    (path / "progress.json").write_text("{", encoding="utf-8")
    with pytest.raises(PyftError, match="checkpoint-1: is damaged"):
        checkpoint.newest(tmp_path, {})


def test_adapter_weights_round_trip_bit_for_bit_and_load_in_stock_peft(tmp_path: Path) -> None:
    model = with_adapter(tiny_llama())
    checkpoint.save_weights(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in keys
    other = with_adapter(tiny_llama(), seed=2)
    checkpoint.load_weights(other, tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        assert torch.equal(other.eval()(tokens).logits, expected)
        assert torch.equal(stock.eval()(tokens).logits, expected)


def test_full_weights_round_trip_bit_for_bit(tmp_path: Path) -> None:
    model, other = tiny_llama(0), tiny_llama(9)
    checkpoint.save_weights(model, tmp_path)
    checkpoint.load_weights(other, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.hidden_size == 16


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    checkpoint.save_weights(with_adapter(tiny_llama()), tmp_path)
    with pytest.raises(PyftError, match="does not fit this model"):
        checkpoint.load_weights(with_adapter(tiny_llama(hidden=32)), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(PyftError, match="cannot be read"):
        checkpoint.load_weights(with_adapter(tiny_llama()), tmp_path)


def output_of(directory: Path, state: str, config: Config) -> None:
    directory.mkdir()
    if not config.model.is_dir():
        tiny_llama().save_pretrained(config.model)
    base = export.fingerprint(config.model)
    marker = {"state": state, "job": checkpoint.job(config), "base": base}
    (directory / export.MARKER).write_text(json.dumps(marker), encoding="utf-8")


def standing(config: Config) -> str:
    return export.check_output(config, checkpoint.job(config))


def test_output_that_is_free_or_ours(tmp_path: Path) -> None:
    config = job_config(tmp_path)
    resumed = job_config(tmp_path, resume=True)
    assert standing(config) == standing(resumed) == "new"
    config.output.mkdir()
    assert standing(config) == standing(resumed) == "new"
    config.output.rmdir()
    output_of(config.output, "running", config)
    assert standing(config) == "new"  # killed before its first checkpoint
    assert standing(resumed) == "resume"
    place = config.output / "checkpoints"
    checkpoint.save(place, Progress({}, step=0), lambda place: None, keep=1)
    with pytest.raises(UsageError, match="unfinished run; continue it with --resume"):
        standing(config)
    with pytest.raises(UsageError, match="holds another run: rank is 4 now and was 16"):
        standing(job_config(tmp_path, resume=True, rank=4))
    assert standing(job_config(tmp_path, overwrite=True, rank=4)) == "new"


def test_finished_output(tmp_path: Path) -> None:
    config = job_config(tmp_path)
    output_of(config.output, "finished", config)
    assert standing(job_config(tmp_path, resume=True)) == "finished"
    assert standing(job_config(tmp_path, overwrite=True)) == "new"
    with pytest.raises(UsageError, match="finished run; give another directory"):
        standing(config)


def test_output_that_holds_something_else(tmp_path: Path) -> None:
    config = job_config(tmp_path)
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("years of work", encoding="utf-8")
    for changes in ({}, {"resume": True}):
        with pytest.raises(UsageError, match=r"holds something else \(such as thesis.tex\)"):
            standing(job_config(tmp_path, **changes))
    with pytest.raises(UsageError, match=r"is not an output of pyft .* give another directory"):
        standing(job_config(tmp_path, overwrite=True))
    with pytest.raises(UsageError, match="is a file"):
        standing(job_config(tmp_path, output=config.data.parent / "out" / "thesis.tex"))


def test_a_stock_model_is_not_overwritten(tmp_path: Path) -> None:
    config = job_config(tmp_path, overwrite=True)
    tiny_llama().save_pretrained(config.output)
    with pytest.raises(UsageError, match=r"is not an output of pyft .* give another directory"):
        standing(config)
    assert (config.output / "model.safetensors").is_file()


@pytest.mark.parametrize("state", ["running", "finished"])
def test_resume_refuses_a_base_whose_weights_have_changed(tmp_path: Path, state: str) -> None:
    config = job_config(tmp_path, resume=True)
    output_of(config.output, state, config)
    assert standing(config) == ("finished" if state == "finished" else "resume")
    tiny_llama(seed=5).save_pretrained(config.model)
    with pytest.raises(UsageError, match="the base model has changed since"):
        standing(config)
    assert standing(job_config(tmp_path, overwrite=True)) == "new"


def test_output_must_not_hold_what_the_job_reads(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    for key, output in (("model", tmp_path / "base"), ("data", tmp_path)):
        with pytest.raises(UsageError, match="holds the"):
            standing(job_config(tmp_path, output=output, overwrite=True))
        assert (tmp_path / "base" / "config.json").is_file(), key


def test_overwrite_removes_what_pyft_writes_and_nothing_else(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    config = job_config(tmp_path, overwrite=True)
    output_of(config.output, "finished", config)
    for name in ("adapter_config.json", "adapter_model.safetensors", "report.html", "notes.txt"):
        (config.output / name).write_text("old", encoding="utf-8")
    place = config.output / "checkpoints"
    checkpoint.save(place, Progress({}, step=5), lambda place: None, keep=1)
    export.claim(config, checkpoint.job(config), standing(config))
    names = {path.name for path in config.output.iterdir()}
    assert names == {"pyft.json", "checkpoints", "notes.txt"}
    assert checkpoint.checkpoints(place) == {}
    marker = export.read_marker(config.output)
    assert marker is not None
    assert marker["state"] == "running"


def test_adapter_is_matched_to_its_base_by_fingerprint(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "base")
    tiny_llama(0).save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    tiny_llama(5).save_pretrained(tmp_path / "twin")
    tiny_llama(0, hidden=32).save_pretrained(tmp_path / "wider")
    config = job_config(tmp_path)
    export.claim(config, checkpoint.job(config), "new")
    checkpoint.save_weights(with_adapter(tiny_llama(0)), config.output)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for same in ("base", "sharded"):
        export.check_adapter_matches(tmp_path / same, config.output)
    with pytest.raises(UsageError, match=r"another base .*same architecture with other weights"):
        export.check_adapter_matches(tmp_path / "twin", config.output)
    with pytest.raises(UsageError, match=r"another base .*other layers or shapes"):
        export.check_adapter_matches(tmp_path / "wider", config.output)


def test_foreign_adapter_is_matched_to_its_base_by_shapes(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "base")
    tiny_llama(0, hidden=32).save_pretrained(tmp_path / "wider")
    adapter = tmp_path / "adapter"
    with_adapter(tiny_llama(0)).save_pretrained(adapter)
    export.check_adapter_matches(tmp_path / "base", adapter)
    with pytest.raises(UsageError, match="has 32 features there and 16 here"):
        export.check_adapter_matches(tmp_path / "wider", adapter)
    with pytest.raises(UsageError, match=r"no adapter_model.safetensors"):
        export.check_adapter_matches(tmp_path / "base", tmp_path / "wider")
