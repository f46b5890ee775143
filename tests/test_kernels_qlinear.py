"""How the Triton linear over a quantized weight is cut into programs; its answers in general are in
test_kernels_quantize.py.

As there, the kernel runs in a process of its own, which prints what is wrong with each case.
"""

import json
import os
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from qlinear_cases import Linear, check_linear
from triton_process import answers_of

pytestmark = pytest.mark.slow

TILES = "several tiles along both axes"
MANY_ROWS = "more rows than tiles fit along axis 1"
LARGEST_AXIS_1 = 65535  # programs, CUDA's limit; axis 0 has 2^31 - 1


@dataclass
class Grids:
    """In the kernel's place: keeps what it would be launched with."""

    found: list[tuple[int, ...]]

    def __getitem__(self, grid: tuple[int, ...]) -> "Grids":
        self.found.append(grid)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Launch nothing."""


def run_cases() -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import configs, qlinear

    class Small:
        """The kernel in tiles of 16 x 32."""

        def qlinear(self, *arguments: Any) -> None:
            qlinear.qlinear(*arguments, configs.QLinear(block_m=16, block_n=32))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Linear("nf4", 40, 70, 96, dtype="fp32", nested=True)
    wrong = {TILES: check_linear(case, Small(), device)}
    n, grids = 32 * LARGEST_AXIS_1 + 1, Grids([])
    x = torch.empty(1, 64, device="meta")
    y = torch.empty(1, n, device="meta")
    with patch.object(qlinear, "qlinear_kernel", grids):
        qlinear.qlinear(
            x, x, x, None, None, None, x, None, 4, (n, 64), 64, None, y, configs.QLinear()
        )
    wrong[MANY_ROWS] = "" if grids.found == [(LARGEST_AXIS_1 + 1, 1)] else str(grids.found)
    return wrong


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("name", [TILES, MANY_ROWS])
def test_programs_cover_the_output(wrong: dict[str, str], name: str) -> None:
    assert wrong[name] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
