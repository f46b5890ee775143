"""Checkpoints quantized by bitsandbytes and by pyft: read, saved, read again, in every bit."""

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from checkpoints import (
    SIZES,
    by_bitsandbytes,
    config_of,
    quantized,
    same_parts,
    tensors_of,
)
from conftest import build_model
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import pyft
from pyft.errors import UsageError
from pyft.formats import FORMATS
from pyft.integrations.transformers import PyftConfig

Checkpoint = Callable[..., Path]

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4 nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "stored as bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "some left": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "o_proj"],
    },
    "8 bits": {"load_in_8bit": True},
}


def decoded(model: nn.Module) -> dict[str, Tensor]:
    """bitsandbytes' own decoding of every weight it holds."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            found[f"{name}.weight"] = dequantize_4bit(weight.data, weight.quant_state)
        elif hasattr(weight, "SCB"):
            found[f"{name}.weight"] = int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


def tokens() -> Tensor:
    return torch.randint(3, 4096, (2, 9))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


@pytest.mark.parametrize("shard", ["1GB", "600KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_bitsandbytes_checkpoint_there_and_back(kind: str, shard: str, tmp_path: Path) -> None:
    theirs = by_bitsandbytes(tmp_path / "theirs", shard=shard, **BITSANDBYTES[kind])
    model = pyft.prepare(tmp_path / "theirs")
    weights, wanted = quantized(model), decoded(theirs)
    assert weights.keys() == wanted.keys()
    assert len(weights) == (12 if kind == "some left" else 14)
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        if kind == "8 bits":
            truth = theirs.get_parameter(name).data.double() / 127
            truth *= theirs.get_parameter(name).SCB.double()[:, None]
            ours = pyft.dequantize(weight, torch.float32).double()
            torch.testing.assert_close(ours, truth, rtol=2e-7, atol=0)
        else:
            assert torch.equal(weight.dequantize(), wanted[name])

    model.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > (shard != "1GB")
    read, written = files_of(tmp_path / "theirs"), files_of(tmp_path / "ours")
    index = "model.safetensors.index.json"
    if shard != "1GB":  # the count of parameters differs: theirs counts bytes
        maps = [json.loads(files.pop(index))["weight_map"] for files in (read, written)]
        assert maps[0] == maps[1]
    assert read == written

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    found = decoded(again)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_model_is_that_of_its_decoded_weights(tmp_path: Path) -> None:
    theirs = by_bitsandbytes(tmp_path, **BITSANDBYTES["nf4 nested"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "16 bits", dtype=torch.float32)
    ids = tokens()
    for module in theirs.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.weight.quant_state.dtype = torch.float32
    for name, weight in decoded(theirs).items():
        plain.get_parameter(name).data.copy_(weight)
    ours = pyft.prepare(tmp_path, dtype=torch.float32)
    assert {p.dtype for n, p in ours.named_parameters() if n not in quantized(ours)} == {
        torch.float32
    }
    torch.testing.assert_close(logits(ours, ids), logits(plain, ids), rtol=1e-4, atol=1e-4)


def test_reads_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_bitsandbytes(tmp_path, **BITSANDBYTES["nf4 nested"])
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.partition(".")[0] != "bitsandbytes"
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert len(quantized(pyft.prepare(tmp_path))) == 14


def test_reads_tensors_where_they_are(tmp_path: Path) -> None:
    """Nothing of a stored weight is copied: its memory is the mapped file's."""
    by_bitsandbytes(tmp_path, **BITSANDBYTES["nf4 nested"])
    model = pyft.prepare(tmp_path)
    with open("/proc/self/maps") as lines:
        mapped = [line.split()[0] for line in lines if str(tmp_path / "model.safetensors") in line]
    spans = [tuple(int(end, 16) for end in span.split("-")) for span in mapped]
    for weight in quantized(model).values():
        for part in weight.parts():
            if part.dim():  # the offset comes from a JSON
                assert any(low <= part.data_ptr() < high for low, high in spans)


CASES = [
    ("nf4", None, None),
    ("nf4", 128, False),
    ("nf4", "row", False),
    ("fp4", None, None),
    ("int4", 32, None),
    ("int4_zp", 64, None),
    ("int4_zp", 64, True),
    ("int8", None, None),
    ("int8", 64, True),
    ("fp8_e4m3", None, None),
    ("mxfp4", None, None),
]


def test_cases_name_every_format() -> None:
    assert {case[0] for case in CASES} == set(FORMATS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pyft_checkpoint_there_and_back(
    case: tuple[str, int | str | None, bool | None], tmp_path: Path, checkpoint: Checkpoint
) -> None:
    format, block_size, double_quant = case
    path, ids = checkpoint("llama", torch.bfloat16), tokens()
    config = PyftConfig(format, block_size, double_quant)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype="auto")
    model.save_pretrained(tmp_path)
    found = config_of(tmp_path)["quantization_config"]
    assert (found["quant_method"], found["format"]) == ("pyft", format)
    names = {name.partition(".weight")[2] for name in tensors_of(tmp_path)}
    weight = quantized(model)["model.layers.0.mlp.up_proj.weight"]
    assert len(names) == len(weight.parts())
    for read in (AutoModelForCausalLM.from_pretrained(tmp_path), pyft.prepare(tmp_path)):
        weights = quantized(read)
        assert weights.keys() == quantized(model).keys()
        assert all(same_parts(weights[name], q) for name, q in quantized(model).items())
        assert not any(q.requires_grad for q in weights.values())
        pyft.revert(read)  # prepare has fused its norms
        assert torch.equal(logits(read, ids), logits(model, ids))


