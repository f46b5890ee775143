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
from pyft.errors import UsageError
from pyft.formats import FORMATS, SCALE_FORMAT, code_table, threshold_table
from pyft.integrations.bitsandbytes import as_quantized, load, obstacle, save
from pyft.quantized import QuantizedTensor

CPU = torch.device("cpu")
FORMAT = pytest.mark.parametrize("format", ["nf4", "fp4"])
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
    assert torch.equal(bits(code_table(SCALE_FORMAT, CPU)), bits(theirs))
    for name in ("nf4", "fp4"):
        codes = bnb_functional.get_4bit_type(name, device="cpu")
        assert torch.equal(bits(code_table(FORMATS[name], CPU)), bits(codes))


@pytest.mark.parametrize("block_size", BLOCKS)
@FORMAT
@DTYPE
def test_decode_is_equal_bit_for_bit(dtype: torch.dtype, format: str, block_size: int) -> None:
    """Codes of all kinds, absmax of sizes a weight has; rows a multiple of 64 long."""
    packed = torch.randint(0, 256, (33 * block_size // 2,), dtype=torch.uint8)
    absmax = torch.rand(33) * 10.0 ** torch.randint(-4, 3, (33,))
    shape = torch.Size((33, block_size))
    q = QuantizedTensor([packed, absmax], format, block_size, shape, dtype)
    state = bnb_functional.QuantState(
        absmax=absmax, shape=shape, dtype=dtype, blocksize=block_size, quant_type=format,
        code=code_table(FORMATS[format], CPU),
    )  # fmt: skip
    ours, theirs = q.dequantize(), dequantize_4bit(packed[:, None], state)
    if format == "fp4" and not torch.cpu._is_avx512_supported():  # there its -0 is 0
        ours, theirs = ours + 0.0, theirs + 0.0
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("block_size", BLOCKS)
@DTYPE
def test_encode_differs_only_next_to_a_midpoint(dtype: torch.dtype, block_size: int) -> None:
    """It multiplies by a reciprocal where pyft divides: by one code, next to a midpoint."""
    w = torch.randn(96, 1024).to(dtype)
    packed, state = quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    q = pyft.quantize(w, block_size=block_size, double_quant=False)
    assert torch.equal(bits(q.scales), bits(state.absmax))
    ours, theirs = codes_of(q.packed).int(), codes_of(packed).int()
    differ = (ours != theirs).nonzero().flatten()
    assert ((ours - theirs)[differ].abs() == 1).all()
    scale = q.scales.repeat_interleave(block_size).double()
    exact = w.flatten().double() / scale  # before any rounding to fp32
    middle = threshold_table(FORMATS["nf4"], CPU)[torch.minimum(ours, theirs)[differ]].double()
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
    differ = (q.scales.int() - state.absmax.int()).abs()
    assert differ.max() <= 1
    assert (differ > 0).float().mean() < 0.02


def linear4bit(
    dtype: torch.dtype,
    format: str = "nf4",
    nested: bool = True,
    block_size: int = 64,
    storage: torch.dtype = torch.uint8,
) -> bnb.nn.Linear4bit:
    """A quantized 64x128 linear of random weights."""
    layer = bnb.nn.Linear4bit(128, 64, bias=False)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 128).to(dtype),
        requires_grad=False,
        blocksize=block_size,
        quant_type=format,
        compress_statistics=nested,
        quant_storage=storage,
    )
    return layer.to("cpu")


def linear8bit() -> bnb.nn.Linear8bitLt:
    layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
    layer.weight.data.normal_()
    layer.weight.data[5] = 0
    return layer.to("cpu")


@pytest.mark.parametrize("nested", [False, True])
@FORMAT
@DTYPE
def test_params4bit_is_read_without_a_copy(dtype: torch.dtype, format: str, nested: bool) -> None:
    layer = linear4bit(dtype, format, nested)
    weight = layer.weight
    assert obstacle(layer) is None
    q = as_quantized(layer)
    assert (q.shape, q.dtype, q.double_quant) == ((64, 128), dtype, nested)
    assert (q.format.name, q.packed.data_ptr()) == (format, weight.data_ptr())
    assert torch.equal(q.dequantize(), dequantize_4bit(weight.data, weight.quant_state))


def test_int8params_is_read_without_a_copy() -> None:
    layer = linear8bit()
    truth = layer.weight.CB.double() / 127 * layer.weight.SCB.double()[:, None]
    for _ in range(2):
        assert obstacle(layer) is None
        q = as_quantized(layer)
        assert q.packed.data_ptr() == layer.weight.data_ptr()
        torch.testing.assert_close(
            pyft.dequantize(q, torch.float32).double(), truth, rtol=2e-7, atol=0
        )
        with torch.no_grad():
            layer(torch.randn(3, 128))  # moves the scales from the weight to the module


def saved(layer: nn.Module, prefix: str = "a.b.") -> dict[str, Tensor]:
    return dict(layer.state_dict(prefix=prefix))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("prefix", ["", "a.b."])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("nested", [False, True])
