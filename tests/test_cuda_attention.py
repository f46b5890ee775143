"""Attention's CUDA kernels, run on the CPU through csrc/cuda/sim.h: needs no GPU and no CUDA
toolkit. Warps run in both orders.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CASES, check, check_far
from sim_attention import UNBOUNDED, Backward, Rule, SimAttention, call_of, view
from sim_kernels import Guarded, pointer, size
from stored_weights import CPU
from torch import Tensor

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
SOURCES = ("attention.cu", "attention_backward.cu", "runtime.cu")
OK, BAD_ARGUMENT = 0, 1
LACKS = {"bias", "slopes", "dropout", "fp32", "dim>256"}
MINE = {name: case for name, case in CASES.items() if not case.needs & LACKS}

PRODUCTS = """
#include "mma.h"

template <class T, bool kTransposed>
__global__ void product(const uint4* a, const uint4* b, float* c) {
  PYFT_SHARED(uint4, tiles, 64);
  const int lane = threadIdx.x;
  tiles[lane] = a[lane];
  tiles[32 + lane] = b[lane];
  __syncthreads();
  uint32_t left[4], right[4];
  pyft::load_matrices<false>(pyft::shared_address(tiles + lane % 16 * 2 + lane / 16), left);
  const int row = kTransposed ? lane % 16 : lane % 8 + lane / 16 * 8;
  const int chunk = kTransposed ? lane / 16 : lane / 8 % 2;
  pyft::load_matrices<kTransposed>(pyft::shared_address(tiles + 32 + row * 2 + chunk), right);
  float sum[2][4] = {};
  pyft::multiply<T>(left, right[0], right[1], sum[0]);
  pyft::multiply<T>(left, right[2], right[3], sum[1]);
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      c[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = sum[n][i];
    }
  }
}

__global__ void too_much(int* out) {
  PYFT_SHARED(uint4, tiles, 3073);
  tiles[0].x = 1;
  out[0] = tiles[0].x;
}

extern "C" int run(int bf16, int transposed, const uint4* a, const uint4* b, float* c) {
  const auto half = transposed ? product<__half, true> : product<__half, false>;
  const auto bfloat = transposed ? product<__nv_bfloat16, true> : product<__nv_bfloat16, false>;
  const auto kernel = bf16 ? bfloat : half;
  PYFT_LAUNCH(kernel, 1, 32, nullptr, a, b, c);
  return pyft::launch_status();
}

