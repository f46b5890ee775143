"""What quantization promises: its error, what infinities, NaN and zeros become, what it refuses."""

import re

import pytest
import torch
from quantize_truth import BEST, RUNS, default_size, running, same
from torch import Tensor

import pyft
from pyft import native
from pyft.errors import UsageError
from pyft.formats import FORMATS, Format, code_table, e8m0_table
from pyft.quantized import QuantizedTensor

NAME = pytest.mark.parametrize("name", FORMATS)
RUN = pytest.mark.parametrize("run", RUNS)
CPU = torch.device("cpu")


def plain_scales(q: QuantizedTensor) -> Tensor:
    """The scale of each element of a weight that is not doubly quantized."""
    scales = e8m0_table(CPU)[q.scales.long()] if q.format.e8m0 else q.scales
    return scales.repeat_interleave(q.block_size)[: q.numel()].view(q.shape)


def values_of(fmt: Format) -> Tensor:
    return code_table(fmt, CPU)[torch.tensor(fmt.order)].double()


# Largest error of an element in units of its block's scale: half of the widest gap; in mxfp4 what
# is lost above the largest number, whose scale leaves up to 8 of them.
LARGEST_ERROR = {
    "nf4": 0.15190350770950317,
    "fp4": 1 / 6,
    "int4": 0.5,
    "int4_zp": 0.5,
    "int8": 0.5 / 127,
    "fp8_e4m3": 16.0,
    "mxfp4": 2.0,
}


@NAME
@RUN
def test_error_on_gaussian_weights(run: str, name: str) -> None:
    """No element could be coded better; none is off by more than the format's bound."""
    fmt, w = FORMATS[name], torch.randn(96, 512)
    with running(run):
        q = pyft.quantize(w, name, double_quant=False)
        found = q.dequantize().double()
    scale = plain_scales(q).double()
    error = (found - w.double()).abs() / scale
    slack = 1e-5 * values_of(fmt).abs().max()
    assert (error <= LARGEST_ERROR[name] + slack).all()
    scaled = w.double() / scale
    if q.zeros is not None:
        scaled += q.zeros.repeat_interleave(q.block_size).view(w.shape)
    best = (scaled[..., None] - values_of(fmt)).abs().amin(dim=-1)
    assert (error <= best + slack).all()


@NAME
def test_bounds_are_half_of_the_widest_gap(name: str) -> None:
    if name != "mxfp4":
        widest = values_of(FORMATS[name]).diff().max() / 2
        assert widest.item() == pytest.approx(LARGEST_ERROR[name], rel=1e-4)


