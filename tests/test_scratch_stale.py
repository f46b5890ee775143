"""What the scratch holds is never taken for a weight it is not of."""

import pytest
import torch
import torch.nn.functional as F
from scratch_tools import ROWS, counting, fresh_scratch, weight  # noqa: F401
from shapes import LINEAR_DTYPES
from torch import Tensor

import pyft
from pyft import scratch
from pyft.ops import qlinear
from pyft.quantized import QuantizedTensor


@pytest.mark.parametrize("part", ["packed", "scales", "zeros"])
def test_a_weight_written_in_place_is_decoded_anew(part: str) -> None:
    q, x = pyft.quantize(torch.randn(48, 128), "int4_zp"), torch.randn(ROWS, 128)
    for _ in range(3):
        F.linear(x, q)
        stored = getattr(q, part)
        stored.copy_(torch.rand(stored.shape) * 15)
        torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))


def test_a_doubly_quantized_weight_written_in_place_is_decoded_anew() -> None:
    q, x = weight(), torch.randn(ROWS, 128)
    for part in q.parts():
        F.linear(x, q)
        part.add_(1)
        torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))


def test_written_through_a_view() -> None:
    q, x = weight(), torch.randn(ROWS, 128)
    F.linear(x, q)
    q.packed[5:9].zero_()
    q.packed.view(-1)[20:].bitwise_not_()
    torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))


def test_exchanged_parts() -> None:
    q, x = weight(), torch.randn(ROWS, 128)
    F.linear(x, q)
    q.packed = torch.randint(0, 256, q.packed.shape, dtype=torch.uint8)
    torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))
    assert q.nested is not None
    q.nested = q.nested * 2
    torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))


def test_another_dtype_is_decoded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    q = weight()
    with counting(monkeypatch) as decodes:
        for dtype in (*LINEAR_DTYPES, *LINEAR_DTYPES):
            x = torch.randn(ROWS, 128).to(dtype)
            found = F.linear(x, q)
            plain = pyft.dequantize(q, dtype=dtype if dtype != torch.float64 else torch.float32)
            torch.testing.assert_close(found, F.linear(x, plain.to(dtype)))
    assert len(decodes) == 8 - 1  # fp64 is decoded in fp32, and fp32 comes next


def test_two_weights_that_share_their_codes() -> None:
    first = pyft.quantize(torch.randn(48, 128), double_quant=False)
    parts = [first.packed, first.scales * 3]
    second = QuantizedTensor(parts, "nf4", 64, first.shape, first.dtype)
    x = torch.randn(ROWS, 128)
    for q in (first, second, first):
        torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))


def test_the_same_codes_in_another_shape() -> None:
    q = pyft.quantize(torch.randn(48, 128), double_quant=False)
    other = QuantizedTensor(q.parts(), "nf4", 64, (128, 48), q.dtype)
    for stored in (q, other, q):
        x = torch.randn(ROWS, stored.shape[1])
        torch.testing.assert_close(F.linear(x, stored), F.linear(x, stored.dequantize()))


def test_the_same_parts_in_another_format() -> None:
    q = pyft.quantize(torch.randn(48, 128), "nf4", double_quant=False)
    other = QuantizedTensor(q.parts(), "fp4", 64, q.shape, q.dtype)
    x = torch.randn(ROWS, 128)
    for stored in (q, other, q):
        torch.testing.assert_close(F.linear(x, stored), F.linear(x, stored.dequantize()))


def test_the_same_parts_in_other_blocks() -> None:
    parts = pyft.quantize(torch.randn(48, 128), "nf4", 32, double_quant=False).parts()
    x = torch.randn(ROWS, 128)
    for size in (32, 64, 32):
        q = QuantizedTensor(parts, "nf4", size, (48, 128), torch.float32)
        torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))


def test_inference_tensors_are_decoded_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing counts the writes to them."""
    with torch.inference_mode():
        q, x = weight(), torch.randn(ROWS, 128)
        with counting(monkeypatch) as decodes:
            F.linear(x, q)
            q.packed.bitwise_not_()
            torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))
    assert len(decodes) == 2


def test_a_new_weight_at_a_recycled_address() -> None:
    x = torch.randn(ROWS, 128)
    for _ in range(20):
        q = weight()
        torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))
        del q


def test_a_decode_that_fails_leaves_nothing_to_be_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = weight(), torch.randn(ROWS, 128)
    expected = F.linear(x, q)
    other = weight()

    def broken(*arguments: object) -> None:
        out = arguments[5]
        assert isinstance(out, Tensor)
        out[:5] = 3.0
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(qlinear, "dequantize_slab", broken)
        with pytest.raises(MemoryError):
            F.linear(x, other)
    assert torch.equal(F.linear(x, q), expected)


def test_saved_tensors_elsewhere() -> None:
    """Hooks that hand the backward copies of what was saved change nothing but the speed."""
    q, x = weight(), torch.randn(ROWS, 128, requires_grad=True)
    (expected,) = torch.autograd.grad(F.linear(x, q).square().sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = F.linear(x, q).square().sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_a_former_weight_that_dies_while_another_is_decoded() -> None:
    """As the garbage collector may let it: it does not take the memory of the other along."""
    former, present = [torch.zeros(8)], [torch.ones(8)]
    coding, dtype = ("nf4", 64, (0, 4, 0, 4)), torch.float32

    def decode(out: Tensor) -> None:
        former.clear()
        out.fill_(7.0)

    with scratch.decoded([former[0]], coding, dtype, lambda out: None):
        pass
    for _ in range(2):
        with scratch.decoded(present, coding, dtype, decode) as view:
            assert not former
            assert torch.equal(view, torch.full((4, 4), 7.0))
