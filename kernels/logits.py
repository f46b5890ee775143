"""Statistics of a tile of logits, a row at a time, and the tile's gradient in its place.

    u = softcap tanh(scale z / softcap), or scale z          lse = log Σ exp(u_c)
    target = u_y      smooth = Σ w_c u_c      mean = Σ p_c u_c, p_c = exp(u_c - lse)
    cross = Σ q_c (u_c - t_c), t and q the teacher's u and p
    top, argmax: the first of the largest u

    dz_c = scale (1 - (u_c / softcap)²) (p_c (g_lse + g_mean (1 + u_c - mean))
                                         + [c = y] g_target + w_c g_smooth + q_c g_cross)

A tile has few rows and many columns: a program has one row's next TILE columns, all in registers,
so that z is read once for its largest and for its sums. Where a row has more, its parts' numbers
are merged by a second kernel, in order. How a row is cut depends on its length alone: the same bits
twice, and whatever rows lie beside it. The gradient's programs go from the last row to the first,
which is what the cache still holds after the statistics.

Bytes moved with 2-byte elements: statistics 2 M V and 16 to 48 a part, gradient 4 M V; 2 M V more
in each with a teacher. Class weights come from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.tiles import INFINITY, tanh

# Lengths and strides that are multiples of it are known to be when a kernel is compiled.
EVEN = 16

# z, labels, class weights, scale, softcap, the teacher's logits, their lse, scale and softcap
LogitTile = tuple[
    Tensor, Tensor, Tensor | None, float, float | None,
    Tensor | None, Tensor | None, float, float | None,
]  # fmt: skip


@triton.jit
def load_wide(ptrs, mask, whole):
    """In fp32; ``whole``: the mask holds everywhere, and accesses can be wider without."""
    x = tl.load(ptrs) if whole else tl.load(ptrs, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def capped(z, factor, cap, SOFTCAP: tl.constexpr):
    """u and the tanh in it, of z times ``factor``."""
    u = z * factor
    bent = u
    if SOFTCAP:
        bent = tanh(u, True)
        u = bent * cap
    return u, bent


@triton.jit
def base_of(peak):
    """What is taken off before exp: the largest, or 0 where that is infinite."""
    return tl.where(tl.abs(peak) == INFINITY, 0.0, peak)


@triton.jit
def weighted_sum(weight, u):
    """Σ weight u, where 0 times an infinity is 0."""
    return tl.sum(tl.where(weight == 0, 0.0, weight * u), axis=0)


@triton.jit
def store_statistics(
    row, V, sums, z_ptrs, labels_ptr, outputs, factor, cap, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Of one row; sums: largest, Σ exp(u - base), smooth, Σ exp(u - base) u, cross, argmax."""
    peak, total, smooth, weighted, cross, first = sums
    lse_ptr, target_ptr, smooth_ptr, mean_ptr, cross_ptr, top_ptr, argmax_ptr = outputs
    tl.store(lse_ptr + row, base_of(peak) + tl.log(total))
    if target_ptr is not None:
        label = tl.load(labels_ptr + row)
        found = (label >= 0) & (label < V)
        u, _ = capped(load_wide(z_ptrs + label, found, False), factor, cap, SOFTCAP)
        tl.store(target_ptr + row, tl.where(found, u, 0.0))
    if smooth_ptr is not None:
        tl.store(smooth_ptr + row, smooth)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, weighted / total)
    if cross_ptr is not None:
        tl.store(cross_ptr + row, cross)
    if top_ptr is not None:  # a maximum passes over NaN, a sum does not
        tl.store(top_ptr + row, tl.where(total == total, peak, total))
    if argmax_ptr is not None:
        tl.store(argmax_ptr + row, tl.minimum(first, V - 1).to(tl.int64))


