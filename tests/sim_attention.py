"""The CUDA kernels of attention built for the CPU through csrc/cuda/sim.h, as pyft.native has them
on a GPU.
"""

import ctypes

from sim_kernels import DTYPES, OK, pointer, size
from torch import Tensor

UNBOUNDED = 2**63 - 1  # PYFT_UNBOUNDED of pyft.h
Rule = tuple[float, int | None, int | None, int, float | None, tuple[int, int, float] | None]


class View(ctypes.Structure):
    """pyft_head_view of pyft.h."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class Attention(ctypes.Structure):
    """pyft_attention of pyft.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "q_heads", "kv_heads", "q_len", "k_len")),
        *((name, ctypes.c_int64) for name in ("dim", "v_dim")),
        *((name, View) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("sinks", "slopes", "bias")),
        ("bias_dtype", ctypes.c_int),
        ("bias_strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens_q", "cu_seqlens_k")),
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int64) for name in ("left", "right", "shift")),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("keep", ctypes.c_float),
    ]


class Backward(ctypes.Structure):
    """pyft_attention_backward of pyft.h."""

    _fields_ = [
        ("d_o", View),
        *((name, ctypes.c_void_p) for name in ("lse", "delta")),
        *((name, View) for name in ("dq", "dk", "dv")),
    ]


def view(x: Tensor | None) -> View:
    """Where x [B, H, S, D] is and how far apart its first three dimensions lie."""
    if x is None:
        return View(None, (ctypes.c_int64 * 3)())
    assert x.shape[-1] == 1 or x.stride(-1) == 1
    return View(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]))


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rule: Rule,
) -> Attention:
    """A pyft_attention."""
    scale, left, right, shift, softcap, dropout = rule
    seed, threshold, keep = dropout or (0, 0, 1.0)
    return Attention(
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
        view(q), view(k), view(v), *map(pointer, (sinks, slopes, bias)),
        0 if bias is None else DTYPES[bias.dtype],
        (ctypes.c_int64 * 4)(*(() if bias is None else bias.stride())),
        pointer(cu_q), pointer(cu_k), 0 if cu_q is None else cu_q.numel() - 1,
        scale, softcap or 0.0, *(UNBOUNDED if x is None else x for x in (left, right)), shift,
        seed, threshold, keep,
    )  # fmt: skip


class SimAttention:
    """The kernels on CPU tensors, as pyft.native has them on a GPU's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.pyft_cuda_error_string.restype = ctypes.c_char_p

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        rule: Rule,
        o: Tensor,
        lse: Tensor,
    ) -> None:
        call = call_of(q, k, v, sinks, bias, slopes, cu_q, cu_k, rule)
        self._run(
            "attention", ctypes.byref(call), ctypes.byref(view(o)), pointer(lse), DTYPES[q.dtype]
        )

    def attention_delta(self, o: Tensor, do: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
        strides = (ctypes.c_int64 * 3)(*(() if dlse is None else dlse.stride()))
        self._run(
            "attention_delta", *map(size, o.shape), ctypes.byref(view(o)), ctypes.byref(view(do)),
            pointer(dlse), strides, pointer(delta), DTYPES[o.dtype],
        )  # fmt: skip

    def attention_backward(
        self,
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
        rule: Rule,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
    ) -> None:
        call = call_of(q, k, v, None, bias, slopes, cu_q, cu_k, rule)
        gradients = Backward(view(do), pointer(lse), pointer(delta), view(dq), view(dk), view(dv))
        self._run(
            "attention_backward", ctypes.byref(call), ctypes.byref(gradients), DTYPES[q.dtype]
        )

    def attention_bias_backward(self, *arguments: object) -> None:
        raise RuntimeError("the kernels take no bias")

    def _run(self, function: str, *arguments: object) -> None:
        status = getattr(self.library, f"pyft_cuda_{function}")(*arguments, None)
        if status != OK:
            raise RuntimeError(f"status {status}: {self.library.pyft_cuda_error_string().decode()}")
