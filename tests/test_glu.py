"""swiglu, geglu and relu2 against the reference in float64, and what they keep."""

from typing import Any

import pytest
import torch
from lora_cases import Call, check_close, check_rule, saved_bytes
from op_behaviours import BEHAVIOUR, check_refused, gradcheck
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, dtype_name
from torch import Tensor

import pyft
from pyft.reference.glu import glu as reference

ACTIVATIONS: dict[str, tuple[Any, str]] = {
    "swiglu": (pyft.swiglu, "silu"),
    "geglu": (pyft.geglu, "gelu"),
    "geglu tanh": (lambda gate, up: pyft.geglu(gate, up, approximate="tanh"), "gelu_tanh"),
    "relu2": (pyft.relu2, "relu2"),
}
OP = pytest.mark.parametrize("op", ACTIVATIONS)
DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
SHAPES = [(), (1,), (65,), (1, 1), (9, 33), (2, 3, 100), (1, 4099), (300, 3)]


def glu(
    op: str,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (5, 33),
    spread: float = 2.0,
) -> Call:
    function, activation = ACTIVATIONS[op]
    names = ("gate",) if op == "relu2" else ("gate", "up")
    inputs = {name: (torch.randn(shape) * spread).to(dtype).requires_grad_() for name in names}
    return Call(
        "glu",
        inputs,
        lambda t: (function(*(t[name] for name in names)),),
        lambda t: (reference(t["gate"], t.get("up"), activation),),
        grows=False,
    )


@OP
@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape: tuple[int, ...], dtype: torch.dtype, op: str) -> None:
    if dtype == torch.float64:
        check_close(glu(op, dtype, shape))
    else:
        check_rule(lambda: glu(op, dtype, shape), draws=24 if len(shape) < 2 else 6)


@OP
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_small_and_large_values(spread: float, dtype: torch.dtype, op: str) -> None:
    check_rule(lambda: glu(op, dtype, spread=spread))


@BEHAVIOUR
@pytest.mark.parametrize("op", ["swiglu", "relu2"])
def test_behaviour(op: str, behaviour: Any) -> None:
    behaviour(glu(op, shape=(2, 3, 20)))


@OP
def test_gradcheck(op: str) -> None:
    gradcheck(glu(op, torch.float64, (3, 5)))


@OP
@pytest.mark.parametrize("shape", [(0,), (0, 8), (2, 0, 4), (3, 0)], ids=str)
def test_nothing(shape: tuple[int, ...], op: str) -> None:
    assert all(value.shape == shape for value in glu(op, shape=shape).run().values())


@OP
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
def test_against_torch(dtype: torch.dtype, op: str) -> None:
    """The activations are torch's, in float64."""
    gate, up = (torch.randn(40, 33).to(dtype) for _ in range(2))
    g, u = gate.double(), up.double()
    wanted = {
        "swiglu": torch.nn.functional.silu(g) * u,
        "geglu": torch.nn.functional.gelu(g) * u,
        "geglu tanh": torch.nn.functional.gelu(g, approximate="tanh") * u,
        "relu2": torch.relu(g) ** 2,
    }[op]
    found = ACTIVATIONS[op][0](*((gate,) if op == "relu2" else (gate, up)))
    assert found.dtype == dtype
    # Rounded once: half an ulp of each number, and a little of the fp32 inside.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = 0.5 * torch.finfo(dtype).eps * wanted.abs() + 1e-6 * (g * u).abs() + tiny
    if dtype == torch.float32:
        allowed += 4 * torch.finfo(dtype).eps * wanted.abs()
    if op == "relu2":
        allowed += 1e-6 * wanted
    assert ((found.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_halves_of_one_tensor(op: str) -> None:
    both = torch.randn(2, 3, 40, requires_grad=True)
    found, wanted = (function(*both.chunk(2, -1)) for function in (ACTIVATIONS[op][0], glu_of(op)))
    torch.testing.assert_close(found, wanted)
    dy = torch.randn(2, 3, 20)
    gradients = [torch.autograd.grad(y, both, dy)[0] for y in (found, wanted)]
    torch.testing.assert_close(*gradients)


def glu_of(op: str) -> Any:
    return lambda gate, up: reference(gate, up, ACTIVATIONS[op][1])


def test_gate_and_up_are_one() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    gradients = [
        torch.autograd.grad(function(x, x).sum(), x)[0]
        for function in (pyft.swiglu, glu_of("swiglu"))
    ]
    torch.testing.assert_close(*gradients)


def test_zero_dimensions_and_broadcast_rows() -> None:
    row = torch.randn(1, 16).expand(5, 16)
    up = torch.randn(5, 16)
    assert torch.equal(pyft.swiglu(row, up), pyft.swiglu(row.contiguous(), up))


def test_relu2_at_and_below_zero() -> None:
    x = torch.tensor([-3.0, -0.0, 0.0, 2.0], requires_grad=True)
    y = pyft.relu2(x)
    assert y.tolist() == [0, 0, 0, 4]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0, 0, 0, 4]


@OP
def test_keeps_its_inputs_only(op: str) -> None:
    assert saved_bytes(glu(op, shape=(50, 64))) == 0


@OP
def test_autocast_leaves_the_dtype(op: str) -> None:
    call = glu(op)
    with torch.autocast("cpu", torch.bfloat16):
        assert call.run()["y0"].dtype == torch.float32


def test_float64_has_no_kernel() -> None:
    with (
        pyft.backend("cpu"),
        pytest.raises(pyft.UsageError, match=r"cannot run glu in torch.float64; use reference"),
    ):
        glu("swiglu", torch.float64).forward()


X: Tensor = torch.ones(2, 8)
BAD: dict[str, tuple[Any, str]] = {
    "integers": (
        lambda: pyft.swiglu(X.int(), X.int()),
        "swiglu: the input is torch.int32; pass a floating",
    ),
    "relu2": (lambda: pyft.relu2(X.long()), "relu2: the input is torch.int64; pass a floating"),
    "shapes": (
        lambda: pyft.geglu(X, X[:1]),
        r"geglu: gate is .*\(2, 8\) and up is .*\(1, 8\); they must be alike",
    ),
    "dtypes": (
        lambda: pyft.swiglu(X, X.half()),
        "gate is torch.float32 .* and up is torch.float16",
    ),
    "device": (
        lambda: pyft.swiglu(X, X.to("meta")),
        "swiglu: gate is on cpu and up on meta; move one",
    ),
    "approximate": (lambda: pyft.geglu(X, X, "exact"), "geglu: approximate is 'exact'; it must be"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str) -> None:
    check_refused(*BAD[what])
