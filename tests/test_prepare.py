"""pyft.prepare: checkpoints quantized while they load, in little memory; what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, build_model
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

import pyft
from pyft.errors import UsageError
from pyft.integrations.transformers import PyftConfig
from pyft.quantized import QuantizedTensor

NAMES = list(ARCHITECTURES)
Checkpoint = Callable[..., Path]


def tokens() -> Tensor:
    return torch.randint(3, 4096, (2, 9))


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def quantized_by_hand(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model with each linear's weight quantized and decoded, the head left."""
    model = build_model(name).to(dtype)
    for path, module in model.named_modules():
        if type(module) is torch.nn.Linear and path != "lm_head":
            module.weight.data = pyft.quantize(module.weight).dequantize()
    return model


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, sharded: bool, checkpoint: Checkpoint) -> None:
    path, ids = checkpoint(name, sharded=sharded), tokens()
    model = pyft.prepare(path, lora=lora())
    packed = [n for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    assert len(packed) == 2 * ARCHITECTURES[name].linears
    assert all(n.endswith("base_layer.weight") and "lm_head" not in n for n in packed)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert not model.training
    report = pyft.apply(model)
    assert report.fused == len(packed)
    torch.testing.assert_close(
        logits(model, ids), logits(quantized_by_hand(name), ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_stored_bits_are_those_of_quantize(name: str, checkpoint: Checkpoint) -> None:
    parameters = dict(pyft.prepare(checkpoint(name, torch.bfloat16)).named_parameters())
    for path, weight in build_model(name).to(torch.bfloat16).named_parameters():
        if isinstance(parameters[path], QuantizedTensor):
            expected = pyft.quantize(weight).parts()
            assert all(map(torch.equal, parameters[path].parts(), expected))
        else:
            assert torch.equal(parameters[path], weight)


def test_a_gradient_step(checkpoint: Checkpoint) -> None:
    model, ids = pyft.prepare(checkpoint("qwen2"), lora=lora()), tokens()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad.abs().max() > 0 for n, p in trained.items() if "lora_B" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype(dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    model = pyft.prepare(checkpoint("llama"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model, tokens()).dtype == dtype
    assert logits(model, tokens()).isfinite().all()


def test_options_reach_every_weight(checkpoint: Checkpoint) -> None:
    model = pyft.prepare(checkpoint("llama"), block_size=128, double_quant=False, device="cpu")
    packed = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    assert len(packed) == 14
    assert {(p.block_size, p.double_quant) for p in packed} == {(128, False)}


def test_without_quantization(checkpoint: Checkpoint) -> None:
    model, ids = pyft.prepare(checkpoint("llama"), quant=None), tokens()
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    expected = logits(build_model("llama"), ids)
    torch.testing.assert_close(logits(model, ids), expected)
    pyft.revert(model)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_loaded_model_is_quantized_in_place(name: str, checkpoint: Checkpoint) -> None:
    model, ids = build_model(name), tokens()
    assert pyft.prepare(model) is model
    assert torch.equal(logits(model, ids), logits(pyft.prepare(checkpoint(name)), ids))
    before = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    pyft.prepare(model)
    assert all(
        a is b
        for a, b in zip(before, [p for p in model.parameters() if p in set(before)], strict=True)
    )


def test_from_pretrained_alone_quantizes(checkpoint: Checkpoint) -> None:
    left = PyftConfig(modules_to_not_convert=["lm_head", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=left)
    packed = {
        n.split(".")[-2] for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)
    }
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_a_structure_without_linears_runs_and_says_so(checkpoint: Checkpoint) -> None:
    """GPT-2's layers are transformers' own Conv1D."""
    options = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    path, ids = checkpoint("gpt2"), tokens()
    model = pyft.prepare(path, lora=LoraConfig(**options))
    report = pyft.apply(model)
    assert report.fused == 0
    assert "its base layer is Conv1D, not torch.nn.Linear" in str(report)
    torch.testing.assert_close(logits(model, ids), logits(build_model("gpt2"), ids))


LOADER = """
import json, os, sys, threading, time
import torch, pyft
import pyft.integrations.quantizer as integration
from pyft.quantized import QuantizedTensor

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

path, quant = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
torch.set_num_threads(2)
pyft.prepare(path + "/warm", quant=quant, dtype=torch.bfloat16)
before = peak = anonymous()
done = False

def sample():
    global peak
    peak = max(peak, anonymous())

def watch():
    while not done:
        sample()
        time.sleep(0.001)

quantize = integration.quantize
def sampled(*args, **kwargs):
    sample()
    packed = quantize(*args, **kwargs)
    sample()
    return packed
integration.quantize = sampled

thread = threading.Thread(target=watch)
thread.start()
model = pyft.prepare(path, quant=quant, dtype=torch.bfloat16)
done = True
thread.join()
sample()
parameters = list(model.parameters())
stored = sum(p.stored_bytes if isinstance(p, QuantizedTensor) else p.nbytes for p in parameters)
print(json.dumps({"peak": peak - before, "stored": stored, "tensors": len(parameters)}))
"""


@pytest.mark.slow
def test_peak_memory_while_loading(tmp_path: Path) -> None:
    """At most the quantized model and two of its largest tensors; a plain load takes more.

    Counted is RssAnon, memory the process owns. The pages of the memory-mapped checkpoint are
    the kernel's cache and can be dropped at any time. The tensors are large because the C library
    keeps tens of MiB of freed blocks, whatever the model's size.
    """
    size = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 2,
        "head_dim": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": True,
    }
    model = build_model("llama", **size)
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    build_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "warm")
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    assert sum(sizes) > 200e6
    del model

    def load(*arguments: str) -> dict[str, int]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        command = [sys.executable, "-c", LOADER, str(tmp_path), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    quantized = load("nf4")
    bound = quantized["stored"] + 2 * max(sizes)
    assert quantized["stored"] < sum(sizes) / 5
    assert quantized["peak"] <= bound
    assert load()["peak"] > bound


def broken(what: str, path: Path, source: Path) -> Path:
    """A directory that is not a checkpoint, in the way named."""
    copy = path / "model"
    if what == "missing":
        return copy
    if what == "a file":
        copy.write_text("weights")
        return copy
    copy.mkdir()
    if what == "empty":
        return copy
    shutil.copy(source / "config.json", copy)
    if what == "pickled":
        torch.save({"w": torch.ones(2)}, copy / "pytorch_model.bin")
    return copy


REFUSED = {
    "missing": "does not exist; give a directory with config.json and",
    "a file": "is not a model directory; it needs config.json and",
    "empty": "is not a model directory; it needs config.json and",
    "no weights": r"holds no \*.safetensors weights",
    "pickled": r"holds pickled weights \(pytorch_model.bin\).*convert them to safetensors",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = broken(what, tmp_path, checkpoint("llama"))
    for given in (path, str(path)):
        with pytest.raises(UsageError, match=REFUSED[what]) as caught:
            pyft.prepare(given)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_refuses_an_unknown_format(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="format 'int3' is unknown; use one of nf4, fp4, int4"):
        pyft.prepare(checkpoint("llama"), quant="int3")


def test_refuses_a_block_size_before_loading(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="block_size 48 is not one nf4 can have: 32, 64"):
        pyft.prepare(checkpoint("llama"), block_size=48)
