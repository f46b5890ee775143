"""The CUDA kernels, run on the CPU through csrc/cuda/sim.h: needs no GPU and no CUDA toolkit."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantize_cases import CASES, CPU, check, check_large_offsets
from torch import Tensor

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OK, BAD_ARGUMENT, CUDA_ERROR = 0, 1, 3

FAULTS = """
#include "device.h"

__global__ void reverse(const int* x, bool barrier, int* out) {
  PYFT_SHARED(int, tile, 96);
  tile[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = tile[95 - threadIdx.x];
}

__global__ void leave_early(const int*, int*) {
  if (threadIdx.x < 7) return;
  __syncthreads();
}

__global__ void read_wide(const int* x, int* out) {
  pyft::store_wide(out, pyft::load_wide<uint4>(x + 1));
}

extern "C" int run(int fault, const int* x, int* out) {
  if (fault < 2) PYFT_LAUNCH(reverse, 1, 96, nullptr, x, fault == 0, out);
  if (fault == 2) PYFT_LAUNCH(leave_early, 1, 64, nullptr, x, out);
  if (fault == 3) PYFT_LAUNCH(read_wide, 1, 1, nullptr, x, out);
  return pyft::launch_status();
}
"""


class Weight4(ctypes.Structure):
    """pyft_weight4 of pyft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "nested", "offset", "codes")),
        ("absmax_codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block_size")),
    ]


