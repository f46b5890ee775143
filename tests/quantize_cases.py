"""What every implementation of the quantize kernels must do, bit for bit, by the reference.

An implementation is anything with the functions of ``Kernels``. A check returns what is wrong as
text, "" when nothing is.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from shapes import WEIGHT_SHAPES
from stored_weights import ALL_FORMATS, CPU, DTYPES, Output, shifted, stored_weight
from torch import Tensor

from pyft.formats import (
    BLOCK_SIZES,
    MXFP4,
    NF4,
    ROW,
    Format,
    blocks_of,
    code_table,
    order_table,
    threshold_table,
)
from pyft.reference import quantize as reference

CONTENTS = ("normal", "zeros", "nan", "inf", "subnormal", "thresholds")


class Kernels(Protocol):
    """The functions of ``pyft.native`` and ``pyft.kernels.quantize``."""

    def quantize(
        self,
        x: Tensor,
        thresholds: Tensor,
        order: Tensor,
        zero_code: int,
        top: float,
        e8m0: bool,
        bits: int,
        block_size: int,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
    ) -> None:
        """x [n] -> packed, scales, zeros."""

    def dequantize(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        nested: Tensor | None,
        offset: Tensor | None,
        codes: Tensor,
        scale_codes: Tensor | None,
        bits: int,
        shape: tuple[int, int],
        block_size: int,
        slab: tuple[int, int, int, int],
        out: Tensor,
    ) -> None:
        """Rows slab[0] to slab[1], columns slab[2] to slab[3] -> out."""


@dataclass(frozen=True)
class Quantize:
    """A weight of rows x cols; block_size 0 is a row; ``shift`` elements put the tensors at
    addresses that wide accesses cannot use.
    """

    format: str
    rows: int
    cols: int
    block_size: int
    dtype: str = "fp32"
    content: str = "normal"
    shift: int = 0


@dataclass(frozen=True)
class Dequantize:
    """A slab of a weight of rows x cols into rows ``gap`` further apart than they need be."""

    format: str
    rows: int
    cols: int
    slab: tuple[int, int, int, int] | None = None  # None: all of it
    block_size: int = 64
    dtype: str = "bf16"
    gap: int = 0
    nested: bool = False
    packed_shift: int = 0
    out_shift: int = 0


Case = Quantize | Dequantize


def _sizes(fmt: Format, cols: int) -> tuple[int, ...]:
    """Two block sizes of a format: a flat one, and rows where they have whole bytes."""
    flat = fmt.block_size or 64
    return (flat, ROW) if cols and cols * fmt.bits % 8 == 0 and not fmt.e8m0 else (flat,)


def _quantize_cases() -> list[Case]:
    cases: list[Case] = []
    for name, fmt in ALL_FORMATS.items():
        for i, (rows, cols) in enumerate(WEIGHT_SHAPES):
            dtype = list(DTYPES)[i % 3]
            cases += [Quantize(name, rows, cols, size, dtype) for size in _sizes(fmt, cols)]
        cases += [Quantize(name, 5, 100, _sizes(fmt, 100)[-1], dtype) for dtype in DTYPES]
        cases += [
            Quantize(name, 2, 384, size, dtype, content)
            for dtype, size in zip(("fp32", "bf16"), (fmt.block_size or 64, 32), strict=True)
            for content in CONTENTS
        ]
        cases += [Quantize(name, 3, 102, size, "bf16", shift=1) for size in _sizes(fmt, 102)]
        if not fmt.e8m0:
            cases += [Quantize(name, 3, cols, ROW, "bf16") for cols in (2, 256, 4096, 10000)]
            cases += [Quantize(name, 2, 258, ROW, content=content) for content in CONTENTS]
    for name in ("nf4", "int4_zp", "int8"):
        cases += [Quantize(name, 1, 2 * size + 1, size, "fp16") for size in BLOCK_SIZES]
        cases += [Quantize(name, 1, n, 64) for n in (1, 2, 7, 8, 9, 63, 64, 65, 27 * 97)]
    return cases


def _dequantize_cases() -> list[Case]:
    cases: list[Case] = []
    for name, fmt in ALL_FORMATS.items():
        both = (False,) if fmt.e8m0 else (False, True)
        for i, (rows, cols) in enumerate(WEIGHT_SHAPES):
            dtype = list(DTYPES)[i % 3]
            for size in _sizes(fmt, cols):
                nested = both[i % len(both)]
                cases.append(Dequantize(name, rows, cols, None, size, dtype, nested=nested))
        cases += [
            Dequantize(name, 11, 200, (2, 9, 0, 200), size, dtype, 8, nested)
            for size in _sizes(fmt, 200)
            for dtype in DTYPES
            for nested in both
        ]
        cases += [
            Dequantize(name, 6, 1100, (1, 5, *columns), size, "bf16", gap)
            for size in _sizes(fmt, 1100)
            for columns, gap in (((32, 640), 16), ((7, 531), 3), ((1024, 1100), 0))
        ]
    for name in ("nf4", "int4_zp", "int8"):
        for size in BLOCK_SIZES:
            cases.append(Dequantize(name, 3, 777, (1, 3, 0, 777), size, gap=3))
            cases.append(Dequantize(name, 9, 1024, None, size, "fp16", nested=True))
        cases += [Dequantize(name, 12, 96, (3, 11, 0, 96), gap=g, packed_shift=1) for g in (0, 8)]
        cases += [Dequantize(name, 12, 96, (3, 11, 0, 96), gap=g, out_shift=1) for g in (0, 8)]
        cases += [Dequantize(name, 12, c, (1, 12, 0, c), gap=-c % 8) for c in (97, 98, 100, 513)]
        cases += [Dequantize(name, 70, 64, (1, 70, 0, 64), gap=16, dtype=dtype) for dtype in DTYPES]
        cases.append(Dequantize(name, 13, 33, (7, 8, 4, 5)))
        cases.append(Dequantize(name, 6, 64, (4, 4, 0, 64)))
        cases.append(Dequantize(name, 6, 64, (1, 4, 9, 9)))
    return cases


CASES: dict[str, Case] = {
    "-".join([type(case).__name__.lower(), *map(str, vars(case).values())]): case
    for case in _quantize_cases() + _dequantize_cases()
}


def check(case: Case, kernels: Kernels, device: torch.device) -> str:
    """What is wrong with one case."""
    if isinstance(case, Quantize):
        return _check_quantize(case, kernels, device)
    return _check_dequantize(case, kernels, device)


def check_large_offsets(kernels: Kernels, device: torch.device) -> str:
    """The last two rows of a weight of more than 2^31 elements, whose other memory is untouched."""
    cols, block_size = 4096, 4096
    rows = 2**31 // cols + 5
    packed = torch.empty(rows * cols // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, device=device)
    generator = torch.Generator().manual_seed(3)
    tail = torch.randint(0, 256, (cols,), dtype=torch.uint8, generator=generator)
    last = torch.rand(2, generator=generator)
    packed[-cols:], scales[-2:] = tail.to(device), last.to(device)
    out = Output((2, cols), torch.float32, device)
    codes = code_table(NF4, CPU).to(device)
    slab, small = (rows - 2, rows, 0, cols), (0, 2, 0, cols)
    kernels.dequantize(
        packed, scales, None, None, None, codes, None, 4, (rows, cols), block_size, slab, out.tensor
    )
    expected = torch.empty(2, cols)
    reference.dequantize(tail, last, None, None, None, NF4, block_size, (2, cols), small, expected)
    return out.differs("out", expected)


def _values(case: Quantize, fmt: Format) -> Tensor:
    """fp32 [rows, cols]; whatever ``content`` names is in some blocks and not in others."""
    n = case.rows * case.cols
    x = torch.randn(n, generator=torch.Generator().manual_seed(n + case.block_size))
    if case.content == "zeros":
        x[: n // 2] = 0.0
        x[: n // 4] *= -1.0
    elif case.content in ("nan", "inf"):
        x[n // 3] = float(case.content)
        x[n - 1] = -float(case.content)
    elif case.content == "subnormal":
        x[: n // 2] *= 1e-40
        x[: n // 4] = -x[: n // 4].abs() * 1e-4  # a few of the smallest fp32 number
    elif case.content == "thresholds":
        ties = threshold_table(fmt, CPU)
        ties = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
        x = ties[ties.isfinite()].repeat(n)[:n].clone()
        block = case.block_size or case.cols
        x[::block] = fmt.top  # then the scale is 1
        if fmt.zero_points:  # or the zero point 7
            x -= 7
            x[1::block] = -7
    return x.view(case.rows, case.cols)


def _check_quantize(case: Quantize, kernels: Kernels, device: torch.device) -> str:
    fmt = ALL_FORMATS[case.format]
    x = _values(case, fmt).to(DTYPES[case.dtype])
    size = case.block_size or case.cols
    blocks = blocks_of(x.numel(), size)
    shift = case.shift
    packed = Output((-(-x.numel() * fmt.bits // 8),), torch.uint8, device, shift=shift)
    scale_type = torch.uint8 if fmt.e8m0 else torch.float32
    scales = Output((blocks,), scale_type, device, shift=shift)
    zeros = Output((blocks,), torch.uint8, device, shift=shift) if fmt.zero_points else None
    tables = (threshold_table(fmt, CPU).to(device), order_table(fmt, CPU).to(device))
    coding = (*tables, fmt.zero_code, fmt.top, fmt.e8m0, fmt.bits, size)
    outputs = (packed.tensor, scales.tensor, zeros and zeros.tensor)
    kernels.quantize(shifted(x.to(device), shift).flatten(), *coding, *outputs)
    expected = reference.quantize(x, fmt, size)
    wrong = packed.differs("packed", expected[0]) + scales.differs("scales", expected[1])
    if zeros is None or expected[2] is None:
        assert zeros is None
        assert expected[2] is None
        return wrong
    return wrong + zeros.differs("zeros", expected[2])


def _check_dequantize(case: Dequantize, kernels: Kernels, device: torch.device) -> str:
    fmt = ALL_FORMATS[case.format]
    block_size = MXFP4.block_size if fmt.e8m0 else case.block_size
    weight = stored_weight(fmt, case.rows, case.cols, block_size, case.nested)
    slab = case.slab or (0, case.rows, 0, case.cols)
    expected = weight.decode(slab, DTYPES[case.dtype])
    out = Output(tuple(expected.shape), expected.dtype, device, case.gap, case.out_shift)
    kernels.dequantize(*weight.arguments(device, case.packed_shift), slab, out.tensor)
    return out.differs("out", expected)
