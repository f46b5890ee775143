"""linear_cross_entropy of numbers that are not finite, huge or masked, on any number of threads,
and with a filter on its gradients.
"""

from typing import Any

import pytest
import torch
from lora_cases import check_near
from loss_cases import (
    IGNORED,
    check_values,
    inputs,
    logits,
    loss_and_gradients,
    loss_of,
    true_loss_and_gradients,
)

import pyft

MIB = 2**20
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
BACKEND = pytest.mark.parametrize("name", ["auto", "reference"])


@REDUCTION
@pytest.mark.parametrize("row", [0, 4, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@BACKEND
def test_a_row_that_is_not_finite(value: float, row: int, reduction: str, name: str) -> None:
    given = inputs(9, bias=True, rank=2, ignored=0.0)
    clean = loss_of({**given, "hidden": given["hidden"].detach()}, reduction="none")
    with torch.no_grad():
        given["hidden"][row, 3] = value
    for budget in (None, 37 * 4 / MIB):
        with pyft.backend(name):
            found = loss_and_gradients(given, reduction=reduction, budget=budget)
        others = torch.arange(9) != row
        assert found["hidden"][row].isnan().any()
        if reduction == "none":
            assert found["loss"][row].isnan()
            torch.testing.assert_close(found["loss"][others], clean[others])
        else:
            assert found["loss"].isnan()
        if reduction != "mean":
            assert found["hidden"][others].isfinite().all()


@REDUCTION
@BACKEND
def test_nobody_looks_at_rows_that_do_not_count(reduction: str, name: str) -> None:
    """Padding may be anything."""
    given = inputs(9, bias=True, rank=2, ignored=0.0, token_weights=True)
    given["labels"][[2, 5]] = IGNORED
    expected = loss_and_gradients(given, reduction=reduction)
    with torch.no_grad():
        given["hidden"][2], given["hidden"][5] = torch.nan, torch.inf
    with pyft.backend(name):
        found = loss_and_gradients(given, reduction=reduction)
    check_values(found, {name: value.double() for name, value in expected.items()})


@REDUCTION
@BACKEND
def test_nobody_looks_at_weights_that_do_not_count(reduction: str, name: str) -> None:
    given = inputs(9, bias=True, rank=2, ignored=0.0, token_weights=True)
    given["labels"][[2, 5]] = IGNORED
    expected = loss_and_gradients(given, reduction=reduction)
    given["token_weights"][2] = torch.nan
    with pyft.backend(name):
        found = loss_and_gradients(given, reduction=reduction)
    check_values(found, {name: value.double() for name, value in expected.items()})


@pytest.mark.parametrize("reduction", ["mean", "none"])
@BACKEND
def test_labels_that_are_masked(reduction: str, name: str) -> None:
    """-inf in the bias: such tokens have no probability, and get no gradient."""
    given = inputs(9, bias=True, ignored=0.2)
    with torch.no_grad():
        given["bias"][1::2] = -torch.inf
    given["labels"] = given["labels"].where(given["labels"] < 0, given["labels"] // 2 * 2)
    with pyft.backend(name):
        found = loss_and_gradients(given, reduction=reduction)
        _, metrics = loss_of(given, reduction=reduction, metrics=True)
    check_values(found, true_loss_and_gradients(given, reduction=reduction))
    assert metrics.entropy.isfinite()
    assert (found["weight"][1::2] == 0).all()
    given["labels"][3] = 1
    with pyft.backend(name):
        assert loss_of(given, reduction="none")[3] == torch.inf


@pytest.mark.parametrize("size", [1e2, 1e4, 3e7])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_logits(size: float, softcap: float | None) -> None:
    given = inputs(16, bias=True, ignored=0.0)
    with torch.no_grad():
        given["hidden"] *= size
        given["bias"] *= size
    for reduction in ("mean", "none"):
        found = loss_and_gradients(given, softcap=softcap, reduction=reduction)
        wanted = true_loss_and_gradients(given, softcap=softcap, reduction=reduction)
        torch.testing.assert_close(
            found["loss"].double(), wanted["loss"], rtol=1e-5, atol=4e-7 * size
        )
        assert all(x.isfinite().all() for x in found.values())


def test_logits_beyond_fp16() -> None:
    given = inputs(6, dtype=torch.float16, ignored=0.0)
    with torch.no_grad():
        given["hidden"] *= 300
        given["weight"] *= 300
    assert logits(given).isinf().any()
    loss_of(given, reduction="none")  # no crash; what it is, is the matmul's


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-30])
def test_logit_scales(scale: float) -> None:
    given = inputs(bias=True, rank=2)
    check_values(
        loss_and_gradients(given, logit_scale=scale),
        true_loss_and_gradients(given, logit_scale=scale),
    )


def test_threads_change_no_bit() -> None:
    given = inputs(70, 2003, 32, bias=True, rank=3)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for reduction in ("mean", "none"):
            found.append(loss_of(given, reduction=reduction).detach())
            again = loss_and_gradients(given, reduction=reduction)
            assert all(
                map(
                    torch.equal,
                    again.values(),
                    loss_and_gradients(given, reduction=reduction).values(),
                )
            )
    torch.set_num_threads(1)
    for reduction in (0, 1):
        for other in found[reduction::2]:
            torch.testing.assert_close(other, found[reduction], rtol=1e-6, atol=1e-6)


def test_filter_that_leaves_out_nothing() -> None:
    given = inputs(40, 301, 16)
    for reduction in ("mean", "sum"):
        exact = loss_and_gradients(given, reduction=reduction)
        check_near(loss_and_gradients(given, reduction=reduction, gradient_filter=1e-37), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [True, 1e-3])
@pytest.mark.parametrize("sure", [True, False])
def test_filter(
    dtype: torch.dtype, threshold: bool | float, sure: bool, record_property: Any
) -> None:
    """What it leaves out is smaller than its threshold, times the weights; where predictions are
    sure that is almost everything.
    """
    limit = torch.finfo(dtype).eps / 32 if threshold is True else threshold
    given = inputs(64, 1000, 32, dtype, ignored=0.0)
    with torch.no_grad():
        if sure:
            given["hidden"].copy_(20 * given["weight"][given["labels"]])
        else:
            given["weight"] *= 4
    exact = loss_and_gradients(given, reduction="sum")
    found = loss_and_gradients(given, reduction="sum", gradient_filter=threshold)
    assert torch.equal(found["loss"], exact["loss"])
    untouched = (found["weight"] == 0).all(1)
    p = logits(given).detach().softmax(1)
    seen = torch.zeros(1000, dtype=torch.bool)
    seen[given["labels"]] = True
    assert not (untouched & seen & (p.max(0).values < 0.9)).any()
    assert not (untouched & ~seen & (p > 1.5 * limit).any(0)).any()
    small = (p < limit / 1.5).all(0) & ~seen
    assert untouched[small].all()
    if sure:
        assert small.float().mean() > 0.8
    h, w = given["hidden"].detach().double(), given["weight"].detach().double()
    left = p.double() * (untouched & ~seen)
    bound = {"hidden": (left @ w.abs()).max(), "weight": (left.t() @ h.abs()).max()}
    eps = torch.finfo(dtype).eps
    for name, most in bound.items():
        error = (found[name].double() - exact[name].double()).abs().max()
        record_property(f"{name} error", float(error))
        assert error <= 1.01 * most + 4 * eps * exact[name].abs().max(), name
    assert bound["hidden"] <= 1.5 * limit * w.abs().sum(0).max()


def test_a_filter_is_of_hidden_and_weight_only() -> None:
    for more in ({"rank": 3, "frozen": "hidden weight"}, {"frozen": "hidden weight"}):
        given = inputs(40, 301, bias=True, **more)
        with torch.no_grad():
            given["weight"] *= 5
        exact = loss_and_gradients(given)
        found = loss_and_gradients(given, gradient_filter=0.01)
        check_near(found, exact)


def test_a_filter_changes_no_loss_without_gradients() -> None:
    given = inputs(9, 301)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(given, gradient_filter=True), loss_of(given))