@triton.jit
def statistics_kernel(
    z_ptr, labels_ptr, weights_ptr, teacher_ptr, teacher_lse_ptr, parts_ptr, lse_ptr, target_ptr,
    smooth_ptr, mean_ptr, cross_ptr, top_ptr, argmax_ptr, V, factor, cap, teacher_factor,
    teacher_cap, stride_zm, stride_tm,
    SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """TILE columns of one row, to fp32 parts [6, M, parts], or of all of a row to the outputs;
    RAGGED as ``_is_ragged`` says.
    """
    parts = tl.cdiv(V, TILE)
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    start = pid % parts * TILE
    offs = tl.arange(0, TILE)
    mask = offs < V - start
    whole = V - start >= TILE if RAGGED else False
    z_ptrs = z_ptr + row * stride_zm
    z = load_wide(z_ptrs + start + offs, mask, whole)
    u, _ = capped(z, factor, cap, SOFTCAP)
    u = tl.where(mask, u, -INFINITY)
    peak = tl.max(u, axis=0)
    rise = tl.exp(u - base_of(peak))
    total = tl.sum(rise, axis=0)
    smooth, weighted, cross, first = total, total, total, start
    if smooth_ptr is not None:
        share = u
        if weights_ptr is not None:
            share *= tl.load(weights_ptr + start + offs, mask=mask, other=0.0)
        smooth = tl.sum(tl.where(mask, share, 0.0), axis=0)
    if mean_ptr is not None:
        weighted = weighted_sum(rise, u)
    if cross_ptr is not None:
        z = load_wide(teacher_ptr + row * stride_tm + start + offs, mask, whole)
        taught, _ = capped(z, teacher_factor, teacher_cap, TEACHER_SOFTCAP)
        q = tl.where(mask, tl.exp(taught - tl.load(teacher_lse_ptr + row)), 0.0)
        cross = weighted_sum(q, u - taught)
    if argmax_ptr is not None:
        first = tl.min(tl.where(u == peak, offs, TILE), axis=0)
    if parts_ptr is None:
        outputs = (lse_ptr, target_ptr, smooth_ptr, mean_ptr, cross_ptr, top_ptr, argmax_ptr)
        sums = (peak, total, smooth, weighted, cross, first)
        store_statistics(row, V, sums, z_ptrs, labels_ptr, outputs, factor, cap, SOFTCAP)
    else:
        count = tl.num_programs(0).to(tl.int64)
        tl.store(parts_ptr + pid, peak)
        tl.store(parts_ptr + count + pid, total)
        if smooth_ptr is not None:
            tl.store(parts_ptr + 2 * count + pid, smooth)
        if mean_ptr is not None:
            tl.store(parts_ptr + 3 * count + pid, weighted)
        if cross_ptr is not None:
            tl.store(parts_ptr + 4 * count + pid, cross)
        if argmax_ptr is not None:
            tl.store(parts_ptr + 5 * count + pid, first.to(tl.float32, bitcast=True))


@triton.jit
def merge_kernel(
    z_ptr, labels_ptr, parts_ptr, lse_ptr, target_ptr, smooth_ptr, mean_ptr, cross_ptr, top_ptr,
    argmax_ptr, V, factor, cap, stride_zm,
    SOFTCAP: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row of at most PARTS parts of TILE columns."""
    parts = tl.cdiv(V, TILE)
    row = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64) * parts
    part = tl.arange(0, PARTS)
    mask = part < parts
    ptrs = parts_ptr + row * parts + part
    peaks = tl.load(ptrs, mask=mask, other=-INFINITY)
    peak = tl.max(peaks, axis=0)
    factors = tl.exp(base_of(peaks) - base_of(peak))
    factors = tl.where(peaks == -INFINITY, 0.0, factors)
    total = tl.sum(tl.load(ptrs + count, mask=mask, other=0.0) * factors, axis=0)
    smooth, weighted, cross, first = total, total, total, 0
    if smooth_ptr is not None:
        smooth = tl.sum(tl.load(ptrs + 2 * count, mask=mask, other=0.0), axis=0)
    if mean_ptr is not None:
        weighted = tl.sum(tl.load(ptrs + 3 * count, mask=mask, other=0.0) * factors, axis=0)
    if cross_ptr is not None:
        cross = tl.sum(tl.load(ptrs + 4 * count, mask=mask, other=0.0), axis=0)
    if argmax_ptr is not None:
        inside = tl.load(ptrs + 5 * count, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        first = tl.min(tl.where(mask & (peaks == peak), part * TILE + inside, V), axis=0)
    outputs = (lse_ptr, target_ptr, smooth_ptr, mean_ptr, cross_ptr, top_ptr, argmax_ptr)
    sums = (peak, total, smooth, weighted, cross, first)
    store_statistics(
        row, V, sums, z_ptr + row * stride_zm, labels_ptr, outputs, factor, cap, SOFTCAP
    )


@triton.jit
def gradient_kernel(
    z_ptr, labels_ptr, weights_ptr, teacher_ptr, teacher_lse_ptr, lse_ptr, mean_ptr, g_lse_ptr,
    g_target_ptr, g_smooth_ptr, g_mean_ptr, g_cross_ptr, kept_ptr, V, scale, factor, cap,
    teacher_factor, teacher_cap, threshold, stride_zm, stride_tm,
    SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """TILE columns of one row; RAGGED as ``_is_ragged`` says."""
    parts = tl.cdiv(V, TILE)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    start = pid % parts * TILE
    offs = tl.arange(0, TILE)
    mask = offs < V - start
    whole = V - start >= TILE if RAGGED else False
    z_ptrs = z_ptr + row * stride_zm + start + offs
    u, bent = capped(load_wide(z_ptrs, mask, whole), factor, cap, SOFTCAP)
    p = tl.exp(u - tl.load(lse_ptr + row))
    du = p * tl.load(g_lse_ptr + row)
    if g_mean_ptr is not None:
        spread = p * (1.0 + u - tl.load(mean_ptr + row))
        du += tl.where(p == 0, 0.0, spread) * tl.load(g_mean_ptr + row)
    label = tl.load(labels_ptr + row) - start
    named = offs == tl.where((label >= 0) & (label < TILE), label, -1).to(tl.int32)
    du += tl.where(named, tl.load(g_target_ptr + row), 0.0)
    if g_smooth_ptr is not None:
        g_smooth = tl.load(g_smooth_ptr + row)
        if weights_ptr is not None:
            g_smooth *= tl.load(weights_ptr + start + offs, mask=mask, other=0.0)
        du += g_smooth
    if g_cross_ptr is not None:
        z = load_wide(teacher_ptr + row * stride_tm + start + offs, mask, whole)
        taught, _ = capped(z, teacher_factor, teacher_cap, TEACHER_SOFTCAP)
        q = tl.exp(taught - tl.load(teacher_lse_ptr + row))
        du += q * tl.load(g_cross_ptr + row)
    if SOFTCAP:
        du *= 1.0 - bent * bent
    dz = (du * scale).to(z_ptr.dtype.element_ty)
    if whole:
        tl.store(z_ptrs, dz)
    else:
        tl.store(z_ptrs, dz, mask=mask)
    if kept_ptr is not None:
        kept = mask & (named | (p >= threshold))
        tl.store(kept_ptr + start + offs, tl.full((TILE,), 1, tl.uint8), mask=kept)


def logit_statistics(
    tile: LogitTile,
    lse: Tensor,
    target: Tensor | None,
    smooth: Tensor | None,
    mean: Tensor | None,
    cross: Tensor | None,
    top: Tensor | None,
    argmax: Tensor | None,
    config: configs.Logits = configs.LOGITS,
) -> None:
    """z [M, V] of any row stride, labels int64 [M], class weights fp32 [V] -> fp32 [M] each, and
    argmax int64 [M]; those that are None are not computed. cross needs a teacher.
    """
    z, labels, weights, scale, softcap, teacher, teacher_lse, teacher_scale, teacher_softcap = tile
    (m, v), columns = z.shape, config.tile
    if m == 0:
        return
    weights = weights if smooth is not None else None
    teacher, teacher_lse = (None, None) if cross is None else (teacher, teacher_lse)
    parts = triton.cdiv(v, columns)
    scratch = None
    if parts > 1:
        scratch = torch.empty(6, m, parts, dtype=torch.float32, device=z.device)
    outputs = (lse, target, smooth, mean, cross, top, argmax)
    factors = _factors(scale, softcap)
    statistics_kernel[(m * parts,)](
        z, labels, weights, teacher, teacher_lse, scratch, *outputs, v, *factors,
        *_factors(teacher_scale, teacher_softcap), z.stride(0), _pitch(teacher),
        SOFTCAP=bool(softcap), TEACHER_SOFTCAP=bool(teacher_softcap),
        RAGGED=_is_ragged(v, z, teacher), TILE=columns, num_warps=config.num_warps,
    )  # fmt: skip
    if scratch is not None:
        merge_kernel[(m,)](
            z, labels, scratch, *outputs, v, *factors, z.stride(0), SOFTCAP=bool(softcap),
            TILE=columns, PARTS=triton.next_power_of_2(parts), num_warps=1,
        )  # fmt: skip


def logit_gradient(
    tile: LogitTile,
    lse: Tensor,
    mean: Tensor | None,
    g_lse: Tensor,
    g_target: Tensor,
    g_smooth: Tensor | None,
    g_mean: Tensor | None,
    g_cross: Tensor | None,
    threshold: float,
    kept: Tensor | None,
    config: configs.Logits = configs.LOGITS,
) -> None:
    """fp32 [M] each -> dz in the place of z; kept uint8 [V] becomes 1 where p >= threshold in a
    row, and at a row's label.
    """
    z, labels, weights, scale, softcap, teacher, teacher_lse, teacher_scale, teacher_softcap = tile
    (m, v), columns = z.shape, config.gradient_tile
    if m == 0:
        return
    weights = weights if g_smooth is not None else None
    teacher, teacher_lse = (None, None) if g_cross is None else (teacher, teacher_lse)
    gradient_kernel[(m * triton.cdiv(v, columns),)](
        z, labels, weights, teacher, teacher_lse, lse, mean, g_lse, g_target, g_smooth, g_mean,
        g_cross, kept, v, scale, *_factors(scale, softcap),
        *_factors(teacher_scale, teacher_softcap), threshold, z.stride(0), _pitch(teacher),
        SOFTCAP=bool(softcap), TEACHER_SOFTCAP=bool(teacher_softcap),
        RAGGED=_is_ragged(v, z, teacher), TILE=columns, num_warps=config.gradient_warps,
    )  # fmt: skip


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """What z is multiplied by, and what its tanh is; without a softcap there is none."""
    return (scale / softcap, softcap) if softcap else (scale, 0.0)


def _is_ragged(v: int, *tensors: Tensor | None) -> bool:
    """Whether rows begin where wide accesses can but end between two."""
    return v % EVEN > 0 and all(x is None or x.stride(0) % EVEN == 0 for x in tensors)


def _pitch(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