def test_relative_error_of_fp8() -> None:
    w = torch.randn(64, 1024)
    q = pyft.quantize(w, "fp8_e4m3")
    normal = w.abs() >= plain_scales(q) * 2.0**-6
    assert normal.float().mean() > 0.9
    error = (q.dequantize() - w).abs()[normal]
    assert (error <= w.abs()[normal] * 2.0**-4 * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8", "int4_zp"])
def test_largest_magnitude_is_kept(name: str) -> None:
    """In int4 to half a step, elsewhere but for rounding."""
    w = torch.randn(32, 128)
    found = pyft.quantize(w, name, "row", double_quant=False).dequantize()
    largest = w.abs().amax(dim=1)
    tolerance = 0.07 if name.startswith("int4") else 1e-6
    kept = found.gather(1, w.abs().argmax(dim=1, keepdim=True)).abs()[:, 0]
    torch.testing.assert_close(kept, largest, rtol=tolerance, atol=0)


def test_double_quantization_adds_little() -> None:
    w = torch.randn(128, 512)
    for name in ("nf4", "fp4", "int4", "int4_zp", "int8", "fp8_e4m3"):
        single = (pyft.quantize(w, name, 64, False).dequantize() - w).square().mean()
        double = (pyft.quantize(w, name, 64, True).dequantize() - w).square().mean()
        allowed = 1.02 if FORMATS[name].bits == 4 else 1.6
        assert single < double * 1.02
        assert double < single * allowed


@NAME
@RUN
def test_zeros_stay_zeros(run: str, name: str) -> None:
    fmt = FORMATS[name]
    w = torch.tensor([0.0, -0.0]).repeat(160)
    with running(run):
        q = pyft.quantize(w, name, double_quant=False)
        nested = None if fmt.e8m0 else pyft.quantize(w, name, double_quant=True)
    byte = fmt.zero_code * 17 if fmt.bits == 4 else fmt.zero_code
    assert q.packed.tolist() == [byte] * (320 * fmt.bits // 8)
    assert not q.scales.view(torch.uint8).any()
    assert q.zeros is None or not q.zeros.any()
    assert q.dequantize().view(torch.int32).any().item() is False
    assert nested is None or not nested.dequantize().any()


@NAME
@RUN
def test_a_bad_element_spoils_its_block_only(run: str, name: str) -> None:
    """Its scale is not finite; the blocks beside it have the bits they would have without it."""
    size = FORMATS[name].block_sizes[0]
    w = torch.randn(5, size)
    plain = pyft.quantize(w, name, size, double_quant=False)
    for bad in (torch.inf, -torch.inf, torch.nan):
        spoilt = w.clone()
        spoilt[2, 7] = bad
        with running(run):
            q = pyft.quantize(spoilt, name, size, double_quant=False)
            found = q.dequantize()
        beside = [0, 1, 3, 4]
        assert same(found[beside], plain.dequantize()[beside])
        packed, expected = q.packed.view(5, -1), plain.packed.view(5, -1)
        assert torch.equal(packed[beside], expected[beside])
        assert torch.equal(q.scales[beside], plain.scales[beside])
        assert not found[2].isfinite().any()
        scale = e8m0_table(CPU)[q.scales[2].long()] if q.format.e8m0 else q.scales[2]
        assert not scale.isfinite()
        if bad != bad:
            assert found[2].isnan().all()


def test_a_bad_element_under_double_quantization_shows() -> None:
    """Scales share a mean: nothing finite is left to be mistaken for the weight."""
    w = torch.randn(5, 64)
    w[2, 7] = torch.inf
    assert not pyft.quantize(w, "nf4", 64, double_quant=True).dequantize().isfinite().any()


def test_one_sided_blocks_use_all_codes_with_zero_points() -> None:
    for w, zero in ((torch.rand(1, 128) + 3, 0), (-torch.rand(1, 128) - 3, 15)):
        q = pyft.quantize(w, "int4_zp")
        assert q.zeros is not None
        assert q.zeros.tolist() == [zero]
        torch.testing.assert_close(q.scales, w.abs().amax(dim=1) / 15)


def test_isa_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.isa() == BEST
    monkeypatch.setenv("PYFT_CPU_ISA", "scalar")
    assert native.isa() == 0
    monkeypatch.setenv("PYFT_CPU_ISA", "")
    assert native.isa() == BEST
    monkeypatch.setenv("PYFT_CPU_ISA", "sse9")
    with pytest.raises(UsageError, match="'sse9' is not one of scalar, avx2, avx512"):
        pyft.quantize(torch.ones(64))


def refusal(call: object, *arguments: object, **options: object) -> str:
    """The message of the UsageError a call raises; one line."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["fp3", "NF4", "", None, 4, ("nf4",)], ids=repr)
def test_unknown_formats(name: object) -> None:
    message = refusal(pyft.quantize, torch.randn(4, 64), name)
    assert f"format {name!r} is unknown; use one of nf4, fp4, int4" in message


@pytest.mark.parametrize(
    "size",
    [0, -64, 16, 63, 65, 96, 8192, True, False, 64.5, "rows", "64", (64,), [64, 32]],
    ids=repr,
)
@NAME
def test_block_sizes_no_format_can_have(name: str, size: object) -> None:
    message = refusal(pyft.quantize, torch.randn(4, 64), name, size)
    assert message.startswith(f"quantize: block_size {size!r} is not one {name} can have: 32")
    assert ('"row"' in message) is not FORMATS[name].e8m0


def test_block_sizes_of_mxfp4() -> None:
    for size in (64, 4096, "row"):
        message = refusal(pyft.quantize, torch.randn(4, 64), "mxfp4", size)
        assert message == f"quantize: block_size {size!r} is not one mxfp4 can have: 32"


@NAME
def test_odd_rows_have_no_bytes_of_their_own(name: str) -> None:
    fmt = FORMATS[name]
    if fmt.bits == 4 and not fmt.e8m0:
        message = refusal(pyft.quantize, torch.randn(4, 65), name, "row")
        assert f"rows of 65 elements have no whole number of bytes in {name}" in message
    elif not fmt.e8m0:
        assert pyft.quantize(torch.randn(4, 65), name, "row").block_size == 65


def test_double_quant_of_mxfp4() -> None:
    message = refusal(pyft.quantize, torch.randn(4, 64), "mxfp4", double_quant=True)
    assert message == ("quantize: the scales of mxfp4 are 8 bits already; leave double_quant out")
    assert not pyft.quantize(torch.randn(4, 64), "mxfp4", double_quant=False).double_quant


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64],
    ids=str,
)
@NAME
def test_dtypes_no_weight_has(name: str, dtype: torch.dtype) -> None:
    message = refusal(pyft.quantize, torch.ones(4, 64).to(dtype), name)
    assert message == (
        f"quantize: the weight is of dtype {dtype}; pass a float32, bfloat16 or float16 tensor"
    )


def test_a_quantized_weight() -> None:
    assert "already quantized" in refusal(pyft.quantize, pyft.quantize(torch.randn(4, 64)))


def test_dtypes_and_outputs_dequantize_refuses() -> None:
    q = pyft.quantize(torch.randn(4, 64))
    for dtype in (torch.float64, torch.int32, torch.uint8):
        message = refusal(pyft.dequantize, q, dtype=dtype)
        assert message == f"dequantize: dtype {dtype} is not one of float32, bfloat16, float16"
        assert str(dtype) in refusal(pyft.dequantize, q, out=torch.empty(4, 64).to(dtype))
    for out in (torch.empty(4, 65), torch.empty(4, 32), torch.empty(256), torch.empty(1, 4, 64)):
        message = refusal(pyft.dequantize, q, out=out)
        assert f"out is torch.float32 {tuple(out.shape)} on cpu" in message
        assert "it must be torch.float32 (4, 64) on cpu" in message
    message = refusal(pyft.dequantize, q, dtype=torch.float16, out=torch.empty(4, 64))
    assert re.search(r"out is torch\.float32 .* it must be torch\.float16", message)
    message = refusal(pyft.dequantize, q, out=torch.empty(4, 64, device="meta"))
    assert "on meta; it must be torch.float32 (4, 64) on cpu" in message


@pytest.mark.parametrize(
    "out",
    [torch.empty(64, 4).t(), torch.empty(4, 128)[:, ::2], torch.empty(1, 64).expand(4, 64)],
    ids=["transposed", "strided", "expanded"],
)
def test_outputs_whose_rows_are_not_adjacent(out: Tensor) -> None:
    q = pyft.quantize(torch.randn(4, 64))
    message = refusal(pyft.dequantize, q, out=out)
    assert f"out has strides {out.stride()}; only the rows of a matrix may be apart" in message


def test_autograd_sees_that_out_was_written() -> None:
    """As any in-place write: a gradient that needs the old values raises instead of being wrong."""
    q = pyft.quantize(torch.randn(4, 64))
    out, x = torch.ones(4, 64), torch.randn(4, 64, requires_grad=True)
    y = (out * x).sum()
    pyft.dequantize(q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@NAME
def test_defaults(name: str) -> None:
    fmt, w = FORMATS[name], torch.randn(4, 128)
    q = pyft.quantize(w, name)
    again = pyft.quantize(w, name, default_size(fmt), fmt.double_quant)
    assert all(map(same, q.parts(), again.parts()))
    assert q.double_quant is fmt.double_quant
