"""How bitsandbytes stores a quantized weight; what pyft checks before it takes one over as it is.

4 bits    weight                       packed codes, uint8 [n/2, 1] or wider items of the same
                                       bytes
          weight.absmax                fp32 [blocks], or uint8 [blocks] when nested
          weight.quant_map             fp32 [16], the codes' values
          weight.nested_absmax         fp32 [ceil(blocks/256)]
          weight.nested_quant_map      fp32 [256]
          weight.quant_state.bitsandbytes__nf4 (or fp4)   JSON as uint8: quant_type, blocksize,
                                       dtype, shape, nested_blocksize, nested_dtype,
                                       nested_offset
8 bits    weight int8 [N, K], SCB fp32 [N], weight_format uint8 [] = 0
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.formats import (
    BLOCK_SIZES,
    FORMATS,
    NESTED_BLOCK,
    SCALE_FORMAT,
    Format,
    blocks_of,
    code_table,
)
from pyft.integrations.stored import AGAIN, Build, Parts, Stored, need, parse, short, sized
from pyft.quantized import QuantizedTensor

STATE = ".weight.quant_state."
TYPES = {f"{STATE}bitsandbytes__{name}": name for name in ("nf4", "fp4")}
_LONGEST_STATE = 4096  # bytes of JSON; bitsandbytes writes less than 200
_MOST_DIMENSIONS = 8
STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
LABELS = {short(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")


@dataclass(frozen=True)
class Layout:
    """The layout as ``pyft.integrations.stored`` reads it."""

    names: tuple[str, ...] = (
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        *TYPES,
        ".SCB",
        ".weight_format",
    )
    marks: tuple[str, ...] = names[1:]

    def check(self, module: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Build:
        """What builds the weight; ``shape`` () takes the one stored."""
        if ".SCB" in parts or ".weight_format" in parts:
            return _check_8bit(module, parts, shape, dtype)
        return _check_4bit(module, parts, shape)


def _check_8bit(module: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Build:
    codes = need(parts, ".weight", module, (torch.int8,))
    if len(codes.shape) != 2 or 0 in codes.shape or (shape and codes.shape != shape):
        wanted = list(shape) or "[out, in]"
        raise UsageError(f"{codes.file}: {codes}; its shape must be {wanted}; {AGAIN}")
    rows, cols = codes.shape
    sized(need(parts, ".SCB", module, (torch.float32,)), (rows,))
    if ".weight_format" in parts:
        order = need(parts, ".weight_format", module, (torch.uint8, torch.int8, torch.int64))
        found = sized(order, ()).read().item()
        if found != 0:
            raise UsageError(
                f"{order.file}: {order.key} is {found}, an order of columns for one GPU; save the "
                "checkpoint with bitsandbytes 0.45 or later, which writes rows (0)"
            )

    def build(tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        packed = tensors[".weight"].view(torch.uint8).view(-1)
        return QuantizedTensor([packed, tensors[".SCB"]], "int8", cols, (rows, cols), dtype)

    return build


def _check_4bit(module: str, parts: Parts, shape: tuple[int, ...]) -> Build:
    packed = need(parts, ".weight", module, STORAGE)
    kept = _state_of(module, parts, packed)
    fmt, stored_shape, block_size, dtype, offset = kept
    n = math.prod(stored_shape)
    if shape and stored_shape != shape:
        raise UsageError(
            f"{packed.file}: the quant_state of {module}.weight says shape {list(stored_shape)}, "
            f"the model has {list(shape)}; {AGAIN}"
        )
    assert packed.dtype is not None
    found, wanted = math.prod(packed.shape) * packed.dtype.itemsize, -(-n // 2)
    if found != wanted or len(packed.shape) != 2 or packed.shape[1] != 1:
        raise UsageError(
            f"{packed.file}: {packed} of {packed.dtype.itemsize} bytes each; {n} codes of 4 bits "
            f"take {wanted} bytes in a column [.., 1]; {AGAIN}"
        )
    blocks = blocks_of(n, block_size)
    absmax = torch.float32 if offset is None else torch.uint8
    sized(need(parts, ".weight.absmax", module, (absmax,)), (blocks,))
    _check_codes(parts, ".weight.quant_map", module, fmt)
    if offset is None:
        for name in (".weight.nested_absmax", ".weight.nested_quant_map"):
            if name in parts:
                raise UsageError(
                    f"{packed.file}: {parts[name]}, but the quant_state of {module}.weight has no "
                    f"nested_offset; {AGAIN}"
                )
    else:
        nested = need(parts, ".weight.nested_absmax", module, (torch.float32,))
        sized(nested, (blocks_of(blocks, NESTED_BLOCK),))
        _check_codes(parts, ".weight.nested_quant_map", module, SCALE_FORMAT)

    def build(tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        codes = tensors[".weight"].view(-1).view(torch.uint8)
        stored = [codes, tensors[".weight.absmax"]]
        if offset is not None:
            mean = torch.tensor(offset, dtype=torch.float32, device=codes.device)
            stored += [tensors[".weight.nested_absmax"], mean]
        return QuantizedTensor(stored, fmt.name, block_size, stored_shape, dtype)

    return build


def _state_of(
    module: str, parts: Parts, packed: Stored
) -> tuple[Format, tuple[int, ...], int, torch.dtype, float | None]:
    """Format, shape, block size, dtype and offset from a quant_state's JSON."""
    keys = [name for name in parts if name.startswith(STATE)]
    if len(keys) != 1 or keys[0] not in TYPES:
        found = ", ".join(parts[name].key for name in keys) or "none"
        raise UsageError(
            f"{packed.file}: {module}{STATE}bitsandbytes__nf4 or __fp4 must be there once beside "
            f"{packed.key}; found {found}; {AGAIN}"
        )
    part = need(parts, keys[0], module, (torch.uint8,))
    where = f"{part.file}: {part.key}"
    if len(part.shape) != 1 or part.shape[0] > _LONGEST_STATE:
        raise UsageError(f"{where} has shape {list(part.shape)}, not that of a short JSON; {AGAIN}")
    try:
        state = parse(bytes(part.read().tolist()))
    except ValueError as error:
        raise UsageError(f"{where} {error}; {AGAIN}") from None
    nested = any(key in state for key in _NESTED_KEYS)
    wanted = {*_KEYS, *(_NESTED_KEYS if nested else ())}
    if state.keys() != wanted:
        wrong = ", ".join(sorted(map(repr, state.keys() ^ wanted)))
        raise UsageError(f"{where} lacks or does not know {wrong}; {AGAIN}")
    known: dict[str, tuple[Any, ...]] = {
        "quant_type": (TYPES[keys[0]],),
        "blocksize": BLOCK_SIZES,
        "dtype": tuple(LABELS),
        "nested_blocksize": (NESTED_BLOCK,),
        "nested_dtype": ("float32",),
    }
    for key, values in known.items():
        value = state.get(key, values[0])
        if type(value) is not type(values[0]) or value not in values:
            expected = ", ".join(map(repr, values))
            raise UsageError(f"{where} has {key} {reprlib.repr(value)}; pyft reads {expected}")
    shape = state["shape"]
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= _MOST_DIMENSIONS
        or not all(type(size) is int and 0 < size < 2**63 for size in shape)
        or math.prod(shape) >= 2**63
    ):
        raise UsageError(
            f"{where} has shape {reprlib.repr(shape)}; sizes are positive integers; {AGAIN}"
        )
    offset = None
    if nested:
        offset = finite(state["nested_offset"], f"{where}: nested_offset")
    fmt = FORMATS[state["quant_type"]]
    return fmt, tuple(shape), state["blocksize"], LABELS[state["dtype"]], offset


def finite(value: Any, what: str) -> float:
    """``value`` as a float that fp32 holds."""
    largest = torch.finfo(torch.float32).max
    if type(value) not in (float, int) or not -largest <= value <= largest:
        raise UsageError(f"{what} is {reprlib.repr(value)}, not a finite fp32 number; {AGAIN}")
    return float(value)


def _check_codes(parts: Parts, name: str, module: str, fmt: Format) -> None:
    part = sized(need(parts, name, module, (torch.float32,)), (2**fmt.bits,))
    codes = code_table(fmt, torch.device("cpu"))
    if not torch.equal(part.read().cpu().view(torch.int32), codes.view(torch.int32)):
        raise UsageError(
            f"{part.file}: {part.key} is not the code book of {fmt.name}, bit for bit; quantize "
            "the model again, from its 16-bit weights"
        )
