"""Decoding: every byte under every kind of scale, slabs, wider outputs, large outputs."""

from functools import cache

import format_oracle as oracle
import numpy as np
import pytest
import torch
from format_oracle import Stored
from quantize_truth import RUNS, rounded, running, same
from shapes import QUANTIZED_DTYPES, dtype_name
from torch import Tensor

import pyft
from pyft.formats import FORMATS, NESTED_BLOCK
from pyft.ops.quantize import decode_tables, dequantize_slab
from pyft.quantized import QuantizedTensor

NAME = pytest.mark.parametrize("name", FORMATS)
RUN = pytest.mark.parametrize("run", RUNS)
DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
CPU = torch.device("cpu")

Decoded = tuple[QuantizedTensor, list[Tensor]]


def decoded_case(name: str, size: int, stored: Stored) -> Decoded:
    """A weight of rows of one block with these parts, and what it decodes to in each dtype."""
    n = stored.packed.size * 8 // FORMATS[name].bits
    shape = (n // size, size)
    values = oracle.dequantize(name, stored, n, size)
    parts = [torch.from_numpy(part) for part in stored.parts()]
    q = QuantizedTensor(parts, name, size, shape, torch.float32)
    return q, [rounded(values, dtype).view(shape) for dtype in QUANTIZED_DTYPES]


def every_byte(name: str, blocks: int) -> tuple[np.ndarray, int]:
    """``blocks`` blocks that each hold all 256 bytes, and their size."""
    packed = np.tile(np.arange(256, dtype=np.uint8), blocks)
    return packed, 256 * 8 // FORMATS[name].bits


@cache
def all_exponents(name: str) -> Decoded:
    """fp32 scales of each of 256 exponents, both signs, several mantissas; e8m0: all 256 bytes."""
    fmt = FORMATS[name]
    if fmt.e8m0:
        packed = np.repeat(np.arange(256, dtype=np.uint8), 16)
        scales = np.tile(np.arange(256, dtype=np.uint8), 16)
        packed = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 256))
        return decoded_case(name, 32, Stored(packed.reshape(-1), scales))
    exponents = torch.arange(256, dtype=torch.int32) << 23
    mantissas = torch.cat([torch.tensor([0, 1, 0x7FFFFF]), torch.randint(0, 2**23, (2,))]).int()
    positive = (exponents[:, None] | mantissas).flatten()
    scales = torch.cat([positive, positive | -(2**31)]).view(torch.float32).numpy()
    packed, size = every_byte(name, len(scales))
    zeros = np.resize(np.arange(16, dtype=np.uint8), scales.shape) if fmt.zero_points else None
    return decoded_case(name, size, Stored(packed, scales, zeros))


@cache
def all_nested(name: str) -> Decoded:
    """All 256 bytes as nested scales, under nested scales and offsets of several sizes."""
    fmt = FORMATS[name]
    scales = np.tile(np.arange(256, dtype=np.uint8), 6)
    nested = np.array([0.0, 1e-3, 0.7, 3e38, np.inf, np.nan], dtype=np.float32)
    packed, size = every_byte(name, len(scales))
    zeros = np.resize(np.arange(16, dtype=np.uint8), scales.shape) if fmt.zero_points else None
    return decoded_case(name, size, Stored(packed, scales, zeros, nested, np.float32(0.321)))


@NAME
@RUN
def test_every_byte_under_every_scale(run: str, name: str) -> None:
    cases = [all_exponents(name)] if FORMATS[name].e8m0 else [all_exponents(name), all_nested(name)]
    with running(run):
        for q, decoded in cases:
            for expected in decoded:
                assert same(pyft.dequantize(q, dtype=expected.dtype), expected)


