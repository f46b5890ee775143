"""QuantizedTensor among torch's own machinery."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes import QUANTIZED_DTYPES, dtype_name
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pyft
from pyft.errors import UsageError
from pyft.formats import FORMATS, Format
from pyft.quantized import QuantizedTensor

BOTH = pytest.mark.parametrize("double_quant", [False, True])


def quantized(double_quant: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    return pyft.quantize(torch.randn(6, 100).to(dtype), double_quant=double_quant)


def same_parts(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = zip(a.parts(), b.parts(), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def linear_with(q: QuantizedTensor) -> nn.Linear:
    linear = nn.Linear(q.shape[1], q.shape[0])
    linear.weight = nn.Parameter(q, requires_grad=False)
    return linear


@BOTH
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
def test_looks_like_the_weight_it_stands_for(dtype: torch.dtype, double_quant: bool) -> None:
    q = quantized(double_quant, dtype)
    assert q.shape == (6, 100)
    assert q.dtype == dtype
    assert q.device.type == "cpu"
    assert q.numel() == 600
    assert q.dim() == 2
    assert q.is_floating_point()
    assert q.double_quant is double_quant
    assert not q.requires_grad
    assert len(q.parts()) == (4 if double_quant else 2)
    expected = 300 + (10 + 4 + 4 if double_quant else 10 * 4)
    assert q.stored_bytes == expected
    assert repr(q) == (
        f"QuantizedTensor(nf4, shape=(6, 100), dtype={dtype}, device='cpu', block_size=64, "
        f"double_quant={double_quant})"
    )


@BOTH
def test_flatten_and_unflatten(double_quant: bool) -> None:
    q = quantized(double_quant)
    names, context = q.__tensor_flatten__()
    inner = {name: getattr(q, name) for name in names}
    again = QuantizedTensor.__tensor_unflatten__(inner, context, q.shape, q.stride())
    assert len(names) == len(q.parts())
    assert all(a is b for a, b in zip(again.parts(), q.parts(), strict=True))
    assert (again.shape, again.dtype, again.block_size) == (q.shape, q.dtype, q.block_size)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
def test_to_dtype_changes_no_stored_bit(dtype: torch.dtype) -> None:
    q = quantized()
    moved = q.to(dtype)
    assert isinstance(moved, QuantizedTensor)
    assert moved.dtype == dtype
    assert same_parts(q, moved)
    assert moved.dequantize().dtype == dtype
    assert torch.equal(moved.dequantize(), pyft.dequantize(q, dtype=dtype))


def test_to_a_dtype_no_weight_has_decodes() -> None:
    """What the values would be on a plain tensor, never a label that no decode can honour."""
    q = quantized()
    for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64):
        converted = q.to(dtype)
        assert not isinstance(converted, QuantizedTensor)
        assert torch.equal(converted, q.dequantize().to(dtype))
    assert torch.equal(q.double() + 0, q.dequantize().double())


@BOTH
def test_to_device_moves_what_is_stored(double_quant: bool) -> None:
    q = quantized(double_quant)
    moved = q.to("meta")
    assert isinstance(moved, QuantizedTensor)
    assert {part.device.type for part in moved.parts()} == {"meta"}
    assert moved.device.type == "meta"
    assert q.cpu() is q
    copied = q.to("cpu", copy=True)
    assert same_parts(copied, q)
    assert copied.packed.data_ptr() != q.packed.data_ptr()


@BOTH
@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: nn.Parameter(q, requires_grad=False)])
def test_deepcopy_and_clone(wrap: Callable[[Tensor], Any], double_quant: bool) -> None:
    q = wrap(quantized(double_quant))
    for other in (copy.deepcopy(q), q.clone()):
        assert isinstance(other, QuantizedTensor)
        assert same_parts(q, other)
        pairs = zip(other.parts(), q.parts(), strict=True)
        assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert isinstance(copy.deepcopy(q), nn.Parameter) == isinstance(q, nn.Parameter)
    assert q.detach().packed.data_ptr() == q.packed.data_ptr()


@BOTH
def test_save_and_load_without_pickled_code(double_quant: bool) -> None:
    q = quantized(double_quant, torch.bfloat16)
    file = io.BytesIO()
    torch.save({"w": q}, file)
    assert file.getbuffer().nbytes < 6000
    file.seek(0)
    with torch.serialization.safe_globals([QuantizedTensor, Format]):
        loaded = torch.load(file, weights_only=True)["w"]
    assert same_parts(q, loaded)
    assert (loaded.shape, loaded.dtype, loaded.block_size) == (q.shape, q.dtype, q.block_size)
    assert loaded.format == FORMATS["nf4"]
    assert torch.equal(loaded.dequantize(), q.dequantize())


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
    "init": lambda w: nn.init.normal_(w),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "setitem mask": lambda w: w.__setitem__(torch.ones(6, 100, dtype=torch.bool), 1.0),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.ones(())),
    "out": lambda w: torch.add(torch.ones(6, 100), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "second of foreach": lambda w: torch._foreach_add_([torch.zeros(2), w], 1.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_raises_and_changes_nothing(write: str) -> None:
    q = quantized()
    before = q.clone()
    with torch.no_grad(), pytest.raises(UsageError, match="dequantize it first"):
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
}


@pytest.mark.parametrize("read", READS)
def test_any_other_use_decodes(read: str) -> None:
    q = quantized()
    found = READS[read](q)
    assert type(found) is Tensor
    assert torch.equal(found, READS[read](q.dequantize()))


@BOTH
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
def test_linear_over_it(dtype: torch.dtype, double_quant: bool) -> None:
    q = quantized(double_quant, dtype)
    x, bias = torch.randn(2, 5, 100, dtype=dtype), torch.randn(6, dtype=dtype)
    expected = F.linear(x, q.dequantize(), bias)
    torch.testing.assert_close(F.linear(x, q, bias), expected)
    torch.testing.assert_close(F.linear(input=x, weight=q, bias=bias), expected)
    torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))
    linear = linear_with(q).to(dtype)
    linear.bias.data.copy_(bias)
    torch.testing.assert_close(linear(x), expected)


def test_linear_backward_reaches_the_input_only() -> None:
    linear = linear_with(quantized())
    x = torch.randn(4, 100, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.dequantize().sum(0).expand(4, 100))
    torch.testing.assert_close(linear.bias.grad, torch.full((6,), 4.0))
    assert linear.weight.grad is None


@pytest.mark.parametrize("change", ["half", "float", "bfloat16", "double", "eval", "train", "cpu"])
def test_no_module_method_changes_a_stored_bit(change: str) -> None:
    linear = linear_with(quantized())
    before = linear.weight.clone()
    getattr(linear, change)()
    assert isinstance(linear.weight, QuantizedTensor)
    assert isinstance(linear.weight, nn.Parameter)
    assert not linear.weight.requires_grad
    assert same_parts(before, linear.weight)
    x = torch.randn(3, 100, dtype=linear.bias.dtype)
    plain = before.dequantize().to(linear.bias.dtype)
    torch.testing.assert_close(linear(x), F.linear(x, plain, linear.bias), atol=2e-2, rtol=2e-2)


def test_module_to_dtype_there_and_back() -> None:
    linear = linear_with(quantized())
    decoded = linear.weight.dequantize()
    linear.to(torch.float16).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(linear.weight.dequantize(), decoded)


def test_module_sees_one_parameter() -> None:
    linear = linear_with(quantized())
    named = dict(linear.named_parameters())
    assert set(named) == {"weight", "bias"}
    assert sum(p.numel() for p in linear.parameters()) == 606
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert linear.state_dict()["weight"].packed.data_ptr() == linear.weight.packed.data_ptr()


@BOTH
def test_compile_whole(double_quant: bool) -> None:
    linear = linear_with(quantized(double_quant))
    x = torch.randn(4, 100, requires_grad=True)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, linear(x))
    grad = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(linear(x).square().sum(), x))


def test_fake_tensors_give_shapes_and_touch_no_memory() -> None:
    with FakeTensorMode():
        q = pyft.quantize(torch.empty(8, 65, dtype=torch.bfloat16))
        dense = q.dequantize()
    assert [part.numel() for part in q.parts()] == [260, 9, 1, 1]
    assert dense.shape == (8, 65)
    assert dense.dtype == torch.bfloat16


def test_compiled_uses_decode_too() -> None:
    w = pyft.quantize(torch.randn(8, 64))
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: x @ w.t(), backend="aot_eager")
    assert torch.equal(compiled(x), x @ w.dequantize().t())
