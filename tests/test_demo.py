"""The demonstration: its data, and that its adapter is a stock PEFT adapter with the logits pyft
has.
"""

import io
import json

import peft
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyft import embedded
from pyft.finetune.demo import demo
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
