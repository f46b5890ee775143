"""bitsandbytes weights as QuantizedTensors: of its modules, read in place, and of its state dicts.

The layouts are the same (``pyft.integrations.bitsandbytes_layout``), so nothing is computed and no
bit changes in either direction.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyft.errors import UsageError
from pyft.formats import BLOCK_SIZES, NESTED_BLOCK, SCALE_FORMAT, code_table
from pyft.integrations.bitsandbytes_layout import LABELS, STATE, STORAGE, TYPES, Layout, finite
from pyft.integrations.stored import of_tensors, short
from pyft.quantized import QuantizedTensor


def load(
    tensors: Mapping[str, Tensor], prefix: str = "", dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """A weight from the tensors bitsandbytes stored it as; nothing is copied.

    Args:
        tensors: a state dict, or the part of one.
        prefix: the module's name with its dot (``model.layers.0.mlp.up_proj.``), as in
            ``state_dict(prefix=...)``.
        dtype: what the weight stands for where the layout does not say (8 bits).

    Raises:
        UsageError: tensors that are missing, do not fit one another, or use other codes.
    """
    module = prefix.removesuffix(".")
    start = len(module)
    parts = {}
    for key, part in of_tensors(tensors).items():
        name = key[start:] if module else f".{key}"
        if key.startswith(prefix) and (name in Layout.names or name.startswith(STATE)):
            parts[name] = part
    build = Layout().check(module, parts, (), dtype)
    return build({name: part.read() for name, part in parts.items()})


def save(
    q: QuantizedTensor, prefix: str = "", storage: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """The tensors bitsandbytes stores this weight as, in its order.

    Args:
        q: nf4 or fp4 in blocks of a power of two, or int8 with a scale a row.
        prefix: the module's name with its dot.
        storage: dtype the packed bytes are shown as (bnb_4bit_quant_storage).

    Raises:
        UsageError: a weight this layout has no place for.
    """
    if q.format.name == "int8" and not q.double_quant:
        return _save_8bit(q, prefix)
    if f"{STATE}bitsandbytes__{q.format.name}" not in TYPES or q.block_size not in BLOCK_SIZES:
        raise UsageError(
            f"save: {prefix}weight is {_describe(q)}; bitsandbytes has nf4 and fp4 in blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))}, and int8 with one fp32 scale a row"
        )
    if q.dtype not in LABELS.values() or storage not in STORAGE:
        raise UsageError(
            f"save: {prefix}weight is {short(q.dtype)} stored as {short(storage)}; bitsandbytes "
            f"has {', '.join(LABELS)} stored as {', '.join(map(short, STORAGE))}"
        )
    if q.packed.numel() % storage.itemsize:
        raise UsageError(
            f"save: the {q.packed.numel()} bytes of {prefix}weight are no whole number of "
            f"{short(storage)}; use bnb_4bit_quant_storage uint8"
        )
    state: dict[str, Any] = {"quant_type": q.format.name, "blocksize": q.block_size}
    state |= {"dtype": short(q.dtype), "shape": list(q.shape)}
    tensors = {
        f"{prefix}weight": q.packed.view(storage).view(-1, 1),
        f"{prefix}weight.absmax": q.scales,
        f"{prefix}weight.quant_map": code_table(q.format, q.device).clone(),
    }
    if q.nested is not None and q.offset is not None:
        offset = finite(q.offset.item(), f"save: the offset of {prefix}weight")
        tensors[f"{prefix}weight.nested_absmax"] = q.nested
        tensors[f"{prefix}weight.nested_quant_map"] = code_table(SCALE_FORMAT, q.device).clone()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state |= {"nested_offset": offset}
    text = bytearray(json.dumps(state).encode())
    key = f"{prefix}{STATE[1:]}bitsandbytes__{q.format.name}"
    tensors[key] = torch.frombuffer(text, dtype=torch.uint8).to(q.device)
    return tensors


def _save_8bit(q: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    if q.dim() != 2 or q.block_size != q.shape[1]:
        raise UsageError(
            f"save: {prefix}weight is {_describe(q)}; bitsandbytes' 8 bits have one scale a row"
        )
    return {
        f"{prefix}weight": q.packed.view(torch.int8).view(q.shape),
        f"{prefix}SCB": q.scales,
        f"{prefix}weight_format": torch.zeros((), dtype=torch.uint8, device=q.device),
    }


def _describe(q: QuantizedTensor) -> str:
    nested = ", double quantization" if q.double_quant else ""
    return f"{q.format.name} {list(q.shape)} in blocks of {q.block_size}{nested}"


def config_of(
    format: str, double_quant: bool, dtype: torch.dtype, left: list[str]
) -> dict[str, Any]:
    """The quantization_config of a model stored in this layout, ``left`` being the linears that
    are not quantized.
    """
    eight = format == "int8"
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": short(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if eight else format,
        "bnb_4bit_use_double_quant": double_quant and not eight,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": left,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "quant_method": "bitsandbytes",
    }


def obstacle(module: Any) -> str | None:
    """Why the weight of a bitsandbytes linear cannot be read in place, or None when it can."""
    weight = module.weight
    if hasattr(weight, "SCB"):
        if weight.has_fp16_weights:
            return "its weight is kept in 16 bits (has_fp16_weights)"
        if weight.dtype != torch.int8:
            return "its 8-bit weight is not quantized yet; move the model to its device first"
        return None if _row_scales(module) is not None else "its 8-bit weight has lost its scales"
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "its 4-bit weight is not quantized yet; move the model to its device first"
    if state.quant_type not in TYPES.values():
        return f"its 4-bit format is {state.quant_type}, not nf4 or fp4"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "its 4-bit weight was repacked by bitsandbytes for its own CPU kernel; "
            "call pyft.apply before model.eval()"
        )
    if state.blocksize not in BLOCK_SIZES:
        return f"its block size {state.blocksize} is not one of {', '.join(map(str, BLOCK_SIZES))}"
    if state.nested and state.state2.blocksize != NESTED_BLOCK:
        return f"its nested block size {state.state2.blocksize} is not {NESTED_BLOCK}"
    return None


def holds(module: Any) -> bool:
    """Whether the weight of ``module`` is bitsandbytes'."""
    return hasattr(module.weight, "quant_state") or hasattr(module.weight, "SCB")


