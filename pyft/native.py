"""The native extensions on tensors: pointers, the current stream, the device guard. No checks of
user input here.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from pyft.errors import UsageError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}


def _cpu() -> ModuleType:
    return importlib.import_module("pyft._cpu")


def _cuda() -> ModuleType:
    return importlib.import_module("pyft._cuda")


def isa() -> int:
    """The instruction set of CPU kernels: the best there is, or what PYFT_CPU_ISA names at the time
    of the call.
    """
    name = os.environ.get("PYFT_CPU_ISA")
    best: int = _cpu().best_isa()
    if not name:
        return best
    if name not in ISAS:
        raise UsageError(f"PYFT_CPU_ISA: {name!r} is not one of {', '.join(ISAS)}")
    if ISAS[name] > best:
        supported = ", ".join(isa for isa, level in ISAS.items() if level <= best)
        raise UsageError(f"PYFT_CPU_ISA: this CPU has no {name}; it has {supported}")
    return ISAS[name]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    function: str, on: Tensor, arguments: tuple[object, ...], cpu_only: tuple[object, ...]
) -> None:
    """Call a kernel of the extension that serves ``on``'s device: CUDA ones end with a stream."""
    if not on.is_cuda:
        getattr(_cpu(), function)(*arguments, *cpu_only)
        return
    with torch.cuda.device(on.device):
        stream = torch.cuda.current_stream(on.device).cuda_stream
        getattr(_cuda(), function)(*arguments, stream)


def _on_cpu(x: Tensor) -> tuple[object, ...]:
    """What kernels of the CPU take beside: the instruction set and how many threads."""
    return () if x.is_cuda else (isa(), torch.get_num_threads())


def use_huge_pages(fresh: Tensor) -> None:
    """Ask for 2 MiB pages behind a CPU tensor that nothing has been written to yet."""
    _cpu().use_huge_pages(fresh.data_ptr(), fresh.nbytes)


def quantize(
    x: Tensor,
    thresholds: Tensor,
    order: Tensor,
    zero_code: int,
    top: float,
    e8m0: bool,
    bits: int,
    block_size: int,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
) -> None:
    """Contiguous x [n] -> packed uint8 [ceil(n * bits / 8)], scales and zeros [blocks]."""
    source = (x.data_ptr(), DTYPES[x.dtype], x.numel(), block_size)
    coding = (bits, zero_code, top, e8m0, thresholds.data_ptr(), order.data_ptr())
    outputs = (packed.data_ptr(), scales.data_ptr(), _address(zeros))
    _launch("quantize", x, (*source, *coding, *outputs), _on_cpu(x))


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested: Tensor | None,
    offset: Tensor | None,
    codes: Tensor,
    scale_codes: Tensor | None,
    bits: int,
    shape: tuple[int, int],
    block_size: int,
    slab: tuple[int, int, int, int],
    out: Tensor,
) -> None:
    """Rows slab[0] to slab[1], columns slab[2] to slab[3] of a weight of ``shape`` -> out, of any
    row stride.
    """
    stored = (packed, scales, zeros, nested, offset, codes, scale_codes)
    output = (out.data_ptr(), out.stride(0), DTYPES[out.dtype])
    arguments = (bits, *map(_address, stored), *shape, block_size, *slab, *output)
    _launch("dequantize", out, arguments, _on_cpu(out))


def qlinear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested: Tensor | None,
    offset: Tensor | None,
    codes: Tensor,
    scale_codes: Tensor | None,
    bits: int,
    shape: tuple[int, int],
    block_size: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """x [M, K] and a weight of ``shape`` [N, K] -> out [M, N]; adjacent columns, any row stride."""
    stored = (packed, scales, zeros, nested, offset, codes, scale_codes)
    source = (x.data_ptr(), x.shape[0], x.stride(0))
    output = (_address(bias), out.data_ptr(), out.stride(0), DTYPES[out.dtype])
    arguments = (*source, bits, *map(_address, stored), *shape, block_size, *output)
    _launch("qlinear", x, arguments, _on_cpu(x))


def dropout(x: Tensor, seed: int, threshold: int, scale: float, out: Tensor) -> None:
    """Contiguous x of any shape -> out of the same shape and dtype."""
    key = seed & 0xFFFF_FFFF_FFFF_FFFF
    arguments = (x.data_ptr(), DTYPES[x.dtype], x.numel(), key, threshold, scale, out.data_ptr())
    _launch("dropout", x, arguments, (torch.get_num_threads(),))


OPTIM_ALIGN = 1  # blocks a tensor of ``optim`` is counted up to


