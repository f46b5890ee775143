"""What the loss takes besides its gradients: traced at a real size, measured at a small one, and
the same in both; whatever the vocabulary.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import saved_bytes
from loss_cases import inputs, logprobs_call, loss_call
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pyft
from pyft.bench.memory import peak_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from loss_memory import extra_bytes

MIB = 2**20
CPU = torch.device("cpu")


@pytest.mark.parametrize(("trained", "most"), [(False, 64), (True, 128)])
def test_of_a_large_vocabulary(trained: bool, most: int) -> None:
    assert 0 < extra_bytes(8192, 256000, 2304, torch.bfloat16, trained) <= most * MIB


@pytest.mark.parametrize("trained", [False, True])
def test_of_wide_rows(trained: bool) -> None:
    """Where the gradient of hidden is larger than the budget there are never two of it."""
    n, d = 16384, 4096
    assert extra_bytes(n, 128256, d, torch.bfloat16, trained) <= 96 * MIB


@pytest.mark.parametrize("trained", [False, True])
def test_the_budget_is_kept(trained: bool) -> None:
    """More of it is used, and no more: what else there is grows with rows and columns alone."""
    n, v, d = 2048, 256000, 512
    for budget in (8, 100):
        found = extra_bytes(n, v, d, torch.bfloat16, trained, "cpu", budget=budget)
        rest = found - budget * MIB
        assert rest <= 32 * n + 32 * v + 4 * MIB, budget


def step(n: int, v: int, d: int, trained: bool, **options: Any) -> tuple[int, list[Tensor]]:
    """The measured peak of a forward and backward less the gradients, and these."""
    hidden = torch.randn(n, d).bfloat16().requires_grad_()
    weight = torch.randn(v, d).bfloat16().requires_grad_(trained)
    labels = torch.randint(v, (n,))
    leaves = [hidden, weight][: 1 + trained]

    def call() -> None:
        pyft.linear_cross_entropy(hidden, weight, labels, **options).backward()

    call()  # what is taken once, as a vendor's scratch
    for leaf in leaves:
        leaf.grad = None
    peak = peak_bytes(call, CPU)
    assert (weight.grad is None) != trained
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return peak - sum(x.nbytes for x in gradients), gradients


@pytest.mark.unfilled
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("budget", [4, 16])
def test_measured_is_traced(budget: float, trained: bool) -> None:
    """But for what the vendor's matmul takes, which the trace does not see."""
    n, v, d = 512, 32000, 128
    measured, gradients = step(n, v, d, trained, budget=budget)
    traced = extra_bytes(n, v, d, torch.bfloat16, trained, "cpu", budget=budget)
    assert len(gradients) == 1 + trained
    assert -64 * 1024 <= measured - traced <= 512 * 1024, (measured, traced)
    assert measured < 0.6 * n * v * 2  # of the logits alone


@pytest.mark.parametrize(("dtype", "rows", "matmuls"), [
    (torch.bfloat16, 48, 3), (torch.bfloat16, 47, 4), (torch.float16, 48, 4), (torch.float32, 8, 3),
])  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_budget_for_all_rows_saves_a_matmul(
    dtype: torch.dtype, rows: int, matmuls: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trained head in bf16; "none" multiplies the logits once more in any case."""
    n, v, d = 48, 640, 32
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,))
    budget = rows * v * dtype.itemsize / MIB
    monkeypatch.setattr("pyft.op.plain", lambda arguments: True)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss = pyft.linear_cross_entropy(hidden, weight, labels, reduction=reduction, budget=budget)
        loss.sum().backward()
    again = reduction == "none"
    assert counter.get_total_flops() == (matmuls + again) * 2 * n * v * d


@pytest.mark.unfilled
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "z_loss": 0.1, "softcap": 5.0},
        {"label_smoothing": 0.1},
        {"shift": True},
    ],
    ids=str,
)
def test_a_frozen_head_takes_nothing_of_its_size(options: dict[str, Any]) -> None:
    n, v, d = 64, 16384, 128
    found, _ = step(n, v, d, False, budget=0.25, **options)
    assert found < v * d * 2 / 4


@pytest.mark.unfilled
@pytest.mark.parametrize("metrics", [False, True])
def test_evaluation_takes_no_more(metrics: bool) -> None:
    n, v, d = 256, 16384, 64
    hidden, weight = torch.randn(n, d).bfloat16(), torch.randn(v, d).bfloat16()
    labels = torch.randint(v, (n,))

    def call() -> None:
        with torch.no_grad():
            pyft.linear_cross_entropy(hidden, weight, labels, metrics=metrics, budget=1)

    call()
    assert peak_bytes(call, CPU) <= 1.25 * MIB


@pytest.mark.unfilled
def test_rows_that_do_not_count_take_nothing() -> None:
    n, v, d = 4096, 4096, 256
    hidden = torch.randn(n, d).bfloat16().requires_grad_()
    weight = torch.randn(v, d).bfloat16()
    labels = torch.full((n,), -100)
    labels[::64] = 5

    def call() -> None:
        pyft.linear_cross_entropy(hidden, weight, labels).backward()

    call()
    hidden.grad = None
    assert peak_bytes(call, CPU) <= 1.5 * hidden.nbytes + 64 * v * 2 + 256 * 1024


@pytest.mark.unfilled
def test_a_shift_copies_nothing() -> None:
    """hidden is not laid out anew."""
    s, v, d = 2048, 256, 1024
    hidden = torch.randn(2, s, d).bfloat16()
    weight, labels = torch.randn(v, d).bfloat16(), torch.randint(v, (2, s))

    def call(shift: bool) -> int:
        def run() -> None:
            with torch.no_grad():
                pyft.linear_cross_entropy(hidden, weight, labels, shift=shift, budget=0.1)

        run()
        return peak_bytes(run, CPU)

    assert call(True) - call(False) <= hidden.nbytes / 4


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_kept_for_the_backward(reduction: str, rank: int | None) -> None:
    """With "none" a few numbers a row; else the gradients, which a forward in fp32 has made."""
    n, v, d = 64, 999, 32
    given = inputs(n, v, d, rank=rank, bias=True, ignored=0.0)
    found = saved_bytes(loss_call(given, reduction=reduction))
    parameters = v * d + v + (0 if rank is None else rank * (v + d))
    assert found <= 32 * n + (0 if reduction == "none" else 4 * (n * d + parameters))
    assert saved_bytes(logprobs_call(given, entropy=True)) <= 40 * n
