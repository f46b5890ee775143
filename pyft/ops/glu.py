"""Gated activations: y = act(gate) up, and act(gate) where there is no ``up``.

    dgate = dY up act'(gate)        dup = dY act(gate)

Saved for the backward: gate and up; act(gate) is computed again.
Sources: Shazeer, GLU Variants Improve Transformer (2020); So et al., Primer (2021).
"""

from typing import Any

from torch import Tensor

from pyft.backend import chosen, device_guard, implementation, launcher
from pyft.errors import UsageError
from pyft.op import Op, Primitive
from pyft.ops.shared.rows import as_rows, empty_rows, rows_with_room

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


def forward(gate: Tensor, up: Tensor | None, activation: str, name: str, tail: int = 0) -> Tensor:
    """y of rows gate and up [M, I]: the left part of a buffer with ``tail`` more columns."""
    m, i = gate.shape
    y = rows_with_room(gate, m, i, tail)
    kernels = launcher("glu", gate, name)
    if kernels is None:
        y.copy_(implementation("glu", "reference").glu(gate, up, activation))
    elif y.numel():
        with device_guard(gate):
            kernels.glu(as_rows(gate), None if up is None else as_rows(up), activation, y)
    return y


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    dgate: Tensor,
    dup: Tensor | None,
    y: Tensor | None,
    name: str,
) -> None:
    """Write the gradients, and y again where it is given, which may lie in the inputs' memory."""
    kernels = launcher("glu", gate, name)
    if kernels is None:
        reference = implementation("glu", "reference")
        again = None if y is None else reference.glu(gate, up, activation)
        found = reference.glu_backward(dy, gate, up, activation)
        for into, value in zip((dgate, dup, y), (*found, again), strict=True):
            if into is not None:
                into.copy_(value)
    elif dgate.numel():
        with device_guard(gate):
            rows = (as_rows(dy), as_rows(gate), None if up is None else as_rows(up))
            kernels.glu_backward(*rows, activation, dgate, dup, y)


def _forward(gate: Tensor, up: Tensor | None, activation: str, name: str) -> Tensor:
    return forward(gate, up, activation, name)


def _fake(gate: Tensor, up: Tensor | None, activation: str, name: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _gradients(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, name: str
) -> tuple[Tensor, Tensor]:
    dgate = empty_rows(gate, *gate.shape)
    dup = gate.new_empty(0) if up is None else empty_rows(up, *up.shape)
    backward(dy, gate, up, activation, dgate, None if up is None else dup, None, name)
    return dgate, dup


def _fake_gradients(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, name: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.name = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = _glu_backward(dy, gate, up, ctx.activation, ctx.name)
    return dgate, None if up is None else dup, None, None


_glu_backward = Primitive("glu_backward", _gradients, _fake_gradients)
_glu = Op("glu", _forward, _fake, _save, _backward)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, in fp32, rounded once.

    Args:
        gate, up: [..., I] of one floating dtype, any strides: halves of one tensor, say.

    Returns:
        [..., I] of the same dtype.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit; a backend asked for by name that
            cannot run.
    """
    return _checked("swiglu", gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) up; approximate: "none" for the exact one, or "tanh". Otherwise as ``swiglu``."""
    if approximate not in ("none", "tanh"):
        raise UsageError(f'geglu: approximate is {approximate!r}; it must be "none" or "tanh"')
    return _checked("geglu", gate, up, "gelu" if approximate == "none" else "gelu_tanh")


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)² of any shape. Otherwise as ``swiglu``."""
    return _checked("relu2", x, None, "relu2")


def _checked(op: str, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if not gate.is_floating_point():
        raise UsageError(f"{op}: the input is {gate.dtype}; pass a floating tensor")
    if up is not None and (up.shape, up.dtype) != (gate.shape, gate.dtype):
        raise UsageError(
            f"{op}: gate is {gate.dtype} {tuple(gate.shape)} and up is {up.dtype} "
            f"{tuple(up.shape)}; they must be alike"
        )
    if up is not None and up.device != gate.device:
        raise UsageError(f"{op}: gate is on {gate.device} and up on {up.device}; move one of them")
    if chosen() == "reference":
        plain: Tensor = implementation("glu", "reference").glu(gate, up, activation)
        return plain
    shape = gate.shape or (1,)
    rows = [None if t is None else as_rows(t.reshape(shape)) for t in (gate, up)]
    y: Tensor = _glu(*rows, activation, chosen())
    return y.view(gate.shape)
