"""Every op on every device and backend of this machine against the reference; on a GPU machine that
is the real GPU.
"""

import pytest
import torch

import pyft
from pyft.backend import IMPLEMENTATIONS, PREFERENCE, obstacle
from pyft.formats import FORMATS

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    (device, name)
    for device in DEVICES
    for name in PREFERENCE[device]
    if obstacle("quantize", name) is None
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 64), (17, 96), (5, 100), (7, 4304), (33, 255), (128, 256)]


def test_every_backend_of_this_machine_is_tried():
    expected = {name for name in IMPLEMENTATIONS["quantize"] if obstacle("quantize", name) is None}
    assert {name for _, name in PLACES} == expected


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "name"), PLACES)
def test_quantized_bits_equal_the_reference(device, name, dtype, format):
    for seed, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=generator).to(dtype)
        w.view(-1)[: shape[1] // 3] = 0
        with pyft.backend("reference"):
            expected = pyft.quantize(w, format)
            decoded = pyft.dequantize(expected, dtype)
        with pyft.backend(name):
            found = pyft.quantize(w.to(device), format)
            scratch = torch.full((shape[0], shape[1] + 8), 7.0, dtype=dtype, device=device)
            out = pyft.dequantize(found, out=scratch[:, : shape[1]])
        for ours, theirs in zip(found.parts(), expected.parts(), strict=True):
            assert torch.equal(ours.cpu(), theirs)
        assert torch.equal(out.cpu(), decoded)
        assert torch.equal(
            scratch[:, shape[1] :].cpu(), torch.full((shape[0], 8), 7.0, dtype=dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "name"), PLACES)
def test_lora_linear_is_as_exact_as_the_reference(device, name, dtype):
    def run(backend, kind, weight, inputs):
        inputs = [t.to(kind).to(device).requires_grad_() for t in inputs]
        x, a, b, bias, dy = inputs
        with pyft.backend(backend):
            y = pyft.lora_linear(x, weight, a, b, 0.5, bias, dropout_p=0.25, seed=3)
            return [y, *torch.autograd.grad(y, inputs[:4], dy)]

    m, n, k, r = 37, 96, 160, 5
    inputs = [torch.randn(shape).to(dtype) for shape in ((m, k), (r, k), (n, r), (n,), (m, n))]
    weight = pyft.quantize((torch.randn(n, k) / k**0.5).to(dtype).to(device))
    dense = pyft.dequantize(weight)
    results = zip(
        run(name, dtype, weight, inputs),
        run("reference", dtype, dense, inputs),
        run("reference", torch.float64, dense.double(), inputs),
        strict=True,
    )
    for found, reference, truth in results:
        ulp = torch.finfo(dtype).eps * truth.abs().max()
        allowed = 2 * (reference - truth).abs().max() + 4 * ulp
        assert (found - truth).abs().max() <= allowed
