"""Quantize and dequantize: every backend of this CPU against an oracle, bit for bit."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantize_cases import CASES, CPU, check, check_large_offsets
from quantize_truth import (
    CONTENTS,
    ISAS,
    RUNS,
    Case,
    default_size,
    running,
    same,
    sizes_of,
    weight,
)
from shapes import QUANTIZED_DTYPES, WEIGHT_SHAPES, dtype_name

import pyft
from pyft import native
from pyft.formats import FORMATS

NAME = pytest.mark.parametrize("name", FORMATS)
RUN = pytest.mark.parametrize("run", RUNS)


def both(name: str) -> tuple[bool, ...]:
    """Whether scales can be quantized: both ways, where they are not 8 bits already."""
    return (False,) if FORMATS[name].e8m0 else (False, True)


@cache
def content_cases(name: str) -> list[Case]:
    """All contents and shapes; block sizes (the smallest, the format's own, rows), dtypes and kinds
    of scales in turn.
    """
    cases, fmt = [], FORMATS[name]
    for i, content in enumerate(CONTENTS):
        for j, shape in enumerate(WEIGHT_SHAPES):
            dtype = QUANTIZED_DTYPES[(i + j) % 3]
            sizes = [fmt.block_sizes[0], default_size(fmt), "row"]
            possible = [size for size in sizes if size in sizes_of(fmt, shape)]
            size = possible[(i + j // 3) % len(possible)]
            double_quant = both(name)[(i // 3 + j) % len(both(name))]
            cases.append(Case(name, weight(shape, content).to(dtype), size, double_quant))
    return cases


@NAME
@RUN
def test_bits_are_the_oracles(run: str, name: str) -> None:
    with running(run):
        for case in content_cases(name):
            case.check()


@cache
def setting_cases(name: str) -> list[Case]:
    """All block sizes, dtypes and both kinds of scales."""
    return [
        Case(name, torch.randn(shape).to(dtype), size, double_quant)
        for shape in ((2, 4304), (3, 97), (5, 100))
        for size in sizes_of(FORMATS[name], shape)
        for dtype in QUANTIZED_DTYPES
        for double_quant in both(name)
    ]


@NAME
@RUN
def test_every_setting(run: str, name: str) -> None:
    with running(run):
        for case in setting_cases(name):
            case.check()


@cache
def nested_case(name: str) -> Case:
    w = torch.randn(700, 64) * torch.logspace(-6, 1, 700)[torch.randperm(700), None]
    return Case(name, w, 64, double_quant=True)


@pytest.mark.parametrize("name", [name for name in FORMATS if True in both(name)])
@RUN
def test_many_nested_blocks(run: str, name: str) -> None:
    """More than 256 scales, of very different sizes: all of the dynamic map is used."""
    case = nested_case(name)
    assert np.unique(case.stored.scales).size > 60
    with running(run):
        case.check()


@cache
def pattern_cases(name: str, dtype: torch.dtype) -> list[Case]:
    """All 65536 patterns in order and in a random order, and the finite ones alone."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    mixed = [part[torch.randperm(part.numel())] for part in (patterns, finite)]
    size = FORMATS[name].block_sizes[0]
    return [Case(name, w, size, double_quant=False) for w in (patterns, *mixed)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@NAME
@RUN
def test_every_sixteen_bit_input(run: str, name: str, dtype: torch.dtype) -> None:
    with running(run):
        for case in pattern_cases(name, dtype):
            case.check()


@pytest.mark.parametrize("run", ISAS)
def test_shared_cases(run: str) -> None:
    """The cases the Triton and CUDA kernels are held to, guards around the outputs included."""
    with running(run):
        wrong = {case: text for case in CASES if (text := check(CASES[case], native, CPU))}
    assert wrong == {}


@pytest.mark.unfilled
def test_more_than_two_to_the_31_elements() -> None:
    assert check_large_offsets(native, CPU) == ""


@NAME
@RUN
def test_any_strides_and_dimensions(run: str, name: str) -> None:
    base = torch.randn(32, 48)
    views = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(5, 48),
        "flat": base[3],
        "scalar": base[0, 0],
        "experts": base.view(4, 8, 48).transpose(0, 1),
        "no rows": base.new_empty(0, 3, 48),
    }
    with running(run):
        for view in views.values():
            q = pyft.quantize(view, name)
            plain = pyft.quantize(view.clone(memory_format=torch.contiguous_format), name)
            assert all(map(same, q.parts(), plain.parts()))
            assert q.shape == view.shape
            assert same(q.dequantize(), plain.dequantize())


@NAME
def test_a_row_is_all_but_the_first_dimension(name: str) -> None:
    if FORMATS[name].e8m0:
        return
    w = torch.randn(3, 5, 8)
    q = pyft.quantize(w, name, "row", double_quant=False)
    assert (q.block_size, q.scales.numel()) == (40, 3)
    flat = pyft.quantize(w.view(3, 40), name, "row", double_quant=False)
    assert all(map(same, q.parts(), flat.parts()))


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
@NAME
@pytest.mark.parametrize("run", ISAS)
def test_number_of_threads_changes_nothing(run: str, name: str, dtype: torch.dtype) -> None:
    """Enough elements that threads share them, at odd places."""
    w = torch.randn(301, 1030).to(dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with running(run):
            q = pyft.quantize(w, name)
            wide = torch.full((301, 1040), 3.0, dtype=dtype)
            pyft.dequantize(q, out=wide[:, :1030])
            results.append([*q.parts(), pyft.dequantize(q), wide])
    assert all(map(same, results[0], results[1]))
    assert all(map(same, results[0], results[2]))
    assert same(results[0][-1][:, :1030].contiguous(), results[0][-2])


@NAME
def test_the_weight_is_only_read(name: str) -> None:
    w = torch.randn(5, 100, requires_grad=True)
    before, version = w.detach().clone(), w._version
    q = pyft.quantize(w, name)
    stored = [part.clone() for part in q.parts()]
    q.dequantize()
    assert w._version == version
    assert same(w.detach(), before)
    assert not q.requires_grad
    assert all(map(same, q.parts(), stored))


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_any_shape(data: st.DataObject, seed: int) -> None:
    name = data.draw(st.sampled_from(list(FORMATS)))
    shape = (data.draw(st.integers(0, 9)), data.draw(st.integers(0, 150)))
    size = data.draw(st.sampled_from(sizes_of(FORMATS[name], shape)))
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    case = Case(name, w, size, data.draw(st.sampled_from(both(name))))
    for run in RUNS:
        with running(run):
            case.check()


@given(st.sampled_from(list(FORMATS)), st.lists(st.floats(width=32), max_size=70))
def test_any_values(name: str, values: list[float]) -> None:
    w = torch.tensor(values, dtype=torch.float32)
    case = Case(name, w, 32, double_quant=False)
    for run in RUNS:
        with running(run):
            case.check()
