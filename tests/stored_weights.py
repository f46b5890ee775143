"""Random weights as kernels take them, and outputs that show what was written where."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyft.formats import (
    FORMATS,
    NESTED_BLOCK,
    SCALE_FORMAT,
    Format,
    blocks_of,
    code_table,
    e8m0_table,
)
from pyft.reference import quantize as reference

CPU = torch.device("cpu")
GUARD = 48  # elements around each output that must stay as they were
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_FORMATS = FORMATS | {SCALE_FORMAT.name: SCALE_FORMAT}


class Output:
    """An output in a buffer that is NaN (or 0xA5) all over before the kernel runs."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        gap: int = 0,
        shift: int = 0,
    ) -> None:
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        size = 2 * GUARD + rows * (cols + gap)
        fill = float("nan") if dtype.is_floating_point else 0xA5
        self.buffer = torch.full((size + 64,), fill, dtype=dtype, device=device)
        self.before = self.buffer.cpu()
        start = GUARD + shift
        stride = cols + gap
        view = self.buffer.as_strided((rows, cols), (stride, 1), start)
        self.tensor = view if len(shape) == 2 else view[0]
        self.written = torch.zeros(self.buffer.numel(), dtype=torch.bool)
        self.written.as_strided((rows, cols), (stride, 1), start).fill_(True)

    def outside(self, name: str) -> str:
        """What was written outside the tensor."""
        wrong = ~_same_bits(self.buffer.cpu(), self.before) & ~self.written
        return f"{name}: {int(wrong.sum())} elements outside it were written; " * bool(wrong.any())

    def differs(self, name: str, expected: Tensor) -> str:
        """What differs from ``expected``, or was written outside the tensor."""
        found = self.tensor.cpu()
        assert found.shape == expected.shape
        wrong = ~_same_bits(found.contiguous(), expected)
        if wrong.any():
            at = int(wrong.flatten().nonzero()[0])
            got, want = found.flatten()[at].item(), expected.flatten()[at].item()
            share = f"{int(wrong.sum())} of {wrong.numel()} differ"
            return f"{name}[{at}] is {got!r}, not {want!r} ({share}); "
        return self.outside(name)


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return a == b
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())


def shifted(x: Tensor, shift: int) -> Tensor:
    """The same values ``shift`` elements further into their storage."""
    buffer = x.new_empty(x.numel() + shift)
    buffer[shift:] = x.flatten()
    return buffer[shift:].view(x.shape)


@dataclass(frozen=True)
class Stored:
    """A random weight with every code in it, as kernels take it."""

    fmt: Format
    shape: tuple[int, int]
    block_size: int
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    nested: Tensor | None
    offset: Tensor | None

    def arguments(self, device: torch.device, shift: int = 0) -> tuple[object, ...]:
        """What the kernels' launchers take between the input and the slab."""
        fmt = self.fmt
        scale_codes = None
        if fmt.e8m0:
            scale_codes = e8m0_table(CPU)
        elif self.nested is not None:
            scale_codes = code_table(SCALE_FORMAT, CPU)
        parts = (self.scales, self.zeros, self.nested, self.offset, code_table(fmt, CPU))
        packed = shifted(self.packed.to(device), shift)
        moved = [part if part is None else part.to(device) for part in (*parts, scale_codes)]
        return (packed, *moved, fmt.bits, self.shape, self.block_size)

    def decode(self, slab: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """The slab by the reference."""
        out = torch.empty(slab[1] - slab[0], slab[3] - slab[2], dtype=dtype)
        parts = (self.packed, self.scales, self.zeros, self.nested, self.offset, self.fmt)
        return reference.dequantize(*parts, self.block_size, self.shape, slab, out)


def stored_weight(
    fmt: Format, rows: int, cols: int, block_size: int, nested: bool, sane: bool = False
) -> Stored:
    """``sane``: without codes and scales that are infinite, NaN or vary too much for a linear."""
    n = rows * cols
    size = block_size or cols or NESTED_BLOCK
    blocks = blocks_of(n, size)
    generator = torch.Generator().manual_seed(n + size)

    def random_bytes(count: int, most: int = 256) -> Tensor:
        return torch.randint(0, most, (count,), dtype=torch.uint8, generator=generator)

    packed = random_bytes(-(-n * fmt.bits // 8))
    packed[:256] = torch.arange(256, dtype=torch.uint8)[: packed.numel()]
    if sane and fmt.bits == 8:
        packed = torch.tensor(fmt.order, dtype=torch.uint8)[packed.long() % len(fmt.order)]
    zeros = random_bytes(blocks, 2**fmt.bits) if fmt.zero_points else None
    groups = None
    offset = None
    if fmt.e8m0:
        scales = random_bytes(blocks) if not sane else 120 + random_bytes(blocks, 5)
    elif nested:
        scales = random_bytes(blocks)
        groups = torch.rand(blocks_of(blocks, NESTED_BLOCK), generator=generator)
        offset = 1 + torch.rand((), generator=generator)
    else:
        scales = torch.rand(blocks, generator=generator)
        if not sane:
            scales[1::7], scales[2::7], scales[3::7] = 0.0, 1e30, 1e-40
            scales[4::7], scales[5::7] = float("nan"), float("inf")
    return Stored(fmt, (rows, cols), size, packed, scales, zeros, groups, offset)
