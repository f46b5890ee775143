"""rms_norm and layer_norm against the reference in float64, and what they keep."""

from typing import Any

import pytest
import torch
from lora_cases import Call, check_close, check_rule, saved_bytes
from op_behaviours import BEHAVIOUR, check_refused, gradcheck
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, dtype_name
from torch import Tensor

import pyft
from pyft.reference import norm as reference

DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)

# What differs from the plain RMSNorm of 7 rows of 100.
CASES: dict[str, dict[str, Any]] = {
    "rms": {},
    "rms without weight": {"weight": False},
    "rms offset": {"offset": 1.0},
    "rms offset without weight": {"offset": 1.0, "weight": False},
    "rms residual": {"residual": True},
    "rms residual offset": {"residual": True, "offset": 1.0, "shape": (2, 3, 65)},
    "rms tail": {"tail": 5, "shape": (2, 3, 40)},
    "layer": {"centered": True},
    "layer without weight": {"centered": True, "weight": False, "bias": False},
    "layer bias only": {"centered": True, "weight": False},
    "layer residual": {"centered": True, "residual": True, "shape": (3, 1, 33)},
    "layer tail": {"centered": True, "tail": 3},
}
SHAPES = [(64,), (1, 7), (5, 33), (2, 3, 130), (1, 4099), (300, 16), (9, 3)]


def norm(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (7, 100),
    centered: bool = False,
    weight: bool = True,
    bias: bool = True,
    residual: bool = False,
    offset: float = 0.0,
    eps: float = 1e-6,
    tail: int = 0,
    weight_dtype: torch.dtype | None = None,
    x: Tensor | None = None,
) -> Call:
    x = torch.randn(shape) if x is None else x
    inputs: dict[str, Tensor] = {"x": x.to(dtype)}
    if weight:
        inputs["weight"] = torch.randn(shape[-1]).to(weight_dtype or dtype)
    if bias and centered:
        inputs["bias"] = torch.randn(shape[-1]).to(weight_dtype or dtype)
    if residual:
        inputs["residual"] = torch.randn(shape).to(dtype)
    for tensor in inputs.values():
        tensor.requires_grad_()
    assert not (centered and offset)

    def arguments(t: Any) -> tuple[Any, ...]:
        scales = (t.get("weight"), t.get("bias")) if centered else (t.get("weight"),)
        return (t["x"], *scales, eps, t.get("residual"), *(() if centered else (offset,)))

    name = "layer_norm" if centered else "rms_norm"

    def op(t: Any) -> tuple[Tensor, ...]:
        found = getattr(pyft, name)(*arguments(t), tail=tail)
        assert isinstance(found, tuple) == residual
        return found if residual else (found,)

    def specified(t: Any) -> tuple[Tensor, ...]:
        return getattr(reference, name)(*arguments(t))[: 1 + residual]

    return Call("norm", inputs, op, specified, grows=False)


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES)
def test_error_rule(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        check_close(norm(dtype, **CASES[case]))
    else:
        check_rule(lambda: norm(dtype, **CASES[case]))


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, centered: bool) -> None:
    check_rule(lambda: norm(dtype, shape, centered=centered, residual=True))


