"""NF4 quantize and dequantize beside a copy of the same size; bitsandbytes beside it in the same
run.
"""

from functools import partial

import pytest
import torch
from timing import DEVICE, ratio, synchronised

import pyft

bnb = pytest.importorskip("bitsandbytes.functional")
SHAPES = [(2048, 2048), (14336, 4096)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(request.param, dtype=torch.bfloat16, device=DEVICE)


def test_quantize(benchmark, weight):
    with pyft.backend("reference"):
        expected = pyft.quantize(weight[:64].contiguous()).packed
    assert torch.equal(pyft.quantize(weight[:64].contiguous()).packed, expected)
    peer = partial(bnb.quantize_4bit, weight, blocksize=64, quant_type="nf4")
    ours = partial(pyft.quantize, weight, double_quant=False)
    benchmark.extra_info["bitsandbytes"] = ratio(ours, peer, repeats=3)
    benchmark(synchronised(ours))


def test_dequantize(benchmark, weight):
    quantized = pyft.quantize(weight)
    out = torch.empty_like(weight)
    with pyft.backend("reference"):
        expected = pyft.dequantize(quantized)
    assert torch.equal(pyft.dequantize(quantized, out=out), expected)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    ours = partial(pyft.dequantize, quantized, out=out)
    benchmark.extra_info["bitsandbytes"] = ratio(ours, partial(bnb.dequantize_4bit, packed, state))
    benchmark.extra_info["copy"] = ratio(ours, partial(out.copy_, weight))
    benchmark(synchronised(ours))
