"""The Triton kernels against the reference: on a GPU if there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own:
``python tests/test_kernels_quantize.py`` prints what is wrong with each case as JSON.
"""

import json
import os

import pytest
import torch
from qlinear_cases import LINEAR_CASES, check_linear
from quantize_cases import CASES, check, check_large_offsets
from triton_process import answers_of

pytestmark = pytest.mark.slow

LARGE = "large offsets"


def run_cases() -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import qlinear
    from pyft.kernels import quantize as kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = {name: check(case, kernels, device) for name, case in CASES.items()}
    for name, case in LINEAR_CASES.items():
        wrong[name] = check_linear(case, qlinear, device)
    return wrong | {LARGE: check_large_offsets(kernels, device)}


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("name", [*CASES, *LINEAR_CASES, LARGE])
def test_kernels_are_as_exact_as_the_reference(wrong: dict[str, str], name: str) -> None:
    assert wrong[name] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
