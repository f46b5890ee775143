"""S = scale drop(x) Aᵀ and dA = scale Sᵀ drop(x) against the reference in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_rule import check_error
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, dtype_name
from torch import Tensor

import pyft
from pyft.ops import skinny
from pyft.ops.dropout import Dropout, as_seed
from pyft.reference import skinny as reference

SCALE, SEED = 1.7, 2**35 + 3
DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
P = pytest.mark.parametrize("p", [0.0, 0.4])
FUNCTION = pytest.mark.parametrize("function", ["project", "reduce"])
# M, K, R
SHAPES = [(64, 96, 4), (90, 33, 1), (1, 700, 3), (700, 1, 3), (33, 65, 64), (12, 40, 512)]


def drop(p: float, seed: int = SEED) -> Dropout:
    return Dropout(as_seed(seed) if p else None, p)


def inputs(function: str, m: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and A, or S and x."""
    x, a, s = (torch.randn(shape).to(dtype) for shape in ((m, k), (r, k), (m, r)))
    return (x, a) if function == "project" else (s, x)


def run(
    function: str, pair: tuple[Tensor, Tensor], p: float, scale: float = SCALE, **more: Any
) -> Tensor:
    found: Tensor = getattr(skinny, function)(*pair, scale, drop(p), **more)
    return found


def expected(
    function: str, pair: tuple[Tensor, Tensor], p: float, dtype: torch.dtype, scale: float = SCALE
) -> Tensor:
    left, right = (t.to(dtype) for t in pair)
    found: Tensor = getattr(reference, function)(left, right, scale, p, SEED)
    return found


def check(function: str, pair: tuple[Tensor, Tensor], found: Tensor, p: float) -> None:
    truth = expected(function, pair, p, torch.float64)
    check_error(function, found, expected(function, pair, p, found.dtype), truth)


@FUNCTION
@DTYPE
@P
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(
    shape: tuple[int, int, int], p: float, dtype: torch.dtype, function: str
) -> None:
    pair = inputs(function, *shape, dtype)
    check(function, pair, run(function, pair, p), p)


@FUNCTION
@P
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.25])
def test_scale(scale: float, p: float, function: str) -> None:
    pair = inputs(function, 40, 24, 3, torch.float32)
    found = run(function, pair, p, scale)
    truth = expected(function, pair, p, torch.float64, scale)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def turned(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def spaced(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0], 2 * t.shape[1] + 3), torch.nan, dtype=t.dtype)
    wide[:, 3::2] = t
    return wide[:, 3::2]


def apart(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0], t.shape[1] + 7), torch.nan, dtype=t.dtype)
    wide[:, 2:-5] = t
    return wide[:, 2:-5]


@FUNCTION
@P
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", [turned, spaced, apart])
def test_any_strides(
    change: Callable[[Tensor], Tensor], which: int, p: float, function: str
) -> None:
    """Where x lies does not change which of its elements are dropped."""
    pair = list(inputs(function, 40, 24, 3, torch.float32))
    truth = expected(function, (pair[0], pair[1]), p, torch.float64)
    pair[which] = change(pair[which])
    found = run(function, (pair[0], pair[1]), p)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
@P
def test_projects_into_columns_of_others(p: float, dtype: torch.dtype) -> None:
    pair = inputs("project", 50, 24, 3, dtype)
    memory = torch.full((50, 10), torch.nan, dtype=dtype)
    out = memory[:, 4:7]
    assert run("project", pair, p, out=out).data_ptr() == out.data_ptr()
    check("project", pair, out, p)
    assert memory[:, :4].isnan().all()
    assert memory[:, 7:].isnan().all()


@FUNCTION
@P
@pytest.mark.parametrize("shape", [(0, 8, 2), (8, 0, 2), (8, 4, 0)], ids=str)
def test_nothing(shape: tuple[int, int, int], p: float, function: str) -> None:
    """Sums of nothing are zero."""
    pair = inputs(function, *shape, torch.float32)
    found = run(function, pair, p)
    assert found.shape == expected(function, pair, p, torch.float32).shape
    assert (found == 0).all()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**64 - 1])
def test_the_mask_is_that_of_dropout(seed: int) -> None:
    x, a, s = torch.randn(20, 33), torch.randn(3, 33), torch.randn(20, 3)
    dropped = pyft.dropout(x, 0.4, seed)
    assert 0.2 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(skinny.project(x, a, 1.0, drop(0.4, seed)), dropped @ a.t())
    torch.testing.assert_close(skinny.reduce(s, x, 1.0, drop(0.4, seed)), s.t() @ dropped)


@FUNCTION
@P
def test_inputs_are_only_read_and_the_bits_are_the_same_twice(p: float, function: str) -> None:
    pair = inputs(function, 200, 64, 8, torch.bfloat16)
    before = [t.clone() for t in pair]
    assert torch.equal(run(function, pair, p), run(function, pair, p))
    assert all(map(torch.equal, before, pair))


@FUNCTION
def test_any_backend_by_name(function: str) -> None:
    """On a CPU all of them are the vendor's matmul."""
    pair = inputs(function, 20, 16, 2, torch.float32)
    found = run(function, pair, 0.4)
    for name in ("reference", "cpu"):
        with pyft.backend(name):
            assert torch.equal(run(function, pair, 0.4), found)
