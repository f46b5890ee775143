"""The Triton matmul with the low-rank product inside, and its random words, on a GPU if there is
one, else in Triton's interpreter: the error rule, with float64 as the truth.

Triton reads TRITON_INTERPRET when it is imported, so kernels run in a process of their own:
``python tests/test_kernels_lora_matmul.py`` prints what is wrong with each case as JSON.
"""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
import triton
import triton.language as tl
from error_rule import broken_rule
from stored_weights import DTYPES, Output, shifted
from torch import Tensor
from triton_process import answers_of

from pyft.kernels.tiles import random_tile
from pyft.reference.dropout import dropout, random_words, threshold

if TYPE_CHECKING:
    from pyft.kernels import configs

SEEDS = (0, 1, 2**31, 2**63 - 1)
FAR = 3 * 2**34  # words of counters beyond 32 bits
SMALL = {"block_m": 32, "block_n": 32, "block_k": 16, "block_r": 16, "group_m": 2}
VARIANTS = {
    "default": {},
    "plain": SMALL,
    "persistent": SMALL | {"persistent": True},
    "tma": SMALL | {"tma": True},
    "persistent-tma": SMALL | {"persistent": True, "tma": True},
}


@dataclass(frozen=True)
class Case:
    """x [m, k] and w [k, n] (stored as its transpose where ``along_k``, as b is), s [m, r]; rows
    ``gap`` further apart than they need be, ``shift`` elements from where wide accesses start.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: str = "bf16"
    along_k: bool = True
    p: float = 0.0
    bias: bool = False
    gap: int = 0
    shift: int = 0


CASES = {
    "-".join(map(str, vars(case).values())): case
    for case in (
        *(Case(37, 50, 40, r, dtype) for r in (1, 3, 16, 40) for dtype in DTYPES),
        *(Case(40, 72, 64, 16, dtype, False, 0.3) for dtype in DTYPES),
        *(Case(33, 35, 21, 3, dtype, along_k, 0.5, True) for dtype in DTYPES for along_k in (0, 1)),
        *(Case(70, 64, 48, 8, "fp16", along_k, 0.0, True, gap=8) for along_k in (False, True)),
        *(Case(20, 24, 32, 8, along_k=along_k, gap=3, shift=1) for along_k in (False, True)),
        Case(1, 40, 64, 4, bias=True),
        Case(100, 1, 16, 2, "fp32"),
        Case(5, 7, 1, 1, "fp32", False),
        Case(5, 8, 0, 4, "fp32", bias=True),
        Case(16, 16, 16, 70, "fp32", False, 0.1),
        Case(0, 16, 16, 4),
        Case(16, 0, 16, 4),
    )
}


def placed(x: Tensor, case: Case, device: torch.device) -> Tensor:
    """x in rows of the case's stride, among NaN."""
    storage = torch.full((x.shape[0], x.shape[1] + case.gap), torch.nan, dtype=x.dtype)
    storage[:, : x.shape[1]] = x
    return shifted(storage.to(device), case.shift)[:, : x.shape[1]]


def check(case: Case, config: "configs.LoraMatmul | None", device: torch.device) -> str:
    """What is wrong with one case; on a GPU two runs give the same bits."""
    from pyft.kernels.lora_matmul import lora_matmul

    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(case.m + case.k + case.r)
    shapes = ((case.m, case.k), (case.k, case.n), (case.m, case.r), (case.r, case.n))
    x, w, s, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    bias = torch.randn(case.n, generator=generator).to(dtype) if case.bias else None
    inputs = [placed(t, case, device) for t in (x, s)]
    weights = [
        placed(t.t(), case, device).t() if case.along_k else placed(t, case, device) for t in (w, b)
    ]
    scale, seed = 1.7, 2**40 + 5

    def run() -> Output:
        out = Output((case.m, case.n), dtype, device, case.gap, case.shift)
        lora_matmul(
            inputs[0], weights[0], inputs[1], weights[1], scale,
            None if bias is None else bias.to(device), out.tensor, threshold(case.p),
            1 / (1 - case.p), seed, config,
        )  # fmt: skip
        return out

    def expected(to: torch.dtype) -> Tensor:
        low = s.to(to) @ b.to(to)
        y = x.to(to) @ w.to(to) + scale * (dropout(low, case.p, seed) if case.p else low)
        return y if bias is None else y + bias.to(to)

    out = run()
    wrong = broken_rule("out", out.tensor.cpu(), expected(dtype), expected(torch.float64))
    wrong += out.outside("out")
    return wrong + (run().differs("second run", out.tensor.cpu()) if device.type == "cuda" else "")


@triton.jit
def words_kernel(
    out_ptr, first, pitch, seed, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPED: tl.constexpr
):
    """Words of ROWS x COLS elements, ``pitch`` from row to row, from element ``first`` on."""
    from_row = tl.arange(0, ROWS).to(tl.int64)
    start = tl.cast(first, tl.int64)
    words = random_tile(from_row, start, pitch, seed, COLS, GROUPED)
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + offs, words.to(tl.int64))


def words_from(first: int, seed: int) -> list[int]:
    """The words of one counter in plain integers."""
    mask = 2**32 - 1
    c = [first // 4 & mask, first // 4 >> 32, 0, 0]
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ key[0], b & mask, a >> 32 ^ c[3] ^ key[1], a & mask]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return c


def check_words(seed: int, grouped: bool, device: torch.device) -> str:
    """What differs from the reference's words."""
    pitch = 40 if grouped else 37
    found = torch.empty(8, 32, dtype=torch.int64, device=device)
    words_kernel[(1,)](found, 4, pitch, seed, ROWS=8, COLS=32, GROUPED=grouped)
    element = torch.arange(8)[:, None] * pitch + 4 + torch.arange(32)
    wrong = ""
    if not torch.equal(found.cpu(), random_words(400, seed, torch.device("cpu"))[element]):
        wrong += "words differ from the reference's; "
    words_kernel[(1,)](found, FAR, pitch, seed, ROWS=8, COLS=32, GROUPED=grouped)
    if found[0, 4:8].tolist() != words_from(FAR + 4, seed):
        wrong += "words of large counters differ; "
    return wrong


def run_cases() -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import configs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        f"words {seed} {grouped}": check_words(seed, grouped, device)
        for seed in SEEDS
        for grouped in (False, True)
    }
    for variant, options in VARIANTS.items():
        config = configs.LoraMatmul(**options) if options else None
        found |= {f"{variant} {name}": check(case, config, device) for name, case in CASES.items()}
    return found


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_lora_matmul(wrong: dict[str, str], name: str, variant: str) -> None:
    assert wrong[f"{variant} {name}"] == ""


def test_defaults_depend_on_dtype_and_capability_alone() -> None:
    from pyft.kernels import configs
    from pyft.kernels.lora_matmul import config_for

    for major in (7, 8, 9, 10, 12):
        assert config_for(torch.float32, major) == configs.LORA_MATMUL_NO_MATRIX_UNITS
    assert config_for(torch.float16, 7) == configs.LORA_MATMUL_NO_MATRIX_UNITS
    assert config_for(torch.bfloat16, 9) == config_for(torch.float16, 10) == configs.LORA_MATMUL_TMA
    for major in (0, 8, 12, 99):
        assert config_for(torch.bfloat16, major) == configs.LORA_MATMUL


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_words_are_the_references(wrong: dict[str, str], seed: int, grouped: bool) -> None:
    assert wrong[f"words {seed} {grouped}"] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
