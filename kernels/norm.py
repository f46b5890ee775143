"""rms_norm and layer_norm over the last dimension, the residual added first, and their backward.

    h = x + residual                 rounded to x's dtype
    xhat = (h - mean) rstd           y = xhat (offset + weight) + bias        rms_norm: mean 0

    g = dy (offset + weight)         dx = rstd (g - [layer_norm] mean(g) - xhat mean(g xhat)) + dh
    dweight = sum of dy xhat         dbias = sum of dy

A program has whole rows of up to ``longest`` elements in registers: x, residual, h and y are moved
once forward, dy, h, dh and dx once backward. Longer rows are read a part at a time, again for each
pass; the second reading comes from the cache. The sums over rows are taken a part of the rows after
another, one program a part, in fp32: the same bits twice.

With 2-byte elements and P parts: forward 4 M D bytes, 8 with a residual; backward 6 M D, 8 with dh,
and 4 P D for each of dweight and dbias.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs


@triton.jit
def load_wide(ptrs, mask):
    """fp32 values, 0 outside the mask."""
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_sum(x_ptrs, residual_ptr, residual_offset, mask, HAS_RESIDUAL: tl.constexpr):
    """h in fp32, having been rounded to x's dtype."""
    h = load_wide(x_ptrs, mask)
    if HAS_RESIDUAL:
        h += load_wide(residual_ptr + residual_offset, mask)
        h = h.to(x_ptrs.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def load_gain(weight_ptr, offs_d, mask_d, offset):
    """offset + weight in fp32, or 1 where there is no weight."""
    if weight_ptr is None:
        gain = tl.full(offs_d.shape, 1.0, tl.float32)
    else:
        gain = load_wide(weight_ptr + offs_d, mask_d) + offset
    return gain


@triton.jit
def store_normed(
    h, mean, rstd, weight_ptr, bias_ptr, y_ptrs, h_ptr, h_offset, offs_d, mask_d, mask, offset
):
    """y, and h where there is a pointer for it, of h [ROWS, BLOCK_D], mean and rstd [ROWS]."""
    y = (h - mean[:, None]) * rstd[:, None]
    y *= load_gain(weight_ptr, offs_d, mask_d, offset)[None, :]
    if bias_ptr is not None:
        y += load_wide(bias_ptr + offs_d, mask_d)[None, :]
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + h_offset, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, M, D, eps, offset,
    stride_xm, stride_rm, stride_ym, stride_hm,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """ROWS rows; LONG: the rows in parts of BLOCK_D."""
    HAS_RESIDUAL: tl.constexpr = residual_ptr is not None
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_m = row < M
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + row[:, None] * stride_xm
    residual_offset = row[:, None] * stride_rm
    y_ptrs = y_ptr + row[:, None] * stride_ym
    h_offset = row[:, None] * stride_hm
    mean = tl.zeros((ROWS,), tl.float32)
    if LONG:
        if mean_ptr is not None:
            sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for start in range(0, D, BLOCK_D):
                cols = (start + offs_d)[None, :]
                mask = mask_m[:, None] & (cols < D)
                sums += load_sum(
                    x_ptrs + cols, residual_ptr, residual_offset + cols, mask, HAS_RESIDUAL
                )
            mean = tl.sum(sums, axis=1) / D
        sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = (start + offs_d)[None, :]
            mask = mask_m[:, None] & (cols < D)
            h = load_sum(x_ptrs + cols, residual_ptr, residual_offset + cols, mask, HAS_RESIDUAL)
            spread = tl.where(mask, h - mean[:, None], 0.0)
            sums += spread * spread
        rstd = tl.rsqrt(tl.sum(sums, axis=1) / D + eps)
        for start in range(0, D, BLOCK_D):
            part = start + offs_d
            cols, mask_d = part[None, :], part < D
            mask = mask_m[:, None] & mask_d[None, :]
            h = load_sum(x_ptrs + cols, residual_ptr, residual_offset + cols, mask, HAS_RESIDUAL)
            store_normed(
                h, mean, rstd, weight_ptr, bias_ptr, y_ptrs + cols, h_ptr, h_offset + cols, part,
                mask_d, mask, offset,
            )  # fmt: skip
    else:
        cols, mask_d = offs_d[None, :], offs_d < D
        mask = mask_m[:, None] & mask_d[None, :]
        h = load_sum(x_ptrs + cols, residual_ptr, residual_offset + cols, mask, HAS_RESIDUAL)
        spread = h
        if mean_ptr is not None:
            mean = tl.sum(h, axis=1) / D
            spread = tl.where(mask, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(spread * spread, axis=1) / D + eps)
        store_normed(
            h, mean, rstd, weight_ptr, bias_ptr, y_ptrs + cols, h_ptr, h_offset + cols, offs_d,
            mask_d, mask, offset,
        )  # fmt: skip
    tl.store(rstd_ptr + row, rstd, mask=mask_m)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=mask_m)


