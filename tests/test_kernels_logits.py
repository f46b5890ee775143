"""The Triton kernels for logits on a GPU if there is one, else in Triton's interpreter: as they
come, and with rows cut in many parts.

Triton reads TRITON_INTERPRET when it is imported, so kernels run in a process of their own:
``python tests/test_kernels_logits.py`` prints what is wrong with each case as JSON.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from error_rule import broken_rule
from logits_cases import CASES, Logits, check
from torch import Tensor
from triton_process import answers_of

from pyft.reference import logits as reference

# Tiles of the statistics and of the gradient, and the lengths of rows they are tried at.
CUTS = {
    "default": (None, None, range(10**6)),
    "tiles of 16 and 64": (16, 64, range(200)),
    "tiles of 256 and 128": (256, 128, range(200, 2000)),
    "tiles of 1024 and 2048": (1024, 2048, range(2000, 10**6)),
}
# Rows that begin where wide accesses can but end between two: of one part, and with a last part of
# many columns, of one and of two.
RAGGED = {
    str(case): case
    for case in (
        Logits(1003, "bf16", gap=21, mean=True, smooth=True, weights=True, threshold=0.01),
        Logits(24, "fp16", gap=8, mean=True, argmax=True, top=True, content="masked"),
        Logits(769, "fp32", gap=15, softcap=5.0, mean=True, content="wide"),
        Logits(514, "bf16", gap=14, mean=True, content="nan"),
    )
}
TRIED = {
    f"{how} {name}": (how, case)
    for how, (_, _, lengths) in CUTS.items()
    for name, case in (CASES | RAGGED).items()
    if case.cols in lengths
}

ROWS, COLS = 3, 1003
SCALE, SOFTCAP, TAUGHT = 0.9, 6.0, (0.7, 4.0)
STRIDES = {"odd": COLS, "ragged": COLS + 21, "to beyond 2^31": 2**30 + 16}
NAMES = ("lse", "target", "smooth", "mean", "cross", "top")


def everything(config: Any, stride: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """All the statistics and dz of the problem below, in rows so far apart, among them a teacher's;
    the memory between them is never touched.
    """
    from pyft.kernels import logits

    z, teacher, labels, weights, teacher_lse, g = problem()
    rows = [
        torch.empty((ROWS - 1) * stride + COLS, dtype=x.dtype, device=device)
        .as_strided((ROWS, COLS), (stride, 1))
        .copy_(x)
        for x in (z, teacher)
    ]
    given = (labels.to(device), weights.to(device), SCALE, SOFTCAP)
    tile = (rows[0], *given, rows[1], teacher_lse.to(device), *TAUGHT)
    sums = [torch.full((ROWS,), torch.nan, device=device) for _ in NAMES]
    argmax = torch.full((ROWS,), -1, device=device)
    logits.logit_statistics(tile, *sums, argmax, config=config)  # type: ignore[arg-type]
    slopes = [x.to(device) for x in g]
    logits.logit_gradient(tile, sums[0], sums[3], *slopes, 0.0, None, config=config)  # type: ignore[arg-type]
    return [x.cpu() for x in (*sums, argmax)], rows[0].cpu()


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """z, the teacher's, labels, class weights, the teacher's lse, and gradients of statistics."""
    generator = torch.Generator().manual_seed(5)
    z, teacher = ((3 * torch.randn((ROWS, COLS), generator=generator)).bfloat16() for _ in range(2))
    weights = torch.rand(COLS, generator=generator)
    g = [torch.randn(ROWS, generator=generator) for _ in range(5)]
    lse = reference.capped(teacher.double(), *TAUGHT).logsumexp(1).float()
    return z, teacher, torch.tensor([COLS - 1, 7, 0]), weights, lse, g


def expected(wide: torch.dtype) -> tuple[reference.Statistics, Tensor]:
    z, teacher, labels, weights, _, g = problem()
    taught = reference.capped(teacher.to(wide), *TAUGHT)
    given = (z.to(wide), labels, weights.to(wide), SCALE, SOFTCAP, taught)
    found = reference.logit_statistics(*given)
    return found, reference.logit_gradient(*given, found.lse, found.mean, *(x.to(wide) for x in g))


def check_stride(stride: int, device: torch.device) -> str:
    """What is wrong with all there is at once, in parts."""
    from pyft.kernels import configs

    found, dz = everything(configs.Logits(tile=256, gradient_tile=512), stride, device)
    (plain, plain_dz), (truth, truth_dz) = expected(torch.float32), expected(torch.float64)
    wrong = broken_rule("dz", dz, plain_dz.bfloat16(), truth_dz)
    for i, name in enumerate(NAMES):
        wrong += broken_rule(name, found[i], plain[i], truth[i])
    same = torch.equal(found[-1], truth.argmax)
    return wrong + ("" if same else f"argmax is {found[-1]}, not {truth.argmax}")


def check_bits(device: torch.device) -> str:
    """Whether two runs give the same bits, and a row the same alone as among others."""
    from pyft.kernels import configs, logits

    z = torch.randn((9, 2064), generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    labels = torch.arange(9, device=device)
    config = configs.Logits(tile=512, gradient_tile=256)

    def run(rows: slice) -> tuple[Tensor, ...]:
        dz, few = z[rows].clone(), labels[rows]
        lse, target, mean = torch.empty(3, len(few), device=device)
        tile = (dz, few, None, 1.0, None, None, None, 1.0, None)
        logits.logit_statistics(tile, lse, target, None, mean, None, None, None, config)
        slopes = (torch.ones_like(lse), -torch.ones_like(lse), None, lse.cos(), None)
        logits.logit_gradient(tile, lse, mean, *slopes, 0.0, None, config)
        return lse, target, mean, dz

    first, second, part = run(slice(9)), run(slice(9)), run(slice(4, 7))
    again = all(map(torch.equal, first, second))
    alone = all(torch.equal(x[4:7], y) for x, y in zip(first, part, strict=True))
    return "" if again and alone else f"again: {again}, among fewer rows: {alone}"


def check_infinite(device: torch.device) -> str:
    """What is wrong where parts of a row or all of it are -infinity, or NaN, or one is infinity."""
    from pyft.kernels import configs, logits

    config = configs.Logits(tile=64, gradient_tile=32)
    z = torch.randn((6, 200), generator=torch.Generator().manual_seed(4)) - 1000
    z[0, :130] = z[1, 70:] = z[2] = z[3, 100:] = -torch.inf
    z[3, 150], z[4, 20], z[5] = torch.nan, torch.inf, torch.nan
    labels, g = torch.tensor([199, 150, 0, 0, 1, 2]), torch.arange(1.0, 7.0)
    lse, top, mean = torch.full((3, 6), torch.nan, device=device)
    argmax = torch.full((6,), -1, device=device)
    dz, slope = z.clone().to(device), g.to(device)
    tile = (dz, labels.to(device), None, 1.0, None, None, None, 1.0, None)
    logits.logit_statistics(tile, lse, None, None, mean, None, top, argmax, config)
    logits.logit_gradient(tile, lse, mean, slope, slope, None, slope, None, 0.0, None, config)

    def expected(wide: torch.dtype) -> tuple[Tensor, ...]:
        found = reference.logit_statistics(z.to(wide), labels)
        given = (found.lse, found.mean, g, g, None, g)
        slopes = reference.logit_gradient(z.to(wide), labels, None, 1.0, None, None, *given)
        return found.lse, found.top, found.mean, slopes

    wrong = ""
    named = zip(("lse", "top", "mean", "dz"), (lse, top, mean, dz), strict=True)
    for (name, x), plain, truth in zip(
        named, expected(torch.float32), expected(torch.float64), strict=True
    ):
        there = truth.isfinite()
        if not torch.equal(
            x.cpu()[~there].nan_to_num(77.0), truth[~there].float().nan_to_num(77.0)
        ):
            wrong += f"{name} is {x}, not {truth}; "
        wrong += broken_rule(name, x.cpu()[there], plain[there], truth[there])
    best = [*z[:2].argmax(1).tolist(), 0, 20]
    some = bool(((argmax >= 0) & (argmax < 200)).all())
    right = some and argmax[[0, 1, 2, 4]].tolist() == best
    return wrong if right else f"{wrong}argmax is {argmax}, not {best} where there is no NaN"


def run_cases() -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
    from pyft.kernels import configs, logits

    def cut(tile: int | None, gradient_tile: int | None) -> Any:
        if tile is None or gradient_tile is None:
            return logits
        config = configs.Logits(tile=tile, gradient_tile=gradient_tile)
        functions: tuple[Callable[..., None], ...] = (
            logits.logit_statistics,
            logits.logit_gradient,
        )
        return SimpleNamespace(**{f.__name__: partial(f, config=config) for f in functions})

    kernels = {how: cut(*tiles) for how, (*tiles, _) in CUTS.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: check(case, kernels[how], device) for name, (how, case) in TRIED.items()}
    found |= {name: check_stride(stride, device) for name, stride in STRIDES.items()}
    return found | {"bits": check_bits(device), "infinite": check_infinite(device)}


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("name", TRIED)
def test_triton(wrong: dict[str, str], name: str) -> None:
    assert wrong[name] == ""


@pytest.mark.parametrize("stride", STRIDES)
def test_triton_with_all_there_is_in_rows_so_far_apart(wrong: dict[str, str], stride: str) -> None:
    assert wrong[stride] == ""


def test_triton_gives_the_same_bits_twice_and_among_fewer_rows(wrong: dict[str, str]) -> None:
    assert wrong["bits"] == ""


def test_triton_where_parts_or_rows_are_infinite(wrong: dict[str, str]) -> None:
    assert wrong["infinite"] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
