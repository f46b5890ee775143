"""Block-wise quantization, the specification: see ``pyft.formats`` for the layout and the rules."""

import torch
from torch import Tensor

from pyft.formats import (
    NESTED_BLOCK,
    SCALE_FORMAT,
    Format,
    code_table,
    e8m0_table,
    order_table,
    scale_offset,
    threshold_table,
)


def quantize(x: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a tensor of n elements: packed uint8 [ceil(n * bits / 8)], scales and, in formats
    that have them, zero points, one a block.
    """
    flat = x.flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -x.numel() % block_size)).view(-1, block_size)
    scales, zeros = _scales(blocks, fmt)
    scale = e8m0_table(x.device)[scales.long()] if fmt.e8m0 else scales
    scaled = blocks / scale[:, None]
    if zeros is not None:
        scaled += zeros[:, None]
    levels = torch.bucketize(scaled, threshold_table(fmt, x.device))
    codes = order_table(fmt, x.device)[levels.masked_fill_(scaled.isnan(), 0)]
    codes[scale == 0] = fmt.zero_code
    return _pack(codes.flatten()[: x.numel()], fmt), scales, zeros


def _scales(blocks: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each row of ``blocks``."""
    if blocks.numel() == 0:
        blocks = blocks.new_zeros(0, 1)
    low, high = blocks.clamp(max=0).amin(dim=1), blocks.clamp(min=0).amax(dim=1)
    span = high - low if fmt.zero_points else blocks.abs().amax(dim=1)
    scales = span / torch.full_like(span, fmt.top)  # by a number, a GPU takes its reciprocal
    if fmt.e8m0:
        return (scales.view(torch.int32) >> 23).to(torch.uint8), None
    if not fmt.zero_points:
        return scales, None
    zeros = -low / scales
    zeros = torch.where(zeros.isfinite(), zeros.round().clamp(0, 2**fmt.bits - 1), 0)
    return scales, zeros.to(torch.uint8)


def _pack(codes: Tensor, fmt: Format) -> Tensor:
    if fmt.bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=fmt.zero_code)
    return codes[0::2] << 4 | codes[1::2]


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: uint8 scales [blocks], fp32 nested scales, fp32 offset []."""
    offset = scale_offset(scales)
    codes, nested, _ = quantize(scales - offset, SCALE_FORMAT, NESTED_BLOCK)
    return codes, nested, offset


def dequantize_scales(
    scales: Tensor, nested: Tensor | None, offset: Tensor | None, fmt: Format
) -> Tensor:
    """The scales as fp32 [blocks], however they are stored."""
    if fmt.e8m0:
        return e8m0_table(scales.device)[scales.long()]
    if nested is None or offset is None:
        return scales
    scale = nested.repeat_interleave(NESTED_BLOCK)[: scales.numel()]
    return code_table(SCALE_FORMAT, scales.device)[scales.long()] * scale + offset


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested: Tensor | None,
    offset: Tensor | None,
    fmt: Format,
    block_size: int,
    shape: tuple[int, int],
    slab: tuple[int, int, int, int],
    out: Tensor,
) -> Tensor:
    """Decode rows slab[0] to slab[1], columns slab[2] to slab[3] of a weight of ``shape`` into out,
    rounded once to its dtype.
    """
    n = shape[0] * shape[1]
    codes = packed if fmt.bits == 8 else torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    values = code_table(fmt, packed.device)[codes[:n].long()]
    if zeros is not None:
        values = values - zeros.repeat_interleave(block_size)[:n]
    scale = dequantize_scales(scales, nested, offset, fmt)
    values = values * scale.repeat_interleave(block_size)[:n]
    return out.copy_(values.view(shape)[slab[0] : slab[1], slab[2] : slab[3]])
