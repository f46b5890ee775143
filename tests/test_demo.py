"""The demonstration: its data, and that its adapter is a stock PEFT adapter with the logits pyft
has.
"""

import io
import json
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyft import embedded
from pyft.errors import UsageError
from pyft.finetune.demo import demo, prepare_job
from pyft.finetune.evaluation import Settings, load


@pytest.mark.slow
def test_short_demo(tmp_path):
    printed = io.StringIO()
    report = demo(tmp_path / "demo", Console(file=printed, width=120), short=True)
    assert report["task"]["change"] < -0.1
    assert report["forgetting"]["points"][-1]["delta_low"] is not None
    assert report["model"]["method"] == "qlora"
    assert all(row["passed"] for row in report["parity"])
    for answer in report["answers"]:
        assert answer["before"] != answer["after"]
    for words in ("Answers to held-out questions", "tokens/s", "report.html"):
        assert words in printed.getvalue()
    saved = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert saved["task"] == report["task"]

    settings = Settings(embedded.MODEL_DIR, tmp_path, tmp_path / "demo", dtype="fp32")
    base = AutoModelForCausalLM.from_pretrained(embedded.MODEL_DIR, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "demo").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "demo")("def dumps(obj):", return_tensors="pt")
    with torch.no_grad():
        expected = stock(**ids).logits
        torch.testing.assert_close(load(settings)(**ids).logits, expected, rtol=0, atol=1e-4)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    split = ([{"messages": talk}] * 2, [{"messages": talk}])
    monkeypatch.setattr("pyft.finetune.demo.docstrings.build_split", lambda: split)


def write_marker(output: Path, model: Path) -> None:
    output.mkdir(exist_ok=True)
    marker = {"state": "finished", "job": {"model": str(model.resolve())}}
    (output / "pyft.json").write_text(json.dumps(marker), encoding="utf-8")


@pytest.mark.usefixtures("few_rows")
def test_the_current_directory_can_be_the_output(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config, questions = prepare_job(Path("."))
    assert (config.output, config.overwrite, questions) == (here, False, ["q"])
    assert config.data == tmp_path / "here-docstring-data" / "train.jsonl"
    assert len(config.data.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.usefixtures("few_rows")
def test_only_an_earlier_demonstration_is_overwritten(tmp_path):
    output = tmp_path / "demo"
    write_marker(output, embedded.MODEL_DIR)
    assert prepare_job(output)[0].overwrite
    assert prepare_job(output)[0].overwrite  # over its own data
    other, thesis = tmp_path / "other", tmp_path / "thesis"
    write_marker(other, tmp_path / "llama")
    with pytest.raises(UsageError, match="holds another run"):
        prepare_job(other)
    thesis.mkdir()
    (thesis / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds something else \(such as config.json\)"):
        prepare_job(thesis)
    assert not list(tmp_path.glob("other-*"))
    assert not list(tmp_path.glob("thesis-*"))


@pytest.mark.usefixtures("few_rows")
def test_data_of_others_beside_the_output_is_kept(tmp_path):
    (tmp_path / "demo-data").mkdir()
    mine = tmp_path / "demo-data" / "train.jsonl"
    mine.write_text("mine", encoding="utf-8")
    files = tmp_path / "demo-docstring-data"
    files.mkdir()
    (files / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"something else \(such as notes.txt\)"):
        prepare_job(tmp_path / "demo")
    assert [path.name for path in files.iterdir()] == ["notes.txt"]
    (files / "notes.txt").unlink()
    prepare_job(tmp_path / "demo")
    assert mine.read_text(encoding="utf-8") == "mine"
    files = tmp_path / "file-docstring-data"
    files.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is a file"):
        prepare_job(tmp_path / "file")
