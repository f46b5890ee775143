"""The LoRA linear over a plain or quantized weight.

    y = x Wᵀ + bias + scale S Bᵀ    with S = drop(x) Aᵀ

    x [M, K]   W [N, K]   A [R, K]   B [N, R]   S [M, R]   y, dY [M, N]

    dS = scale dY B                       computed once, used by dX and dA
    dX = dY W + drop(dS A)                the same mask as the forward's
    dA = dSᵀ drop(x)    dB = scale dYᵀ S    dW = dYᵀ x    dbias = sum of dY over rows

Saved for the backward: x (where dA or dW is wanted) and S (where dB is), besides the weights
themselves. The decoded weight, the mask and drop(x) are made again.
Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
"""

from typing import Any

import torch
from torch import Tensor

from pyft.backend import backend, chosen, implementation, select
from pyft.errors import UsageError
from pyft.op import Op, Primitive
from pyft.ops import qlinear
from pyft.ops.dropout import apply_dropout, as_seed, check_probability
from pyft.quantized import QuantizedTensor

# The weight travels as a dense tensor, or as None with the stored tensors of a quantized one and
# their format and block size.


def _forward(
    x: Tensor,
    weight: Tensor | None,
    stored: list[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    format: str,
    block_size: int,
    out_features: int,
    scale: float,
    dropout_p: float,
    name: str,
) -> tuple[Tensor, Tensor]:
    with backend(name):
        select("lora_linear", x.device)  # raises where the backend asked for by name cannot run
    if weight is None:
        shape = (out_features, x.shape[1])
        y = qlinear.forward(x, qlinear.Stored(stored, format, block_size, shape), bias, name)
    else:
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    if lora_a is None or lora_b is None:
        return y, x.new_empty(0)
    s = torch.mm(x if seed is None else apply_dropout(x, dropout_p, seed), lora_a.t())
    return y.addmm_(s, lora_b.t(), alpha=scale), s


def _fake(
    x: Tensor,
    weight: Tensor | None,
    stored: list[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    format: str,
    block_size: int,
    out_features: int,
    scale: float,
    dropout_p: float,
    name: str,
) -> tuple[Tensor, Tensor]:
    if weight is None:  # what is decoded: a traced peak must see it
        x.new_empty(qlinear.scratch_shape(out_features, x.shape[1], x.dtype))
    s = x.new_empty(0) if lora_a is None else x.new_empty(x.shape[0], lora_a.shape[0])
    return x.new_empty(x.shape[0], out_features), s


def _gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor | None,
    stored: list[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    format: str,
    block_size: int,
    scale: float,
    dropout_p: float,
    name: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dX, dW, dA, dB, dbias; an empty tensor where ``needs`` (in that order) is false."""
    need_x, need_w, need_a, need_b, need_bias = needs
    dx, dw, da, db, dbias = (
        x.new_empty(0) for _ in range(5)
    )  # an op's outputs may not be one another
    if need_x and weight is not None:
        dx = torch.mm(dy, weight)
    elif need_x:
        shape = (dy.shape[1], x.shape[1])
        dx = qlinear.input_gradient(dy, qlinear.Stored(stored, format, block_size, shape), name)
    if lora_a is not None and lora_b is not None and (need_x or need_a):
        ds = torch.mm(dy, lora_b).mul_(scale)
        if need_x and seed is None:
            dx.addmm_(ds, lora_a)
        elif need_x and seed is not None:
            dx.add_(apply_dropout(torch.mm(ds, lora_a), dropout_p, seed))
        if need_a:
            da = torch.mm(ds.t(), x if seed is None else apply_dropout(x, dropout_p, seed))
    if need_b:
        db = torch.mm(dy.t(), s).mul_(scale)
    if need_w:
        dw = torch.mm(dy.t(), x)
    if need_bias:
        dbias = dy.sum(0)
    return dx, dw, da, db, dbias


def _fake_gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor | None,
    stored: list[Tensor],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    format: str,
    block_size: int,
    scale: float,
    dropout_p: float,
    name: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k, r = dy.shape[1], x.shape[1], 0 if lora_a is None else lora_a.shape[0]
    if needs[0] and weight is None:
        x.new_empty(qlinear.scratch_shape(k, n, x.dtype))
    shapes = ((dy.shape[0], k), (n, k), (r, k), (n, r), (n,))
    dx, dw, da, db, dbias = (
        x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)
    )
    return dx, dw, da, db, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, stored, lora_a, lora_b, bias, seed, *static = inputs
    s = output[1]
    leaves = (x, weight, lora_a, lora_b, bias)
    ctx.needs = [leaf is not None and leaf.requires_grad for leaf in leaves]
    _, need_w, need_a, need_b, _ = ctx.needs
    if not (need_w or need_a):
        x = x.new_empty(0, x.shape[1])  # dX needs only the number of columns
    if not need_b:
        s = s.new_empty(0)
    ctx.save_for_backward(x, s, weight, lora_a, lora_b, seed, *stored)
    ctx.format, ctx.block_size, _, ctx.scale, ctx.dropout_p, ctx.name = static
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    x, s, weight, lora_a, lora_b, seed, *stored = ctx.saved_tensors
    static = (ctx.format, ctx.block_size, ctx.scale, ctx.dropout_p, ctx.name)
    saved = (x, s, weight, stored, lora_a, lora_b, seed)
    found = _lora_linear_backward(dy.contiguous(), *saved, *static, ctx.needs)
    dx, dw, da, db, dbias = (
        gradient if need else None for gradient, need in zip(found, ctx.needs, strict=True)
    )
    return dx, dw, None, da, db, dbias, *(None,) * 7


_lora_linear_backward = Primitive("lora_linear_backward", _gradients, _fake_gradients)
_lora_linear = Op("lora_linear", _forward, _fake, _save, _backward)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + scale drop(x) Aᵀ Bᵀ, forward and backward, without keeping W, the mask or
    drop(x).

    Args:
        x: [..., K], any floating dtype, any strides, any number of rows, none included.
        weight: [N, K], a tensor of x's dtype or a QuantizedTensor of any dtype.
        lora_a: [R, K], or None (with lora_b) for the bare linear.
        lora_b: [N, R]. Adapters and bias of another dtype are cast to x's; their gradients come
            back in their own.
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
        bias: [N] or None.
        dropout_p: probability of dropping an input of the adapter, 0 <= p < 1.
        seed: of the dropout mask, see ``pyft.dropout``; the same seed gives the same mask on every
            backend.

    Returns:
        [..., N] of x's dtype. Inside autocast everything is cast to autocast's dtype first.

    Raises:
        UsageError: shapes or dtypes that do not fit, a backend asked for by name that cannot run.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = weight if isinstance(weight, QuantizedTensor) else weight.to(x.dtype)
    _check(x, weight, lora_a, lora_b, bias)
    check_probability("lora_linear", dropout_p)
    lora_a, lora_b, bias = (
        None if tensor is None else tensor.to(x.dtype) for tensor in (lora_a, lora_b, bias)
    )
    name = chosen()
    drawn = as_seed(seed) if dropout_p > 0 and lora_a is not None else None
    if name == "reference":
        dense = weight.to(x.dtype).dequantize() if isinstance(weight, QuantizedTensor) else weight
        mask_seed = 0 if drawn is None else int(drawn)
        reference = implementation("lora_linear", "reference").lora_linear
        plain: Tensor = reference(x, dense, lora_a, lora_b, scale, bias, dropout_p, mask_seed)
        return plain
    given: Tensor | None = weight
    stored: list[Tensor] = []
    static = ("", 0)
    if isinstance(weight, QuantizedTensor):
        given, stored, static = None, weight.parts(), (weight.format.name, weight.block_size)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    adapter = (lora_a, lora_b, bias, drawn)
    y: Tensor = _lora_linear(
        rows,
        given,
        stored,
        *adapter,
        *static,
        weight.shape[0],
        float(scale),
        float(dropout_p),
        name,
    )[0]
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(
    x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None
) -> None:
    n, k = weight.shape if weight.dim() == 2 else (0, -1)
    if x.dim() < 1 or x.shape[-1] != k:
        raise UsageError(
            f"lora_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; "
            "need [..., K] and [N, K]"
        )
    if not x.is_floating_point():
        raise UsageError(f"lora_linear: x is {x.dtype}; pass a floating tensor")
    if not isinstance(weight, QuantizedTensor) and weight.dtype != x.dtype:
        raise UsageError(
            f"lora_linear: x is {x.dtype} and weight is {weight.dtype}; cast one of them"
        )
    if (lora_a is None) != (lora_b is None):
        raise UsageError("lora_linear: lora_a and lora_b go together; pass both or neither")
    if lora_a is not None and lora_b is not None:
        r = lora_a.shape[0] if lora_a.dim() == 2 else -1
        if lora_a.shape != (r, k) or lora_b.shape != (n, r):
            raise UsageError(
                f"lora_linear: lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} "
                f"do not fit weight {(n, k)}; need [R, {k}] and [{n}, R]"
            )
    for what, tensor in (
        ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias),
    ):  # fmt: skip
        if tensor is not None and tensor.device != x.device:
            raise UsageError(
                f"lora_linear: x is on {x.device} and {what} on {tensor.device}; move one of them"
            )
    if bias is not None and bias.shape != (n,):
        raise UsageError(
            f"lora_linear: bias {tuple(bias.shape)} does not fit weight {(n, k)}; need [{n}]"
        )
