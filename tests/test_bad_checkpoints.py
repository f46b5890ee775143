"""Damaged and hostile checkpoint directories: one line that names the file and the key."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from checkpoints import by_bitsandbytes, config_of, integer_checkpoint, tensors_of
from conftest import build_model
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import Tensor

import pyft
from pyft.errors import UsageError


def text_tensor(text: str | bytes) -> Tensor:
    raw = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(raw), dtype=torch.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny quantized checkpoints, to be copied and damaged."""
    path = tmp_path_factory.mktemp("quantized")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    by_bitsandbytes(path / "bitsandbytes", bnb_4bit_use_double_quant=True, **options)
    by_bitsandbytes(path / "sharded", shard="600KB", **options)
    pyft.prepare(build_model("llama")).save_pretrained(path / "pyft")
    build_model("llama").save_pretrained(path / "plain")
    integer_checkpoint(path / "gptq", ordered=True, group=32)
    integer_checkpoint(path / "awq", method="awq", group=32)
    return {name.name: name for name in path.iterdir()}


@pytest.fixture
def copied(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoints[name], tmp_path / "copy", dirs_exist_ok=True))

    return copy


def refused(path: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pyft.prepare(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bitsandbytes", "pyft", "gptq"])
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(name: str, keep: float, copied: Callable[[str], Path]) -> None:
    file = copied(name) / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep if keep > 1 else keep * len(raw))])
    refused(file.parent, "model.safetensors: cannot be read as safetensors")


def test_a_shard_that_is_not_there(copied: Callable[[str], Path]) -> None:
    path = copied("sharded")
    (path / "model-00002-of-00002.safetensors").unlink()
    refused(path, r"names model-00002-of-00002.safetensors, which is not there")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    refused(path, "weight_map does not give each tensor a file name")
    (path / "model.safetensors.index.json").write_text("{")
    refused(path, "model.safetensors.index.json: is not JSON")


O_PROJ = "model.layers.1.self_attn.o_proj"
COMPANIONS = ("weight.absmax", "weight.nested_absmax", "weight.quant_map")
COMPANIONS += ("weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4")
DAMAGED: dict[tuple[str, str], dict[str, Tensor | None]] = {
    ("bitsandbytes", "weight.absmax is missing beside"): {"weight.absmax": None},
    ("bitsandbytes", "is uint8 .*, quantized, but nothing beside it says how"): dict.fromkeys(
        COMPANIONS
    ),
    ("bitsandbytes", f"{O_PROJ} has no weight in this checkpoint"): dict.fromkeys(
        ("weight", *COMPANIONS)
    ),
    ("bitsandbytes", r"says shape \[32, 128\], the model has \[64, 64\]"): {
        "weight.quant_state.bitsandbytes__nf4": text_tensor(
            '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 128], '
            '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}'
        )
    },
    ("pyft", "weight.scales is missing beside"): {"weight.scales": None},
    ("pyft", "weight.nested is missing beside"): {"weight.nested": None},
    ("pyft", r"o_proj.weight is uint8 \[2047\]; its shape must be \[2048\]"): {
        "weight": torch.zeros(2047, dtype=torch.uint8)
    },
    ("pyft", r"weight.scales is float32 \[64\]; its dtype must be uint8"): {
        "weight.scales": torch.ones(64)
    },
    ("pyft", "weight.zeros is there, but config.json says nf4, double_quant, which has none"): {
        "weight.zeros": torch.zeros(64, dtype=torch.uint8)
    },
    ("pyft", "weight.columns does not name each column once"): {
        "weight.columns": torch.zeros(64, dtype=torch.int32)
    },
    ("pyft", r"weight.offset is float32 \[1\]; its shape must be \[\]"): {
        "weight.offset": torch.ones(1)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: " ".join(case)[:60])
def test_tensors_that_do_not_fit(case: tuple[str, str], copied: Callable[[str], Path]) -> None:
    path = copied(case[0])
    tensors = tensors_of(path)
    for name, tensor in DAMAGED[case].items():
        tensors.pop(f"{O_PROJ}.{name}", None)
        if tensor is not None:
            tensors[f"{O_PROJ}.{name}"] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    refused(path, case[1])


ENTRIES: dict[tuple[str, str], Any] = {
    ("bitsandbytes", "quantization_config is 'nf4', not an object"): "nf4",
    ("bitsandbytes", "says load_in_8bit, or load_in_4bit"): {"quant_method": "bitsandbytes"},
    ("bitsandbytes", "bnb_4bit_quant_type nf4 or fp4"): {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"
    },
    ("bitsandbytes", "bnb_4bit_quant_storage is 'int3'; it can be uint8"): {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "int3",
    },
    ("pyft", r"weight is uint8 \[3072\]; its shape must be \[6144\]"): {
        "quant_method": "pyft", "format": "int8"
    },
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES, ids=lambda case: " ".join(case)[:60])
def test_configurations_that_do_not_fit(
    case: tuple[str, str], copied: Callable[[str], Path]
) -> None:
    path = copied(case[0])
    config = config_of(path) | {"quantization_config": ENTRIES[case]}
    (path / "config.json").write_text(json.dumps(config))
    refused(path, case[1])


@pytest.mark.parametrize("name", ["pyft", "plain"])
def test_a_weight_that_is_in_no_file(name: str, copied: Callable[[str], Path]) -> None:
    """transformers would draw it at random and go on."""
    path = copied(name)
    tensors = tensors_of(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    refused(path, "has no model.norm.weight; the checkpoint is damaged")


def test_a_configuration_that_is_no_json(copied: Callable[[str], Path]) -> None:
    path = copied("pyft")
    (path / "config.json").write_bytes(b"\xff{")
    refused(path, "config.json: is not UTF-8 text")


@settings(max_examples=80)
@given(data=st.data())
def test_any_damage_to_a_file_is_refused_or_read(
    data: st.DataObject, checkpoints: dict[str, Path]
) -> None:
    """Bytes of a header changed, tensors dropped or cut, files shortened."""
    name = data.draw(st.sampled_from(["bitsandbytes", "pyft", "gptq", "awq"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(checkpoints[name], folder, dirs_exist_ok=True))
        damage(data, path)
        try:
            pyft.prepare(path)
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017  either outcome is right


def damage(data: st.DataObject, path: Path) -> None:
    file = path / "model.safetensors"
    kind = data.draw(st.sampled_from(["bytes", "shorter", "drop", "cut"]))
    if kind in ("bytes", "shorter"):
        raw = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(raw[:8], "little")
        if kind == "shorter":
            raw = raw[: data.draw(st.integers(0, len(raw)))]
        for _ in range(data.draw(st.integers(1, 4)) if kind == "bytes" else 0):
            raw[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
        file.write_bytes(raw)
    else:
        tensors = tensors_of(path)
        keys = [key for key in sorted(tensors) if "proj" in key]
        for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True)):
            tensor = tensors.pop(key)
            if kind == "cut" and tensor.dim():
                tensors[key] = tensor[: data.draw(st.integers(0, len(tensor)))].contiguous()
        save_file(tensors, file, {"format": "pt"})
