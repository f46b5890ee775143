"""The whole job on each architecture with each shape of data: it trains, says what it fused, and
stock PEFT reads it.
"""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import ARCHITECTURES, build_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from pyft.finetune.config import Config
from pyft.finetune.parity import parity
from pyft.finetune.train import finetune
from pyft.integrations.peft import apply

QUESTION, ANSWER = "What is the sum of {0} and {1}?", "The sum of {0} and {1} is {2}."
SHAPES = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "text": lambda q, a: {"text": f"{q} {a}"},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "sharegpt": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
}


def write_data(path: Path, shape: str) -> Path:
    numbers = [(i, 7 * i % 31, i + 7 * i % 31) for i in range(24)]
    rows = [SHAPES[shape](QUESTION.format(*n), ANSWER.format(*n)) for n in numbers]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def run(model: Path, data: Path, output: Path, **settings: object) -> dict:
    defaults = {
        "max_steps": 2, "gradient_accumulation": 1, "max_length": 64, "dtype": "fp32", "rank": 4,
        "prompts": 1, "max_new_tokens": 4, "general_rows": 4, "learning_rate": 0.01, "validation":
        0.2,
    }  # fmt: skip
    job = Config(**{"model": model, "data": data, "output": output, **defaults, **settings})
    return finetune(job, Console(file=io.StringIO()), parity)


def quantized_base(base: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    """``base`` with the weights that ``model`` computes with."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            inner = name.removeprefix("base_model.model.")
            base.get_submodule(inner).weight.data = module.base_layer.weight.dequantize()
    return base


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finetune(checkpoint, tmp_path, name, shape):
    model = checkpoint(name)
    data = write_data(tmp_path / "data.jsonl", shape)
    report = run(model, data, tmp_path / "out")
    assert report["data"]["format"] == shape
    assert report["outcome"] == "finished"

    layers = build_model(name).config.num_hidden_layers
    fused = [
        row for row in report["fused"] if row["runs"].startswith("pyft.lora_linear on cpu over nf4")
    ]
    left = [row for row in report["fused"] if not row["runs"].startswith("pyft")]
    assert len(fused) == layers * ARCHITECTURES[name].linears
    assert [row["module"].rpartition(".")[2] for row in left if row["why"]] == ["lm_head"]
    assert {row["quantity"] for row in report["parity"]} == {"y", "dX", "dA", "dB"}
    assert all(row["passed"] for row in report["parity"])


def test_parity_leaves_out_dora():
    model = peft.get_peft_model(
        build_model("llama"), peft.LoraConfig(r=4, target_modules=["o_proj"], use_dora=True)
    )
    apply(model)
    ids = torch.randint(3, 4096, (1, 16))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(16)[None]}
    assert parity(SimpleNamespace(model=model), batch) == []


def test_parity_leaves_out_fused_layers_that_never_run():
    model = peft.get_peft_model(
        build_model("llama"), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    apply(model)
    first = model.base_model.model.model.layers[0]
    first.forward = lambda hidden, *args, **kwargs: hidden
    ids = torch.randint(3, 4096, (1, 16))
    positions = torch.arange(16)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    rows = parity(SimpleNamespace(model=model), batch)
    names = {row["module"] for row in rows}
    assert len(names) == ARCHITECTURES["llama"].linears + 1  # and the MLP
    assert all(".layers.1." in name for name in names)
    assert all(row["passed"] for row in rows)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_stock_peft_reads_the_adapter(checkpoint, tmp_path, name, method):
    from pyft.finetune.evaluation import Settings, load

    model = checkpoint(name)
    data = write_data(tmp_path / "data.jsonl", "messages")
    run(model, data, tmp_path / "out", method=method)
    quant = "nf4" if method == "qlora" else "none"
    settings = Settings(model, data, tmp_path / "out", quant=quant, dtype="fp32")
    ours = load(settings)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if method == "qlora":
        base = quantized_base(base, ours)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.randint(3, 4096, (2, 32))
    with torch.no_grad():
        expected, plain = stock(ids).logits, stock.base_model.model
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-4)
        with stock.disable_adapter():
            assert (plain(ids).logits - expected).abs().max() > 1e-3


def test_a_model_with_no_linear_runs_unfused_and_says_so(checkpoint, tmp_path):
    data = write_data(tmp_path / "data.jsonl", "text")
    report = run(checkpoint("gpt2"), data, tmp_path / "out", method="lora")
    assert report["outcome"] == "finished"
    reasons = {row["why"] for row in report["fused"] if row["runs"].startswith("PEFT")}
    assert reasons == {"its base layer is Conv1D, not torch.nn.Linear"}
