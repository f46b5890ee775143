"""bitsandbytes as an oracle where its CPU code is right, and its layers under apply."""

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from shapes import QUANTIZED_DTYPES, dtype_name
from torch import Tensor, nn

import pyft
from pyft.formats import NF4, absmax_format, code_table, midpoint_table
from pyft.integrations.bitsandbytes import as_quantized, obstacle
from pyft.quantized import QuantizedTensor

CPU = torch.device("cpu")
DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
BLOCKS = (
    64,
    128,
    256,
    512,
    1024,
)  # at 2048 and 4096 its AVX-512 code is inaccurate by its own account


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def codes_of(packed: Tensor) -> Tensor:
    flat = packed.flatten()
    return torch.stack((flat >> 4, flat & 15), dim=1).flatten()


def test_code_tables_are_equal_bit_for_bit() -> None:
    theirs = bnb_functional.create_dynamic_map(signed=True)
    assert torch.equal(bits(code_table(absmax_format(), CPU)), bits(theirs))
    nf4 = bnb_functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(bits(code_table(NF4, CPU)), bits(nf4))


@pytest.mark.parametrize("block_size", BLOCKS)
@DTYPE
def test_decode_is_equal_bit_for_bit(dtype: torch.dtype, block_size: int) -> None:
    """Codes of all kinds, absmax of sizes a weight has; rows a multiple of 64 long."""
    packed = torch.randint(0, 256, (33 * block_size // 2,), dtype=torch.uint8)
    absmax = torch.rand(33) * 10.0 ** torch.randint(-4, 3, (33,))
    shape = torch.Size((33, block_size))
    q = QuantizedTensor(packed, absmax, None, None, "nf4", block_size, shape, dtype)
    state = bnb_functional.QuantState(
        absmax=absmax, shape=shape, dtype=dtype, blocksize=block_size, quant_type="nf4",
        code=code_table(NF4, CPU),
    )  # fmt: skip
    theirs = dequantize_4bit(packed[:, None], state)
    assert torch.equal(bits(q.dequantize()), bits(theirs))


@pytest.mark.parametrize("block_size", BLOCKS)
@DTYPE
def test_encode_differs_only_next_to_a_midpoint(dtype: torch.dtype, block_size: int) -> None:
    """It multiplies by a reciprocal where pyft divides: by one code, next to a midpoint."""
    w = torch.randn(96, 1024).to(dtype)
    packed, state = quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    q = pyft.quantize(w, block_size=block_size, double_quant=False)
    assert torch.equal(bits(q.absmax), bits(state.absmax))
    ours, theirs = codes_of(q.packed).int(), codes_of(packed).int()
    differ = (ours != theirs).nonzero().flatten()
    assert ((ours - theirs)[differ].abs() == 1).all()
    scale = q.absmax.repeat_interleave(block_size).double()
    exact = w.flatten().double() / scale  # before any rounding to fp32
    middle = midpoint_table(NF4, CPU)[torch.minimum(ours, theirs)[differ]].double()
    ulp = torch.from_numpy(np.spacing(middle.abs().float().numpy())).double()
    assert ((exact[differ] - middle).abs() <= 1.5 * ulp).all()
    assert differ.numel() <= 1e-4 * w.numel()


@DTYPE
def test_double_quantization_differs_only_by_rounding(dtype: torch.dtype) -> None:
    """Its mean is summed in fp32: some ulp away, and with it 8-bit codes next to a midpoint."""
    w = torch.randn(512, 256).to(dtype)
    _, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    q = pyft.quantize(w)
    assert state.state2.blocksize == 256
    assert q.offset is not None
    assert q.nested is not None
    assert abs(q.offset.item() - state.offset.item()) <= 4 * np.spacing(np.float32(q.offset.item()))
    torch.testing.assert_close(q.nested, state.state2.absmax, rtol=1e-5, atol=0)
    differ = (q.absmax.int() - state.absmax.int()).abs()
    assert differ.max() <= 1
    assert (differ > 0).float().mean() < 0.02


@pytest.mark.parametrize("nested", [False, True])
@DTYPE
def test_params4bit_is_read_without_a_copy(dtype: torch.dtype, nested: bool) -> None:
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 128).to(dtype),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=nested,
    )
    layer = layer.to("cpu")
    weight = layer.weight
    assert obstacle(weight) is None
    q = as_quantized(weight)
    assert (q.shape, q.dtype, q.double_quant) == ((64, 128), dtype, nested)
    assert q.packed.data_ptr() == weight.data_ptr()
    assert torch.equal(q.dequantize(), dequantize_4bit(weight.data, weight.quant_state))


class Model(nn.Module):
    """Two 4-bit linears, as transformers marks a model it loaded in 4 bits."""

    is_loaded_in_4bit = True

    def __init__(self, quant_type: str = "nf4", nested: bool = True) -> None:
        super().__init__()
        options = {
            "quant_type": quant_type,
            "compute_dtype": torch.float32,
            "compress_statistics": nested,
        }
        self.first = bnb.nn.Linear4bit(64, 128, **options)
        self.second = bnb.nn.Linear4bit(128, 64, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def adapted(**options: bool | str) -> PeftModel:
    model = Model(**options).to("cpu")
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
    )


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *trained])]


@pytest.mark.parametrize("nested", [False, True])
def test_fused_equals_peft(nested: bool) -> None:
    model, x = adapted(nested=nested), torch.randn(5, 64)
    expected = step(model, x)
    report = pyft.apply(model)
    assert report.fused == 2
    assert {entry.runs for entry in report.modules} == {"pyft.lora_linear on cpu over nf4"}
    found = step(model, x)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    pyft.revert(model)
    assert all(map(torch.equal, step(model, x), expected))


def test_another_format_is_left_with_a_reason() -> None:
    model, x = adapted(quant_type="fp4"), torch.randn(5, 64)
    expected = step(model, x)
    report = pyft.apply(model)
    assert report.fused == 0
    assert {entry.why for entry in report.modules} == {"its 4-bit format is fp4, not nf4"}
    assert all(map(torch.equal, step(model, x), expected))


def test_weights_not_quantized_yet_are_left() -> None:
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert "move the model to its device first" in str(obstacle(layer.weight))


def test_after_bitsandbytes_repacks_its_weight() -> None:
    """Its own forward in eval mode may change the layout in place: what is fused must notice."""
    model, x = adapted(), torch.randn(5, 64)
    pyft.apply(model)
    expected = model(x).detach()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            model(x)
        again = model(x)
    error = (again - expected).abs().max() / expected.abs().max()
    assert error < 0.02  # bitsandbytes itself computes in bf16 from here on
