"""The matmul of CPUs that have none for 16 bits, as it would run on any."""

from typing import Any

import pytest
import torch
from error_rule import check_error
from torch import Tensor

import pyft
from pyft.bench.memory import peak_bytes
from pyft.ops.shared import matmul
from pyft.ops.shared.matmul import mm

HALVES = [torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (8, 8, 8), (9, 17, 5), (3, 40, 1), (33, 1, 16), (0, 4, 4), (4, 0, 4), (4, 4, 0)]


@pytest.fixture(autouse=True)
def an_old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_matmul", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(matmul, "FEW", 0)
    monkeypatch.setattr(matmul, "BLOCK", 8)


def multiplied(x: list[Tensor], options: dict[str, Any], biased: bool) -> Tensor:
    """What ``mm`` is to compute, in the dtype of x: a, b, bias and out."""
    a, b, bias, out = x
    total = options.get("scale", 1.0) * (a @ b)
    total = total + bias if biased else total
    return out + total if options.get("accumulate") else total


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": -0.3}, {"accumulate": True}, {"scale": 2.0, "accumulate": True}],
    ids=str,
)
def test_error_rule(
    dtype: torch.dtype, size: tuple[int, int, int], biased: bool, options: dict[str, Any]
) -> None:
    m, k, n = size
    given = [torch.randn(s) for s in ((m, k), (k, n), (n,), (m, n))]
    x = [t.to(dtype) for t in given]
    out = x[3].clone() if options.get("accumulate") else torch.full((m, n), torch.nan).to(dtype)
    found = mm(x[0], x[1], out, x[2] if biased else None, **options)
    assert found is out
    reference, truth = (
        multiplied([t.to(d) for t in x], options, biased) for d in (dtype, torch.float64)
    )
    check_error("mm", found, reference, truth)


@pytest.mark.parametrize("dtype", HALVES)
def test_strides(dtype: torch.dtype) -> None:
    """Transposed, every second row, columns of something wider."""
    a, b = torch.randn(20, 19).to(dtype).t(), torch.randn(40, 30).to(dtype)[::2, 3:14]
    wide = torch.full((19, 30), 7.0).to(dtype)
    mm(a, b, wide[:, 5:16])
    expected = (a.double() @ b.double()).to(dtype)
    torch.testing.assert_close(wide[:, 5:16], expected)
    assert bool((wide[:, :5] == 7).all() and (wide[:, 16:] == 7).all())
    assert torch.equal(mm(a, b), wide[:, 5:16])


def test_sums_are_fp32() -> None:
    """Of many small numbers after a large one, over several blocks."""
    a = torch.cat([torch.full((1, 1), 256.0), torch.full((1, 64), 0.5)], 1).bfloat16()
    assert mm(a, torch.ones(65, 1).bfloat16()).item() == 288.0


def test_what_is_widened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "BLOCK", 64)
    a, b = torch.randn(1024, 512).bfloat16(), torch.randn(512, 1024).bfloat16()
    out = torch.empty(1024, 1024, dtype=torch.bfloat16)
    assert peak_bytes(lambda: mm(a, b, out), torch.device("cpu")) <= 3 * 4 * 64**2 + 4096


def test_others_go_to_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_widened", None)
    x = torch.randn(8, 8)
    assert torch.equal(mm(x, x), x @ x)
    monkeypatch.setattr(matmul, "FEW", 8**3 + 1)
    assert torch.equal(mm(x.bfloat16(), x.bfloat16()), x.bfloat16() @ x.bfloat16())


def test_the_ops_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA linear and a loss, forward and backward."""
    ran = []
    widened = matmul._widened
    monkeypatch.setattr(matmul, "_widened", lambda *given: ran.append(given) or widened(*given))
    x, w = torch.randn(9, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    a, b = torch.randn(3, 24).bfloat16(), torch.randn(40, 3).bfloat16()
    leaves = [t.requires_grad_() for t in (x, w, a, b)]
    labels = torch.randint(40, (9,))

    def gradients() -> list[Tensor]:
        y = pyft.lora_linear(x, w, a, b, 0.5)
        loss = pyft.linear_cross_entropy(x, w, labels, lora=(a, b, 0.5))
        return [y, *torch.autograd.grad(y.float().square().mean() + loss, leaves)]

    found = gradients()
    assert len(ran) >= 10
    with pyft.backend("reference"):
        expected = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
