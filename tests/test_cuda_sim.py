"""The CUDA kernels, run on the CPU through csrc/cuda/sim.h: needs no GPU and no CUDA toolkit."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qlinear_cases import LINEAR_CASES, check_linear
from quantize_cases import CASES, check, check_large_offsets
from sim_kernels import Coding, Guarded, SimKernels, Slab, Weight, pointer, size
from stored_weights import CPU

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
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


@pytest.mark.parametrize("name", CASES)
def test_bits_are_the_references(library: ctypes.CDLL, name: str) -> None:
    for reverse_warps in (0, 1):
        library.pyft_sim_reverse_warps(reverse_warps)
        assert check(CASES[name], SimKernels(library), CPU) == ""


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_linear_is_as_exact_as_the_reference(library: ctypes.CDLL, name: str) -> None:
    for reverse_warps in (0, 1):
        library.pyft_sim_reverse_warps(reverse_warps)
        assert check_linear(LINEAR_CASES[name], SimKernels(library), CPU) == ""


def test_nothing_is_read_beyond_the_inputs(library: ctypes.CDLL) -> None:
    child = os.fork()  # a read beyond ends the process
    if child == 0:
        kernels = Guarded(SimKernels(library))
        wrong = [check(case, kernels, CPU) for case in CASES.values()]
        wrong += [check_linear(case, kernels, CPU) for case in LINEAR_CASES.values()]
        os._exit(1 if any(wrong) else 0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.unfilled
def test_offsets_beyond_31_bits(library: ctypes.CDLL) -> None:
    assert check_large_offsets(SimKernels(library), CPU) == ""


def test_device_count(library: ctypes.CDLL) -> None:
    assert library.pyft_cuda_device_count() == 1


def _status(library: ctypes.CDLL, function: str, *arguments: Any) -> int:
    """The status of a call without a single tensor."""
    numbers = [size(x) if isinstance(x, int) else x for x in arguments]
    status: int = getattr(library, f"pyft_cuda_{function}")(*numbers, None)
    return status


def _sized(bits: int, rows: int, cols: int, block_size: int) -> Any:
    return ctypes.byref(Weight(bits, *[None] * 7, rows, cols, block_size))


def _coded(bits: int, zero_code: int = 7) -> Any:
    return ctypes.byref(Coding(bits, zero_code, 1.0, 0, None, None))


def test_empty_input_touches_nothing(library: ctypes.CDLL) -> None:
    null = None
    for block_size in (0, 64):
        assert (
            _status(library, "quantize", null, 0, 0, block_size, _coded(4), null, null, null) == OK
        )
    for rows, cols, slab in ((3, 0, (0, 3, 0, 0)), (0, 8, (0, 0, 0, 8)), (4, 8, (1, 3, 8, 8))):
        weight = _sized(4, rows, cols, 64)
        assert _status(library, "dequantize", weight, Slab(*slab), null, 0, 0) == OK
    for m, rows in ((0, 4), (3, 0)):
        weight = _sized(4, rows, 8, 64)
        assert _status(library, "qlinear", null, m, 8, weight, null, null, rows, 0) == OK


@pytest.mark.parametrize(
    ("dtype", "n", "block_size", "bits", "zero_code"),
    [
        (3, 64, 64, 4, 7),
        (-1, 64, 64, 4, 7),
        (3, 0, 64, 4, 7),
        (0, -1, 64, 4, 7),
        (0, 2**62, 64, 4, 7),
        (0, 64, 0, 4, 7),
        (0, 64, -64, 4, 7),
        (0, 64, 48, 4, 7),
        (0, 70, 16, 8, 7),
        (0, 70, 35, 4, 7),
        (0, 8191, 8192, 8, 7),
        (0, 64, 64, 3, 7),
        (0, 64, 64, 4, 16),
        (0, 64, 64, 8, 256),
        (0, 64, 64, 4, -1),
    ],
)
def test_quantize_refuses(
    library: ctypes.CDLL, dtype: int, n: int, block_size: int, bits: int, zero_code: int
) -> None:
    coding = _coded(bits, zero_code)
    arguments = (None, dtype, n, block_size, coding, None, None, None)
    assert _status(library, "quantize", *arguments) == BAD_ARGUMENT


@pytest.mark.parametrize(
    ("slab", "stride", "dtype", "bits", "block_size"),
    [
        ((-1, 2, 0, 9), 9, 0, 4, 64),
        ((2, 1, 0, 9), 9, 0, 4, 64),
        ((0, 5, 0, 9), 9, 0, 4, 64),
        ((0, 4, -1, 9), 9, 0, 4, 64),
        ((0, 4, 5, 4), 9, 0, 4, 64),
        ((0, 4, 0, 10), 10, 0, 4, 64),
        ((0, 4, 0, 9), 8, 0, 4, 64),
        ((0, 4, 0, 9), 9, 3, 4, 64),
        ((0, 0, 0, 9), 9, 3, 4, 64),
        ((0, 4, 0, 9), 9, 0, 5, 64),
        ((0, 4, 0, 9), 9, 0, 4, 33),
        ((0, 4, 0, 9), 9, 0, 4, 9),
        ((0, 4, 0, 9), 9, 0, 8, 18),
    ],
)
def test_dequantize_refuses(
    library: ctypes.CDLL,
    slab: tuple[int, int, int, int],
    stride: int,
    dtype: int,
    bits: int,
    block_size: int,
) -> None:
    arguments = (_sized(bits, 4, 9, block_size), Slab(*slab), None, stride, dtype)
    assert _status(library, "dequantize", *arguments) == BAD_ARGUMENT


@pytest.mark.parametrize(
    ("m", "stride", "dtype", "bits", "block_size"),
    [
        (-1, 4, 0, 4, 64),
        (65, 4, 0, 4, 64),
        (2, 3, 0, 4, 64),
        (2, 4, 3, 4, 64),
        (0, 4, 3, 4, 64),
        (2, 4, 0, 2, 64),
        (2, 4, 0, 4, 65),
    ],
)
def test_qlinear_refuses(
    library: ctypes.CDLL, m: int, stride: int, dtype: int, bits: int, block_size: int
) -> None:
    arguments = (None, m, 9, _sized(bits, 4, 9, block_size), None, None, stride, dtype)
    assert _status(library, "qlinear", *arguments) == BAD_ARGUMENT


def _run_fault(faults: ctypes.CDLL, fault: int) -> tuple[int, list[int]]:
    x = torch.arange(96, dtype=torch.int32)
    out = torch.full_like(x, -1)
    return faults.run(fault, pointer(x), pointer(out)), out.tolist()


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
