"""Block-wise quantization, the specification: see ``pyft.formats`` for the layout and the rules."""

import torch
from torch import Tensor

from pyft.formats import Format, absmax_format, code_table, midpoint_table


def quantize_blocks(x: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor]:
    """Code a flat fp32 tensor [n]: uint8 codes, padded to whole blocks; fp32 absmax [blocks]."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if blocks.numel() else blocks.new_empty(0)
    codes = torch.zeros(blocks.shape, dtype=torch.int16, device=x.device)
    scaled = blocks / absmax[:, None]
    for midpoint in midpoint_table(fmt, x.device):
        codes += scaled > midpoint
    codes[absmax == 0] = fmt.zero_code
    return codes.to(torch.uint8).flatten(), absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, fmt: Format, block_size: int) -> Tensor:
    """Decode uint8 codes [n] with fp32 absmax [ceil(n / block_size)] to fp32 [n]."""
    scale = absmax.repeat_interleave(block_size)[: codes.numel()]
    return code_table(fmt, codes.device)[codes.long()] * scale


def quantize(x: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a tensor to 4 bits: packed uint8 [ceil(n/2)], fp32 absmax [ceil(n/block_size)]."""
    codes, absmax = quantize_blocks(x.flatten().float(), fmt, block_size)
    packed = codes[0::2] << 4 | codes[1::2]
    return packed[: (x.numel() + 1) // 2], absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: uint8 codes [blocks], fp32 nested absmax, fp32 offset []."""
    fmt = absmax_format()
    offset = absmax.double().sum().div(max(absmax.numel(), 1)).float()
    codes, nested = quantize_blocks(absmax - offset, fmt, fmt.block_size)
    return codes[: absmax.numel()], nested, offset


def dequantize_absmax(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The absmax that ``quantize_absmax`` stored, fp32 [blocks]."""
    fmt = absmax_format()
    return dequantize_blocks(codes, nested, fmt, fmt.block_size) + offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    fmt: Format,
    block_size: int,
    rows: tuple[int, int],
    out: Tensor,
) -> Tensor:
    """Decode rows rows[0] to rows[1] of a weight into out [rows, K], rounded once to its dtype."""
    if nested is not None and offset is not None:
        absmax = dequantize_absmax(absmax, nested, offset)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    first, last = (row * out.shape[1] for row in rows)
    flat = dequantize_blocks(codes, absmax, fmt, block_size)[first:last]
    return out.copy_(flat.view(out.shape))
