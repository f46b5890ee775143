"""The statistics of a tile of logits and its gradient, as the losses ask for them: each backend
against the reference, float64 and devices without kernels, and the reference against autograd.
"""

import math

import pytest
import torch
from error_rule import check_error
from shapes import LINEAR_DTYPES, dtype_name
from torch import Tensor

import pyft
from pyft.errors import UsageError
from pyft.ops import logits as op
from pyft.reference import logits as reference

DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
ALL = op.Wanted(True, True, True, True)
SUMS = ("lse", "target", "smooth", "mean", "cross", "top")


def tile(
    m: int = 6,
    v: int = 301,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    taught: bool = True,
    scale: float = 1.3,
    softcap: float | None = 4.0,
    gap: int = 0,
) -> op.Tile:
    """Logits in rows ``gap`` further apart than they need be; one label names no column."""
    z = (2 * torch.randn(m, v + gap)).to(dtype)[:, :v]
    labels = torch.randint(v, (m,))
    labels[m // 2] = -100
    w = torch.rand(v, dtype=op.wide(dtype)) if weights else None
    teacher = None
    if taught:
        other = (2 * torch.randn(m, v + 2 * gap)).to(dtype)[:, :v]
        lse = reference.capped(other.double(), 0.7, 3.0).logsumexp(1).to(op.wide(dtype))
        teacher = op.Taught(other, lse, 0.7, 3.0)
    return op.Tile(z, labels, w, scale, softcap, teacher)


def by_the_reference(t: op.Tile, dtype: torch.dtype) -> reference.Statistics:
    teacher = None
    if t.taught is not None:
        teacher = reference.capped(t.taught.z.to(dtype), t.taught.scale, t.taught.softcap)
    w = None if t.class_weights is None else t.class_weights.to(dtype)
    return reference.logit_statistics(t.z.to(dtype), t.labels, w, t.scale, t.softcap, teacher)


def wanted_of(t: op.Tile) -> op.Wanted:
    return op.Wanted(True, True, t.taught is not None, True)


def check_statistics(t: op.Tile, name: str = "auto") -> None:
    before = t.z.clone()
    found = op.statistics(t, wanted_of(t), name)
    assert torch.equal(t.z, before)
    wide = op.wide(t.z.dtype)
    expected, truth = (by_the_reference(t, dtype) for dtype in (wide, torch.float64))
    for key in SUMS:
        if key != "cross" or t.taught is not None:
            value, plain, exact = (getattr(x, key) for x in (found, expected, truth))
            check_error(key, value, plain, exact)
    assert torch.equal(found.argmax, truth.argmax)


@DTYPE
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_statistics(dtype: torch.dtype, name: str) -> None:
    for size in ((1, 1), (64, 7), (64, 301), (32, 4099)):
        for softcap in (None, 4.0):
            for given in (True, False):
                check_statistics(
                    tile(*size, dtype, given, given, softcap=softcap, gap=3 * given), name
                )


@DTYPE
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_gradient(dtype: torch.dtype, name: str) -> None:
    """In the place of the tile, by autograd of the sums in float64."""
    wide = op.wide(dtype)
    for size in ((1, 1), (6, 301), (9, 4099)):
        for given in (True, False):
            for softcap in (None, 4.0):
                t = tile(*size, dtype, given, given, softcap=softcap, gap=2 * given)
                g = [torch.randn(size[0], dtype=wide) for _ in range(5)]
                if not given:
                    g[4:] = [None]  # type: ignore[list-item]
                exact = by_autograd(t, g)
                sums = by_the_reference(t, torch.float64)
                lse, mean = sums.lse.to(wide), sums.mean.to(wide)
                plain = by_the_reference_gradient(t, lse, mean, g)
                z = t.z
                op.gradient_(t, lse, mean, op.Weights(g[0], g[1], g[2], g[3], g[4]), name)
                assert t.z is z
                check_error("dz", t.z, plain, exact)


def by_autograd(t: op.Tile, g: list[Tensor]) -> Tensor:
    z = t.z.detach().double().requires_grad_()
    found = by_the_reference(t._replace(z=z), torch.float64)
    parts = [found.lse, found.target, found.smooth, found.mean, found.cross]
    total = sum((x * y.double()).sum() for x, y in zip(parts, g, strict=True) if y is not None)
    return torch.autograd.grad(total, z)[0]


def by_the_reference_gradient(t: op.Tile, lse: Tensor, mean: Tensor, g: list[Tensor]) -> Tensor:
    teacher = None
    if t.taught is not None:
        teacher = reference.capped(t.taught.z, t.taught.scale, t.taught.softcap)
    return reference.logit_gradient(
        t.z, t.labels, t.class_weights, t.scale, t.softcap, teacher, lse, mean, *g
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_columns_of_a_tile(dtype: torch.dtype, name: str) -> None:
    """The gradient of some columns is these columns of the gradient: what else a row's gradient
    needs of it is in its sums.
    """
    t = tile(6, 120, dtype)
    sums = op.statistics(t, ALL, name)
    g = [torch.randn(6, dtype=dtype) for _ in range(5)]
    whole = t._replace(z=t.z.clone())
    op.gradient_(whole, sums.lse, sums.mean, op.Weights(*g), name)
    for begin, end in ((0, 50), (50, 119), (119, 120)):
        taught = op.Taught(t.taught.z[:, begin:end], t.taught.lse, t.taught.scale, t.taught.softcap)
        part = op.Tile(
            t.z[:, begin:end].clone(), t.labels - begin, t.class_weights[begin:end].contiguous(),
            t.scale, t.softcap, taught,
        )  # fmt: skip
        op.gradient_(part, sums.lse, sums.mean, op.Weights(*g), name)
        torch.testing.assert_close(part.z, whole.z[:, begin:end])


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
def test_columns_that_are_kept(dtype: torch.dtype, name: str) -> None:
    t = tile(5, 301, dtype, weights=False, taught=False, softcap=None, scale=1.0)
    t.labels[2] = 7
    sums = op.statistics(t, op.Wanted(), name)
    p = (t.z.double() - sums.lse.double()[:, None]).exp()
    for threshold in (0.0, 1e-30, 1e-3, 0.5, 2.0):
        kept = torch.zeros(301, dtype=torch.uint8)
        kept[11] = 1
        copy = t._replace(z=t.z.clone())
        one = torch.ones(5, dtype=op.wide(dtype))
        filtered = op.Filter(threshold, kept)
        op.gradient_(copy, sums.lse, None, op.Weights(one, -one), name, filtered)
        named = torch.zeros(301, dtype=torch.bool).index_fill(
            0, torch.cat([t.labels, torch.tensor([11])]), True
        )
        sure, able = ((p >= threshold * x).any(0) | named for x in (1.01, 0.99))
        assert kept[sure].all()
        assert not kept[~able].any()


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_what_is_not_wanted_is_empty(name: str) -> None:
    t = tile()
    for field in ("smooth", "mean", "cross", "top"):
        found = op.statistics(t, op.Wanted(**{field: True}), name)
        assert found.lse.shape == found.target.shape == (6,)
        for other in ("smooth", "mean", "cross", "top"):
            assert getattr(found, other).numel() == (6 if other == field else 0), (field, other)
        assert found.argmax.numel() == (6 if field == "top" else 0)
        full = getattr(op.statistics(t, ALL, name), field)
        torch.testing.assert_close(getattr(found, field), full)
    empty = op.empty_statistics(t.z, 4, op.Wanted(mean=True))
    assert [x.numel() for x in empty] == [4, 4, 0, 4, 0, 0, 0]
    assert empty.argmax.dtype == torch.int64


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
def test_rows_that_are_not_finite(dtype: torch.dtype, name: str) -> None:
    """NaN stays in its row; -inf is no probability; ties go to the first."""
    t = tile(6, 300, dtype, taught=False, softcap=None, scale=1.0)
    t.z[1, 200] = torch.nan
    t.z[2, 5:] = -torch.inf
    t.z[3] = 1.5
    t.z[4, 77] = 3e4
    t.labels.copy_(torch.tensor([0, 1, 2, 3, 77, 299]))
    expected = by_the_reference(t, torch.float64)
    found = op.statistics(t._replace(class_weights=None), ALL._replace(cross=False), name)
    assert found.lse[1].isnan()
    others = torch.arange(6) != 1
    for key in ("lse", "target", "mean", "top"):
        value, exact = getattr(found, key)[others], getattr(expected, key)[others]
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argmax[others], expected.argmax[others])
    assert found.argmax[3] == 0
    assert found.lse[3] == pytest.approx(1.5 + math.log(300))
    one = torch.ones(6, dtype=op.wide(dtype))
    op.gradient_(t, found.lse, found.mean, op.Weights(one, -one, None, one), name)
    assert t.z[others].isfinite().all()
    assert t.z[1].isnan().all()
    assert (t.z[2, 5:] == 0).all()


def test_no_rows() -> None:
    """Their sums are empty, in the right dtypes."""
    found = op.empty_statistics(torch.empty(0, 9, dtype=torch.bfloat16), 0, ALL)
    assert all(x.shape == (0,) for x in found)
    assert found.lse.dtype == torch.float32


def test_sums_over_a_large_vocabulary() -> None:
    """A few ulp for 262144 columns."""
    t = tile(2, 262144, weights=True, taught=True, softcap=None, scale=1.0)
    check_statistics(t)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    t = tile(7, 40001, torch.bfloat16)
    first = op.statistics(t, ALL, "auto")
    torch.set_num_threads(threads)
    again = op.statistics(t, ALL, "auto")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_backends() -> None:
    for name in ("triton", "cuda"):
        with pytest.raises(UsageError, match=f"backend '{name}' cannot run logits"):
            op.statistics(tile(), op.Wanted(), name)
    with pytest.raises(UsageError, match=r"in torch\.float64; use reference"):
        op.statistics(tile(dtype=torch.float64), op.Wanted(), "cpu")
    assert pyft.availability()["logits"]["reference"] == "yes"


def test_teachers_as_kernels_take_them() -> None:
    """One after another, whatever their strides."""
    t = tile(4, 33, gap=5)
    turned = op.Taught(t.taught.z.t().contiguous().t(), *t.taught[1:])
    with pyft.backend("auto"):
        one = op.statistics(t, ALL, "auto")
        other = op.statistics(
            t._replace(taught=turned, z=t.z.t().contiguous().t()), ALL, "reference"
        )
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_gradcheck_of_the_reference(with_teacher: bool) -> None:
    t = tile(4, 9, torch.float64)
    teacher = torch.randn(4, 9).double() if with_teacher else None

    def sums(z: Tensor) -> tuple[Tensor, ...]:
        found = reference.logit_statistics(z, t.labels, t.class_weights, 1.3, 2.0, teacher)
        return (found.lse, found.target, found.smooth, found.mean, found.cross)[: 4 + with_teacher]

    z = t.z.clone().requires_grad_()
    assert torch.autograd.gradcheck(sums, z)
    g = [torch.randn(4).double() for _ in range(5)]
    expected = torch.autograd.grad(sums(z), z, g[: 4 + with_teacher])[0]
    found = reference.logit_gradient(
        z, t.labels, t.class_weights, 1.3, 2.0, teacher, sums(z)[0], sums(z)[3], *g
    )
    torch.testing.assert_close(found.detach(), expected)
