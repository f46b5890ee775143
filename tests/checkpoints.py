"""Quantized checkpoints for tests: made by bitsandbytes, and packed here as GPTQ and AWQ do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import build_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pyft.quantized import QuantizedTensor

SIZES: dict[str, Any] = {"intermediate_size": 128, "num_hidden_layers": 2}
Array = np.ndarray[Any, np.dtype[Any]]


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def quantized(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """The quantized weights of a model by name."""
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def same_parts(found: QuantizedTensor, wanted: QuantizedTensor) -> bool:
    """Whether two weights are equal in every stored bit and in what they say of themselves."""
    facts = [(q.format, q.block_size, q.shape, q.dtype, len(q.parts())) for q in (found, wanted)]
    pairs = zip(found.parts(), wanted.parts(), strict=True)
    return facts[0] == facts[1] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def by_bitsandbytes(
    path: Path, model: str = "llama", shard: str = "1GB", **options: Any
) -> torch.nn.Module:
    """A tiny model quantized and saved by transformers and bitsandbytes into ``path``."""
    build_model(model, **SIZES).to(torch.bfloat16).save_pretrained(path / "16 bits")
    config = BitsAndBytesConfig(**options)
    made: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        path / "16 bits", quantization_config=config, dtype="auto"
    )
    made.save_pretrained(path, max_shard_size=shard)
    return made


def _words(nibbles: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """Codes [A, 8 B] as int32 [A, B]: code order[i] of eight in bits 4 i to 4 i + 3."""
    groups = nibbles.reshape(nibbles.shape[0], -1, 8).astype(np.uint32)
    words = np.zeros(groups.shape[:2], np.uint32)
    for place, which in enumerate(order):
        words |= groups[:, :, which] << np.uint32(4 * place)
    return words.view(np.int32)


def gptq_weight(
    rng: np.random.Generator,
    n: int,
    k: int,
    group: int,
    version: str,
    symmetric: bool,
    ordered: bool,
) -> tuple[dict[str, Array], Array]:
    """A weight in GPTQ's layout, and its values [n, k] by (q - z) * s."""
    size = k if group == -1 else group
    groups = k // size
    codes = rng.integers(0, 16, (k, n))
    # What is stored in four bits: a zero point less one in version 1, so that 16 is one too.
    least, most = (1, 17) if version == "gptq" else (0, 16)
    zeros = np.full((groups, n), 8) if symmetric else rng.integers(least, most, (groups, n))
    if not symmetric:
        zeros[0, :2] = least, most - 1
    scales = rng.uniform(0.001, 0.1, (groups, n)).astype(np.float16)
    index = np.arange(k) // size
    if ordered:
        index = rng.permutation(index)
    values = (codes - zeros[index]) * scales[index].astype(np.float64)
    return {
        "qweight": _words(codes.T).T.copy(),
        "qzeros": _words(zeros - least),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }, values.T


def awq_weight(
    rng: np.random.Generator, n: int, k: int, group: int
) -> tuple[dict[str, Array], Array]:
    """A weight in AWQ's gemm layout, and its values [n, k]."""
    size = k if group == -1 else group
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // size, n))
    scales = rng.uniform(0.001, 0.1, (k // size, n)).astype(np.float16)
    index = np.arange(k) // size
    values = (codes - zeros[index]) * scales[index].astype(np.float64)
    stored = {"qweight": _words(codes, order), "qzeros": _words(zeros, order), "scales": scales}
    return stored, values.T


def integer_checkpoint(
    path: Path,
    method: str = "gptq",
    group: int = 64,
    version: str = "gptq",
    symmetric: bool = False,
    ordered: bool = False,
    shard: str = "1GB",
) -> dict[str, Array]:
    """A tiny Llama in GPTQ's or AWQ's layout in ``path``; returns each linear's values by name."""
    rng = np.random.default_rng(len(version) + group)
    model = build_model("llama", **SIZES).half()
    model.save_pretrained(path, max_shard_size=shard)
    values = {}
    names = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear} - {"lm_head"}
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in sorted(names):
            if f"{name}.weight" not in tensors:
                continue
            n, k = tensors.pop(f"{name}.weight").shape
            if method == "awq":
                stored, values[name] = awq_weight(rng, n, k, group)
            else:
                stored, values[name] = gptq_weight(rng, n, k, group, version, symmetric, ordered)
            tensors |= {f"{name}.{key}": torch.from_numpy(v) for key, v in stored.items()}
        save_file(tensors, file, {"format": "pt"})
    entry = {"quant_method": method, "bits": 4, "group_size": group}
    if method == "awq":
        entry |= {"version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    else:
        entry |= {"checkpoint_format": version, "sym": symmetric, "desc_act": ordered}
    (path / "config.json").write_text(json.dumps(config_of(path) | {"quantization_config": entry}))
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = {key: file for file, keys in _keys(path) for key in keys}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return values


def _keys(path: Path) -> Iterator[tuple[str, list[str]]]:
    for file in path.glob("*.safetensors"):
        yield file.name, list(load_file(file))