@pytest.mark.parametrize("name", ["llama", "qwen3"], ids=["head", "tied head"])
def test_sharded_adapted_and_saved_again(name: str, tmp_path: Path, checkpoint: Checkpoint) -> None:
    """The base once, adapters on it as stock PEFT, both again; a checkpoint over itself."""
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", tokens()
    model = pyft.prepare(checkpoint(name, torch.bfloat16))
    model.save_pretrained(base, max_shard_size="300KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    assert ("lm_head.weight" in tensors_of(base)) == (name == "llama")

    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = pyft.prepare(base, lora=LoraConfig(task_type="CAUSAL_LM", **options))
    wanted = logits(adapted, ids)
    adapted.save_pretrained(adapter)
    assert all("lora_" in key for key in tensors_of(adapter))

    again = pyft.prepare(base)
    again.save_pretrained(base, max_shard_size="300KB")
    read = PeftModel.from_pretrained(pyft.prepare(base), adapter)
    pyft.apply(read)
    assert torch.equal(logits(read, ids), wanted)
    weights = quantized(pyft.prepare(base))
    assert all(same_parts(weights[key], q) for key, q in quantized(model).items())


def test_adapters_added_by_transformers(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Its own PEFT integration saves the adapter, and only that."""
    model, ids = pyft.prepare(checkpoint("llama")), tokens()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert all("lora_" in key for key in tensors_of(tmp_path))
    fresh = pyft.prepare(checkpoint("llama"))
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(logits(fresh, ids), wanted)


def test_a_model_quantized_in_place_is_saved(tmp_path: Path) -> None:
    model, ids = build_model("llama"), tokens()
    pyft.prepare(model, quant="int4", block_size=32)
    model.save_pretrained(tmp_path)
    read = pyft.prepare(tmp_path)
    assert torch.equal(logits(read, ids), logits(model, ids))
    assert {q.format.name for q in quantized(read).values()} == {"int4"}


@pytest.mark.parametrize(
    "case", [("nf4", 64, True), ("fp4", 64, False), ("int8", "row", False)], ids=str
)
def test_saved_in_the_layout_of_bitsandbytes_on_request(
    case: tuple[str, int | str, bool], tmp_path: Path
) -> None:
    """It loads there, with what is left here left there; it loads here with the same bits.

    Blocks are no longer than a row: where they are, bitsandbytes decodes wrongly on a CPU.
    """
    build_model("llama", **SIZES).to(torch.bfloat16).save_pretrained(tmp_path / "16 bits")
    config = PyftConfig(*case, modules_to_not_convert=["lm_head", "o_proj"], layout="bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "16 bits", quantization_config=config, dtype="auto"
    )
    model.save_pretrained(tmp_path / "theirs")
    entry = config_of(tmp_path / "theirs")["quantization_config"]
    assert entry.keys() == BitsAndBytesConfig().to_dict().keys()
    assert (entry["quant_method"], entry["bnb_4bit_compute_dtype"]) == ("bitsandbytes", "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    found, weights = decoded(theirs), quantized(model)
    assert found.keys() == weights.keys()
    assert len(found) == 12
    for name, weight in weights.items():
        ours = pyft.dequantize(weight, found[name].dtype)
        torch.testing.assert_close(found[name], ours, rtol=2e-7 if case[0] == "int8" else 0, atol=0)
    read = pyft.prepare(tmp_path / "theirs")
    assert all(same_parts(quantized(read)[name], q) for name, q in weights.items())
    read.config.quantization_config.layout = "pyft"
    read.save_pretrained(tmp_path / "ours")
    again = quantized(pyft.prepare(tmp_path / "ours"))
    assert all(same_parts(again[name], q) for name, q in weights.items())


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    pyft.prepare(build_model("llama"), quant="int8").save_pretrained(tmp_path)
    assert {q.format.name for q in quantized(pyft.prepare(tmp_path)).values()} == {"int8"}
    assert len(quantized(pyft.prepare(tmp_path, quant=None))) == 14
    with pytest.raises(UsageError, match="quantized already, in int8; leave quant out"):
        pyft.prepare(tmp_path, quant="fp4")
    with pytest.raises(UsageError, match="quantized already and read as it is; leave block_size"):
        pyft.prepare(tmp_path, block_size=64)


def test_weights_of_two_kinds_are_refused_when_saved(tmp_path: Path) -> None:
    model = pyft.prepare(build_model("llama"))
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(pyft.quantize(torch.randn(64, 96), "fp4"), requires_grad=False)
    with pytest.raises(UsageError, match=r"layers.1.mlp.down_proj.weight is fp4.*says nf4"):
        model.save_pretrained(tmp_path)


def test_configurations_that_nothing_has() -> None:
    refused: dict[str, dict[str, Any]] = {
        "format 'nf3' is unknown": {"format": "nf3"},
        "format is 4, not a name": {"format": 4},
        "block_size 48 is not one nf4 can have": {"block_size": 48},
        "layout 'gguf' is unknown; use pyft or bitsandbytes": {"layout": "gguf"},
        "modules_to_not_convert is 'lm_head', not a list": {"modules_to_not_convert": "lm_head"},
    }
    for message, options in refused.items():
        with pytest.raises(UsageError, match=message):
            PyftConfig(**options)
