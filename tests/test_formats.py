"""The formats' constants against their publications, and the tables made of them."""

import ast
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import NormalDist
from types import ModuleType

import format_oracle as oracle
import numpy as np
import pytest
import torch
from torch import Tensor

from pyft import formats
from pyft.formats import (
    BLOCK_SIZES,
    FORMATS,
    FP4,
    FP8,
    INT4,
    INT4_ZP,
    INT8,
    MXFP4,
    NESTED_BLOCK,
    NF4,
    ROW,
    SCALE_FORMAT,
    Format,
    blocks_of,
    code_table,
    dynamic_map,
    e8m0_table,
    order_table,
    threshold_table,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
ALL = {**FORMATS, SCALE_FORMAT.name: SCALE_FORMAT}
ORACLES = {**oracle.FORMATS, SCALE_FORMAT.name: oracle.SCALES}
EVERY = pytest.mark.parametrize("fmt", ALL.values(), ids=lambda fmt: fmt.name)


def encode(values: Tensor, fmt: Format) -> Tensor:
    """Codes by the tables, as the documented rule says."""
    levels = (values[:, None] > threshold_table(fmt, CPU)).sum(dim=1)
    return order_table(fmt, CPU)[levels]


def normal_float() -> list[float]:
    """QLoRA's NF4: quantiles of a standard normal, 8 above zero and 7 below, scaled to [-1, 1]."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = sorted([*above, *below, 0.0])
    return [value / max(values) for value in values]


def test_nf4_codes_are_normal_quantiles() -> None:
    np.testing.assert_allclose(NF4.codes, normal_float(), rtol=0, atol=2e-6)
    assert NF4.codes[0] == -1.0
    assert NF4.codes[15] == 1.0


def test_fp4_codes_are_those_of_bitsandbytes() -> None:
    magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
    assert FP4.codes == (*magnitudes.tolist(), *(-magnitudes).tolist())
    from bitsandbytes import functional as bnb

    theirs = bnb.get_4bit_type("fp4", device="cpu")
    assert code_table(FP4, CPU).tolist() == theirs.tolist()
    assert code_table(NF4, CPU).tolist() == bnb.get_4bit_type("nf4", device="cpu").tolist()


def test_int4_codes() -> None:
    assert INT4.codes == tuple(range(-8, 8))
    assert INT4_ZP.codes == tuple(range(16))
    assert (INT4.zero_code, INT4_ZP.zero_code) == (8, 0)
    values = torch.linspace(-9, 9, 1801)
    assert torch.equal(encode(values, INT4), (values.round().clamp(-8, 7) + 8).to(torch.uint8))
    assert torch.equal(encode(values, INT4_ZP), values.round().clamp(0, 15).to(torch.uint8))


def test_int8_codes_are_signed_bytes() -> None:
    signed = np.arange(256, dtype=np.uint8).view(np.int8)
    assert np.float32(INT8.codes).tolist() == (signed / 127.0).astype(np.float32).tolist()
    assert INT8.unused == (128,)
    values = torch.linspace(-1.2, 1.2, 3001, dtype=torch.float64)
    exact = values * 127
    clear = (exact - exact.floor() - 0.5).abs() > 1e-4
    expected = exact.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    assert torch.equal(encode(values.float(), INT8)[clear], expected[clear])


def test_fp8_codes_are_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ours = code_table(FP8, CPU)
    assert torch.equal(ours.isnan(), theirs.isnan())
    kept = ~theirs.isnan()
    assert torch.equal(ours.view(torch.int32)[kept], theirs.view(torch.int32)[kept])
    assert FP8.unused == (0x7F, 0xFF)
    assert max(FP8.codes[code] for code in FP8.order) == FP8.top == 448.0


def test_fp8_rounds_as_torch_does() -> None:
    """Every bf16 of magnitude up to 448, and every midpoint with its neighbours."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    edges = threshold_table(FP8, CPU)
    edges = edges[edges.isfinite()]
    steps = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-1e9, 1e9)]
    values = torch.cat([patterns, edges, *steps])
    values = values[values.abs() <= 448]
    theirs = values.to(torch.float8_e4m3fn).view(torch.uint8)
    theirs[values == 0] = 0  # pyft writes no sign for -0
    assert torch.equal(encode(values, FP8), theirs)


