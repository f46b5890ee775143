"""QuantizedTensor: what it stores, copied, moved, saved and loaded."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantize_truth import same, sizes_of
from quantized_weights import KIND, KINDS, Kind, linear_with, quantized, same_parts
from shapes import QUANTIZED_DTYPES, dtype_name
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pyft
from pyft.formats import FORMATS, Format, blocks_of
from pyft.quantized import QuantizedTensor

DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)


@KIND
@DTYPE
def test_looks_like_the_weight_it_stands_for(dtype: torch.dtype, kind: Kind) -> None:
    q = quantized(kind, dtype)
    assert (q.shape, q.dtype, q.numel(), q.dim()) == ((6, 100), dtype, 600, 2)
    assert q.device.type == "cpu"
    assert q.is_floating_point()
    assert q.double_quant is kind[1]
    assert not q.requires_grad
    assert repr(q) == (
        f"QuantizedTensor({q.format.name}, shape=(6, 100), dtype={dtype}, device='cpu', "
        f"block_size={q.block_size}, double_quant={kind[1]})"
    )


@KIND
def test_parts(kind: Kind) -> None:
    q = quantized(kind)
    expected = {"packed": q.packed, "scales": q.scales, "zeros": q.zeros, "nested": q.nested,
                "offset": q.offset, "columns": q.columns}  # fmt: skip
    there = {name: part for name, part in expected.items() if part is not None}
    assert all(a is b for a, b in zip(q.parts(), there.values(), strict=True))
    assert ("zeros" in there) is q.format.zero_points
    assert ("nested" in there) is ("offset" in there) is kind[1]
    assert ("columns" in there) is (kind[0] == "columns")
    blocks = blocks_of(600, q.block_size)
    byte_scales = q.format.e8m0 or kind[1]
    assert q.packed.shape == (600 * q.format.bits // 8,)
    assert q.scales.shape == (blocks,)
    assert q.scales.dtype == (torch.uint8 if byte_scales else torch.float32)
    for name, part in there.items():
        kinds = {"packed": torch.uint8, "zeros": torch.uint8, "columns": torch.int32}
        assert part.dtype == (
            q.scales.dtype if name == "scales" else kinds.get(name, torch.float32)
        )
    assert q.stored_bytes == sum(part.nbytes for part in there.values())


# Bits per weight of a large weight, as documented: those of its codes, 32 of a scale and 8 of a
# zero point a block; doubly quantized, 8 and 32 for 256 of a scale.
BITS = {
    ("nf4", False, 64): 4.5,
    ("nf4", True, 64): 4.127,
    ("fp4", True, 64): 4.127,
    ("nf4", True, 4096): 4.002,
    ("int4", False, 128): 4.25,
    ("int4", False, 32): 5.0,
    ("int4_zp", False, 128): 4.3125,
    ("int4_zp", True, 64): 4.252,
    ("int8", False, "row"): 8 + 32 / 2048,
    ("fp8_e4m3", False, 128): 8.25,
    ("mxfp4", False, 32): 4.25,
}


@pytest.mark.parametrize("setting", BITS, ids=lambda setting: "-".join(map(str, setting)))
def test_bits_per_weight(setting: tuple[str, bool, int | str]) -> None:
    name, nest, size = setting
    q = pyft.quantize(torch.randn(512, 2048), name, size, nest)
    assert 8 * q.stored_bytes / q.numel() == pytest.approx(BITS[setting], abs=5e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_stored_bytes_of_any_setting(name: str) -> None:
    fmt = FORMATS[name]
    for shape in ((7, 100), (33, 65), (1, 1), (0, 64)):
        for size in sizes_of(fmt, shape):
            for nest in (False, True)[: 2 - fmt.e8m0]:
                q = pyft.quantize(torch.randn(shape), name, size, nest)
                blocks = math.ceil(math.prod(shape) / q.block_size)
                expected = math.ceil(math.prod(shape) * fmt.bits / 8) + blocks * fmt.zero_points
                expected += blocks + 4 * math.ceil(blocks / 256) + 4 if nest else 0
                expected += 0 if nest else blocks * (1 if fmt.e8m0 else 4)
                assert q.stored_bytes == expected


@KIND
def test_flatten_and_unflatten(kind: Kind) -> None:
    q = quantized(kind)
    names, context = q.__tensor_flatten__()
    inner = {name: getattr(q, name) for name in names}
    again = QuantizedTensor.__tensor_unflatten__(inner, context, q.shape, q.stride())
    assert len(names) == len(q.parts())
    assert all(a is b for a, b in zip(again.parts(), q.parts(), strict=True))
    assert (again.shape, again.dtype, again.block_size) == (q.shape, q.dtype, q.block_size)
    assert (again.format, again.double_quant) == (q.format, q.double_quant)


def test_columns_stored_in_another_order() -> None:
    q = quantized(("columns", False))
    assert q.columns is not None
    plain = QuantizedTensor(q.parts()[:-1], "int4_zp", 32, q.shape, q.dtype)
    expected = torch.empty(6, 100)
    expected[:, q.columns.long()] = plain.dequantize()
    assert same(q.dequantize(), expected)
    wide = torch.full((6, 110), 2.0)
    assert same(pyft.dequantize(q, out=wide[:, :100]), expected)
    assert (wide[:, 100:] == 2.0).all()
    with pyft.backend("reference"):
        assert same(q.dequantize(), expected)


@KIND
@DTYPE
def test_to_dtype_changes_no_stored_bit(dtype: torch.dtype, kind: Kind) -> None:
    q = quantized(kind)
    moved = q.to(dtype)
    assert isinstance(moved, QuantizedTensor)
    assert moved.dtype == dtype
    assert same_parts(q, moved)
    assert moved.dequantize().dtype == dtype
    assert same(moved.dequantize(), pyft.dequantize(q, dtype=dtype))


def test_float64_is_fp32_decoded_and_widened() -> None:
    q = quantized().double()
    assert q.dtype == torch.float64
    assert torch.equal(q.dequantize(), pyft.dequantize(q, dtype=torch.float32).double())


def test_to_a_dtype_no_weight_has_decodes() -> None:
    """What the values would be on a plain tensor, never a label that no decode can honour."""
    q = quantized()
    for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64):
        converted = q.to(dtype)
        assert not isinstance(converted, QuantizedTensor)
        assert torch.equal(converted, q.dequantize().to(dtype))
    assert torch.equal(q.double() + 0, q.dequantize().double())


@KIND
def test_to_device_moves_what_is_stored(kind: Kind) -> None:
    q = quantized(kind)
    moved = q.to("meta")
    assert isinstance(moved, QuantizedTensor)
    assert {part.device.type for part in moved.parts()} == {"meta"}
    assert moved.device.type == "meta"
    assert q.cpu() is q
    copied = q.to("cpu", copy=True)
    assert same_parts(copied, q)
    assert copied.packed.data_ptr() != q.packed.data_ptr()
    both = q.to("meta", torch.float16)
    assert (both.device.type, both.dtype, both.scales.dtype) == (
        "meta",
        torch.float16,
        q.scales.dtype,
    )


@KIND
@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: nn.Parameter(q, requires_grad=False)])
def test_deepcopy_and_clone(wrap: Callable[[Tensor], Any], kind: Kind) -> None:
    q = wrap(quantized(kind))
    for other in (copy.deepcopy(q), q.clone()):
        assert isinstance(other, QuantizedTensor)
        assert same_parts(q, other)
        pairs = zip(other.parts(), q.parts(), strict=True)
        assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert isinstance(copy.deepcopy(q), nn.Parameter) == isinstance(q, nn.Parameter)
    assert q.detach().packed.data_ptr() == q.packed.data_ptr()


@KIND
def test_deepcopy_of_a_module(kind: Kind) -> None:
    linear = linear_with(quantized(kind))
    other = copy.deepcopy(linear)
    x = torch.randn(3, 100)
    assert isinstance(other.weight, nn.Parameter)
    assert same_parts(other.weight, linear.weight)
    assert torch.equal(other(x), linear(x))
    linear.weight.packed.zero_()
    assert not torch.equal(other(x), linear(x))


def test_tied_weights_stay_tied_in_a_copy() -> None:
    first, second = linear_with(quantized()), linear_with(quantized())
    second.weight = first.weight
    copied = copy.deepcopy(nn.ModuleList([first, second]))
    assert copied[0].weight is copied[1].weight


def reloaded(what: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    assert file.getbuffer().nbytes < 16_000
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@KIND
def test_save_and_load_without_pickled_code(kind: Kind) -> None:
    q = quantized(kind, torch.bfloat16)
    with torch.serialization.safe_globals([QuantizedTensor, Format]):
        loaded = reloaded({"w": q}, weights_only=True)["w"]
    assert same_parts(q, loaded)
    assert (loaded.shape, loaded.dtype, loaded.block_size) == (q.shape, q.dtype, q.block_size)
    assert loaded.format == q.format
    assert same(loaded.dequantize(), q.dequantize())


@KIND
def test_pickle_of_a_module(kind: Kind) -> None:
    linear = linear_with(quantized(kind))
    x = torch.randn(3, 100)
    for other in (pickle.loads(pickle.dumps(linear)), reloaded(linear, weights_only=False)):
        assert isinstance(other.weight, nn.Parameter)
        assert isinstance(other.weight, QuantizedTensor)
        assert same_parts(other.weight, linear.weight)
        assert torch.equal(other(x), linear(x))


@KIND
def test_state_dict_holds_the_weight_itself(kind: Kind) -> None:
    linear = linear_with(quantized(kind))
    named = dict(linear.named_parameters())
    assert set(named) == {"weight", "bias"}
    assert sum(p.numel() for p in linear.parameters()) == 606
    state = linear.state_dict()
    assert set(state) == {"weight", "bias"}
    assert same_parts(state["weight"], linear.weight)
    assert state["weight"].packed.data_ptr() == linear.weight.packed.data_ptr()
    empty = nn.Linear(100, 6, device="meta")
    empty.load_state_dict(state, assign=True)
    assert same_parts(empty.weight, linear.weight)


CHANGES = ("half", "float", "bfloat16", "double", "eval", "train", "cpu")


@pytest.mark.parametrize("change", CHANGES)
@KIND
def test_no_module_method_changes_a_stored_bit(kind: Kind, change: str) -> None:
    linear = linear_with(quantized(kind))
    before = linear.weight.clone()
    getattr(linear, change)()
    assert isinstance(linear.weight, QuantizedTensor)
    assert isinstance(linear.weight, nn.Parameter)
    assert not linear.weight.requires_grad
    assert same_parts(before, linear.weight)
    x = torch.randn(3, 100, dtype=linear.bias.dtype)
    plain = before.dequantize().to(linear.bias.dtype)
    expected = nn.functional.linear(x, plain, linear.bias)
    torch.testing.assert_close(linear(x), expected, atol=5e-2, rtol=2e-2)


@KIND
def test_module_to_dtype_there_and_back(kind: Kind) -> None:
    linear = linear_with(quantized(kind))
    decoded = linear.weight.dequantize()
    linear.to(torch.float16).to(torch.bfloat16).to(torch.float32)
    assert same(linear.weight.dequantize(), decoded)


@KIND
def test_training_steps_change_no_stored_bit(kind: Kind) -> None:
    linear = linear_with(quantized(kind))
    before = linear.weight.clone()
    optimizer = torch.optim.SGD([p for p in linear.parameters() if p.requires_grad], lr=0.1)
    for mode in (True, False, True):
        linear.train(mode)
        linear(torch.randn(100, 100)).square().sum().backward()
        optimizer.step()
    assert linear.weight.grad is None
    assert same_parts(before, linear.weight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_fake_tensors_give_shapes_and_touch_no_memory(kind: Kind) -> None:
    real = pyft.quantize(torch.randn(8, 66), kind[0], double_quant=kind[1])
    with FakeTensorMode():
        q = pyft.quantize(torch.empty(8, 66, dtype=torch.bfloat16), kind[0], double_quant=kind[1])
        dense = q.dequantize()
    shapes = [(part.shape, part.dtype) for part in q.parts()]
    assert shapes == [(part.shape, part.dtype) for part in real.parts()]
    assert (dense.shape, dense.dtype) == ((8, 66), torch.bfloat16)
