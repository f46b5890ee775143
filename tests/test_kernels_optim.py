"""The GPU kernels of the optimizer step against the reference: the CUDA source through
csrc/cuda/sim.h, which needs no GPU, and the Triton twin on a GPU if there is one, else in Triton's
interpreter.

Triton reads TRITON_INTERPRET when it is imported, so its kernel runs in a process of its own:
``python tests/test_kernels_optim.py`` prints what is wrong with each case as JSON.
"""

import ctypes
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from optim_cases import CASES, CPU, RULES, check
from torch import Tensor
from triton_process import answers_of

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OK, BAD_ARGUMENT = 0, 1


class RuleStruct(ctypes.Structure):
    """pyft_optim_rule of pyft.h."""

    _fields_ = [
        ("algorithm", ctypes.c_int),
        ("nesterov", ctypes.c_int),
        *((name, ctypes.c_float) for name in next(iter(RULES.values()))._fields[2:]),
    ]


class Maps(ctypes.Structure):
    """pyft_optim_maps of pyft.h."""

    _fields_ = [("codes", ctypes.c_void_p), ("starts", ctypes.c_void_p)]


class SimKernels:
    """The CUDA kernel on CPU tensors, shared among ``grid`` thread blocks."""

    OPTIM_ALIGN = 1

    def __init__(self, library: ctypes.CDLL, grid: int) -> None:
        self.library, self.grid = library, grid
        library.pyft_cuda_error_string.restype = ctypes.c_char_p

    def optim(
        self,
        table: Tensor,
        blocks: int,
        aligned: bool,
        on: Tensor,
        codes: Tensor,
        starts: Tensor,
        *rule: float,
    ) -> None:
        status = self.status(
            table.data_ptr(), len(table), blocks, DTYPES[on.dtype], rule, codes, starts, self.grid
        )
        if status != OK:
            raise RuntimeError(f"status {status}: {self.library.pyft_cuda_error_string().decode()}")

    def status(
        self,
        table: int | None,
        count: int,
        blocks: int,
        dtype: int,
        rule: tuple[float, ...],
        codes: Tensor,
        starts: Tensor,
        grid: int,
    ) -> int:
        maps = Maps(codes.data_ptr(), starts.data_ptr())
        found: int = self.library.pyft_cuda_optim(
            ctypes.c_void_p(table), ctypes.c_int64(count), ctypes.c_int64(blocks), dtype,
            ctypes.byref(RuleStruct(int(rule[0]), int(rule[1]), *rule[2:])), ctypes.byref(maps),
            grid, None,
        )  # fmt: skip
        return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/optim.cu compiled for the CPU."""
    target = tmp_path_factory.mktemp("sim") / "optim.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC"]
    command = [os.environ.get("CXX", "g++"), *flags, "-shared", "-DPYFT_CPU_SIM", f"-I{CUDA}"]
    sources = [str(CUDA / name) for name in ("optim.cu", "runtime.cu")]
    done = subprocess.run(
        [*command, "-x", "c++", *sources, "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return ctypes.CDLL(str(target))


@pytest.mark.parametrize(("grid", "reverse_warps"), [(1000, 0), (3, 1)])
@pytest.mark.parametrize("name", CASES)
def test_cuda_source_on_the_cpu(
    library: ctypes.CDLL, name: str, grid: int, reverse_warps: int
) -> None:
    library.pyft_sim_reverse_warps(reverse_warps)
    assert check(CASES[name], SimKernels(library, grid), CPU) == ""


def test_cuda_refuses_bad_arguments(library: ctypes.CDLL) -> None:
    kernels = SimKernels(library, 1)
    rule = tuple(RULES["adamw"])
    codes, starts = torch.empty(4, 256), torch.empty(64, dtype=torch.uint8)
    wrong = [(-1, 0, 0, 1, 0), (1, 0, 0, 1, 0), (1, 1, 3, 1, 0), (1, 1, -1, 1, 0), (1, 1, 0, 0, 0)]
    for count, blocks, dtype, grid, algorithm in [*wrong, (1, 1, 0, 1, 3), (1, 1, 0, 1, -1)]:
        changed = (algorithm, *rule[1:])
        status = kernels.status(None, count, blocks, dtype, changed, codes, starts, grid)
        assert status == BAD_ARGUMENT, (count, blocks, dtype, grid, algorithm)
    assert kernels.status(None, 0, 0, 0, rule, codes, starts, 1) == OK
    assert kernels.status(None, 1, 1, 0, rule, codes, starts[1:], 1) == BAD_ARGUMENT


def run_cases() -> dict[str, str]:
    """What is wrong with each case of the Triton kernel, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import configs, optim

    class Interpreted:
        """With larger programs: the interpreter's time goes by their number."""

        OPTIM_ALIGN = 16

        def optim(self, *arguments: object) -> None:
            optim.optim(*arguments, config=configs.Optim(rows=self.OPTIM_ALIGN))  # type: ignore[arg-type]

    gpu = torch.cuda.is_available()
    kernels = optim if gpu else Interpreted()
    device = torch.device("cuda" if gpu else "cpu")
    return {name: check(case, kernels, device) for name, case in CASES.items()}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_triton_bits_are_the_references(wrong: dict[str, str], name: str) -> None:
    assert wrong[name] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