def optim(
    table: Tensor,
    blocks: int,
    aligned: bool,
    on: Tensor,
    codes: Tensor,
    starts: Tensor,
    *rule: float,
) -> None:
    """One optimizer step over the tensors of ``table``, int64 [tensors, 8] rows of
    pyft_optim_tensor, whose parameters are like ``on``; ``blocks`` of 256 elements in all, at any
    address.
    """
    count = (table.data_ptr(), len(table), *((blocks,) if on.is_cuda else ()))
    arguments = (*count, DTYPES[on.dtype], *rule, codes.data_ptr(), starts.data_ptr())
    if on.is_cuda:
        processors = torch.cuda.get_device_properties(on.device).multi_processor_count
        resident = 3 * processors  # thread blocks: every share of the work starts at once
        _launch("optim", on, (*arguments, resident), ())
    else:
        _launch("optim", on, arguments, (isa(), torch.get_num_threads()))


def _rows(matrix: Tensor | None) -> tuple[int, int]:
    """Address and distance of rows."""
    return (0, 0) if matrix is None else (matrix.data_ptr(), matrix.stride(0))


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
) -> None:
    """x, residual [M, D] -> h = x + residual, y = (h - mean) rstd (offset + weight) + bias [M, D]
    and mean, rstd fp32 [M]; any row strides. ``mean`` is given where the norm is ``centered``, h
    where there is a residual.
    """
    inputs = (_rows(x), _rows(residual), _address(weight), _address(bias), eps, offset)
    outputs = (_rows(y), _rows(h), _address(mean) if centered else 0, rstd.data_ptr())
    _launch("norm", x, (*inputs, *outputs, *x.shape, DTYPES[x.dtype]), _on_cpu(x))


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
) -> None:
    """dy, h, dh [M, D] of any row strides -> dx [M, D]; dweight, dbias fp32 [P, D]: a sum for each
    of P runs of ceil(M / P) rows.
    """
    sums = dweight if dweight is not None else dbias
    parts = 0 if sums is None else sums.shape[0]
    inputs = (_rows(dy), _rows(h), _address(weight), _address(mean), rstd.data_ptr(), offset)
    outputs = (_rows(dh), _rows(dx), _address(dweight), _address(dbias))
    arguments = (*inputs, *outputs, *dy.shape, parts, DTYPES[dy.dtype])
    _launch("norm_backward", dy, arguments, _on_cpu(dy))


def _heads(x: Tensor | None, out: Tensor | None) -> tuple[object, ...]:
    """Addresses, heads, and the distances of batches, heads and tokens."""
    if x is None or out is None:
        return (0, 0, 0, (0, 0, 0), (0, 0, 0))
    return (x.data_ptr(), out.data_ptr(), x.shape[1], x.stride()[:3], out.stride()[:3])


def _table(table: Tensor | None) -> tuple[int, int, int]:
    """Address and distances of batches (0 where there is one for all) and of rows."""
    if table is None:
        return (0, 0, 0)
    batch = table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0
    return (table.data_ptr(), batch, table.stride(-2))


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    q_out: Tensor,
    k_out: Tensor | None,
) -> None:
    """q, k [B, H, S, D] of any strides but the last -> q_out, k_out, which may be q and k.

    cos, sin [B or 1, S, R/2] of each token, or with ``positions`` int64 [B, S] tables [P, R/2].
    """
    batch, _, seq, dim = q.shape
    half = cos.shape[-1]
    where = (0, 0, 0) if positions is None else (positions.data_ptr(), *positions.stride())
    tables = (_table(cos), _table(sin), where, interleaved, inverse)
    sizes = (batch, seq, dim, half, DTYPES[cos.dtype], DTYPES[q.dtype])
    _launch("rope", q, (_heads(q, q_out), _heads(k, k_out), *tables, *sizes), _on_cpu(q))


def glu(gate: Tensor, up: Tensor | None, activation: str, out: Tensor) -> None:
    """gate, up [M, I] of any row strides -> out [M, I], act(gate) up."""
    operands = (_rows(gate), _rows(up), ACTIVATIONS[activation], _rows(out))
    _launch("glu", gate, (*operands, *gate.shape, DTYPES[gate.dtype]), _on_cpu(gate))


def glu_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    dgate: Tensor,
    dup: Tensor | None,
    out: Tensor | None,
) -> None:
    """dy, gate, up [M, I] of any row strides -> dgate, dup and, once more, act(gate) up; an output
    may be the memory of an input.
    """
    inputs = (_rows(dy), _rows(gate), _rows(up), ACTIVATIONS[activation])
    outputs = (_rows(dgate), _rows(dup), _rows(out))
    _launch("glu_backward", dy, (*inputs, *outputs, *dy.shape, DTYPES[dy.dtype]), _on_cpu(dy))


# z, labels, class weights, scale, softcap, the teacher's logits, their lse, scale and softcap
LogitTile = tuple[
    Tensor, Tensor, Tensor | None, float, float | None,
    Tensor | None, Tensor | None, float, float | None,
]  # fmt: skip


def _logits(tile: LogitTile) -> tuple[object, ...]:
    """A call's pyft_logits."""
    z, labels, weights, scale, softcap, teacher, teacher_lse, teacher_scale, teacher_softcap = tile
    taught = (0, 0) if teacher is None else (teacher.data_ptr(), teacher.stride(0))
    views = (
        (z.data_ptr(), z.stride(0), scale, softcap or 0.0),
        (*taught, teacher_scale, teacher_softcap or 0.0),
    )
    given = (labels.data_ptr(), _address(weights))
    return (*z.shape, views[0], *given, views[1], _address(teacher_lse))