def test_mxfp4_codes_are_e2m1() -> None:
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert MXFP4.codes == (*magnitudes, *(-value for value in magnitudes))
    assert [np.signbit(code) for code in MXFP4.codes] == [False] * 8 + [True] * 8
    assert (MXFP4.block_size, MXFP4.block_sizes, MXFP4.top) == (32, (32,), 4.0)
    # the largest magnitude's exponent, less that of the largest E2M1 number, is the scale's
    assert np.frexp(max(MXFP4.codes))[1] == np.frexp(MXFP4.top)[1] == 3


def test_mxfp4_ties_go_to_even() -> None:
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0, 7.0: 6.0}
    for sign in (1.0, -1.0):
        values = torch.tensor(list(ties)) * sign
        found = code_table(MXFP4, CPU)[encode(values, MXFP4).long()]
        assert found.tolist() == [sign * value for value in ties.values()]


def test_e8m0_is_a_biased_exponent() -> None:
    table = e8m0_table(CPU)
    assert table.dtype == torch.float32
    assert table[:255].tolist() == [2.0**i for i in range(-127, 128)]
    assert table[255].isnan()
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(table.view(torch.int32)[:255], theirs.view(torch.int32)[:255])


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map(signed: bool) -> None:
    """Its definition in exact decimals, the oracle's and bitsandbytes' fp32 numbers."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i if signed else 2 ** (i + 1)
        centres = [(0.1 + 0.9 * (j + 0.5) / n) * 10 ** (i - 6) for j in range(n)]
        values += [*centres, *(-centre for centre in centres)] if signed else centres
    found = np.float32(dynamic_map(signed))
    assert found.size == 256
    np.testing.assert_allclose(found, sorted(values), rtol=3e-7, atol=0)
    assert found.tobytes() == oracle.dynamic_map(signed).tobytes()
    from bitsandbytes import functional as bnb

    theirs = bnb.create_dynamic_map(signed=signed)
    assert found.tobytes() == theirs.numpy().tobytes()


def test_scales_are_in_the_signed_map_in_blocks_of_256() -> None:
    assert SCALE_FORMAT.codes == dynamic_map(signed=True)
    assert SCALE_FORMAT.block_size == NESTED_BLOCK == 256
    assert SCALE_FORMAT.zero_code == 127


@EVERY
def test_codes_are_fp32_and_the_oracles(fmt: Format) -> None:
    coding = ORACLES[fmt.name]
    table = code_table(fmt, CPU)
    assert (len(fmt.codes), table.dtype) == (2**fmt.bits, torch.float32)
    assert np.array_equal(np.float32(fmt.codes), np.array(fmt.codes), equal_nan=True)
    assert np.array_equal(table.numpy(), coding.values, equal_nan=True)
    settings = (coding.bits, coding.top, coding.unused, coding.e8m0, coding.zero_points)
    assert settings == (fmt.bits, fmt.top, fmt.unused, fmt.e8m0, fmt.zero_points)
    assert fmt.zero_code == coding.zero_code
    assert fmt.codes[fmt.zero_code] == 0.0
    assert not np.signbit(fmt.codes[fmt.zero_code])


@EVERY
def test_order_is_by_value_and_has_every_written_code(fmt: Format) -> None:
    values = [fmt.codes[code] for code in fmt.order]
    assert values == sorted(values)
    assert {*fmt.order, *fmt.unused} == set(range(2**fmt.bits))
    assert len(fmt.order) == 2**fmt.bits - len(fmt.unused)
    zeros = [code for code in fmt.order if fmt.codes[code] == 0]
    assert zeros[-1] == fmt.zero_code
    table = order_table(fmt, CPU)
    assert (table.dtype, len(table)) == (torch.uint8, 2**fmt.bits)
    assert table.tolist() == [*fmt.order, *[fmt.order[-1]] * len(fmt.unused)]


@EVERY
def test_thresholds_ascend(fmt: Format) -> None:
    table = threshold_table(fmt, CPU)
    assert (table.dtype, len(table)) == (torch.float32, 2**fmt.bits - 1)
    assert (table.diff()[table[1:].isfinite()] > 0).all()
    assert table.isposinf().sum() == len(fmt.unused)


@EVERY
def test_every_threshold_and_its_neighbours_by_the_oracle(fmt: Format) -> None:
    """Exact ties take the side the format says; one ulp off, the nearer one."""
    used = np.unique(np.float32([fmt.codes[code] for code in fmt.order]))
    middle = torch.from_numpy((used[:-1] + used[1:]) / np.float32(2))
    around = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-1e9, 1e9)]
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e9, -1e9])
    values = torch.cat([middle, *around, torch.from_numpy(used), zeros])
    expected = oracle.nearest(values.numpy(), ORACLES[fmt.name])
    assert np.array_equal(encode(values, fmt).numpy(), expected)
    tied = np.float32(fmt.codes)[encode(middle, fmt).numpy()]
    assert np.isin(tied, used).all()
    expected_side = {"down": middle * 0 - 1, "zero": -middle.sign(), "even": None}[fmt.ties]
    if expected_side is not None:
        went_up = torch.from_numpy(tied) > middle
        assert torch.equal(went_up, expected_side > 0)


@EVERY
def test_every_used_code_codes_itself(fmt: Format) -> None:
    codes = torch.tensor(fmt.order)
    written = encode(code_table(fmt, CPU)[codes], fmt).long()
    value = code_table(fmt, CPU)
    assert torch.equal(value[written], value[codes])
    away_from_zero = value[codes] != 0
    assert torch.equal(written[away_from_zero], codes[away_from_zero])


def test_registry() -> None:
    assert list(FORMATS) == ["nf4", "fp4", "int4", "int4_zp", "int8", "fp8_e4m3", "mxfp4"]
    assert all(name == fmt.name for name, fmt in FORMATS.items())
    assert tuple(2**i for i in range(5, 13)) == BLOCK_SIZES
    for fmt in FORMATS.values():
        assert fmt.block_size in (*fmt.block_sizes, ROW)
        assert set(fmt.block_sizes) <= set(BLOCK_SIZES)
        assert fmt.bits in (4, 8)
    defaults = {name: fmt.block_size for name, fmt in FORMATS.items()}
    fours = {"nf4": 64, "fp4": 64, "int4": 128, "int4_zp": 128, "mxfp4": 32}
    assert defaults == fours | {"int8": ROW, "fp8_e4m3": 128}
    assert {name for name, fmt in FORMATS.items() if fmt.double_quant} == {"nf4", "fp4"}


def test_formats_compare_by_name() -> None:
    assert len({NF4, FP4, NF4}) == 2
    assert FORMATS["nf4"] == NF4
    assert NF4 != FP4
    assert NF4 != "nf4"


@pytest.mark.parametrize(("blocks", "expected"), [(0, 0), (1, 1), (256, 1), (257, 2), (512, 2)])
def test_blocks_of(blocks: int, expected: int) -> None:
    assert blocks_of(blocks, NESTED_BLOCK) == expected


def digest(module: ModuleType) -> str:
    """A hash of every table that ``module``, which is pyft.formats, has."""
    found = hashlib.sha256()
    for fmt in (*module.FORMATS.values(), module.SCALE_FORMAT):
        for table in (module.code_table, module.order_table, module.threshold_table):
            found.update(table(fmt, CPU).numpy().tobytes())
    for signed in (True, False):
        found.update(np.float32(module.dynamic_map(signed)).tobytes())
    found.update(module.e8m0_table(CPU).numpy().tobytes())
    return found.hexdigest()


def test_tables_do_not_depend_on_the_cpu() -> None:
    """torch's vector code for an older CPU rounds some functions another way."""
    script = (
        "import pyft.formats, test_formats, torch;"
        "print(torch.backends.cpu.get_cpu_capability(), test_formats.digest(pyft.formats))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["DEFAULT", digest(formats)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_tables_do_not_depend_on_torchs_defaults(default: torch.dtype | torch.device) -> None:
    """A model is often built under another default dtype or device, and pyft first used there."""
    spec = spec_from_file_location("formats_again", formats.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = module_from_spec(spec)
    with default if isinstance(default, torch.device) else default_dtype(default):
        spec.loader.exec_module(again)
        assert digest(again) == digest(formats)


def test_kernels_share_the_nested_block() -> None:
    """Kernels import nothing of pyft, so the one number both need is compared here."""
    tree = ast.parse((ROOT / "kernels" / "tiles.py").read_text())
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    assert found["NESTED_BLOCK"] == NESTED_BLOCK
