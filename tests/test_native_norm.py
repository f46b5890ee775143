"""The C++ norms against the reference, on every instruction set and any number of threads."""

import pytest
import torch
from norm_cases import CASES, check
from quantize_truth import ISAS, same
from stored_weights import CPU, DTYPES
from torch import Tensor

from pyft import native


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_error_rule(monkeypatch: pytest.MonkeyPatch, name: str, isa: str) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    assert check(CASES[name], native, CPU) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_pattern_is_added_and_rounded_once(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: str
) -> None:
    """All 16-bit numbers, subnormal ones, infinities and NaN among them, plus random ones."""
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    x = torch.arange(2**16).to(torch.int16).view(DTYPES[dtype]).view(256, 256)
    for small in (False, True):
        residual = torch.randint(0, 2**16, (256, 256)).to(torch.int16)
        residual = (residual & (0xFF if small else -1)).view(x.dtype)
        y, h, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(256)
        native.norm(x, residual, None, None, 1e-6, 0.0, False, y, h, None, rstd)
        assert same(h, x + residual)


def both_ways(parts: int) -> list[Tensor]:
    """All outputs of a layer norm with 700 rows, enough for several threads."""
    rows, cols = 700, 131
    x, residual, dy, dh = (torch.randn(rows, cols).bfloat16() for _ in range(4))
    weight, bias = torch.randn(cols).bfloat16(), torch.randn(cols).bfloat16()
    y, h, dx = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    mean, rstd = torch.empty(rows), torch.empty(rows)
    dweight = torch.empty(parts, cols) if parts else None
    dbias = torch.empty(parts, cols) if parts else None
    native.norm(x, residual, weight, bias, 1e-6, 0.0, True, y, h, mean, rstd)
    native.norm_backward(dy, h, weight, mean, rstd, 0.0, dh, dx, dweight, dbias)
    outputs = [y, h, mean, rstd, dx, dweight, dbias]
    return [output for output in outputs if output is not None]


@pytest.mark.parametrize("parts", [0, 1, 13, 64])
@pytest.mark.parametrize("threads", [2, 3])
def test_number_of_threads_changes_nothing(threads: int, parts: int) -> None:
    found = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        torch.manual_seed(3)
        found.append(both_ways(parts))
    for outputs in found[1:]:
        assert all(map(torch.equal, outputs, found[0]))


def test_parts_sum_to_the_whole() -> None:
    rows, cols = 100, 33
    dy, h = torch.randn(rows, cols), torch.randn(rows, cols)
    rstd, dx = torch.rand(rows), torch.empty(rows, cols)
    sums = [torch.empty(parts, cols) for parts in (1, 7, 100, 160)]
    for part in sums:
        native.norm_backward(dy, h, None, None, rstd, 0.0, None, dx, part, None)
    truth = (dy.double() * h.double() * rstd.double()[:, None]).sum(0)
    for part in sums:
        torch.testing.assert_close(part.double().sum(0), truth, rtol=1e-5, atol=1e-5)
    assert (sums[3][100:] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_rows_repeated_by_a_stride_of_zero(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    row = torch.randn(1, 50)
    found = []
    for x in (row.expand(4, 50), row.repeat(4, 1)):
        y, rstd = torch.empty(4, 50), torch.empty(4)
        with torch.inference_mode():
            native.norm(x, None, None, None, 1e-6, 0.0, False, y, None, None, rstd)
        found.append((y, rstd))
    assert all(map(torch.equal, *found))


def test_nan_and_infinity_stay_in_their_rows() -> None:
    x = torch.randn(5, 77)
    x[1, 3], x[3, 76] = float("nan"), float("inf")
    y, rstd = torch.empty(5, 77), torch.empty(5)
    native.norm(x, None, None, None, 1e-6, 0.0, False, y, None, None, rstd)
    assert y[[0, 2, 4]].isfinite().all()
    assert y[1].isnan().all()
    assert y[3, 76].isnan()


def test_rows_that_overlap_are_refused() -> None:
    x, rstd = torch.randn(3, 8), torch.empty(3)
    y = torch.empty(30).as_strided((3, 8), (4, 1))
    with pytest.raises(ValueError, match="outside its documented range"):
        native.norm(x, None, None, None, 1e-6, 0.0, False, y, None, None, rstd)
