"""GPTQ and AWQ checkpoints, packed by ``checkpoints``: their own formula, exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    config_of,
    gptq_weight,
    integer_checkpoint,
    quantized,
    same_parts,
    tensors_of,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import pyft
from pyft.errors import UsageError
from pyft.integrations.gptq import layout_of
from pyft.integrations.stored import of_tensors

GPTQ = [
    {"group": 32},
    {"group": 64},
    {"group": -1},
    {"version": "gptq_v2"},
    {"symmetric": True},
    {"symmetric": True, "version": "gptq_v2", "group": 32},
    {"ordered": True, "group": 32},
    {"ordered": True, "symmetric": True, "version": "gptq_v2", "group": 32},
    {"group": 32, "shard": "600KB"},
]
AWQ = [{"group": 32}, {"group": 64}, {"group": -1}]
CASES = [*({"method": "gptq"} | case for case in GPTQ), *({"method": "awq"} | case for case in AWQ)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_values_are_those_of_their_formula(case: dict[str, Any], tmp_path: Path) -> None:
    wanted = integer_checkpoint(tmp_path, **case)
    model = pyft.prepare(tmp_path)
    weights = quantized(model)
    assert weights.keys() == {f"{name}.weight" for name in wanted}
    assert model.lm_head.weight.dtype == torch.float16
    for name, values in wanted.items():
        weight = weights[f"{name}.weight"]
        assert weight.format.name == ("int4" if case.get("symmetric") else "int4_zp")
        group = case.get("group", 64)
        assert weight.block_size == (values.shape[1] if group == -1 else group)
        assert (weight.columns is not None) == bool(case.get("ordered"))
        assert (weight.dtype, weight.shape) == (torch.float16, values.shape)
        decoded = pyft.dequantize(weight, torch.float32)
        assert torch.equal(decoded, torch.from_numpy(values.astype(np.float32)))
        half = torch.from_numpy(values).float().half()  # exact in fp32: rounded once
        assert torch.equal(weight.dequantize(), half)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("group", "k"), [(128, 256), (256, 1024), (-1, 136)])
def test_one_weight(group: int, k: int, version: str) -> None:
    """Sizes of other models; more rows than are unpacked at a time."""
    rng = np.random.default_rng(0)
    n = 1096
    for ordered in (False, True):
        stored, values = gptq_weight(rng, n, k, group, version, False, ordered)
        if version == "gptq":
            assert values.shape == (n, k)
            assert (stored["qzeros"] & 15 == 15).any()  # a zero point of 16
        entry = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": ordered}
        layout = layout_of(entry | {"checkpoint_format": version}, "here")
        tensors = {f".{key}": torch.from_numpy(value) for key, value in stored.items()}
        with torch.device("meta"):  # as while a model is made without memory
            build = layout.check("m", of_tensors(tensors), (n, k), torch.float32)
        q = build(tensors)
        assert torch.equal(q.dequantize(), torch.from_numpy(values.astype(np.float32)))


def test_it_trains_and_is_saved_in_pyft_s_layout(tmp_path: Path) -> None:
    integer_checkpoint(tmp_path / "theirs", ordered=True, group=32)
    model = pyft.prepare(tmp_path / "theirs", dtype=torch.float32)
    ids = torch.randint(3, 4096, (2, 9))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "ours")
    entry = config_of(tmp_path / "ours")["quantization_config"]
    assert (entry["quant_method"], entry["format"], entry["block_size"]) == ("pyft", "int4_zp", 32)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    read = pyft.prepare(tmp_path / "ours", lora=lora)
    found = {n.replace("base_model.model.", ""): q for n, q in quantized(read).items()}
    for name, q in quantized(model).items():
        assert same_parts(found[name.replace(".weight", ".base_layer.weight")], q)
    assert torch.equal(read(input_ids=ids).logits.detach(), wanted)
    read.train()
    read(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in read.named_parameters() if "lora_B" in n)


def changed(path: Path, **entry: Any) -> None:
    config = config_of(path)
    config["quantization_config"] |= entry
    (path / "config.json").write_text(json.dumps(config))


REFUSED_ENTRIES: dict[str, dict[str, Any]] = {
    "gptq bits is 8; pyft reads 4": {"bits": 8},
    "gptq bits is '4'; pyft reads 4": {"bits": "4"},
    "gptq group_size is 48; pyft reads -1, 32, 64": {"group_size": 48},
    "gptq group_size is None": {"group_size": None},
    "gptq format is 'marlin'; pyft reads gptq, gptq_v2": {"checkpoint_format": "marlin"},
    "awq format is 'gemv'; pyft reads gemm": {"quant_method": "awq", "checkpoint_format": "gemv"},
    "'hqq' is not a quantization pyft reads": {"quant_method": "hqq"},
    "None is not a quantization pyft reads": {"quant_method": None},
    r"down_proj.qweight is int32 \[16, 64\]; its shape must be \[128, 8\]": {
        "quant_method": "awq",
        "checkpoint_format": "gemm",
    },
}


@pytest.mark.parametrize("message", REFUSED_ENTRIES)
def test_refuses_what_it_cannot_read(message: str, tmp_path: Path) -> None:
    integer_checkpoint(tmp_path)
    changed(tmp_path, **REFUSED_ENTRIES[message])
    with pytest.raises(UsageError, match=message) as caught:
        pyft.prepare(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


Q = "model.layers.0.mlp.down_proj"
REFUSED_TENSORS: dict[str, dict[str, torch.Tensor | None]] = {
    rf"{Q}.qzeros is missing beside": {"qzeros": None},
    rf"{Q}.qweight is missing beside": {"qweight": None},
    rf"{Q}.scales is missing beside": {"scales": None},
    rf"{Q}.g_idx is missing beside": {"g_idx": None},
    rf"{Q}.qweight is uint8 \[16, 64\]; its dtype must be int32": {
        "qweight": torch.zeros(16, 64, dtype=torch.uint8)
    },
    rf"{Q}.scales is float16 \[4, 63\]; its shape must be \[4, 64\]": {
        "scales": torch.zeros(4, 63).half()
    },
    rf"{Q}.g_idx does not give each of 4 groups 32 columns": {
        "g_idx": torch.zeros(128, dtype=torch.int32)
    },
}


@pytest.mark.parametrize("message", REFUSED_TENSORS)
def test_refuses_tensors_that_do_not_fit(message: str, tmp_path: Path) -> None:
    integer_checkpoint(tmp_path, ordered=True, group=32)
    tensors = tensors_of(tmp_path)
    for name, tensor in REFUSED_TENSORS[message].items():
        del tensors[f"{Q}.{name}"]
        if tensor is not None:
            tensors[f"{Q}.{name}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=message) as caught:
        pyft.prepare(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_groups_that_no_row_holds(tmp_path: Path) -> None:
    integer_checkpoint(tmp_path, group=-1)
    changed(tmp_path, group_size=128)
    with pytest.raises(
        UsageError, match=r"gate_proj is \[128, 64\]; pyft reads gptq.*groups of 128"
    ):
        pyft.prepare(tmp_path)


def test_a_symmetric_checkpoint_with_one_other_zero_point_keeps_them(tmp_path: Path) -> None:
    integer_checkpoint(tmp_path, symmetric=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.qzeros"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    weights = quantized(pyft.prepare(tmp_path))
    assert {q.format.name for q in weights.values()} == {"int4_zp"}
    zeros = weights[f"{Q}.weight"].zeros
    assert zeros is not None
    assert zeros.unique().tolist() == [8, 9]
