"""Dropout from a seed beside torch's, forward."""

from functools import partial

import pytest
import torch
from timing import DEVICE, ratio, synchronised

import pyft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(benchmark, dtype):
    x = torch.randn(2048, 4096, dtype=dtype, device=DEVICE)
    with pyft.backend("reference"):
        expected = pyft.dropout(x[:8], 0.1, seed=1)
    assert torch.equal(pyft.dropout(x, 0.1, seed=1)[:8], expected)
    ours = partial(pyft.dropout, x, 0.1, seed=1)
    benchmark.extra_info["torch"] = ratio(ours, partial(torch.nn.functional.dropout, x, 0.1))
    benchmark(synchronised(ours))