def logit_statistics(
    tile: LogitTile,
    lse: Tensor,
    target: Tensor | None,
    smooth: Tensor | None,
    mean: Tensor | None,
    cross: Tensor | None,
    top: Tensor | None,
    argmax: Tensor | None,
) -> None:
    """z [M, V] of any row stride, labels int64 [M], class weights fp32 [V] -> fp32 [M] each, and
    argmax int64 [M]; those that are None are not computed.
    """
    sums = tuple(map(_address, (lse, target, smooth, mean, cross, top)))
    arguments = (_logits(tile), sums, _address(argmax), DTYPES[tile[0].dtype])
    _launch("logit_statistics", tile[0], arguments, _on_cpu(tile[0]))


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
) -> None:
    """fp32 [M] each -> dz in the place of z; kept uint8 [V] becomes 1 where p >= threshold in a
    row, and at a row's label.
    """
    sums = tuple(map(_address, (lse, mean, g_lse, g_target, g_smooth, g_mean, g_cross)))
    arguments = (_logits(tile), sums, threshold, _address(kept), DTYPES[tile[0].dtype])
    _launch("logit_gradient", tile[0], arguments, _on_cpu(tile[0]))


UNBOUNDED = 2**63 - 1  # PYFT_UNBOUNDED of pyft.h
# scale, left, right, shift, softcap, and dropout's seed, threshold and keep
AttentionRule = tuple[
    float, int | None, int | None, int, float | None, tuple[int, int, float] | None
]


def _view(x: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and the distances of the first three dimensions."""
    return (0, (0, 0, 0)) if x is None else (x.data_ptr(), x.stride()[:3])


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rule: AttentionRule,
) -> tuple[object, ...]:
    """A call's pyft_attention."""
    scale, left, right, shift, softcap, dropout = rule
    bounds = (UNBOUNDED if bound is None else bound for bound in (left, right))
    seed, threshold, keep = dropout or (0, 0, 1.0)
    numbers = (scale, softcap or 0.0, *bounds, shift, seed & 0xFFFF_FFFF_FFFF_FFFF, threshold, keep)
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    biased = (
        (0, 0, (0, 0, 0, 0))
        if bias is None
        else (bias.data_ptr(), DTYPES[bias.dtype], bias.stride())
    )
    packed = (0, 0, 0) if cu_q is None else (cu_q.data_ptr(), _address(cu_k), cu_q.numel() - 1)
    views = (_view(q), _view(k), _view(v))
    return (views, sizes, _address(sinks), _address(slopes), biased, packed, numbers)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rule: AttentionRule,
    o: Tensor,
    lse: Tensor,
) -> None:
    """q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] of any strides but the last -> o [B,
    Hq, Sq, Dv], lse fp32 [B, Hq, Sq].

    sinks fp32 [Hq]; bias [B, Hq, Sq, Sk] of any dtype and strides; slopes fp32 [B, Hq]; cu_q, cu_k
    int32 [n + 1]. A CUDA kernel takes no bias, slopes or dropout.
    """
    call = _attention(q, k, v, sinks, bias, slopes, cu_q, cu_k, rule)
    _launch("attention", q, (call, _view(o), lse.data_ptr(), DTYPES[q.dtype]), _on_cpu(q))


def attention_delta(o: Tensor, do: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    """o, do [B, H, S, D] -> delta fp32 [B, H, S], the sum of o do over D, minus dlse."""
    arguments = (o.shape, _view(o), _view(do), _view(dlse), delta.data_ptr(), DTYPES[o.dtype])
    _launch("attention_delta", o, arguments, _on_cpu(o))


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rule: AttentionRule,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    """do [B, Hq, Sq, Dv], lse and delta fp32 [B, Hq, Sq] -> the gradients that are not None, of
    any strides but the last.
    """
    call = _attention(q, k, v, None, bias, slopes, cu_q, cu_k, rule)
    gradients = tuple(map(_view, (do, dq, dk, dv)))
    sums = (lse.data_ptr(), delta.data_ptr())
    _launch("attention_backward", q, (call, gradients, *sums, DTYPES[q.dtype]), _on_cpu(q))


def attention_bias_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    bias: Tensor,
    slopes: Tensor | None,
    rule: AttentionRule,
    dbias: Tensor,
) -> None:
    """-> contiguous dbias, [B, Hq, Sq, Sk] with 1 for each dimension whose stride is 0 in bias."""
    call = _attention(q, k, v, None, bias, slopes, None, None, rule)
    gradients = tuple(map(_view, (do, None, None, None)))
    outputs = (lse.data_ptr(), delta.data_ptr(), dbias.data_ptr(), DTYPES[q.dtype])
    _launch("attention_bias_backward", q, (call, gradients, *outputs), _on_cpu(q))
