"""The linear over quantized weights, forward and the gradient of its input."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from error_rule import check_error
from qlinear_cases import LINEAR_CASES, check_linear
from quantize_truth import ISAS, RUNS, running, same, sizes_of
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, WEIGHT_SHAPES, dtype_name
from torch import Tensor

import pyft
from pyft import native
from pyft.errors import UsageError
from pyft.formats import FORMATS
from pyft.ops.qlinear import FUSED_ROWS
from pyft.quantized import QuantizedTensor
from pyft.scratch import limit_scratch, slabs

ROOT = Path(__file__).parents[1]
NAME = pytest.mark.parametrize("name", FORMATS)
RUN = pytest.mark.parametrize("run", RUNS)
DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
MANY = max(FUSED_ROWS["cpu"].values()) + 6  # more rows than are ever decoded for on the fly
CPU = torch.device("cpu")


@pytest.fixture
def small_scratch() -> Iterator[None]:
    """1 MiB: the least there can be."""
    before = limit_scratch(1 << 20)
    yield
    limit_scratch(before)


def decoded(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The weight rounded once to the dtype it is multiplied in."""
    if dtype == torch.float64:
        return pyft.dequantize(q, dtype=torch.float32).double()
    return pyft.dequantize(q, dtype=dtype)


def forward_and_gradient(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = F.linear(x, weight, bias)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def check_linear_over(q: QuantizedTensor, x: Tensor, bias: Tensor | None, dy: Tensor) -> None:
    """y and dX by the error rule, with fp64 over the decoded weight as the truth."""
    w = decoded(q, x.dtype)
    found = forward_and_gradient(x, q, bias, dy)
    plain = forward_and_gradient(x, w, bias, dy)
    wide = None if bias is None else bias.double()
    truth = forward_and_gradient(x.double(), w.double(), wide, dy.double())
    for what, kernel, reference, exact in zip(("y", "dX"), found, plain, truth, strict=True):
        check_error(what, kernel, reference, exact)


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@NAME
@RUN
def test_error_rule(run: str, name: str, dtype: torch.dtype) -> None:
    """Few rows (decoded on the fly) and many, odd K, weights of all shapes."""
    weights = [shape for shape in WEIGHT_SHAPES if shape[0]]
    for i, (n, k) in enumerate([*weights, (64, 1030)]):
        sizes = sizes_of(FORMATS[name], (n, k))
        q = pyft.quantize(torch.randn(n, k).bfloat16(), name, sizes[i % len(sizes)])
        few = FUSED_ROWS["cpu"].get(dtype, 0)
        for m in (1, 3, few, few + 1, MANY)[i % 2 :: 2]:
            if n * m < 32:
                continue  # the rule compares largest errors: of a few numbers they are chance
            x, dy = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
            bias = torch.randn(n, dtype=dtype) if i % 3 else None
            with running(run):
                check_linear_over(q, x, bias, dy)


@pytest.mark.parametrize("run", ISAS)
def test_any_number_of_rows(run: str) -> None:
    q = pyft.quantize(torch.randn(37, 200))
    with running(run):
        for dtype, m in itertools.product(LINEAR_DTYPES, range(MANY)):
            x, dy = torch.randn(m, 200, dtype=dtype), torch.randn(m, 37, dtype=dtype)
            check_linear_over(q, x, torch.randn(37, dtype=dtype), dy)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0, 3), (4, 5, 6)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    q = pyft.quantize(torch.randn(9, 64))
    x, bias = torch.randn(*shape, 64), torch.randn(9)
    found = forward_and_gradient(x, q, bias, torch.ones(*shape, 9))
    plain = forward_and_gradient(x, q.dequantize(), bias, torch.ones(*shape, 9))
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("n", "k"), [(0, 64), (5, 0)])
@pytest.mark.parametrize("m", [3, MANY])
def test_empty_weights(m: int, n: int, k: int) -> None:
    q, bias = pyft.quantize(torch.randn(n, k)), torch.randn(n)
    y, dx = forward_and_gradient(torch.randn(m, k), q, bias, torch.ones(m, n))
    assert torch.equal(y, bias.expand(m, n))
    assert torch.equal(dx, torch.zeros(m, k))


