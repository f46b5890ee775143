"""What every implementation of the quantize kernels must do, bit for bit, by the reference.

An implementation is anything with the functions of ``Kernels``. A check returns what is wrong as
text, "" when nothing is.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyft.formats import (
    BLOCK_SIZES,
    NESTED_BLOCK,
    NF4,
    absmax_format,
    code_table,
    midpoint_table,
    nested_blocks,
)
from pyft.reference import quantize as reference

CPU = torch.device("cpu")
GUARD = 37  # elements around each output that must stay as they were
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONTENTS = ("normal", "zeros", "nan", "inf", "subnormal", "midpoints")


class Kernels(Protocol):
    """The functions of ``pyft.native`` and ``pyft.kernels.quantize``."""

    def quantize4(
        self,
        x: Tensor,
        midpoints: Tensor,
        zero_code: int,
        block_size: int,
        packed: Tensor,
        absmax: Tensor,
    ) -> None:
        """x [n] -> packed, absmax."""

    def quantize_absmax(
        self,
        x: Tensor,
        offset: Tensor,
        midpoints: Tensor,
        zero_code: int,
        codes: Tensor,
        absmax: Tensor,
    ) -> None:
        """x [n] - offset -> codes, absmax."""

    def dequantize4(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested: Tensor | None,
        offset: Tensor | None,
        codes: Tensor,
        absmax_codes: Tensor | None,
        rows: int,
        cols: int,
        block_size: int,
        row_begin: int,
        row_end: int,
        out: Tensor,
    ) -> None:
        """Rows [row_begin, row_end) -> out."""


@dataclass(frozen=True)
class Quantize:
    """n weights; ``shift`` elements put the tensors at addresses that wide accesses cannot use."""

    n: int
    block_size: int
    dtype: str = "fp32"
    content: str = "normal"
    shift: int = 0


@dataclass(frozen=True)
class QuantizeAbsmax:
    """n absmax values."""

    n: int
    content: str = "normal"


@dataclass(frozen=True)
class Dequantize:
    """Rows [begin, end) of a weight [rows, cols] into rows ``cols + gap`` apart, with shifts."""

    rows: int
    cols: int
    begin: int
    end: int
    gap: int = 0
    block_size: int = 64
    dtype: str = "bf16"
    nested: bool = True
    packed_shift: int = 0
    out_shift: int = 0


Case = Quantize | QuantizeAbsmax | Dequantize

_ALL: list[Case] = [
    *(Quantize(5 * 100, 64, dtype) for dtype in DTYPES),
    *(Quantize(9000, block, "bf16") for block in BLOCK_SIZES),
    *(Quantize(2 * block + 1, block) for block in BLOCK_SIZES),
    *(Quantize(n, 64, "fp16") for n in (1, 2, 7, 8, 9, 63, 64, 65, 3 * 4304, 31 * 96, 27 * 97)),
    *(Quantize(700, 128, dtype, what) for dtype in ("fp32", "bf16") for what in CONTENTS),
    *(Quantize(1111, 64, dtype, shift=1) for dtype in DTYPES),
    *(QuantizeAbsmax(n) for n in (1, 2, 255, 256, 257, 2500)),
    *(QuantizeAbsmax(600, what) for what in CONTENTS),
    *(Dequantize(11, 100, 2, 9, dtype=dtype, nested=n) for dtype in DTYPES for n in (False, True)),
    *(Dequantize(70, 64, 1, 70, gap=16, dtype=dtype) for dtype in DTYPES),
    *(Dequantize(5, cols, 1, 5, gap=8) for cols in (1, 8, 64, 96, 97, 100, 4304)),
    *(Dequantize(3, 777, 1, 3, gap=3, block_size=block, nested=False) for block in BLOCK_SIZES),
    *(Dequantize(9, 1024, 0, 9, block_size=block, dtype="fp16") for block in BLOCK_SIZES),
    *(Dequantize(12, 96, 3, 11, gap, packed_shift=1) for gap in (0, 8)),
    *(Dequantize(12, 96, 3, 11, gap, out_shift=1) for gap in (0, 8)),
    *(Dequantize(12, cols, 1, 12, gap=-cols % 8) for cols in (97, 98, 100, 513)),
    Dequantize(1, 1, 0, 1),
    Dequantize(13, 33, 7, 8),
    Dequantize(300, 513, 1, 300, block_size=128),
    Dequantize(6, 64, 4, 4),
]
CASES: dict[str, Case] = {
    "-".join([type(case).__name__.lower(), *map(str, vars(case).values())]): case for case in _ALL
}


def check(case: Case, kernels: Kernels, device: torch.device) -> str:
    """What is wrong with one case."""
    if isinstance(case, Quantize):
        return _check_quantize(case, kernels, device)
    if isinstance(case, QuantizeAbsmax):
        return _check_quantize_absmax(case, kernels, device)
    return _check_dequantize(case, kernels, device)


def check_large_offsets(kernels: Kernels, device: torch.device) -> str:
    """The last two rows of a weight of more than 2^31 elements, whose other memory is untouched."""
    cols, block_size = 4096, 4096
    rows = 2**31 // cols + 5
    packed = torch.empty(rows * cols // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(rows, device=device)
    generator = torch.Generator().manual_seed(3)
    tail = torch.randint(0, 256, (cols,), dtype=torch.uint8, generator=generator)
    scales = torch.rand(2, generator=generator)
    packed[-cols:], absmax[-2:] = tail.to(device), scales.to(device)
    out = _Output((2, cols), torch.float32, device)
    codes = code_table(NF4, CPU).to(device)
    sizes = (rows, cols, block_size, rows - 2, rows)
    kernels.dequantize4(packed, absmax, None, None, codes, None, *sizes, out.tensor)
    expected = torch.empty(2, cols)
    reference.dequantize(tail, scales, None, None, NF4, block_size, (0, 2), expected)
    return out.differs("out", expected)


class _Output:
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
        start = -(-GUARD // 16) * 16 + shift
        stride = cols + gap
        self.tensor = self.buffer.as_strided((rows, cols), (stride, 1), start).view(shape)
        self.written = torch.zeros(self.buffer.numel(), dtype=torch.bool)
        self.written.as_strided((rows, cols), (stride, 1), start).fill_(True)

    def differs(self, name: str, expected: Tensor) -> str:
        """What differs from ``expected``, or was written outside the tensor."""
        after = self.buffer.cpu()
        wrong = ~_same_bits(self.tensor.cpu().contiguous(), expected)
        if wrong.any():
            at = int(wrong.flatten().nonzero()[0])
            got = self.tensor.cpu().flatten()[at].item()
            want = expected.flatten()[at].item()
            share = f"{int(wrong.sum())} of {wrong.numel()} differ"
            return f"{name}[{at}] is {got!r}, not {want!r} ({share}); "
        outside = ~_same_bits(after, self.before) & ~self.written
        return (
            f"{name}: {int(outside.sum())} elements outside it were written; "
            if outside.any()
            else ""
        )


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return a == b
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())


def _values(n: int, content: str, block_size: int) -> Tensor:
    """fp32 [n]; whatever ``content`` names is in some blocks and not in others."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n + block_size))
    if content == "zeros":
        x[: n // 2] = 0.0
        x[: n // 4] *= -1.0
    elif content in ("nan", "inf"):
        x[n // 3] = float(content)
        x[n - 1] = -float(content)
    elif content == "subnormal":
        x[: n // 2] *= 1e-40
    elif content == "midpoints":
        ties = midpoint_table(NF4 if block_size != NESTED_BLOCK else absmax_format(), CPU)
        ties = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
        x = ties.repeat(-(-n // ties.numel()))[:n].clone()
        x[::block_size] = 1.0
    return x


def _shifted(x: Tensor, shift: int) -> Tensor:
    """The same values ``shift`` elements further into their storage."""
    buffer = x.new_empty(x.numel() + shift)
    buffer[shift:] = x.flatten()
    return buffer[shift:].view(x.shape)


def _check_quantize(case: Quantize, kernels: Kernels, device: torch.device) -> str:
    x = _values(case.n, case.content, case.block_size).to(DTYPES[case.dtype])
    packed = _Output(((case.n + 1) // 2,), torch.uint8, device, shift=case.shift)
    absmax = _Output((-(-case.n // case.block_size),), torch.float32, device, shift=case.shift)
    midpoints = midpoint_table(NF4, CPU).to(device)
    on_device = _shifted(x.to(device), case.shift)
    kernels.quantize4(
        on_device, midpoints, NF4.zero_code, case.block_size, packed.tensor, absmax.tensor
    )
    expected_packed, expected_absmax = reference.quantize(x, NF4, case.block_size)
    return packed.differs("packed", expected_packed) + absmax.differs("absmax", expected_absmax)


def _check_quantize_absmax(case: QuantizeAbsmax, kernels: Kernels, device: torch.device) -> str:
    fmt = absmax_format()
    x = _values(case.n, case.content, NESTED_BLOCK)
    if case.content == "zeros":
        x[:] = x[0]
    _, _, offset = reference.quantize_absmax(x)
    if case.content in ("nan", "inf"):
        offset = torch.tensor(0.5)
    codes = _Output((case.n,), torch.uint8, device)
    absmax = _Output((nested_blocks(case.n),), torch.float32, device)
    midpoints = midpoint_table(fmt, CPU).to(device)
    kernels.quantize_absmax(
        x.to(device), offset.to(device), midpoints, fmt.zero_code, codes.tensor, absmax.tensor
    )
    expected, expected_absmax = reference.quantize_blocks(x - offset, fmt, NESTED_BLOCK)
    return codes.differs("codes", expected[: case.n]) + absmax.differs("absmax", expected_absmax)


def _check_dequantize(case: Dequantize, kernels: Kernels, device: torch.device) -> str:
    n = case.rows * case.cols
    blocks = -(-n // case.block_size)
    generator = torch.Generator().manual_seed(n + case.block_size)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    packed[:256] = torch.arange(256, dtype=torch.uint8)[: packed.numel()]
    nested = offset = None
    if case.nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        nested = torch.rand(nested_blocks(blocks), generator=generator)
        offset = torch.rand((), generator=generator)
    else:
        absmax = torch.rand(blocks, generator=generator)
        absmax[1::7], absmax[2::7], absmax[3::7] = 0.0, 1e30, 1e-40
        absmax[4::7] = float("nan")
    dtype = DTYPES[case.dtype]
    shape = (case.end - case.begin, case.cols)
    out = _Output(shape, dtype, device, case.gap, case.out_shift)
    codes, absmax_codes = (code_table(fmt, CPU).to(device) for fmt in (NF4, absmax_format()))
    kernels.dequantize4(
        _shifted(packed.to(device), case.packed_shift),
        absmax.to(device),
        None if nested is None else nested.to(device),
        None if offset is None else offset.to(device),
        codes,
        absmax_codes if case.nested else None,
        case.rows,
        case.cols,
        case.block_size,
        case.begin,
        case.end,
        out.tensor,
    )
    expected = torch.empty(shape, dtype=dtype)
    rows = (case.begin, case.end)
    reference.dequantize(packed, absmax, nested, offset, NF4, case.block_size, rows, expected)
    return out.differs("out", expected)