@BEHAVIOUR
@pytest.mark.parametrize("case", ["rms", "rms residual", "layer residual", "rms tail"])
def test_behaviour(case: str, behaviour: Any) -> None:
    behaviour(norm(**CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    options = {**CASES[case], "shape": (3, 5)}
    gradcheck(norm(torch.float64, **options))


@pytest.mark.parametrize("weight_dtype", [*QUANTIZED_DTYPES, torch.float64], ids=dtype_name)
@DTYPE
def test_weight_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Cast to x's; its gradient comes back in its own."""
    call = norm(dtype, centered=True, weight_dtype=weight_dtype)
    found = call.run()
    assert found["y0"].dtype == dtype
    assert found["weight"].dtype == found["bias"].dtype == weight_dtype
    check_rule(lambda: norm(dtype, centered=True, weight_dtype=weight_dtype))


@DTYPE
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_huge_values(dtype: torch.dtype, centered: bool) -> None:
    """Whose squares do not fit fp16."""
    check_rule(
        lambda: norm(dtype, centered=centered, x=torch.randn(7, 100).clamp(-3, 3) * 1e4, offset=0.0)
    )


@DTYPE
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_rows_of_zeros(dtype: torch.dtype, centered: bool) -> None:
    x = torch.randn(6, 64)
    x[::2] = 0
    check_rule(lambda: norm(dtype, (6, 64), centered=centered, x=x, eps=1e-5))
    zeros = norm(dtype, (6, 64), x=x, eps=0.0)  # by the equations 0 / 0, and only there
    with torch.no_grad():
        (y,) = zeros.forward()
    assert y[::2].isnan().all()
    assert y[1::2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_nothing(shape: tuple[int, ...], centered: bool) -> None:
    call = norm(shape=shape, centered=centered, residual=True, tail=2)
    found = call.run()
    assert found["y0"].shape == found["y1"].shape == found["x"].shape == shape
    assert (found["weight"] == 0).all()


def test_only_one_output_is_used() -> None:
    for used in (0, 1):
        call = norm(residual=True)
        x, weight, residual = (call.inputs[name] for name in ("x", "weight", "residual"))
        y = call.forward()[used]
        wanted = call.reference(call.inputs)[used]
        leaves = [x, residual] if used else [x, residual, weight]
        found = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        expected = torch.autograd.grad(wanted.sum(), leaves)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_x_is_its_own_residual() -> None:
    x = torch.randn(5, 33, requires_grad=True)
    ys, wanted = (f(x, None, 1e-6, x) for f in (pyft.rms_norm, reference.rms_norm))
    for y, other in zip(ys, wanted, strict=True):
        found = [torch.autograd.grad(z.square().sum(), x, retain_graph=True)[0] for z in (y, other)]
        torch.testing.assert_close(*found)


def test_the_sum_is_rounded_once_and_then_normed() -> None:
    x, residual = torch.randn(8, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    y, h = pyft.rms_norm(x, None, 1e-6, residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, pyft.rms_norm(h, None, 1e-6))


@pytest.mark.parametrize("tail", [0, 5])
def test_columns_of_a_tail(tail: int) -> None:
    x = torch.randn(2, 3, 16)
    y = pyft.rms_norm(x, None, 1e-6, tail=tail)
    assert y.shape == x.shape
    assert y.stride() == (3 * (16 + tail), 16 + tail, 1)
    assert y.untyped_storage().nbytes() >= (6 * (16 + tail)) * 4
    assert torch.equal(y, pyft.rms_norm(x, None, 1e-6))
    with pyft.backend("reference"):
        assert pyft.rms_norm(x, None, 1e-6, tail=tail).stride() == y.stride()


@pytest.mark.parametrize("case", ["rms", "rms residual", "layer", "layer residual"])
def test_keeps_statistics_of_rows_only(case: str) -> None:
    """x is the caller's, or the sum is the result's; beside them one or two fp32 a row."""
    call = norm(torch.bfloat16, **{**CASES[case], "shape": (50, 64)})
    rows = 50 * 4 * (2 if "layer" in case else 1)
    assert saved_bytes(call) <= rows + (50 * 64 * 2 if "residual" in case else 0)


def test_autocast_leaves_the_dtype_of_x() -> None:
    call = norm(residual=True)
    expected = call.run()
    with torch.autocast("cpu", torch.bfloat16):
        found = call.run()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["cpu"])
def test_float64_has_no_kernel(name: str) -> None:
    with (
        pyft.backend(name),
        pytest.raises(pyft.UsageError, match=r"cannot run norm in torch.float64; use reference"),
    ):
        norm(torch.float64).forward()


X, W = torch.ones(2, 8), torch.ones(8)
META = torch.ones(8, device="meta")
BAD: dict[str, tuple[Any, str]] = {
    "integers": (lambda: pyft.rms_norm(X.long(), W, 1e-6), r"rms_norm: x is torch.int64 \(2, 8\)"),
    "scalar": (
        lambda: pyft.layer_norm(torch.ones(()), None, None, 1e-6),
        r"layer_norm: x is .*\(\)",
    ),
    "eps": (lambda: pyft.rms_norm(X, W, -1e-6), "rms_norm: eps is -1e-06; it must be 0 or more"),
    "nan": (lambda: pyft.rms_norm(X, W, float("nan")), "rms_norm: eps is nan"),
    "weight": (
        lambda: pyft.rms_norm(X, W[:7], 1e-6),
        r"weight \(7,\) does not fit x \(2, 8\); need \(8,\)",
    ),
    "weight of rows": (lambda: pyft.rms_norm(X, X, 1e-6), r"weight \(2, 8\) does not fit"),
    "bias": (lambda: pyft.layer_norm(X, W, W[:3], 1e-6), r"layer_norm: bias \(3,\) does not fit"),
    "residual": (lambda: pyft.rms_norm(X, W, 1e-6, W), r"residual \(8,\) does not fit x \(2, 8\)"),
    "dtypes": (
        lambda: pyft.rms_norm(X, W, 1e-6, X.half()),
        "x is torch.float32 and residual is torch.float16; cast",
    ),
    "device": (lambda: pyft.rms_norm(X, META, 1e-6), "x is on cpu and weight on meta; move one"),
    "tail": (lambda: pyft.rms_norm(X, W, 1e-6, tail=-1), "rms_norm: tail is -1"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str) -> None:
    check_refused(*BAD[what])
