"""The product with an adapter's low-rank product beside it, against the reference in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from error_rule import check_error
from shapes import LINEAR_DTYPES, dtype_name
from torch import Tensor

from pyft.ops.lora_matmul import LowRank, Wide, product
from pyft.reference.lora_matmul import lora_matmul as reference

SCALE = 1.7
DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
SHAPES = [(16, 24, 32, 4), (1, 7, 33, 1), (9, 33, 5, 3), (70, 40, 64, 64), (3, 8, 16, 512)]


class Product:
    """x [M, K], w [K, N], s [M, R], b [R, N], bias [N] and out [M, N] among NaN."""

    def __init__(self, m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.float32) -> None:
        self.x, self.s = torch.randn(m, k).to(dtype), torch.randn(m, r).to(dtype)
        self.w, self.b = torch.randn(k, n).to(dtype), torch.randn(r, n).to(dtype)
        self.bias = torch.randn(n).to(dtype)
        self.memory = torch.full((m, n + 5), torch.nan, dtype=dtype)
        self.out = self.memory[:, 2 : n + 2]

    def low(self) -> LowRank:
        return LowRank(self.s, self.b, SCALE)

    def expected(self, dtype: torch.dtype, low: bool = True, bias: bool = True) -> Tensor:
        x, w, s, b, added = (t.to(dtype) for t in (self.x, self.w, self.s, self.b, self.bias))
        if not low:
            s = torch.zeros_like(s)
        return reference(x, w, s, b, SCALE, added if bias else None)

    def check(self, out: Tensor, **which: bool) -> None:
        """The error rule; in float64, which is the truth itself, a few roundings of the terms."""
        truth = self.expected(torch.float64, **which)
        if out.dtype == torch.float64:
            terms = self.x.abs() @ self.w.abs() + SCALE * self.s.abs() @ self.b.abs() + 4
            assert ((out - truth).abs() <= 8 * torch.finfo(out.dtype).eps * terms).all()
        else:
            check_error("out", out, self.expected(out.dtype, **which), truth)
        beside = torch.cat((self.memory[:, :2], self.memory[:, -3:]), 1)
        assert beside.isnan().all()


@DTYPE
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(
    shape: tuple[int, int, int, int], bias: bool, low: bool, dtype: torch.dtype
) -> None:
    """Over several draws at once: one number alone may be right by chance."""
    m, *rest = shape
    p = Product(12 * m, *rest, dtype)
    product(p.x, p.w, p.low() if low else None, p.bias if bias else None, p.out)
    p.check(p.out, low=low, bias=bias)


@DTYPE
@pytest.mark.parametrize("low", [False, True])
def test_added_to_what_is_there(low: bool, dtype: torch.dtype) -> None:
    p = Product(90, 24, 32, 4, dtype)
    before = torch.randn(p.out.shape).to(dtype)
    p.out.copy_(before)
    product(p.x, p.w, p.low() if low else None, None, p.out, accumulate=True)
    truth, in_dtype = (
        p.expected(d, low=low, bias=False) + before.to(d) for d in (torch.float64, dtype)
    )
    check_error("out", p.out, in_dtype, truth)


def test_a_bias_is_added_to_what_is_there_too() -> None:
    """``accumulate`` adds all that would be written without it."""
    p = Product(6, 8, 16, 2)
    p.out.zero_()
    product(p.x, p.w, p.low(), p.bias, p.out, accumulate=True)
    p.check(p.out)


def turned(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def spaced(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0], 2 * t.shape[1]), torch.nan, dtype=t.dtype)
    wide[:, ::2] = t
    return wide[:, ::2]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("change", [turned, spaced])
@pytest.mark.parametrize("which", ["x", "w", "s", "b", "out"])
def test_any_strides(which: str, change: Any, accumulate: bool) -> None:
    p = Product(30, 8, 16, 4)
    setattr(p, which, change(getattr(p, which)))
    if accumulate:
        p.out.zero_()
    product(p.x, p.w, p.low(), None, p.out, accumulate)
    p.check(p.out, bias=False)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (3, 0, 4, 2), (3, 4, 0, 2), (3, 4, 5, 0)], ids=str)
def test_nothing(shape: tuple[int, int, int, int], accumulate: bool) -> None:
    p = Product(*shape)
    if accumulate:
        p.out.zero_()
    product(p.x, p.w, p.low(), None, p.out, accumulate)
    p.check(p.out, bias=False)


def test_columns_of_the_low_rank_product() -> None:
    p = Product(20, 24, 8, 3)
    whole = torch.zeros(20, 24)
    p.low().add_to(whole)
    for begin, end in ((0, 24), (5, 6), (7, 24), (3, 3)):
        part = torch.zeros(20, end - begin)
        p.low().columns(begin, end).add_to(part)
        torch.testing.assert_close(part, whole[:, begin:end])
    truth = SCALE * (p.s.double() @ p.b.double())
    torch.testing.assert_close(whole.double(), truth, rtol=1e-5, atol=1e-5)


@DTYPE
@pytest.mark.parametrize("slot", [0, 3, 7])
def test_wide(slot: int, dtype: torch.dtype) -> None:
    """One product of [x | S] and [W ; 0 | scale B | 0] is all: what belongs to others, S of theirs
    included, does not show.
    """
    p, tail = Product(96, 24, 32, 4, dtype), 11
    p.b = p.b.t().contiguous().t()  # of an adapter [N, R], as ops keep it
    side = torch.randn(96, tail).to(dtype)
    side[:, slot : slot + 4] = p.s
    wide = Wide(torch.cat((p.x, side), 1), tail, slot)
    weight = torch.full((24, 32 + tail), torch.nan, dtype=dtype)
    weight[:, :32] = p.w.t()
    wide.fill(weight, p.low())
    assert torch.equal(weight[:, :32], p.w.t())
    filled = torch.zeros(24, tail, dtype=dtype)
    filled[:, slot : slot + 4] = (SCALE * p.b.t().double()).to(dtype)
    torch.testing.assert_close(weight[:, 32:], filled)
    product(wide.buffer, weight.t(), None, p.bias, p.out)
    p.check(p.out)


def test_wide_of_a_slab_of_columns() -> None:
    p = Product(20, 24, 16, 4)
    wide = Wide(torch.cat((p.x, p.s), 1), 4, 0)
    for begin, end in ((0, 10), (10, 24)):
        weight = torch.full((end - begin, 20), torch.nan)
        weight[:, :16] = p.w.t()[begin:end]
        wide.fill(weight, p.low().columns(begin, end))
        product(wide.buffer, weight.t(), None, p.bias[begin:end], p.out[:, begin:end])
    p.check(p.out)


def test_inputs_are_only_read_and_the_bits_are_the_same_twice() -> None:
    p = Product(40, 24, 32, 8, torch.bfloat16)
    tensors = (p.x, p.w, p.s, p.b, p.bias)
    before = [t.clone() for t in tensors]
    product(p.x, p.w, p.low(), p.bias, p.out)
    first = p.out.clone()
    product(p.x, p.w, p.low(), p.bias, p.out)
    assert torch.equal(first, p.out)
    assert all(map(torch.equal, before, tensors))
    assert replace(p.low(), scale=0.0).scale == 0.0


def test_a_scale_of_zero_is_no_adapter() -> None:
    p = Product(10, 8, 16, 2)
    product(p.x, p.w, replace(p.low(), scale=0.0), p.bias, p.out)
    p.check(p.out, low=False)