def as_quantized(module: Any) -> QuantizedTensor:
    """The weight of a bitsandbytes linear without ``obstacle``, as a QuantizedTensor over the same
    memory; the same one as long as that is the same, so that it is known to be decoded already.
    """
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    scales: Any = _row_scales(module) if state is None else state.absmax
    memory = (weight.data_ptr(), weight._version, scales.data_ptr(), scales._version)
    known = _of_weight.get(weight)
    if known is None or known[0] != memory:
        known = _of_weight[weight] = (memory, _quantized(weight, state, scales))
    found: QuantizedTensor = known[1]
    return found


_of_weight = WeakTensorKeyDictionary()  # weight -> where it and its scales were, QuantizedTensor


def _quantized(weight: Any, state: Any, scales: Tensor) -> QuantizedTensor:
    packed = weight.data.view(torch.uint8).view(-1)  # stored as another dtype for FSDP
    parts = [packed, scales]
    if state is None:
        return QuantizedTensor(parts, "int8", weight.shape[1], weight.shape, torch.float16)
    if state.nested:
        offset = torch.as_tensor(state.offset, device=weight.device).float()
        parts += [state.state2.absmax, offset]
    return QuantizedTensor(parts, state.quant_type, state.blocksize, state.shape, state.dtype)


def _row_scales(module: Any) -> Tensor | None:
    """Its first forward moves SCB from the weight to the module's state."""
    scales: Tensor | None = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return scales
