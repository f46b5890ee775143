"""Quantize and dequantize: every backend of this CPU against an oracle, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import nf4_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nf4_oracle import Stored
from quantize_cases import CASES, CPU, check, check_large_offsets
from shapes import QUANTIZED_DTYPES, WEIGHT_SHAPES, dtype_name
from torch import Tensor

import pyft
from pyft import native
from pyft.errors import UsageError
from pyft.formats import BLOCK_SIZES, NF4, absmax_format, midpoint_table
from pyft.ops.quantize import dequantize_rows
from pyft.quantized import QuantizedTensor

BEST = native._cpu().best_isa()
ISAS = [name for name, level in native.ISAS.items() if level <= BEST]
RUNS = ["reference", *ISAS]


@contextmanager
def running(name: str) -> Iterator[None]:
    """On the reference, or in C++ with this instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        if name != "reference":
            patch.setenv("PYFT_CPU_ISA", name)
        with pyft.backend("reference" if name == "reference" else "cpu"):
            yield


def bits(x: Tensor) -> Tensor:
    """The bits of x as integers, every NaN the same."""
    if not x.is_floating_point():
        return x
    x = torch.where(x.isnan(), torch.full((), float("nan"), dtype=x.dtype), x).contiguous()
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def stored_like(q: QuantizedTensor, expected: Stored) -> bool:
    found = [*q.parts()]
    parts = (expected.packed, expected.absmax, expected.nested, expected.offset)
    wanted = [torch.from_numpy(np.asarray(part)) for part in parts if part is not None]
    return len(found) == len(wanted) and all(map(same, found, wanted))