@FORMAT
@DTYPE
def test_state_dict_round_trip(
    dtype: torch.dtype, format: str, nested: bool, storage: torch.dtype, prefix: str
) -> None:
    """The layer's own tensors: read without a copy, written back byte for byte, in its order."""
    layer = linear4bit(dtype, format, nested, block_size=128, storage=storage)
    theirs = saved(layer, prefix)
    q = load(theirs, prefix)
    assert (q.format.name, q.block_size, q.double_quant) == (format, 128, nested)
    assert (q.shape, q.dtype) == ((64, 128), dtype)
    assert q.packed.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(q.dequantize(), dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    same(save(q, prefix, storage), theirs)


@pytest.mark.parametrize("prefix", ["", "a.b."])
def test_state_dict_round_trip_of_8_bits(prefix: str) -> None:
    theirs = saved(linear8bit(), prefix)
    q = load(theirs, prefix, torch.bfloat16)
    assert (q.format.name, q.block_size, q.shape, q.dtype) == (
        "int8",
        128,
        (64, 128),
        torch.bfloat16,
    )
    same(save(q, prefix), theirs)


@pytest.mark.parametrize("nested", [False, True])
@FORMAT
def test_pyft_weights_are_read_by_bitsandbytes(format: str, nested: bool) -> None:
    q = pyft.quantize(torch.randn(64, 128).bfloat16(), format, 64, nested)
    stored = save(q, "m.")
    weight = bnb.nn.Params4bit.from_prequantized(
        stored.pop("m.weight"), {key.removeprefix("m.weight."): t for key, t in stored.items()},
        device="cpu",
    )  # fmt: skip
    assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), q.dequantize())


def test_refuses_to_save_what_the_layout_has_no_place_for() -> None:
    w = torch.randn(64, 96)
    refused = {
        "int4": (
            pyft.quantize(w, "int4", 32),
            torch.uint8,
            "w.weight is int4.*bitsandbytes has nf4",
        ),
        "row": (pyft.quantize(w, "nf4", "row"), torch.uint8, "in blocks of 96"),
        "int8": (pyft.quantize(w, "int8", 64), torch.uint8, "one scale a row"),
        "nested": (pyft.quantize(w, "int8", "row", True), torch.uint8, "double quantization"),
        "float64": (pyft.quantize(w).double(), torch.uint8, "float64 stored as uint8"),
        "storage": (pyft.quantize(w), torch.int32, "stored as int32; bitsandbytes has float32"),
        "bytes": (pyft.quantize(w[:1, :6]), torch.bfloat16, "3 bytes of w.weight are no whole"),
        "inf": (pyft.quantize(w * torch.inf), torch.uint8, "offset of w.weight is nan|is inf"),
    }
    for q, storage, message in refused.values():
        with pytest.raises(UsageError, match=message):
            save(q, "w.", storage)


class Model(nn.Module):
    """Two quantized linears, as transformers marks a model it loaded in 4 or 8 bits."""

    def __init__(self, quant_type: str = "nf4", nested: bool = True) -> None:
        super().__init__()
        self.is_loaded_in_4bit = quant_type != "int8"
        self.is_loaded_in_8bit = not self.is_loaded_in_4bit
        if self.is_loaded_in_8bit:
            self.first = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
            self.second = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
            return
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


@pytest.mark.parametrize(
    ("format", "nested"), [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)]
)
def test_fused_equals_peft(format: str, nested: bool) -> None:
    """In training bitsandbytes decodes 8 bits on a CPU, as pyft always does."""
    model, x = adapted(quant_type=format, nested=nested), torch.randn(5, 64)
    expected = step(model, x)
    report = pyft.apply(model)
    assert report.fused == 2
    assert {entry.runs for entry in report.modules} == {f"pyft.lora_linear on cpu over {format}"}
    found = step(model, x)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    pyft.revert(model)
    assert all(map(torch.equal, step(model, x), expected))


def test_8_bits_are_closer_to_the_decoded_weight_than_bitsandbytes_itself() -> None:
    """Outside training it rounds activations to 8 bits too."""
    model, x = adapted(quant_type="int8").eval(), torch.randn(5, 64)
    truth = x.double()
    for name in ("first", "second"):
        layer = getattr(model.base_model.model, name)
        base, scale = layer.base_layer, layer.scaling["default"]
        w = base.weight.data.double() / 127 * base.weight.SCB.double()[:, None]
        w += scale * (layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double())
        y = truth @ w.t()
        truth = torch.relu(y + base.bias.double()) if base.bias is not None else y
    with torch.no_grad():
        theirs = (model(x) - truth).abs().max()
        pyft.apply(model)
        ours = (model(x) - truth).abs().max()
    assert ours < theirs / 10


def test_weights_not_quantized_yet_are_left() -> None:
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert "move the model to its device first" in str(obstacle(layer))
    eight = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    assert "move the model to its device first" in str(obstacle(eight))
    assert "kept in 16 bits" in str(obstacle(bnb.nn.Linear8bitLt(64, 64)))


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


def test_a_layer_is_read_once_until_its_weight_changes() -> None:
    """The same QuantizedTensor each time, so that the scratch knows what it holds."""
    layer = linear4bit(torch.float32, "nf4", True)
    first = as_quantized(layer)
    assert as_quantized(layer) is first
    layer.weight.data = layer.weight.data.flip(0)
    again = as_quantized(layer)
    assert again is not first
    assert torch.equal(again.packed, first.packed.flip(0))
    other = linear8bit()
    assert as_quantized(other) is as_quantized(other)
