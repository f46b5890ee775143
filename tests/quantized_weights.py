"""Quantized weights of every kind, for tests of what is done with them."""

import pytest
import torch
from quantize_truth import same
from torch import nn

import pyft
from pyft.formats import FORMATS
from pyft.quantized import QuantizedTensor

# Every format, with its scales stored in each way it has.
KINDS = [(name, nest) for name, fmt in FORMATS.items() for nest in (False, True)[: 2 - fmt.e8m0]]
KIND = pytest.mark.parametrize(
    "kind", [*KINDS, ("columns", False)], ids=lambda kind: "-".join(map(str, kind))
)

Kind = tuple[str, bool]


def quantized(kind: Kind = ("nf4", True), dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """A weight [6, 100]; "columns" is one whose columns are stored in another order."""
    name, nest = kind
    w = torch.randn(6, 100).to(dtype)
    if name == "columns":
        q = pyft.quantize(w, "int4_zp", 32)
        parts = [*q.parts(), torch.randperm(100).int()]
        return QuantizedTensor(parts, "int4_zp", 32, w.shape, dtype)
    return pyft.quantize(w, name, 32 if FORMATS[name].e8m0 else 64, nest)


def same_parts(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether every stored bit agrees."""
    if a.format != b.format or a.block_size != b.block_size:
        return False
    pairs = zip(a.parts(), b.parts(), strict=True)
    return all(map(same, *zip(*pairs, strict=True)))


def linear_with(q: QuantizedTensor) -> nn.Linear:
    """A layer that holds the weight as its frozen parameter."""
    linear = nn.Linear(q.shape[1], q.shape[0])
    linear.weight = nn.Parameter(q, requires_grad=False)
    return linear