def rounded(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """fp32 rounded once, without torch."""
    with np.errstate(all="ignore"):
        if dtype == torch.float16:
            return torch.from_numpy(x.astype(np.float16))
    if dtype == torch.bfloat16:
        return torch.from_numpy(oracle.to_bf16(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


class Case:
    """A weight, what must be stored for it, and what that decodes to: for all backends."""

    def __init__(self, w: Tensor, block_size: int, double_quant: bool) -> None:
        self.w, self.block_size, self.double_quant = w, block_size, double_quant
        self.stored = oracle.quantize(w.float().flatten().numpy(), block_size, double_quant)
        values = oracle.dequantize(self.stored, w.numel(), block_size)
        self.decoded = [rounded(values, dtype).view(w.shape) for dtype in QUANTIZED_DTYPES]

    def check(self) -> None:
        w, block_size = self.w, self.block_size
        q = pyft.quantize(w, block_size=block_size, double_quant=self.double_quant)
        assert stored_like(q, self.stored)
        assert (q.shape, q.dtype, q.block_size, q.format) == (w.shape, w.dtype, block_size, NF4)
        for expected in self.decoded:
            assert same(pyft.dequantize(q, dtype=expected.dtype), expected)


def weight(shape: tuple[int, ...], content: str) -> Tensor:
    """fp32; half of the rows hold what ``content`` names, the others normal values."""
    x = torch.randn(shape)
    special = {
        "normal": x,
        "zeros": torch.zeros_like(x),
        "negative zeros": -torch.zeros_like(x),
        "nan": torch.where(torch.rand_like(x) < 0.02, torch.nan, x),
        "inf": torch.where(torch.rand_like(x) < 0.02, x.sign() * torch.inf, x),
        "subnormal": x * 1e-40,
        "smallest": torch.randint(-2, 3, shape).float() * 2.0**-149,
        "huge": x.clamp(-1, 1) * 3.4e38,
        "constant": torch.full_like(x, -0.3),
        "one per row": (torch.arange(x.numel()) % 97 == 5).float().view(shape),
    }[content].clone()  # fmt: skip
    special[1::2] = x[1::2]
    return special


CONTENTS = (
    "normal", "zeros", "negative zeros", "nan", "inf", "subnormal", "smallest", "huge", "constant",
    "one per row",
)  # fmt: skip


@cache
def content_cases(content: str) -> list[Case]:
    cases = [Case(weight(shape, content), 64, double_quant=False) for shape in WEIGHT_SHAPES]
    for dtype in QUANTIZED_DTYPES:
        cases += [Case(weight(shape, content).to(dtype), 64, True) for shape in WEIGHT_SHAPES]
    return cases


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", RUNS)
def test_bits_are_the_oracles(name: str, content: str) -> None:
    with running(name):
        for case in content_cases(content):
            case.check()


@cache
def block_cases(block_size: int) -> list[Case]:
    shapes = ((2, 4304), (3, block_size), (1, block_size + 1), (5, 100))
    return [Case(torch.randn(s).half(), block_size, dq) for s in shapes for dq in (False, True)]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", RUNS)
def test_every_block_size(name: str, block_size: int) -> None:
    with running(name):
        for case in block_cases(block_size):
            case.check()


@pytest.mark.parametrize("name", RUNS)
def test_many_nested_blocks(name: str) -> None:
    """More than 256 absmax values, of very different sizes: all of the dynamic map is used."""
    w = torch.randn(700, 64) * torch.logspace(-6, 1, 700)[torch.randperm(700), None]
    case = Case(w, 64, double_quant=True)
    assert np.unique(case.stored.absmax).size > 60
    with running(name):
        case.check()


@cache
def pattern_cases(dtype: torch.dtype) -> list[Case]:
    """All 65536 patterns in order and in a random order, and the finite ones alone."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    mixed = [part[torch.randperm(part.numel())] for part in (patterns, finite)]
    return [Case(w, 64, double_quant=False) for w in (patterns, *mixed)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", RUNS)
def test_every_sixteen_bit_input(name: str, dtype: torch.dtype) -> None:
    with running(name):
        for case in pattern_cases(dtype):
            case.check()


Decode = tuple[QuantizedTensor, list[Tensor]]


def decode_case(packed: Tensor, absmax: Tensor) -> Decode:
    """A weight with these codes and absmax, and what it decodes to in each dtype."""
    shape = (absmax.numel(), 2 * packed.numel() // absmax.numel())
    stored = Stored(packed.numpy(), absmax.numpy())
    values = oracle.dequantize(stored, 2 * packed.numel(), shape[1])
    q = QuantizedTensor(packed, absmax, None, None, "nf4", shape[1], shape, torch.float32)
    return q, [rounded(values, dtype).view(shape) for dtype in QUANTIZED_DTYPES]


@cache
def every_byte() -> Decode:
    """All bytes under absmax of each of 256 exponents, both signs, several mantissas."""
    exponents = torch.arange(256, dtype=torch.int32) << 23
    mantissas = torch.cat([torch.tensor([0, 1, 0x7FFFFF]), torch.randint(0, 2**23, (2,))]).int()
    positive = (exponents[:, None] | mantissas).flatten()
    absmax = torch.cat([positive, positive | -(2**31)]).view(torch.float32)
    return decode_case(torch.arange(256, dtype=torch.uint8).repeat(absmax.numel()), absmax)


@cache
def every_upper_half() -> Decode:
    """All 16 codes under absmax of all 65536 upper halves with random lower halves."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    absmax = (upper | torch.randint(0, 2**16, upper.shape, dtype=torch.int32)).view(torch.float32)
    codes = torch.tensor([2 * i << 4 | 2 * i + 1 for i in range(8)] * 2, dtype=torch.uint8)
    return decode_case(codes.repeat(absmax.numel()), absmax)


@pytest.mark.parametrize("case", [every_byte, every_upper_half], ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", RUNS)
def test_decode_rounds_once_at_every_exponent(name: str, case: Callable[[], Decode]) -> None:
    q, decoded = case()
    with running(name):
        for expected in decoded:
            assert same(pyft.dequantize(q, dtype=expected.dtype), expected)


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**90])
@pytest.mark.parametrize("name", RUNS)
def test_thresholds_of_the_codes(name: str, scale: float) -> None:
    """A midpoint takes the code below it, its upper neighbour the one above."""
    middle = midpoint_table(NF4, CPU)
    below = torch.nextafter(middle, torch.tensor(-2.0))
    above = torch.nextafter(middle, torch.tensor(2.0))
    codes = torch.arange(15)
    w = torch.cat([torch.tensor([1.0]), middle, below, above]) * scale  # 46 of a block of 64
    w = torch.nn.functional.pad(w, (0, 18))
    expected = torch.cat([torch.tensor([15]), codes, codes, codes + 1, torch.full((18,), 7)])
    with running(name):
        packed = pyft.quantize(w, double_quant=False).packed
        found = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
        assert found.tolist() == expected.tolist()
        tail = pyft.quantize(w[:46], double_quant=False).packed
        assert torch.equal(tail, packed[:23])


def test_thresholds_of_the_absmax_codes() -> None:
    middle = midpoint_table(absmax_format(), CPU)
    neighbours = [torch.nextafter(middle, torch.full((), end)) for end in (-2.0, 2.0)]
    zero = torch.zeros(())
    for values, code in ((middle, 0), (neighbours[0], 0), (neighbours[1], 1)):
        x = torch.cat([values, torch.ones(1)])
        codes, absmax = torch.empty(256, dtype=torch.uint8), torch.empty(1)
        native.quantize_absmax(x, zero, middle, absmax_format().zero_code, codes, absmax)
        assert codes[:255].tolist() == [i + code for i in range(255)]
        assert codes[255] == 255
        assert absmax.tolist() == [1.0]


@pytest.mark.parametrize("name", ISAS)
def test_shared_cases(name: str) -> None:
    """The cases the Triton and CUDA kernels are held to, guards around the outputs included."""
    with running(name):
        wrong = {case: text for case in CASES if (text := check(CASES[case], native, CPU))}
    assert wrong == {}


@pytest.mark.unfilled
def test_more_than_two_to_the_31_elements() -> None:
    assert check_large_offsets(native, CPU) == ""


@pytest.mark.parametrize("name", RUNS)
def test_zero_blocks_store_code_seven_and_absmax_zero(name: str) -> None:
    with running(name):
        q = pyft.quantize(torch.tensor([0.0, -0.0]).repeat(80), double_quant=False)
    assert q.packed.tolist() == [0x77] * 80
    assert q.absmax.view(torch.int32).tolist() == [0, 0, 0]
    assert same(q.dequantize(), torch.zeros(160))


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", RUNS)
def test_out_in_a_wider_scratch(name: str, dtype: torch.dtype) -> None:
    """The tail of each row, and the rows around, keep what they held."""
    for rows, cols in ((5, 64), (3, 97), (4, 100), (1, 33), (6, 1)):
        q = pyft.quantize(torch.randn(rows, cols))
        for gap in (1, 16):
            scratch = torch.full((rows + 2, cols + gap), 7.0, dtype=dtype)
            out = scratch[1:-1, :cols]
            with running(name):
                assert pyft.dequantize(q, out=out) is out
                assert same(out, pyft.dequantize(q, dtype=dtype))
            scratch[1:-1, :cols] = 7.0
            assert (scratch == 7.0).all()


@pytest.mark.parametrize("name", RUNS)
def test_slabs_of_rows(name: str) -> None:
    """Rows that start anywhere, in the middle of a byte and of a block too."""
    for rows, cols in ((9, 97), (70, 3), (6, 100), (5, 256)):
        q = pyft.quantize(torch.randn(rows, cols))
        whole = pyft.dequantize(q)
        for begin in range(0, rows, 2):
            for end in {begin, begin + 1, rows}:
                out = torch.empty(end - begin, cols)
                with running(name):
                    dequantize_rows(q.parts(), NF4, 64, (begin, end), rows, out)
                assert same(out, whole[begin:end])


@pytest.mark.parametrize("name", RUNS)
def test_any_strides_and_dimensions(name: str) -> None:
    base = torch.randn(32, 48)
    views = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(5, 48),
        "flat": base[3],
        "scalar": base[0, 0],
        "experts": base.view(4, 8, 48).transpose(0, 1),
    }
    with running(name):
        for view in views.values():
            plain = pyft.quantize(view.clone(memory_format=torch.contiguous_format))
            q = pyft.quantize(view)
            assert all(map(same, q.parts(), plain.parts()))
            assert q.shape == view.shape
            assert same(q.dequantize(), plain.dequantize())


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ISAS)
def test_number_of_threads_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Enough elements that two threads share them, at odd places."""
    w = torch.randn(301, 1031).to(dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with running(name):
            q = pyft.quantize(w, block_size=128)
            wide = torch.full((301, 1040), 3.0, dtype=dtype)
            pyft.dequantize(q, out=wide[:, :1031])
            results.append([*q.parts(), pyft.dequantize(q), wide])
    assert all(map(same, results[0], results[1]))
    assert all(map(same, results[0], results[2]))
    assert same(results[0][-1][:, :1031].contiguous(), results[0][-2])


def test_the_weight_is_only_read() -> None:
    w = torch.randn(5, 100, requires_grad=True)
    before, version = w.detach().clone(), w._version
    q = pyft.quantize(w)
    q.dequantize()
    assert w._version == version
    assert same(w.detach(), before)
    assert not q.requires_grad


@given(
    rows=st.integers(0, 9),
    cols=st.integers(0, 150),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    name=st.sampled_from(RUNS),
    seed=st.integers(0, 2**32),
)
def test_any_shape(
    rows: int, cols: int, block_size: int, double_quant: bool, name: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with running(name):
        Case(torch.randn(rows, cols, generator=generator), block_size, double_quant).check()


@given(st.lists(st.floats(width=32, allow_subnormal=True), max_size=70))
def test_any_values(values: list[float]) -> None:
    case = Case(torch.tensor(values, dtype=torch.float32), 32, double_quant=False)
    for name in RUNS:
        with running(name):
            case.check()


def test_error_is_at_most_half_the_widest_gap() -> None:
    w = torch.randn(64, 256)
    widest = max(high - low for low, high in zip(NF4.codes, NF4.codes[1:], strict=False))
    q = pyft.quantize(w, double_quant=False)
    allowed = q.absmax.repeat_interleave(64).view(w.shape) * (widest / 2) * (1 + 1e-6)
    assert ((q.dequantize() - w).abs() <= allowed).all()


def test_isa_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.isa() == BEST
    monkeypatch.setenv("PYFT_CPU_ISA", "scalar")
    assert native.isa() == 0
    monkeypatch.setenv("PYFT_CPU_ISA", "")
    assert native.isa() == BEST
    monkeypatch.setenv("PYFT_CPU_ISA", "sse9")
    with pytest.raises(UsageError, match="'sse9' is not one of scalar, avx2, avx512"):
        pyft.quantize(torch.ones(64))


def test_refusals() -> None:
    w = torch.randn(4, 64)
    q = pyft.quantize(w)
    with pytest.raises(UsageError, match="format 'fp3' is unknown; use one of nf4"):
        pyft.quantize(w, "fp3")
    for block_size in (0, -64, 16, 63, 65, 8192):
        with pytest.raises(UsageError, match=f"block_size {block_size} is not one of 32, 64"):
            pyft.quantize(w, block_size=block_size)
    for dtype in (torch.float64, torch.int8, torch.bool, torch.complex64):
        with pytest.raises(UsageError, match=f"{dtype}.*float32, bfloat16 or float16"):
            pyft.quantize(w.to(dtype))
    with pytest.raises(UsageError, match="already quantized"):
        pyft.quantize(q)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(UsageError, match=f"dtype {dtype} is not one of"):
            pyft.dequantize(q, dtype=dtype)
    with pytest.raises(UsageError, match=r"out is torch.float32 \(4, 65\)"):
        pyft.dequantize(q, out=torch.empty(4, 65))
    with pytest.raises(UsageError, match=r"it must be torch\.float16"):
        pyft.dequantize(q, dtype=torch.float16, out=torch.empty(4, 64))
    for out in (
        torch.empty(64, 4).t(),
        torch.empty(4, 128)[:, ::2],
        torch.empty(1, 64).expand(4, 64),
    ):
        with pytest.raises(UsageError, match="elements of a row must be adjacent"):
            pyft.dequantize(q, out=out)
