"""QuantizedTensor in use: reads decode, writes raise, linears run, compiled too."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantize_truth import same
from quantized_weights import KIND, Kind, linear_with, quantized, same_parts
from shapes import QUANTIZED_DTYPES, dtype_name
from torch import Tensor, nn

import pyft
from pyft.errors import UsageError
from pyft.quantized import QuantizedTensor

SOME = pytest.mark.parametrize(
    "kind",
    [("nf4", True), ("int4_zp", False), ("int8", False), ("columns", False)],
    ids=lambda kind: kind[0],
)
ROOT = Path(__file__).parents[1]
DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)


def test_state_dict_assigns() -> None:
    linear, other = linear_with(quantized()), linear_with(quantized())
    linear.load_state_dict(other.state_dict(), assign=True)
    assert isinstance(linear.weight, QuantizedTensor)
    assert same_parts(linear.weight, other.weight)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "copy_": lambda w: w.copy_(torch.zeros(6, 100)),
    "data": lambda w: w.data.zero_(),
    "init": lambda w: nn.init.normal_(w),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "setitem mask": lambda w: w.__setitem__(torch.ones(6, 100, dtype=torch.bool), 1.0),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.ones(())),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), torch.ones(1, 100)),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(6, 100, dtype=torch.bool), 0.0),
    "out": lambda w: torch.add(torch.ones(6, 100), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "second of foreach": lambda w: torch._foreach_add_([torch.zeros(2), w], 1.0),
    "state_dict": lambda w: linear_with(w).load_state_dict(
        {"weight": torch.zeros(6, 100), "bias": torch.zeros(6)}
    ),
}


@pytest.mark.parametrize("write", WRITES)
@SOME
def test_writing_raises_and_changes_nothing(kind: Kind, write: str) -> None:
    q = quantized(kind)
    before = q.clone()
    with torch.no_grad(), pytest.raises((UsageError, RuntimeError), match="dequantize it first"):
        WRITES[write](q)
    assert same_parts(q, before)


READS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda w: w.sum(),
    "row": lambda w: w[2],
    "transposed": lambda w: w.t(),
    "matmul": lambda w: torch.ones(3, 6) @ w,
    "abs": lambda w: w.abs().max(),
    "isnan": lambda w: w.isnan(),
    "compare": lambda w: w > 0,
    "cat": lambda w: torch.cat([w, w]),
    "like": lambda w: torch.zeros_like(w),
    "second argument": lambda w: torch.zeros(6, 100).copy_(w),
    "norm": lambda w: torch.linalg.vector_norm(w),
    "reshape": lambda w: w.reshape(-1),
    "embedding": lambda w: F.embedding(torch.tensor([3, 1]), w),
    "numpy": lambda w: torch.from_numpy(w.dequantize().numpy()),
}


@pytest.mark.parametrize("read", READS)
@SOME
def test_any_other_use_decodes(kind: Kind, read: str) -> None:
    q = quantized(kind)
    found = READS[read](q)
    assert type(found) is Tensor
    assert torch.equal(found, READS[read](q.dequantize()))


@KIND
@DTYPE
def test_linear_over_it(dtype: torch.dtype, kind: Kind) -> None:
    q = quantized(kind, dtype)
    x, bias = torch.randn(2, 5, 100, dtype=dtype), torch.randn(6, dtype=dtype)
    expected = F.linear(x, q.dequantize(), bias)
    torch.testing.assert_close(F.linear(x, q, bias), expected)
    torch.testing.assert_close(F.linear(input=x, weight=q, bias=bias), expected)
    torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))
    linear = linear_with(q).to(dtype)
    linear.bias.data.copy_(bias)
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("rows", [4, 100])
@KIND
def test_linear_backward_reaches_the_input_only(kind: Kind, rows: int) -> None:
    linear = linear_with(quantized(kind))
    x = torch.randn(rows, 100, requires_grad=True)
    linear(x).sum().backward()
    expected = linear.weight.dequantize().sum(0).expand(rows, 100)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.bias.grad, torch.full((6,), float(rows)))
    assert linear.weight.grad is None


@SOME
def test_compile_whole(kind: Kind) -> None:
    torch._dynamo.reset()
    linear = linear_with(quantized(kind))
    x = torch.randn(4, 100, requires_grad=True)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, linear(x))
    grad = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(linear(x).square().sum(), x))


@pytest.mark.parametrize("rows", [3, 100])
def test_compile_of_a_model(rows: int) -> None:
    """Several formats in one graph, for few rows and for many, after a weight is exchanged too."""
    torch._dynamo.reset()
    kinds = (("nf4", True), ("int4_zp", False), ("int8", False), ("mxfp4", False))
    layers: list[nn.Module] = []
    for kind in kinds:
        layers += [linear_with(quantized(kind)), nn.Linear(6, 100)]
    model = nn.Sequential(*layers)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(rows, 100, requires_grad=True)
        found, expected = compiled(x), model(x)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(gradient, wanted)
        layers[0].weight = nn.Parameter(quantized(kinds[0]), requires_grad=False)


@SOME
def test_compiled_uses_decode_too(kind: Kind) -> None:
    torch._dynamo.reset()
    w, x = quantized(kind), torch.randn(3, 100)
    compiled = torch.compile(lambda x: x @ w.t(), backend="aot_eager")
    assert torch.equal(compiled(x), x @ w.dequantize().t())


def test_compiled_out() -> None:
    w = quantized()
    compiled = torch.compile(lambda q: pyft.dequantize(q) * 2, backend="aot_eager")
    assert same(compiled(w), w.dequantize() * 2)


def test_out_among_fake_tensors() -> None:
    """No kernel may run on tensors without memory, nor a table made among them be kept; in a
    process of its own, which a write to address 0 would end.
    """
    script = """
import pyft, torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    q = pyft.quantize(torch.empty(8, 66), "int8")
    try:
        print(tuple(pyft.dequantize(q, out=torch.empty(8, 66)).shape))
    except pyft.UsageError as error:
        print(error)
print(bool(pyft.quantize(torch.ones(4, 64), "int8").dequantize().eq(1).all()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-300:]
    assert done.stdout.splitlines()[1:] == ["True"]