class SimKernels:
    """The three kernels on CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.pyft_cuda_error_string.restype = ctypes.c_char_p

    def quantize4(
        self,
        x: Tensor,
        midpoints: Tensor,
        zero_code: int,
        block_size: int,
        packed: Tensor,
        absmax: Tensor,
    ) -> None:
        self._run(
            "quantize4", _pointer(x), DTYPES[x.dtype], _size(x.numel()), _size(block_size),
            _pointer(midpoints), zero_code, _pointer(packed), _pointer(absmax),
        )  # fmt: skip

    def quantize_absmax(
        self,
        x: Tensor,
        offset: Tensor,
        midpoints: Tensor,
        zero_code: int,
        codes: Tensor,
        absmax: Tensor,
    ) -> None:
        self._run(
            "quantize_absmax", _pointer(x), _size(x.numel()), _pointer(offset), _pointer(midpoints),
            zero_code, _pointer(codes), _pointer(absmax),
        )  # fmt: skip

    def dequantize4(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested: Tensor | None,
        offset: Tensor | None,
        codes: Tensor,
        absmax_codes: Tensor | None,
        rows: int,
        cols: int,
        block_size: int,
        row_begin: int,
        row_end: int,
        out: Tensor,
    ) -> None:
        tensors = (packed, absmax, nested, offset, codes, absmax_codes)
        weight = Weight4(*map(_pointer, tensors), rows, cols, block_size)
        self._run(
            "dequantize4", ctypes.byref(weight), _size(row_begin), _size(row_end), _pointer(out),
            _size(out.stride(0)), DTYPES[out.dtype],
        )  # fmt: skip

    def _run(self, function: str, *arguments: object) -> None:
        status = getattr(self.library, f"pyft_cuda_{function}")(*arguments, None)
        if status != OK:
            raise RuntimeError(f"status {status}: {self.library.pyft_cuda_error_string().decode()}")


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _size(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Compiles CUDA sources for the CPU into one library and loads it."""

    def compile_and_load(*sources: Path) -> ctypes.CDLL:
        target = tmp_path_factory.mktemp("sim") / "sim.so"
        flags = ["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC"]
        command = [os.environ.get("CXX", "g++"), *flags, "-shared", "-DPYFT_CPU_SIM", f"-I{CUDA}"]
        done = subprocess.run(
            [*command, "-x", "c++", *map(str, sources), "-o", str(target)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return ctypes.CDLL(str(target))

    return compile_and_load


@pytest.fixture(scope="session")
def library(build: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return build(*sorted(CUDA.glob("*.cu")))


@pytest.fixture(scope="session")
def faults(
    build: Callable[..., ctypes.CDLL], tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("faults") / "faults.cu"
    source.write_text(FAULTS)
    return build(source, CUDA / "runtime.cu")


@pytest.mark.parametrize("reverse_warps", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_bits_are_the_references(library: ctypes.CDLL, name: str, reverse_warps: int) -> None:
    library.pyft_sim_reverse_warps(reverse_warps)
    assert check(CASES[name], SimKernels(library), CPU) == ""


@pytest.mark.unfilled
def test_offsets_beyond_31_bits(library: ctypes.CDLL) -> None:
    assert check_large_offsets(SimKernels(library), CPU) == ""


def test_device_count(library: ctypes.CDLL) -> None:
    assert library.pyft_cuda_device_count() == 1


def test_empty_input_touches_nothing(library: ctypes.CDLL) -> None:
    null, zero, size = None, _size(0), _size(64)
    assert library.pyft_cuda_quantize4(null, 0, zero, size, null, 7, null, null, null) == OK
    assert library.pyft_cuda_quantize_absmax(null, zero, null, null, 0, null, null, null) == OK
    weight = ctypes.byref(Weight4(None, None, None, None, None, None, 3, 0, 64))
    assert library.pyft_cuda_dequantize4(weight, zero, _size(3), null, zero, 0, null) == OK


@pytest.mark.parametrize(
    ("dtype", "n", "block_size", "zero_code"),
    [
        (3, 64, 64, 7),
        (-1, 64, 64, 7),
        (0, -1, 64, 7),
        (0, 2**62, 64, 7),
        (0, 64, 0, 7),
        (0, 64, 16, 7),
        (0, 64, 48, 7),
        (0, 64, 8192, 7),
        (0, 64, 64, 16),
        (0, 64, 64, -1),
    ],
)
def test_quantize_refuses(
    library: ctypes.CDLL, dtype: int, n: int, block_size: int, zero_code: int
) -> None:
    status = library.pyft_cuda_quantize4(
        None, dtype, _size(n), _size(block_size), None, zero_code, None, None, None
    )
    assert status == BAD_ARGUMENT


@pytest.mark.parametrize(
    ("begin", "end", "stride", "dtype", "block_size"),
    [
        (-1, 2, 8, 0, 64),
        (2, 1, 8, 0, 64),
        (0, 5, 8, 0, 64),
        (0, 4, 7, 0, 64),
        (0, 4, 8, 3, 64),
        (0, 4, 8, 0, 33),
    ],
)
def test_dequantize_refuses(
    library: ctypes.CDLL, begin: int, end: int, stride: int, dtype: int, block_size: int
) -> None:
    weight = ctypes.byref(Weight4(None, None, None, None, None, None, 4, 8, block_size))
    status = library.pyft_cuda_dequantize4(
        weight, _size(begin), _size(end), None, _size(stride), dtype, None
    )
    assert status == BAD_ARGUMENT


def test_quantize_absmax_refuses(library: ctypes.CDLL) -> None:
    for n, zero_code in ((-1, 0), (5, 256), (5, -1)):
        arguments = (None, _size(n), None, None, zero_code, None, None, None)
        assert library.pyft_cuda_quantize_absmax(*arguments) == BAD_ARGUMENT


def _run_fault(faults: ctypes.CDLL, fault: int) -> tuple[int, list[int]]:
    x = torch.arange(96, dtype=torch.int32)
    out = torch.full_like(x, -1)
    return faults.run(fault, _pointer(x), _pointer(out)), out.tolist()


def test_simulator_shows_a_missing_barrier(faults: ctypes.CDLL) -> None:
    expected = list(range(95, -1, -1))
    for reverse_warps in (0, 1):
        faults.pyft_sim_reverse_warps(reverse_warps)
        assert _run_fault(faults, 0) == (OK, expected)
        assert _run_fault(faults, 1) != (OK, expected)


@pytest.mark.parametrize(("fault", "text"), [(2, b"divergent barrier"), (3, b"misaligned address")])
def test_simulator_reports_an_error(faults: ctypes.CDLL, fault: int, text: bytes) -> None:
    faults.pyft_cuda_error_string.restype = ctypes.c_char_p
    assert _run_fault(faults, fault)[0] == CUDA_ERROR
    assert text in faults.pyft_cuda_error_string()