@cache
def every_upper_half() -> Decoded:
    """All 16 codes under scales of all 65536 upper halves with random lower halves."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    scales = (upper | torch.randint(0, 2**16, upper.shape, dtype=torch.int32)).view(torch.float32)
    codes = np.array([2 * i << 4 | 2 * i + 1 for i in range(8)] * 2, dtype=np.uint8)
    return decoded_case("nf4", 32, Stored(np.tile(codes, scales.numel()), scales.numpy()))


@RUN
def test_decode_rounds_once_under_scales_of_all_upper_halves(run: str) -> None:
    q, decoded = every_upper_half()
    with running(run):
        for expected in decoded:
            assert same(pyft.dequantize(q, dtype=expected.dtype), expected)


@DTYPE
@NAME
@RUN
def test_out_in_a_wider_scratch(run: str, name: str, dtype: torch.dtype) -> None:
    """The tail of each row, and the rows around, keep what they held."""
    for rows, cols in ((5, 64), (3, 97), (4, 100), (1, 33), (6, 1)):
        q = pyft.quantize(torch.randn(rows, cols), name, FORMATS[name].block_sizes[0])
        for gap in (1, 16):
            scratch = torch.full((rows + 2, cols + gap), 7.0, dtype=dtype)
            out = scratch[1:-1, :cols]
            with running(run):
                assert pyft.dequantize(q, out=out) is out
                assert same(out, pyft.dequantize(q, dtype=dtype))
            scratch[1:-1, :cols] = 7.0
            assert (scratch == 7.0).all()


def decode_slab(q: QuantizedTensor, slab: tuple[int, int, int, int], out: Tensor) -> None:
    shape = (q.shape[0], q.shape[1])
    dequantize_slab(q.parts(), q.format, q.block_size, shape, slab, out)


@NAME
@RUN
def test_slabs_of_rows_and_columns(run: str, name: str) -> None:
    """They start and end anywhere: in the middle of a byte, of a block, of a vector."""
    for rows, cols, double_quant in ((9, 97, False), (70, 4, True), (6, 100, True), (3, 642, True)):
        nest = double_quant and not FORMATS[name].e8m0
        q = pyft.quantize(torch.randn(rows, cols), name, 32, nest)
        whole = pyft.dequantize(q)
        columns = [(0, cols), (1, cols), (0, cols - 1), (cols // 3, cols // 2), (cols - 1, cols)]
        for begin in range(0, rows, 1 + rows // 4):
            for end in {begin, begin + 1, rows}:
                for left, right in columns:
                    wide = torch.full((end - begin, right - left + 3), 5.0)
                    out = wide[:, : right - left]
                    with running(run):
                        decode_slab(q, (begin, end, left, right), out)
                    assert same(out, whole[begin:end, left:right])
                    assert (wide[:, right - left :] == 5.0).all()


@NAME
def test_slabs_of_whole_rows_where_rows_are_blocks(name: str) -> None:
    if FORMATS[name].e8m0:
        return
    q = pyft.quantize(torch.randn(7, 90), name, "row")
    whole = pyft.dequantize(q)
    for run in RUNS:
        with running(run):
            for slab in ((2, 5, 0, 90), (0, 7, 13, 77), (6, 7, 89, 90)):
                out = torch.empty(slab[1] - slab[0], slab[3] - slab[2])
                decode_slab(q, slab, out)
                assert same(out, whole[slab[0] : slab[1], slab[2] : slab[3]])


@cache
def large_weight(name: str) -> tuple[QuantizedTensor, dict[torch.dtype, Tensor]]:
    """A weight of 32 MiB in bf16 and a little more, and what the scalar code decodes it to."""
    rows, cols = 4097, 4104
    q = pyft.quantize(torch.randn(rows, cols).bfloat16(), name)
    with running("scalar"):
        return q, {dtype: pyft.dequantize(q, dtype=dtype) for dtype in QUANTIZED_DTYPES}


@DTYPE
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("run", [run for run in RUNS if run not in ("reference", "scalar")])
@pytest.mark.unfilled
def test_outputs_no_cache_holds(run: str, name: str, dtype: torch.dtype) -> None:
    """Whole, from an odd address, and row by row into a wider scratch whose tail is kept."""
    q, decoded = large_weight(name)
    expected = decoded[dtype]
    rows, cols = expected.shape
    with running(run):
        assert torch.equal(pyft.dequantize(q, dtype=dtype), expected)
        buffer = torch.zeros(expected.numel() + 80, dtype=dtype)
        for shift in (0, 1):
            out = buffer[32 + shift :][: expected.numel()].view(rows, cols)
            pyft.dequantize(q, out=out)
            assert torch.equal(out, expected)
            out.zero_()
        assert not buffer.any()
        wide = torch.zeros(rows, cols + 24, dtype=dtype)
        pyft.dequantize(q, out=wide[:, :cols])
        assert torch.equal(wide[:, :cols], expected)
        assert not wide[:, cols:].any()


@pytest.mark.parametrize("name", ["nf4", "int4_zp", "int8", "mxfp4"])
@pytest.mark.unfilled
def test_large_outputs_are_the_references(name: str) -> None:
    """On two threads; a few rows of it by the reference."""
    torch.set_num_threads(2)
    q = pyft.quantize(torch.randn(4200, 4096).bfloat16(), name)
    whole = pyft.dequantize(q)
    with running("reference"):
        for begin in (0, 2049, 4197):
            out = torch.empty(3, 4096, dtype=q.dtype)
            part = parts_of_rows(q, begin, begin + 3)
            decode_slab(part, (0, 3, 0, 4096), out)
            assert same(out, whole[begin : begin + 3])


def parts_of_rows(q: QuantizedTensor, begin: int, end: int) -> QuantizedTensor:
    """Some rows of a weight as one of their own; scales are made plain."""
    fmt, cols = q.format, q.shape[1]
    first, last = begin * cols, end * cols
    scales = q.scales
    if q.nested is not None and q.offset is not None:
        table = decode_tables(fmt, True, CPU)[1]
        assert table is not None
        spread = q.nested.repeat_interleave(NESTED_BLOCK)[: scales.numel()]
        scales = table[scales.long()] * spread + q.offset
    blocks = slice(first // q.block_size, last // q.block_size)
    parts = [q.packed[first * fmt.bits // 8 : last * fmt.bits // 8], scales[blocks]]
    if q.zeros is not None:
        parts.append(q.zeros[blocks])
    return QuantizedTensor(parts, fmt.name, q.block_size, (end - begin, cols), q.dtype)


COLS = 4096
ROWS = 2**31 // COLS + 5


def untouched(numel: int, kind: type[np.generic]) -> Tensor:
    """Zeros that take no memory until they are written to."""
    return torch.from_numpy(np.zeros(numel, dtype=kind))


@pytest.mark.unfilled
def test_quantize_more_than_two_to_the_31_elements() -> None:
    w = untouched(ROWS * COLS, np.int16).view(torch.bfloat16).view(ROWS, COLS)
    w[-2:] = torch.randn(2, COLS)
    torch.set_num_threads(2)
    q = pyft.quantize(w, "nf4", 4096, double_quant=False)
    tail = pyft.quantize(w[-2:], "nf4", 4096, double_quant=False)
    assert torch.equal(q.packed[-COLS:], tail.packed)
    assert torch.equal(q.scales[-2:], tail.scales)
    assert q.scales.count_nonzero() == 2
    assert (q.packed[-COLS - 64 : -COLS] == 0x77).all()


@pytest.mark.unfilled
def test_linear_over_more_than_two_to_the_31_elements() -> None:
    packed, scales = untouched(ROWS * COLS, np.uint8), torch.zeros(ROWS)
    packed[-COLS:] = torch.randint(0, 256, (COLS,), dtype=torch.uint8)
    scales[-1] = 0.01
    q = QuantizedTensor([packed, scales], "int8", COLS, (ROWS, COLS), torch.float32)
    x = torch.randn(1, COLS)
    last = torch.empty(1, 100)
    decode_slab(q, (ROWS - 1, ROWS, COLS - 100, COLS), last)
    codes = torch.tensor(FORMATS["int8"].codes)[packed[-COLS:].long()] * 0.01
    assert torch.equal(last[0], codes[-100:])
    torch.set_num_threads(2)
    y = torch.nn.functional.linear(x, q)
    torch.testing.assert_close(y[0, -1], x[0] @ codes, rtol=1e-5, atol=1e-5)
    assert y.count_nonzero() == 1