LAYOUTS = {
    "wider rows": lambda m, k: torch.randn(m, k + 9)[:, :k],
    "every other row": lambda m, k: torch.randn(2 * m, k)[::2],
    "transposed": lambda m, k: torch.randn(k, m).t(),
    "every other column": lambda m, k: torch.randn(m, 2 * k)[:, ::2],
    "odd address": lambda m, k: torch.randn(m * k + 1)[1:].view(m, k),
    "one row for all": lambda m, k: torch.randn(1, k).expand(m, k),
    "windows of a sequence": lambda m, k: torch.randn(2 * m + k).unfold(0, k, 2)[:m],
    "permuted batch": lambda m, k: torch.randn(3, m, k).transpose(0, 1),
    "rows reversed in memory": lambda m, k: torch.randn(m, k).flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [2, 5, MANY])
@DTYPE
def test_layouts_of_the_input(dtype: torch.dtype, m: int, layout: str) -> None:
    q, bias = pyft.quantize(torch.randn(33, 100)), torch.randn(33, dtype=dtype)
    x = LAYOUTS[layout](m, 100).to(dtype)
    check_linear_over(q, x, bias, torch.randn(*x.shape[:-1], 33, dtype=dtype))
    if x.shape[:-1].numel() <= FUSED_ROWS["cpu"][dtype]:
        assert torch.equal(F.linear(x, q, bias), F.linear(x.contiguous(), q, bias))


BIASES = {
    "every other": lambda n: torch.randn(2 * n)[::2],
    "one for all": lambda n: torch.randn(1).expand(n),
    "a column": lambda n: torch.randn(n, 3)[:, 1],
    "odd address": lambda n: torch.randn(n + 1)[1:],
    "fp64": lambda n: torch.randn(n).double(),
}


@pytest.mark.parametrize("layout", BIASES)
@pytest.mark.parametrize("m", [2, MANY])
def test_layouts_of_the_bias(m: int, layout: str) -> None:
    q, x, bias = pyft.quantize(torch.randn(7, 100)), torch.randn(m, 100), BIASES[layout](7)
    assert torch.equal(F.linear(x, q, bias), F.linear(x, q, bias.float().contiguous()))


@pytest.mark.parametrize("m", [2, MANY])
def test_layouts_of_the_gradient(m: int) -> None:
    q, x = pyft.quantize(torch.randn(7, 100)), torch.randn(m, 100, requires_grad=True)
    for dy in (torch.randn(1, 1).expand(m, 7), torch.randn(7, m).t(), torch.randn(m, 9)[:, 2:]):
        (found,) = torch.autograd.grad(F.linear(x, q), x, dy)
        torch.testing.assert_close(found, dy @ q.dequantize())


@DTYPE
@pytest.mark.parametrize("m", [3, MANY])
def test_columns_stored_in_another_order(m: int, dtype: torch.dtype) -> None:
    plain = pyft.quantize(torch.randn(12, 100), "int4_zp", 32)
    parts = [*plain.parts(), torch.randperm(100).int()]
    q = QuantizedTensor(parts, "int4_zp", 32, plain.shape, torch.float32)
    x, dy = torch.randn(m, 100, dtype=dtype), torch.randn(m, 12, dtype=dtype)
    check_linear_over(q, x, torch.randn(12, dtype=dtype), dy)


@pytest.mark.parametrize("run", ISAS)
def test_shared_cases(run: str) -> None:
    """The cases the Triton and CUDA kernels are held to, memory around the output included."""
    with running(run):
        wrong = {
            case: text
            for case in LINEAR_CASES
            if (text := check_linear(LINEAR_CASES[case], native, CPU))
        }
    assert wrong == {}


@pytest.mark.parametrize("m", [1, 23])
@DTYPE
@pytest.mark.parametrize("run", ISAS)
def test_same_bits_twice_and_on_any_number_of_threads(run: str, dtype: torch.dtype, m: int) -> None:
    """More than one part for each thread, the last one short."""
    q = pyft.quantize(torch.randn(1021, 1100))
    x, bias = torch.randn(m, 1100, dtype=dtype), torch.randn(1021, dtype=dtype)
    with running(run):
        expected = F.linear(x, q, bias)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert same(F.linear(x, q, bias), expected)


