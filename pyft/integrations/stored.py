"""Tensors of a checkpoint as their headers describe them, checked before any of them is read.

A layout (pyft's own, bitsandbytes', GPTQ's, AWQ's) says which tensors of a module make up its
weight, checks what their headers claim, and only then builds a QuantizedTensor from them.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyft.errors import UsageError
from pyft.quantized import QuantizedTensor

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
AGAIN = "the checkpoint is damaged or of another kind: fetch or save it again"


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, not read yet."""

    key: str
    file: str
    dtype: torch.dtype | None  # None where torch has no name for it
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def __str__(self) -> str:
        dtype = "of an unknown dtype" if self.dtype is None else short(self.dtype)
        return f"{self.key} is {dtype} {list(self.shape)}"


Parts = Mapping[str, Stored]  # by what follows the module's name: ".weight", ".weight.absmax", ...
Build = Callable[[Mapping[str, Tensor]], QuantizedTensor]


class Layout(Protocol):
    """How a library stores a quantized linear's weight."""

    @property
    def names(self) -> tuple[str, ...]:
        """What follows the module's name in the keys of a weight's tensors."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Those of ``names`` that only a quantized weight has."""

    def check(self, module: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Build:
        """What builds the weight [out, in] of ``module``, which the model has in this shape.

        ``dtype`` labels the weight where the layout does not say its own. Raises UsageError, one
        line with file and key, for tensors that are missing or do not fit.
        """


def short(dtype: torch.dtype) -> str:
    """The dtype's name without ``torch.``"""
    return str(dtype).removeprefix("torch.")


def of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors in memory, seen as a checkpoint's."""
    return {
        key: Stored(key, "state dict", tensor.dtype, tuple(tensor.shape), partial(_itself, tensor))
        for key, tensor in tensors.items()
    }


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def of_files(files: Iterable[str | Path]) -> dict[str, Stored]:
    """Every tensor of some safetensors files, from their headers alone; UsageError where a file is
    none, or shorter than its header says.
    """
    found = {}
    for path in map(str, files):
        try:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  not a dictionary
                header = file.get_slice(key)
                dtype, shape = _DTYPES.get(header.get_dtype()), tuple(header.get_shape())
                found[key] = Stored(key, path, dtype, shape, partial(file.get_tensor, key))
        except (SafetensorError, OSError) as error:
            reason = str(error).split("\n", 1)[0]
            raise UsageError(f"{path}: cannot be read as safetensors ({reason}); {AGAIN}") from None
    return found


def need(parts: Parts, name: str, module: str, dtypes: tuple[torch.dtype, ...]) -> Stored:
    """The part called ``name``, which must be there in one of ``dtypes``."""
    if name not in parts:
        others = ", ".join(sorted(part.key for part in parts.values())) or "nothing"
        where = next((part.file for part in parts.values()), "checkpoint")
        raise UsageError(f"{where}: {module}{name} is missing beside {others}; {AGAIN}")
    part = parts[name]
    if part.dtype not in dtypes:
        wanted = " or ".join(map(short, dtypes))
        raise UsageError(f"{part.file}: {part}; its dtype must be {wanted}; {AGAIN}")
    return part


def sized(part: Stored, shape: tuple[int, ...]) -> Stored:
    """The part, which must have this shape."""
    if part.shape != shape:
        raise UsageError(f"{part.file}: {part}; its shape must be {list(shape)}; {AGAIN}")
    return part


def shards(path: Path) -> list[Path]:
    """The weights of a checkpoint directory: model.safetensors, or what its index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UsageError(f"{index}: weight_map does not give each tensor a file name; {AGAIN}")
    files = [path / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{index}: names {file.name}, which is not there; fetch it too")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UsageError where it holds none."""
    try:
        found = parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}; {AGAIN}") from None
    return found


def parse(text: bytes) -> dict[str, Any]:
    """A JSON object from its bytes; ValueError says in one line what they are instead."""
    try:
        found = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"is a JSON {type(found).__name__}, not an object")
    return found
