"""The Triton activations on a GPU if there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so kernels run in a process of their own:
``python tests/test_kernels_glu.py`` prints what is wrong with each case as JSON.
"""

import json
import os

import pytest
import torch
from glu_cases import CASES, check
from triton_process import answers_of


def run_cases() -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import glu

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: check(case, glu, device) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_triton(wrong: dict[str, str], name: str) -> None:
    assert wrong[name] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