@pytest.mark.parametrize("run", ISAS)
def test_rows_do_not_depend_on_one_another(run: str) -> None:
    """A row has the same bits alone as among others."""
    q = pyft.quantize(torch.randn(33, 1500))
    for dtype in QUANTIZED_DTYPES:
        few = FUSED_ROWS["cpu"][dtype]
        x = torch.randn(few, 1500, dtype=dtype)
        with running(run):
            together = F.linear(x, q)
            for i in range(0, few, 3):
                assert same(F.linear(x[i : i + 1], q), together[i : i + 1])


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["nf4", "int8", "mxfp4"])
@pytest.mark.usefixtures("small_scratch")
def test_slab_by_slab_is_the_whole(name: str, dtype: torch.dtype) -> None:
    """Several slabs forward and several backward, the last ones short. Of -1, 0 and 1 all sums are
    exact, so that a wrong element shows, and in any order, so that nothing else does.
    """
    n, k = 1100, 1301
    w = torch.randint(-1, 2, (n, k)).float()
    size = 32 if name == "mxfp4" else 64
    q = pyft.quantize(w, name, size, double_quant=False)
    assert torch.equal(q.dequantize(), w)
    x, dy = torch.randint(-1, 2, (MANY, k)).to(dtype), torch.randint(-1, 2, (MANY, n)).to(dtype)
    for which in (slabs(n, k, torch.bfloat16), slabs(k, n, torch.bfloat16)):
        assert len(which) >= 3
    found = forward_and_gradient(x, q, None, dy)
    exact = forward_and_gradient(x.double(), w.double(), None, dy.double())
    limit_scratch(None)
    whole = forward_and_gradient(x, q, None, dy)
    for slabbed, at_once, truth in zip(found, whole, exact, strict=True):
        assert torch.equal(slabbed, truth.to(dtype))
        assert torch.equal(at_once, truth.to(dtype))


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@pytest.mark.usefixtures("small_scratch")
def test_slab_by_slab_keeps_to_the_error_rule(dtype: torch.dtype) -> None:
    q = pyft.quantize(torch.randn(900, 1301))
    x, dy = torch.randn(MANY, 1301, dtype=dtype), torch.randn(MANY, 900, dtype=dtype)
    check_linear_over(q, x, torch.randn(900, dtype=dtype), dy)


def test_infinities_and_nan_pass_through() -> None:
    w = torch.randn(4, 128)
    w[1, 3] = torch.nan
    q = pyft.quantize(w, double_quant=False)
    for m in (2, MANY):
        x = torch.randn(m, 128)
        x[1, 5] = torch.inf
        y, plain = F.linear(x, q), F.linear(x, q.dequantize())
        assert torch.equal(y.isfinite(), plain.isfinite())
        assert torch.equal(y.isnan(), plain.isnan())


def test_nothing_is_saved_but_the_weight() -> None:
    q, x = pyft.quantize(torch.randn(64, 128)), torch.randn(MANY, 128, requires_grad=True)
    saved: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with keep:
        F.linear(x, q)
    stored = {part.data_ptr() for part in q.parts()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in stored) == 0


def test_second_backward_is_the_same() -> None:
    q, x = pyft.quantize(torch.randn(64, 128)), torch.randn(MANY, 128, requires_grad=True)
    y = F.linear(x, q).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


@pytest.mark.parametrize("m", [2, MANY])
def test_under_autocast(m: int) -> None:
    q, x = pyft.quantize(torch.randn(7, 100)), torch.randn(m, 100)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, q)
    assert same(y, F.linear(x.bfloat16(), q))


@pytest.mark.parametrize("m", [2, MANY])
def test_inference_mode(m: int) -> None:
    q, x = pyft.quantize(torch.randn(7, 100)), torch.randn(m, 100)
    with torch.inference_mode():
        found = F.linear(x, q)
    assert torch.equal(found, F.linear(x, q))


def test_a_weight_on_another_device() -> None:
    """Refused in one line; in a process of its own, as a wrong address would end it."""
    script = f"""
import torch, pyft
q = pyft.quantize(torch.randn(8, 64)).to("meta")
for rows in ({MANY}, 2):
    try:
        torch.nn.functional.linear(torch.randn(rows, 64), q)
    except pyft.UsageError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-300:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("cpu" in line and "meta" in line for line in lines)


@pytest.mark.parametrize("shape", [(3, 63), (65,), (2, 3, 1)])
def test_inputs_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"x \(.*\) and weight \(8, 64\) do not fit"):
        F.linear(torch.randn(shape), pyft.quantize(torch.randn(8, 64)))
