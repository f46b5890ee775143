"""The Triton products with one thin side, on a GPU if there is one, else in Triton's interpreter:
the error rule, with float64 as the truth.

Triton reads TRITON_INTERPRET when it is imported, so kernels run in a process of their own:
``python tests/test_kernels_skinny.py`` prints what is wrong with each case as JSON.
"""

import json
import os
from dataclasses import dataclass

import pytest
import torch
from error_rule import broken_rule
from stored_weights import DTYPES, Output, shifted
from torch import Tensor
from triton_process import answers_of

from pyft.reference.dropout import dropout, threshold

SEED, SCALE = 2**35 + 3, 0.6
CONFIGS = {
    "default": {},
    "small": {"block_m": 32, "block_k": 32, "block_r": 16, "programs": 12},
}


@dataclass(frozen=True)
class Case:
    """x [m, k] and a thin side of r; rows ``gap`` further apart than they need be, ``shift``
    elements from where wide accesses could start; ``turned``: a, or the sum, is a transposed view.
    """

    m: int
    k: int
    r: int
    dtype: str = "bf16"
    p: float = 0.0
    turned: bool = False
    gap: int = 0
    shift: int = 0


CASES = {
    "-".join(map(str, vars(case).values())): case
    for case in (
        *(Case(70, 130, r, dtype) for r in (1, 3, 16, 40) for dtype in DTYPES),
        *(Case(67, 129, 5, dtype, 0.4, True) for dtype in DTYPES),
        *(Case(80, 128, 16, dtype, 0.1, turned=True, gap=8) for dtype in DTYPES),
        *(Case(33, 61, 7, dtype, gap=3, shift=1) for dtype in DTYPES),
        Case(3, 600, 4, p=0.5),
        Case(600, 3, 4, p=0.5),
        Case(20, 40, 300, "fp32"),
        Case(1, 1, 1, "fp32"),
        Case(0, 24, 4),
        Case(24, 0, 4),
    )
}


def placed(x: Tensor, case: Case, device: torch.device) -> Tensor:
    """x in rows of the case's stride, among NaN."""
    storage = torch.full((x.shape[0], x.shape[1] + case.gap), torch.nan, dtype=x.dtype)
    storage[:, : x.shape[1]] = x
    return shifted(storage.to(device), case.shift)[:, : x.shape[1]]


def check(case: Case, options: dict[str, int], device: torch.device) -> dict[str, str]:
    """What is wrong with each of the two; on a GPU two runs give the same bits."""
    from pyft.kernels import configs, skinny

    config = configs.Skinny(**options) if options else None
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(case.m + case.k)
    shapes = ((case.m, case.k), (case.r, case.k), (case.m, case.r))
    x, a, s = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    x_in, s_in = placed(x, case, device), placed(s, case, device)
    a_in = placed(a.t(), case, device).t() if case.turned else placed(a, case, device)
    drop = (threshold(case.p), 1 / (1 - case.p), SEED)

    def project() -> Output:
        out = Output((case.m, case.r), dtype, device, case.gap, case.shift)
        skinny.project(x_in, a_in, SCALE, *drop, out.tensor, config)
        return out

    def reduce() -> Output:
        shape = (case.k, case.r) if case.turned else (case.r, case.k)
        out = Output(shape, dtype, device, case.gap, case.shift)
        into = out.tensor.t() if case.turned else out.tensor
        skinny.reduce(s_in, x_in, SCALE, *drop, into, config)
        return out

    def dropped(to: torch.dtype) -> Tensor:
        """x as it is multiplied: rounded to its dtype when it is dropped, in the truth too."""
        return (dropout(x, case.p, SEED) if case.p else x).to(to)

    def projected(to: torch.dtype) -> Tensor:
        return SCALE * (dropped(to) @ a.to(to).t())

    def reduced(to: torch.dtype) -> Tensor:
        found = SCALE * (s.to(to).t() @ dropped(to))
        return found.t() if case.turned else found

    found = {}
    for name, run, expected in (("project", project, projected), ("reduce", reduce, reduced)):
        out = run()
        truth = expected(torch.float64)
        wrong = broken_rule(name, out.tensor.cpu(), expected(dtype), truth) + out.outside(name)
        if device.type == "cuda":
            wrong += run().differs("second run", out.tensor.cpu())
        found[name] = wrong
    return found


def run_cases() -> dict[str, dict[str, str]]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        f"{how} {name}": check(case, options, device)
        for how, options in CONFIGS.items()
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def wrong() -> dict[str, dict[str, str]]:
    return answers_of(__file__)


@pytest.mark.parametrize("op", ["project", "reduce"])
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("name", CASES)
def test_triton(wrong: dict[str, dict[str, str]], name: str, how: str, op: str) -> None:
    assert wrong[f"{how} {name}"][op] == ""


def test_parts_depend_on_shapes_alone_and_hold_all_blocks() -> None:
    from pyft.kernels.skinny import LEAST_BLOCKS, _split

    for tiles in (1, 3, 64, 1000):
        for blocks in (0, 1, 5, 64, 999):
            parts, each = _split(tiles, blocks, 256)
            assert (parts - 1) * each < max(1, blocks) <= parts * each
            assert parts == 1 or each >= LEAST_BLOCKS - 1


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
