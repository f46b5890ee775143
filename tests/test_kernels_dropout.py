"""The Triton dropout on a GPU if there is one, else in Triton's interpreter: the reference's bits.

Triton reads TRITON_INTERPRET when it is imported, so kernels run in a process of their own:
``python tests/test_kernels_dropout.py`` prints what is wrong with each case as JSON.
"""

import json
import os

import pytest
import torch
from triton_process import answers_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = (1, 3, 4, 5, 1000, 2048, 4099)
SEEDS = (0, 1, 2**31 + 5, 2**63 - 1, -1)
P = 0.3
CASES = [f"{dtype} {n} {seed}" for dtype in DTYPES for n in SIZES for seed in SEEDS]


def run_cases() -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import dropout
    from pyft.reference import dropout as reference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = {}
    for case in CASES:
        dtype, n, seed = case.split()
        x = torch.randn(int(n), device=device).to(DTYPES[dtype])
        out = torch.full_like(x, float("nan"))
        key = int(seed)
        dropout.dropout(x, key, reference.threshold(P), 1.0 / (1.0 - P), out)
        expected = reference.dropout(x, P, key)
        wrong[case] = "" if torch.equal(out, expected) else f"{out} is not {expected}"
    return wrong


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("case", CASES)
def test_triton(wrong: dict[str, str], case: str) -> None:
    assert wrong[case] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
