"""RMSNorm and LayerNorm over the last dimension, with the residual added first.

    h = x + residual                              rounded to x's dtype
    x̂ = (h - mean) rstd                           rstd = 1 / sqrt(mean((h - mean)²) + eps)
    y = x̂ (offset + weight) + bias                RMSNorm: mean 0, no bias

    g = dY (offset + weight)
    dX = rstd (g - mean(g) - x̂ mean(g x̂)) + dH    RMSNorm: without mean(g)
    dweight = sum of dY x̂ over rows    dbias = sum of dY over rows

    x, h, y [M, D]   weight, bias [D]   mean, rstd [M] in fp32

Saved for the backward: h, which is x itself where there is no residual, mean and rstd.
Sources: Zhang and Sennrich, Root Mean Square Layer Normalization (2019); Ba et al., Layer
Normalization (2016).
"""

from typing import Any

import torch
from torch import Tensor

from pyft.backend import chosen, device_guard, implementation, launcher
from pyft.errors import UsageError
from pyft.op import Op, Primitive
from pyft.ops.shared.rows import as_rows, empty_rows, rows_with_room

# Partial sums of a weight's gradient: their number on a device's type, of at least so many rows
# each, and of at most _MOST_ROWS, which one fp32 sum may run over.
_PARTS = {"cpu": (64, 16)}
_PARTS_ELSEWHERE = (512, 4)
_MOST_ROWS = 512


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    tail: int,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, mean, rstd of rows x [M, D]; h is empty without a residual, mean unless ``centered``.

    y is the left part of a buffer with ``tail`` more columns.
    """
    m, d = x.shape
    y = rows_with_room(x, m, d, tail)
    h = x.new_empty(0) if residual is None else empty_rows(x, m, d)
    mean = x.new_empty(m if centered else 0, dtype=torch.float32)
    rstd = x.new_empty(m, dtype=torch.float32)
    kernels = launcher("norm", x, name)
    if kernels is None:
        found, total = _reference(x, residual, weight, bias, eps, offset, centered)
        y.copy_(found)
        if residual is not None:
            h.copy_(total)
    elif x.numel():
        with device_guard(x):
            kernels.norm(
                as_rows(x),
                None if residual is None else as_rows(residual),
                weight,
                bias,
                eps,
                offset,
                centered,
                y,
                None if residual is None else h,
                mean if centered else None,
                rstd,
            )
    return y, h, mean, rstd


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    tail: int,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, d = x.shape
    h = x.new_empty(0) if residual is None else x.new_empty(m, d)
    mean = x.new_empty(m if centered else 0, dtype=torch.float32)
    return x.new_empty_strided((m, d), (d + tail, 1)), h, mean, x.new_empty(m, dtype=torch.float32)


def _gradients(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    need_weight: bool,
    need_bias: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dweight and dbias, the last two empty where they are not needed."""
    m, d = h.shape
    kernels = launcher("norm", h, name)
    if kernels is None:
        return _reference_gradients(
            dy, h, weight, bias, dh, eps, offset, centered, need_weight, need_bias
        )
    most, least_rows = _PARTS.get(h.device.type, _PARTS_ELSEWHERE)
    parts = max(1, min(-(-m // least_rows), most), -(-m // _MOST_ROWS))
    dx = empty_rows(h, m, d)
    dweight, dbias = (
        h.new_empty((parts, d) if need else 0, dtype=torch.float32)
        for need in (need_weight, need_bias)
    )
    if h.numel():
        with device_guard(h):
            kernels.norm_backward(
                as_rows(dy),
                as_rows(h),
                weight,
                mean if centered else None,
                rstd,
                offset,
                None if dh is None else as_rows(dh),
                dx,
                dweight if need_weight else None,
                dbias if need_bias else None,
            )
    else:
        dweight.zero_()
        dbias.zero_()
    return dx, _sum(dweight, weight), _sum(dbias, bias)


def _sum(parts: Tensor, like: Tensor | None) -> Tensor:
    return parts if like is None or parts.dim() == 1 else parts.sum(0).to(like.dtype)


def _fake_gradients(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    need_weight: bool,
    need_bias: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (
        h.new_empty(0) if like is None or not need else torch.empty_like(like)
        for like, need in ((weight, need_weight), (bias, need_bias))
    )
    return h.new_empty(h.shape), dweight, dbias


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    reference = implementation("norm", "reference")
    found: tuple[Tensor, Tensor] = (
        reference.layer_norm(x, weight, bias, eps, residual)
        if centered
        else reference.rms_norm(x, weight, eps, residual, offset)
    )
    return found


def _reference_gradients(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dh: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        x = h.detach().requires_grad_()
        w, b = (None if t is None else t.detach().requires_grad_() for t in (weight, bias))
        y, _ = _reference(x, None, w, b, eps, offset, centered)
        leaves = (x, w, b)
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    dx, dweight, dbias = (h.new_empty(0) if leaf is None else next(found) for leaf in leaves)
    return (
        dx if dh is None else dx + dh,
        dweight if need_weight else h.new_empty(0),
        dbias if need_bias else h.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, *static = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, bias, mean, rstd)
    ctx.needs = [t is not None and t.requires_grad for t in (weight, bias)]
    ctx.summed = residual is not None
    ctx.eps, ctx.offset, ctx.centered, _, ctx.name = static
    ctx.mark_non_differentiable(mean, rstd, *(() if ctx.summed else (h,)))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Tensor | None, __: Tensor | None
) -> tuple[Tensor | None, ...]:
    h, weight, bias, mean, rstd = ctx.saved_tensors
    dh = dh if ctx.summed else None
    if dy is None:
        if dh is None:
            return (None,) * 9
        dy = torch.zeros_like(h)
    dx, dweight, dbias = _norm_backward(
        dy, h, weight, bias, mean, rstd, dh, ctx.eps, ctx.offset, ctx.centered, *ctx.needs, ctx.name
    )
    return (
        dx,
        dx.clone() if ctx.summed else None,  # two leaves' gradients may not be one tensor
        dweight if ctx.needs[0] else None,
        dbias if ctx.needs[1] else None,
        *(None,) * 5,
    )


_norm_backward = Primitive("norm_backward", _gradients, _fake_gradients)
_norm = Op("norm", forward, _fake, _save, _backward)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    tail: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps) (offset + weight) over the last dimension, in fp32, rounded once.

    Args:
        x: [..., D], any floating dtype, any strides, any number of rows, none included.
        weight: [D] or None; of another dtype it is cast to x's.
        eps: added to the mean square.
        residual: [..., D] of x's dtype, added to x first; the sum is returned too.
        offset: added to the weight: 1 for Gemma's norms, whose weights are stored around 0.
        tail: 0 or more; the rows returned are D of D + tail columns of a buffer, which
            ``pyft.NormInput`` gives to an op.

    Returns:
        y [..., D], or with a residual (y, x + residual).

    Raises:
        UsageError: shapes, dtypes or devices that do not fit; a backend asked for by name that
            cannot run.
    """
    return _checked("rms_norm", x, weight, None, eps, residual, offset, False, tail)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    tail: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean(x)) / sqrt(variance(x) + eps) weight + bias over the last dimension, in fp32,
    rounded once.

    Arguments, result and errors as ``pyft.rms_norm``; bias: [D] or None.
    """
    return _checked("layer_norm", x, weight, bias, eps, residual, 0.0, True, tail)


def _checked(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    offset: float,
    centered: bool,
    tail: int,
) -> Tensor | tuple[Tensor, Tensor]:
    if x.dim() < 1 or not x.is_floating_point():
        raise UsageError(f"{op}: x is {x.dtype} {tuple(x.shape)}; pass a floating tensor [..., D]")
    for what, value in (("eps", eps), ("tail", tail)):
        if not value >= 0:
            raise UsageError(f"{op}: {what} is {value}; it must be 0 or more")
    for what, tensor, shape in (
        ("weight", weight, x.shape[-1:]), ("bias", bias, x.shape[-1:]),
        ("residual", residual, x.shape),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != shape:
            raise UsageError(
                f"{op}: {what} {tuple(tensor.shape)} does not fit x {tuple(x.shape)}; "
                f"need {tuple(shape)}"
            )
        if tensor is not None and tensor.device != x.device:
            raise UsageError(
                f"{op}: x is on {x.device} and {what} on {tensor.device}; move one of them"
            )
    if residual is not None and residual.dtype != x.dtype:
        raise UsageError(f"{op}: x is {x.dtype} and residual is {residual.dtype}; cast one of them")
    weight, bias = (
        None if tensor is None else tensor.to(x.dtype).contiguous() for tensor in (weight, bias)
    )
    name = chosen()
    if name == "reference":
        y, h = _reference(x, residual, weight, bias, eps, offset, centered)
        if tail:
            y = torch.nn.functional.pad(y, (0, tail)).narrow(-1, 0, x.shape[-1])
    else:
        rows = as_rows(x)
        more = None if residual is None else as_rows(residual)
        arguments = (float(eps), float(offset), centered, tail, name)
        y, h, _, _ = _norm(rows, more, weight, bias, *arguments)
        y = y.view(x.shape)
        h = h if residual is None else h.view(x.shape)
    return y if residual is None else (y, h)