@triton.jit
def load_xhat(h_ptrs, mean, rstd, mask):
    """xhat of rows with this mean and rstd, 0 outside the mask."""
    return tl.where(mask, (load_wide(h_ptrs, mask) - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def load_stats(mean_ptr, rstd_ptr, row, mask_m):
    """mean, 0 where it is not stored, and rstd of rows."""
    mean = tl.zeros(row.shape, tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row, mask=mask_m, other=0.0)
    return mean, tl.load(rstd_ptr + row, mask=mask_m, other=0.0)


@triton.jit
def store_dx(g, xhat, rstd, mean_g, mean_gx, dh_ptr, dh_offset, dx_ptrs, mask):
    """dx of g and xhat [ROWS, BLOCK_D] and their means [ROWS]."""
    dx = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
    if dh_ptr is not None:
        dx += load_wide(dh_ptr + dh_offset, mask)
    tl.store(dx_ptrs, dx.to(dx_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "each"])
def norm_backward_kernel(
    dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dh_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    M, D, each, offset, stride_ym, stride_hm, stride_gm, stride_xm,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program p has rows [p each, (p + 1) each), ROWS at a time, all of a row at once."""
    part = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    cols, mask_d = offs_d[None, :], offs_d < D
    gain = load_gain(weight_ptr, offs_d, mask_d, offset)[None, :]
    if dweight_ptr is not None:
        dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    end = tl.minimum((part + 1) * each, M)
    for start in range(part * each, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask_m = row < end
        mask = mask_m[:, None] & mask_d[None, :]
        mean, rstd = load_stats(mean_ptr, rstd_ptr, row, mask_m)
        dy = load_wide(dy_ptr + row[:, None] * stride_ym + cols, mask)
        xhat = load_xhat(h_ptr + row[:, None] * stride_hm + cols, mean, rstd, mask)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        g = dy * gain
        mean_gx = tl.sum(g * xhat, axis=1) / D
        mean_g = tl.zeros((ROWS,), tl.float32)
        if mean_ptr is not None:
            mean_g = tl.sum(g, axis=1) / D
        store_dx(
            g, xhat, rstd, mean_g, mean_gx, dh_ptr, row[:, None] * stride_gm + cols,
            dx_ptr + row[:, None] * stride_xm + cols, mask,
        )  # fmt: skip
    if dweight_ptr is not None:
        tl.store(dweight_ptr + part * D + offs_d, tl.sum(dweight, axis=0), mask=mask_d)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part * D + offs_d, tl.sum(dbias, axis=0), mask=mask_d)


@triton.jit
def long_norm_backward_kernel(
    dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dh_ptr, dx_ptr, D, offset,
    stride_ym, stride_hm, stride_gm, stride_xm, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of one row, in parts of BLOCK_D."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offs_d = tl.arange(0, BLOCK_D)
    mean, rstd = load_stats(mean_ptr, rstd_ptr, row, row >= 0)
    dy_ptrs = dy_ptr + row[:, None] * stride_ym
    h_ptrs = h_ptr + row[:, None] * stride_hm
    sums_g = tl.zeros((1, BLOCK_D), tl.float32)
    sums_gx = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        part = start + offs_d
        cols, mask = part[None, :], (part < D)[None, :]
        g = load_wide(dy_ptrs + cols, mask) * load_gain(weight_ptr, part, part < D, offset)[None, :]
        sums_g += g
        sums_gx += g * load_xhat(h_ptrs + cols, mean, rstd, mask)
    mean_gx = tl.sum(sums_gx, axis=1) / D
    mean_g = tl.zeros((1,), tl.float32)
    if mean_ptr is not None:
        mean_g = tl.sum(sums_g, axis=1) / D
    for start in range(0, D, BLOCK_D):
        part = start + offs_d
        cols, mask = part[None, :], (part < D)[None, :]
        g = load_wide(dy_ptrs + cols, mask) * load_gain(weight_ptr, part, part < D, offset)[None, :]
        store_dx(
            g, load_xhat(h_ptrs + cols, mean, rstd, mask), rstd, mean_g, mean_gx, dh_ptr,
            row[:, None] * stride_gm + cols, dx_ptr + row[:, None] * stride_xm + cols, mask,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "each"])
def long_norm_sums_kernel(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, M, D, each, stride_ym, stride_hm,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of a part's rows (axis 0) and BLOCK_D columns (axis 1)."""
    part = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    cols, mask = offs_d[None, :], (offs_d < D)[None, :]
    dweight = tl.zeros((1, BLOCK_D), tl.float32)
    dbias = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(part * each, tl.minimum((part + 1) * each, M)):
        row = start + tl.arange(0, 1)
        dy = load_wide(dy_ptr + row[:, None] * stride_ym + cols, mask)
        dbias += dy
        if dweight_ptr is not None:
            mean, rstd = load_stats(mean_ptr, rstd_ptr, row, row >= 0)
            dweight += dy * load_xhat(h_ptr + row[:, None] * stride_hm + cols, mean, rstd, mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + part * D + cols, dweight, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part * D + cols, dbias, mask=mask)


def tile_of(d: int, config: configs.Norm, elements: int) -> tuple[int, int, bool, int]:
    """Rows and columns at once, whether rows are longer than that, and how many warps."""
    long = d > config.longest
    block_d = config.tile if long else triton.next_power_of_2(d)
    rows = max(1, config.tile // block_d)
    return rows, block_d, long, max(1, min(16, rows * block_d // (32 * elements)))


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    config: configs.Norm = configs.NORM,
) -> None:
    """x, residual [M, D] -> y, h [M, D], mean, rstd fp32 [M]; ``mean`` is given iff centered."""
    m, d = x.shape
    if m * d == 0:
        return
    rows, block_d, long, num_warps = tile_of(d, config, config.elements)
    norm_kernel[(triton.cdiv(m, rows),)](
        x, residual, weight, bias, y, h, mean, rstd, m, d, eps, offset,
        x.stride(0), _pitch(residual), y.stride(0), _pitch(h),
        ROWS=rows, BLOCK_D=block_d, LONG=long, num_warps=num_warps,
    )  # fmt: skip


def norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    dh: Tensor | None,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    config: configs.Norm = configs.NORM,
) -> None:
    """dy, h, dh [M, D] -> dx [M, D] and dweight, dbias fp32 [P, D]: sums over P parts of the rows,
    ceil(M / P) each, zeros for a part without rows.
    """
    m, d = dy.shape
    sums = dbias if dweight is None else dweight
    if d == 0 or (m == 0 and sums is None):
        return
    rows, block_d, long, num_warps = tile_of(d, config, config.elements_backward)
    each = rows if sums is None else triton.cdiv(m, sums.shape[0])
    parts = triton.cdiv(m, rows) if sums is None else sums.shape[0]
    if not long:
        norm_backward_kernel[(parts,)](
            dy, h, weight, mean, rstd, dh, dx, dweight, dbias, m, d, each, offset,
            dy.stride(0), h.stride(0), _pitch(dh), dx.stride(0),
            ROWS=rows, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
        return
    if sums is not None:
        long_norm_sums_kernel[(parts, triton.cdiv(d, block_d))](
            dy, h, mean, rstd, dweight, dbias, m, d, each, dy.stride(0), h.stride(0),
            BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    if m > 0:
        long_norm_backward_kernel[(m,)](
            dy, h, weight, mean, rstd, dh, dx, d, offset,
            dy.stride(0), h.stride(0), _pitch(dh), dx.stride(0),
            BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip


def _pitch(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
