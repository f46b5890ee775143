"""Rotary position embedding of queries and keys, and its inverse, which is its gradient.

    first' = first cos - second sin        second' = second cos + first sin

Nothing but cos, sin and positions is saved: dq and dk are turned back by the same angles.
Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021).
"""

from typing import Any

import torch
from torch import Tensor

from pyft.backend import chosen, device_guard, implementation, launcher
from pyft.errors import UsageError
from pyft.op import Op, Primitive
from pyft.ops.shared.heads import adjacent, empty_heads


def _turn(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    kernels = launcher("rope", q, name)
    if kernels is None:
        turn = implementation("rope", "reference").rope
        turned = turn(q, k, cos, -sin if inverse else sin, positions, interleaved)
        return turned[0], q.new_empty(0) if k is None else turned[1]
    if positions is not None and q.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= cos.shape[0]:
            raise UsageError(
                f"rope: positions reach from {low} to {high}; cos and sin have rows 0 to "
                f"{cos.shape[0] - 1}"
            )
    q, k = adjacent(q), None if k is None else adjacent(k)
    q_out = empty_heads(q)
    k_out = q.new_empty(0) if k is None else empty_heads(k)
    if q.numel() + k_out.numel():
        tables = (adjacent(cos), adjacent(sin), positions)
        with device_guard(q):
            kernels.rope(q, k, *tables, interleaved, inverse, q_out, None if k is None else k_out)
    return q_out, k_out


def _fake(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty(0) if k is None else empty_heads(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, cos, sin, positions, *static = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.interleaved, ctx.inverse, ctx.name = static
    ctx.with_keys = k is not None
    if k is None:
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    keys = dk if ctx.with_keys else None
    static = (ctx.interleaved, not ctx.inverse, ctx.name)
    dq, dk = _rope_backward(dq, keys, cos, sin, positions, *static)
    return dq, dk if ctx.with_keys else None, *(None,) * 6


_rope_backward = Primitive("rope_backward", _turn, _fake)
_rope = Op("rope", _turn, _fake, _save, _backward)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Turn the first R of each head's D dimensions, in R/2 pairs, by angles given as cos and sin.

    Args:
        q: [B, Hq, S, D], any floating dtype, any strides.
        k: [B, Hkv, S, D] of q's dtype, or None.
        cos, sin: [B or 1, S, R/2], of each token, or with positions tables [P, R/2]; R <= D; of q's
            dtype or fp32. They get no gradient.
        positions: integers [B, S], 0 <= p < P: of packed sequences, say. Checked on a CPU only: a
            GPU would have to be waited for.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        q and k turned, in memory [B, S, H, D].

    Raises:
        UsageError: shapes, dtypes or devices that do not fit; a backend asked for by name that
            cannot run.
    """
    if chosen() != "reference":
        _refuse_learned(cos, sin)
    _check(q, k, cos, sin, positions)
    if cos.dtype not in (q.dtype, torch.float32):
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    positions = None if positions is None else positions.long()
    if chosen() == "reference":
        turn = implementation("rope", "reference").rope
        turned: tuple[Tensor, Tensor | None] = turn(q, k, cos, sin, positions, interleaved)
        return turned
    q_out, k_out = _rope(q, k, cos, sin, positions, interleaved, False, chosen())
    return q_out, None if k is None else k_out


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise UsageError(f"rope: q is {q.dtype} {tuple(q.shape)}; pass floating [B, H, S, D]")
    b, _, s, d = q.shape
    if k is not None and (k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (b, s, d)):
        raise UsageError(
            f"rope: k {tuple(k.shape)} does not fit q {tuple(q.shape)}; need [{b}, H, {s}, {d}]"
        )
    if k is not None and k.dtype != q.dtype:
        raise UsageError(f"rope: q is {q.dtype} and k is {k.dtype}; cast one of them")
    if cos.shape != sin.shape or cos.dtype != sin.dtype or not cos.is_floating_point():
        raise UsageError(
            f"rope: cos {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)} "
            "must be floating tensors of one shape and dtype"
        )
    table = positions is not None
    fits = cos.dim() == 2 if table else cos.dim() == 3 and cos.shape[0] in (1, b)
    if not fits or (not table and cos.shape[1] != s) or not 0 < 2 * cos.shape[-1] <= d:
        need = f"[P, R/2] with R <= {d}" if table else f"[{b} or 1, {s}, R/2] with R <= {d}"
        raise UsageError(
            f"rope: cos {tuple(cos.shape)} does not fit q {tuple(q.shape)}; need {need}"
        )
    if positions is not None and (positions.shape != (b, s) or positions.is_floating_point()):
        raise UsageError(
            f"rope: positions are {positions.dtype} {tuple(positions.shape)}; "
            f"need integers {(b, s)}"
        )
    for what, tensor in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        if tensor is not None and tensor.device != q.device:
            raise UsageError(
                f"rope: q is on {q.device} and {what} on {tensor.device}; move one of them"
            )


def _refuse_learned(cos: Tensor, sin: Tensor) -> None:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise UsageError(
            "rope: cos and sin require a gradient, which they do not get; detach them, or use "
            'pyft.backend("reference")'
        )