extern "C" int run_too_much(int* out) {
  PYFT_LAUNCH(too_much, 1, 1, nullptr, out);
  return pyft::launch_status();
}
"""


def _build(target: Path, *sources: Path) -> ctypes.CDLL:
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


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("attention") / "sim.so"
    return _build(target, *(CUDA / source for source in SOURCES))


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("products")
    source = folder / "products.cu"
    source.write_text(PRODUCTS)
    return _build(folder / "sim.so", source, CUDA / "runtime.cu")


@pytest.mark.parametrize("name", MINE)
def test_gradients_are_as_exact_as_the_references(library: ctypes.CDLL, name: str) -> None:
    for reverse_warps in (0, 1):
        library.pyft_sim_reverse_warps(reverse_warps)
        assert check(MINE[name], SimAttention(library), CPU) == ""


@pytest.mark.parametrize("dims", [(40, 24), (64, 64), (128, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_all_features_at_once(library: ctypes.CDLL, dtype: str, dims: tuple[int, int]) -> None:
    """Several tiles of rows and of columns, packed, in a group of heads; the same bits twice."""
    case = replace(
        next(iter(MINE.values())),
        lengths=((70, 80), (0, 3), (1, 66)), heads=(2, 1), dims=dims, dtype=dtype,
        left=50, right=3, shift=2, softcap=5.0, sinks=True, dlse="full", layout="bshd",
        repeat=dims == (64, 64),
    )  # fmt: skip
    for reverse_warps in (0, 1):
        library.pyft_sim_reverse_warps(reverse_warps)
        assert check(case, SimAttention(library), CPU) == ""


def test_offsets_beyond_31_bits(library: ctypes.CDLL) -> None:
    assert check_far(SimAttention(library), CPU) == ""


class GuardedAttention(SimAttention):
    """The kernels on inputs that end where memory cannot be read."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.guard = Guarded(self)._guard

    def attention(self, *arguments: Any) -> None:
        *inputs, rule, o, lse = arguments
        super().attention(*map(self.guard, inputs), rule, o, lse)

    def attention_delta(self, o: Tensor, do: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
        super().attention_delta(self.guard(o), self.guard(do), dlse, delta)

    def attention_backward(self, *arguments: Any) -> None:
        inputs, (rule, *outputs) = arguments[:10], arguments[10:]
        super().attention_backward(*map(self.guard, inputs), rule, *outputs)


def test_nothing_is_read_beyond_the_inputs(library: ctypes.CDLL) -> None:
    shapes: list[dict[str, Any]] = [
        {"seq": (37, 37), "dims": (40, 40)},
        {"seq": (70, 81), "dims": (64, 64), "right": 0},
        {"seq": (33, 65), "dims": (59, 111)},
        {"lengths": ((17, 17), (0, 5), (9, 30)), "dims": (128, 32)},
        {"seq": (5, 19), "dims": (136, 136)},
    ]
    cases = [replace(next(iter(MINE.values())), **shape, dtype="fp16") for shape in shapes]
    child = os.fork()  # a read beyond ends the process
    if child == 0:
        kernels = GuardedAttention(library)
        os._exit(1 if any(check(case, kernels, CPU) for case in cases) else 0)
    assert os.waitpid(child, 0)[1] == 0


PLAIN: Rule = (1.0, None, None, 0, None, None)


def _statuses(library: ctypes.CDLL, dtype: int, change: Callable[[Any], None]) -> set[int]:
    """What forward and backward answer to a call without a single row."""
    x = torch.zeros(1, 2, 0, 8, dtype=torch.float16)
    call = call_of(x, x, x, None, None, None, None, None, PLAIN)
    change(call)
    views = [view(None)] * 4
    gradients = Backward(views[0], None, None, *views[1:])
    pointers = [ctypes.byref(s) for s in (call, views[0], gradients)]
    forward = library.pyft_cuda_attention(pointers[0], pointers[1], None, dtype, None)
    return {forward, library.pyft_cuda_attention_backward(pointers[0], pointers[2], dtype, None)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", -1), ("q_heads", 0), ("q_heads", 3), ("kv_heads", 0), ("q_len", -1),
        ("k_len", 2**30), ("dim", 0), ("dim", 257), ("v_dim", 257), ("bias", 16), ("slopes", 16),
        ("threshold", 1), ("cu_seqlens_q", 16), ("cu_seqlens_k", 16),
    ],
)  # fmt: skip
def test_refuses(library: ctypes.CDLL, field: str, value: int) -> None:
    assert _statuses(library, 1, lambda call: setattr(call, field, value)) == {BAD_ARGUMENT}


def test_refuses_a_dtype(library: ctypes.CDLL) -> None:
    def as_it_is(call: Any) -> None:
        assert call.left == call.right == UNBOUNDED

    assert [_statuses(library, dtype, as_it_is) for dtype in (0, 1, 2, 3)] == [
        {BAD_ARGUMENT}, {OK}, {OK}, {BAD_ARGUMENT},
    ]  # fmt: skip
    library.pyft_sim_capability(7)
    try:
        assert [_statuses(library, dtype, as_it_is) for dtype in (1, 2)] == [{OK}, {BAD_ARGUMENT}]
    finally:
        library.pyft_sim_capability(8)


def test_delta_refuses(library: ctypes.CDLL) -> None:
    nothing = ctypes.byref(view(None))
    for sizes, dtype in (((1, 1, 1, 8), 0), ((1, 1, 1, 8), 3), ((-1, 1, 1, 8), 1)):
        arguments = (*map(size, sizes), nothing, nothing, None, None, pointer(None), dtype, None)
        assert library.pyft_cuda_attention_delta(*arguments) == BAD_ARGUMENT


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_simulated_product(products: ctypes.CDLL, dtype: torch.dtype, transposed: bool) -> None:
    a, b = (torch.randint(-8, 9, (16, 16)).to(dtype) for _ in range(2))
    c = torch.full((16, 16), torch.nan)
    bf16 = int(dtype == torch.bfloat16)
    assert products.run(bf16, int(transposed), pointer(a), pointer(b), pointer(c)) == OK
    assert torch.equal(c, a.float() @ (b if transposed else b.t()).float())


def test_simulator_refuses_too_much_shared_memory(products: ctypes.CDLL) -> None:
    products.pyft_cuda_error_string.restype = ctypes.c_char_p
    out = torch.zeros(1, dtype=torch.int32)
    assert products.run_too_much(pointer(out)) != OK
    assert b"too much shared memory" in products.pyft_cuda_error_string()
