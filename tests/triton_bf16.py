"""Makes Triton's interpreter round to bf16 and sum matrix products as GPUs do.

The interpreter holds bf16 as its 16 bits. As shipped (3.6 to 3.9) it truncates when it casts to
bf16, misreads subnormals, and does arithmetic on the bits as if they were integers. Kernels cast
to fp32 before they compute, but for matrix products, so casts and those are what is put right.

Products go to numpy's BLAS, whose order of summation differs from CPU to CPU and between a product
and its transpose: scores that a backward computes again would not be the forward's. Here as on a
GPU an element's products are added in the order of K.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 values to the bits of the nearest bf16, ties to even, as uint16."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 as uint16 to the same values in fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def install() -> None:
    """Patch the interpreter of this process."""
    shipped_cast = InterpreterBuilder.cast_impl
    shipped_convert = InterpreterBuilder.create_fp_to_fp

    def cast(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return shipped_cast(self, src, dst_type)
        if source == tl.bfloat16:
            wide = TensorHandle(widen(src.data), tl.float32)
            return wide if target == tl.float32 else shipped_cast(self, wide, dst_type)
        return TensorHandle(round_to_bf16(src.data.astype(np.float32)), tl.bfloat16)

    def convert(self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        return shipped_convert(self, src, dst_type, rounding)

    def dot(
        self: Any, a: TensorHandle, b: TensorHandle, start: TensorHandle, *rest: Any
    ) -> TensorHandle:
        left, right = (
            (widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data).astype(np.float64)
            for x in (a, b)
        )
        total = start.data.astype(np.float32)
        for k in range(left.shape[-1]):  # a product in fp64 is exact, as in a fused multiply-add
            total = (left[..., :, k, None] * right[..., k, None, :] + total).astype(np.float32)
        return TensorHandle(total.astype(start.data.dtype), start.dtype.scalar)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = convert
