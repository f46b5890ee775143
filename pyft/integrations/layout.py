"""How pyft itself stores a quantized weight: one tensor for each part, nothing else.

    weight           packed codes, uint8 [ceil(n * bits / 8)]
    weight.scales    fp32 or uint8 [blocks]
    weight.zeros     uint8 [blocks], in formats with zero points
    weight.nested    fp32 [ceil(blocks/256)], with double quantization
    weight.offset    fp32 [], with double quantization
    weight.columns   int32 [K], where columns are stored in another order

Format and block size are the model's, in config.json; the shape is the module's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.formats import NESTED_BLOCK, Format, blocks_of
from pyft.integrations.stored import AGAIN, Build, Parts, need, sized
from pyft.quantized import QuantizedTensor

_PARTS = {
    "scales": ".weight.scales",
    "zeros": ".weight.zeros",
    "nested": ".weight.nested",
    "offset": ".weight.offset",
    "columns": ".weight.columns",
}


def save(q: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The tensors a weight is stored as; ``prefix`` is the module's name with its dot."""
    stored = {name: getattr(q, part) for part, name in _PARTS.items()}
    return {f"{prefix}weight": q.packed} | {
        prefix + name[1:]: tensor for name, tensor in stored.items() if tensor is not None
    }


@dataclass(frozen=True)
class Layout:
    """The layout as ``pyft.integrations.stored`` reads it; block size 0 is a row."""

    format: Format
    block_size: int
    double_quant: bool
    names: tuple[str, ...] = (".weight", *_PARTS.values())
    marks: tuple[str, ...] = tuple(_PARTS.values())

    def check(self, module: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Build:
        """What builds the weight, in the model's ``shape``."""
        fmt, n, uint8, fp32 = self.format, math.prod(shape), (torch.uint8,), (torch.float32,)
        block_size = self.block_size or shape[-1]
        blocks = blocks_of(n, block_size)
        sized(need(parts, ".weight", module, uint8), ((n * fmt.bits + 7) // 8,))
        narrow = fmt.e8m0 or self.double_quant
        sized(need(parts, ".weight.scales", module, uint8 if narrow else fp32), (blocks,))
        present = [".weight", ".weight.scales"]
        if fmt.zero_points:
            sized(need(parts, ".weight.zeros", module, uint8), (blocks,))
            present.append(".weight.zeros")
        if self.double_quant:
            nested = need(parts, ".weight.nested", module, fp32)
            sized(nested, (blocks_of(blocks, NESTED_BLOCK),))
            sized(need(parts, ".weight.offset", module, fp32), ())
            present += [".weight.nested", ".weight.offset"]
        if ".weight.columns" in parts:
            columns = need(parts, ".weight.columns", module, (torch.int32,))
            order = sized(columns, shape[-1:]).read().cpu().sort().values
            if not torch.equal(order, torch.arange(shape[-1], dtype=torch.int32, device="cpu")):
                raise UsageError(
                    f"{columns.file}: {columns.key} does not name each column once; {AGAIN}"
                )
            present.append(".weight.columns")
        for name in parts.keys() - {*present}:
            double = ", double_quant" if self.double_quant else ""
            raise UsageError(
                f"{parts[name].file}: {parts[name].key} is there, but config.json says {fmt.name}"
                f"{double}, which has none; {AGAIN}"
            )

        def build(tensors: Mapping[str, Tensor]) -> QuantizedTensor:
            stored = [tensors[name] for name in present]
            return QuantizedTensor(stored, fmt.name, block_size, shape, dtype)

        return build
