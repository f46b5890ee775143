"""The formats' constants against their papers."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from nf4_oracle import dynamic8

from pyft.formats import (
    BLOCK_SIZES,
    FORMATS,
    NESTED_BLOCK,
    NF4,
    Format,
    absmax_format,
    code_table,
    midpoint_table,
    nested_blocks,
)

CPU = torch.device("cpu")
ALL = [*FORMATS.values(), absmax_format()]


def normal_float() -> list[float]:
    """QLoRA's NF4: quantiles of a standard normal, 8 above zero and 7 below, scaled to [-1, 1]."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = sorted([*above, *below, 0.0])
    return [value / max(values) for value in values]


def dynamic_map() -> list[float]:
    """The signed dynamic map: centres of 2**i intervals of [0.1, 1] times 10**(i - 6), and 0, 1."""
    values = [0.0, 1.0]
    for i in range(7):
        for j in range(2**i):
            centre = 0.1 + 0.9 * (j + 0.5) / 2**i
            values += [centre * 10 ** (i - 6), -centre * 10 ** (i - 6)]
    return sorted(values)


def test_nf4_codes_are_normal_quantiles() -> None:
    np.testing.assert_allclose(NF4.codes, normal_float(), rtol=0, atol=2e-6)
    assert NF4.codes[0] == -1.0
    assert NF4.codes[15] == 1.0
    assert NF4.bits == 4
    assert NF4.block_size == 64


def test_absmax_codes_are_the_dynamic_map() -> None:
    fmt = absmax_format()
    np.testing.assert_allclose(fmt.codes, dynamic_map(), rtol=3e-7, atol=0)
    assert fmt.bits == 8
    assert fmt.block_size == NESTED_BLOCK == 256


def test_absmax_codes_do_not_depend_on_the_cpu() -> None:
    """torch's vector code for an older CPU rounds some functions another way."""
    script = (
        "import pyft.formats as f, numpy, torch;"
        "print(torch.backends.cpu.get_cpu_capability());"
        "print(numpy.float32(f.absmax_format().codes).tobytes().hex())"
    )
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": "default",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    capability, codes = done.stdout.split()
    assert capability == "DEFAULT"
    assert codes == np.float32(absmax_format().codes).tobytes().hex() == dynamic8().tobytes().hex()


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
def test_codes_ascend_and_are_fp32(fmt: Format) -> None:
    assert len(fmt.codes) == 2**fmt.bits
    assert all(low < high for low, high in zip(fmt.codes, fmt.codes[1:], strict=False))
    assert all(float(np.float32(code)) == code for code in fmt.codes)
    assert fmt.codes[fmt.zero_code] == 0.0
    assert fmt.codes.count(0.0) == 1
    assert code_table(fmt, CPU).tolist() == list(fmt.codes)
    assert code_table(fmt, CPU).dtype == torch.float32


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
def test_midpoints_are_fp32_means_of_neighbours(fmt: Format) -> None:
    codes = np.array(fmt.codes, dtype=np.float32)
    expected = (codes[:-1] + codes[1:]) / np.float32(2)
    found = midpoint_table(fmt, CPU)
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == expected.tobytes()


def test_registry_is_keyed_by_name() -> None:
    assert FORMATS["nf4"] is NF4
    assert all(name == fmt.name for name, fmt in FORMATS.items())
    assert all(fmt.block_size in BLOCK_SIZES for fmt in FORMATS.values())


def test_block_sizes_are_powers_of_two() -> None:
    assert tuple(2**i for i in range(5, 13)) == BLOCK_SIZES


@pytest.mark.parametrize(("blocks", "expected"), [(0, 0), (1, 1), (256, 1), (257, 2), (512, 2)])
def test_nested_blocks(blocks: int, expected: int) -> None:
    assert nested_blocks(blocks) == expected


def test_kernels_share_the_nested_block() -> None:
    """Kernels import nothing of pyft, so the one number both need is compared here."""
    tree = ast.parse((Path(__file__).parents[1] / "kernels" / "tiles.py").read_text())
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert found["NESTED_BLOCK"] == NESTED_BLOCK
