"""What ``pyft.attention`` is given, looked at before anything is computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyft.backend import chosen
from pyft.errors import UsageError
from pyft.ops.dropout import check_probability

Window = int | tuple[int | None, int | None]


def as_autocast(*heads: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the dtype of autocast, as torch casts them for attention."""
    device = heads[0].device.type
    if not torch.is_autocast_enabled(device):
        return heads
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in heads)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, host: bool = False) -> None:
    """Raise UsageError unless q, k and v are heads that fit one another; ``host``: k and v may be
    on the CPU.
    """
    if q.dim() != 4 or not q.is_floating_point():
        raise UsageError(
            f"attention: q is {q.dtype} {tuple(q.shape)}; pass floating [B, Hq, Sq, D]"
        )
    b, hq, _, d = q.shape
    if d == 0:
        raise UsageError(f"attention: q {tuple(q.shape)} has heads of no dimensions")
    if k.dim() != 4 or (k.shape[0], k.shape[3]) != (b, d):
        raise UsageError(
            f"attention: k {tuple(k.shape)} does not fit q {tuple(q.shape)}; "
            f"need [{b}, Hkv, Sk, {d}]"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise UsageError(
            f"attention: v {tuple(v.shape)} does not fit k {tuple(k.shape)}; "
            f"need [{', '.join(map(str, k.shape[:3]))}, Dv]"
        )
    hkv = k.shape[1]
    if hq != 0 and (hkv == 0 or hq % hkv != 0):
        raise UsageError(
            f"attention: {hq} query heads are no multiple of {hkv} key heads; each key head serves "
            "as many query heads"
        )
    for what, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise UsageError(
                f"attention: q is {q.dtype} and {what} is {tensor.dtype}; cast one of them"
            )
        if not host or tensor.device.type != "cpu":
            _same_device(q, what, tensor)


def check_scores(
    q: Tensor,
    k: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    dropout_p: float,
) -> None:
    """Raise UsageError unless what changes scores fits q and k."""
    check_probability("attention", dropout_p)
    if softcap is not None and not 0 < softcap < math.inf:
        raise UsageError(f"attention: softcap is {softcap}; pass a positive number, or None")
    b, hq, sq = q.shape[:3]
    if sinks is not None and (sinks.shape != (hq,) or not sinks.is_floating_point()):
        raise UsageError(
            f"attention: sinks are {sinks.dtype} {tuple(sinks.shape)}; need floating [{hq}]"
        )
    full = (b, hq, sq, k.shape[2])
    if bias is not None and not (bias.is_floating_point() and _expands(bias, full)):
        hint = "; turn a mask into 0 and -inf" if bias.dtype == torch.bool else ""
        raise UsageError(
            f"attention: bias is {bias.dtype} {tuple(bias.shape)}; need floating {full}, or 1 in "
            f"place of any of these{hint}"
        )
    if slopes is not None:
        if slopes.shape not in ((hq,), (b, hq)) or not slopes.is_floating_point():
            raise UsageError(
                f"attention: alibi_slopes are {slopes.dtype} {tuple(slopes.shape)}; need floating "
                f"[{hq}] or [{b}, {hq}]"
            )
        if slopes.requires_grad and torch.is_grad_enabled() and chosen() != "reference":
            raise UsageError(
                "attention: alibi_slopes require a gradient, which they do not get; detach them, "
                'or use pyft.backend("reference")'
            )
    for what, tensor in (("sinks", sinks), ("bias", bias), ("alibi_slopes", slopes)):
        _same_device(q, what, tensor)


def check_packed(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Boundaries of queries and of keys, filled in; UsageError where they are none."""
    if cu_q is None:
        if cu_k is not None:
            raise UsageError("attention: cu_seqlens_k without cu_seqlens_q; pass both")
        return None, None
    if q.shape[0] != 1:
        raise UsageError(
            f"attention: cu_seqlens with a batch of {q.shape[0]}; let the rows follow one another, "
            "[1, H, B S, D]"
        )
    if bias is not None:
        raise UsageError("attention: bias with cu_seqlens; pass sequences with a bias unpacked")
    if cu_k is None:
        if q.shape[2] != k.shape[2]:
            raise UsageError(
                f"attention: {q.shape[2]} queries and {k.shape[2]} keys; pass cu_seqlens_k"
            )
        cu_k = cu_q
    for what, cu, length, longest in (
        ("q", cu_q, q.shape[2], max_q),
        ("k", cu_k, k.shape[2], max_k),
    ):
        if cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise UsageError(
                f"attention: cu_seqlens_{what} is {cu.dtype} {tuple(cu.shape)}; need int32 [n + 1]"
            )
        _same_device(q, f"cu_seqlens_{what}", cu)
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_boundaries(what, cu, length, longest)
    if cu_q.shape != cu_k.shape:
        raise UsageError(
            f"attention: cu_seqlens of {cu_q.numel() - 1} sequences of queries and "
            f"{cu_k.numel() - 1} of keys"
        )
    return cu_q, cu_k


def _check_boundaries(what: str, cu: Tensor, length: int, longest: int | None) -> None:
    if torch._subclasses.fake_tensor.is_fake(cu):
        return
    lengths = cu.diff()
    if int(cu[0]) != 0 or int(cu[-1]) != length or bool((lengths < 0).any()):
        raise UsageError(
            f"attention: cu_seqlens_{what} must ascend from 0 to {length}; "
            f"it is {_shortened(cu.tolist())}"
        )
    if longest is not None and lengths.numel() and int(lengths.max()) > longest:
        raise UsageError(
            f"attention: max_seqlen_{what} is {longest}, but a sequence has {int(lengths.max())}"
        )


def _shortened(numbers: list[int]) -> str:
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{', '.join(map(str, numbers[:4]))}, ..., {', '.join(map(str, numbers[-3:]))}]"


def bounds(causal: bool, window: Window | None) -> tuple[int | None, int | None]:
    """How far before and after itself a query sees keys; None: without an end."""
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise UsageError(f"attention: window is {window}; it counts the query's own key too")
        left: int | None = window - 1
        right: int | None = window - 1
    elif window is None:
        left, right = None, None
    elif (
        isinstance(window, tuple | list)
        and len(window) == 2
        and all(bound is None or isinstance(bound, int) for bound in window)
    ):
        left, right = window
    else:
        raise UsageError(f"attention: window is {window!r}; pass W or (left, right), integers")
    return left, 0 if causal and (right is None or right > 0) else right


def check_buffers(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, gradients: Sequence[Tensor] | None
) -> list[Tensor | None]:
    """Buffers for o, dq, dk and dv; none at all where no one is given."""
    if out is None and gradients is None:
        return []
    if gradients is not None and len(gradients) != 3:
        raise UsageError(f"attention: {len(gradients)} gradients; pass buffers for q, k and v")
    dq, dk, dv = gradients or (None, None, None)
    o_shape = (*q.shape[:3], v.shape[3])
    for what, buffer, shape in (
        ("out", out, o_shape), ("gradients[0]", dq, q.shape),
        ("gradients[1]", dk, k.shape), ("gradients[2]", dv, v.shape),
    ):  # fmt: skip
        if buffer is None:
            continue
        if buffer.shape != shape or buffer.dtype != q.dtype or buffer.stride(3) != 1:
            raise UsageError(
                f"attention: {what} is {buffer.dtype} {tuple(buffer.shape)} with strides "
                f"{buffer.stride()}; need {q.dtype} {tuple(shape)}, the last stride 1"
            )
        _same_device(q, what, buffer)
    return [out, dq, dk, dv]


def _expands(x: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    return len(sizes) == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)
    )


def _same_device(q: Tensor, what: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.device != q.device:
        raise UsageError(
            f"attention: q is on {q.device} and {what} on {tensor.device}; move one of them"
        )
