"""The CUDA kernels built for the CPU through csrc/cuda/sim.h, as pyft.native has them on a GPU."""

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OK = 0


class Coding(ctypes.Structure):
    """pyft_coding of pyft.h."""

    _fields_ = [
        ("bits", ctypes.c_int),
        ("zero_code", ctypes.c_int),
        ("top", ctypes.c_float),
        ("e8m0", ctypes.c_int),
        ("thresholds", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
    ]


class Weight(ctypes.Structure):
    """pyft_weight of pyft.h."""

    _fields_ = [
        ("bits", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros", "nested", "offset")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale_codes")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block_size")),
    ]


Slab = ctypes.c_int64 * 4


class SimKernels:
    """The kernels on CPU tensors, as pyft.native has them on a GPU's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.pyft_cuda_error_string.restype = ctypes.c_char_p

    def quantize(
        self,
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
        coding = Coding(bits, zero_code, top, e8m0, thresholds.data_ptr(), order.data_ptr())
        self._run(
            "quantize", pointer(x), DTYPES[x.dtype], size(x.numel()), size(block_size),
            ctypes.byref(coding), *map(pointer, (packed, scales, zeros)),
        )  # fmt: skip

    def dequantize(self, *arguments: Any) -> None:
        *stored, slab, out = arguments
        self._run(
            "dequantize", ctypes.byref(_weight(*stored)), Slab(*slab), pointer(out),
            size(out.stride(0)), DTYPES[out.dtype],
        )  # fmt: skip

    def qlinear(self, x: Tensor, *arguments: Any) -> None:
        *stored, bias, out = arguments
        self._run(
            "qlinear", pointer(x), size(x.shape[0]), size(x.stride(0)),
            ctypes.byref(_weight(*stored)), pointer(bias), pointer(out), size(out.stride(0)),
            DTYPES[out.dtype],
        )  # fmt: skip

    def _run(self, function: str, *arguments: object) -> None:
        status = getattr(self.library, f"pyft_cuda_{function}")(*arguments, None)
        if status != OK:
            raise RuntimeError(f"status {status}: {self.library.pyft_cuda_error_string().decode()}")


def _weight(*stored: Any) -> Weight:
    *tensors, bits, shape, block_size = stored
    return Weight(bits, *map(pointer, tensors), *shape, block_size)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def size(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


class Guarded:
    """The kernels on inputs that end where memory cannot be read."""

    def __init__(self, kernels: SimKernels) -> None:
        self.kernels = kernels
        self.pages: list[mmap.mmap] = []

    def quantize(self, x: Tensor, *arguments: Any) -> None:
        *inputs, packed, scales, zeros = (x, *arguments)
        self.kernels.quantize(*map(self._guard, inputs), packed, scales, zeros)

    def dequantize(self, *arguments: Any) -> None:
        self.kernels.dequantize(*map(self._guard, arguments[:-1]), arguments[-1])

    def qlinear(self, *arguments: Any) -> None:
        self.kernels.qlinear(*map(self._guard, arguments[:-1]), arguments[-1])

    def _guard(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0 or not value.is_contiguous():
            return value
        count = value.numel() * value.element_size()
        start = -count % mmap.PAGESIZE
        page = mmap.mmap(-1, start + count + mmap.PAGESIZE)
        self.pages.append(page)
        copy = torch.frombuffer(page, dtype=torch.uint8)[start : start + count].view(value.dtype)
        copy.copy_(value.flatten())
        end = ctypes.c_void_p(copy.data_ptr() + count)
        assert ctypes.CDLL(None).mprotect(end, mmap.PAGESIZE, 0) == 0
        return copy.view(value.shape)
