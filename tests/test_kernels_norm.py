"""The Triton norm kernels on a GPU if there is one, else in Triton's interpreter: as they come, and
with every row read in parts, as long rows are.

Triton reads TRITON_INTERPRET when it is imported, so kernels run in a process of their own:
``python tests/test_kernels_norm.py`` prints what is wrong with each case as JSON.
"""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from norm_cases import CASES, check
from triton_process import answers_of

# Some: the interpreter's time goes by the number of parts.
IN_PARTS = [
    name
    for name, case in CASES.items()
    if (case.rows <= 4 and 100 <= case.cols <= 257) or (case.rows == 5 and case.parts > 1)
]


def run_cases() -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import configs, norm

    parts = configs.Norm(tile=128, longest=0)
    in_parts = SimpleNamespace(
        norm=partial(norm.norm, config=parts),
        norm_backward=partial(norm.norm_backward, config=parts),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        f"{how} {name}": check(case, kernels, device)
        for name, case in CASES.items()
        for how, kernels in (("whole", norm), ("parts", in_parts))
        if how == "whole" or name in IN_PARTS
    }


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_triton(wrong: dict[str, str], name: str) -> None:
    assert wrong[f"whole {name}"] == ""


@pytest.mark.parametrize("name", IN_PARTS)
def test_triton_with_rows_in_parts(wrong: dict[str, str], name: str) -> None:
    assert wrong[f"parts {name}"] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
