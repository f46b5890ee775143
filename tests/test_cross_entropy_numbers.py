"""Numbers of linear_cross_entropy that are easy to get wrong: labels of every kind, rows that do
not count, infinities, divisors, what is filtered, and what comes beside the loss.
"""

from typing import Any

import pytest
import torch
from lora_cases import check_near
from loss_cases import IGNORED, inputs, logits, loss_call, loss_of, written_out
from torch import Tensor, nn

import pyft

MIB = 2**20
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
BACKEND = pytest.mark.parametrize("name", ["auto", "reference"])


def run(given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The loss and the gradients of its sum."""
    loss = loss_of(given, **options)
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def truth(given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    doubles = {
        n: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for n, x in given.items()
    }
    loss = written_out(doubles, **options)
    leaves = {n: x for n, x in doubles.items() if isinstance(x, Tensor) and x.requires_grad}
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        size = max(float(wanted[name].abs().max()), 1e-3) if value.numel() else 1.0
        error = float((value.double() - wanted[name]).abs().max()) if value.numel() else 0.0
        assert error <= tolerance * size, (name, error, size)


@BACKEND
@REDUCTION
@pytest.mark.parametrize("ignored", [0, -1, 36, 5000, -(2**62)])
def test_other_labels_to_ignore(ignored: int, reduction: str, name: str) -> None:
    given = inputs(ignored=0.0, bias=True)
    given["labels"][::3] = ignored
    with pyft.backend(name):
        found = run(given, ignore_index=ignored, reduction=reduction)
    check(found, truth(given, ignore_index=ignored, reduction=reduction))
    assert (found["hidden"][::3] == 0).all()


@BACKEND
@REDUCTION
@pytest.mark.parametrize("n", [0, 5, (0, 4), (2, 0)])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_no_row_counts(n: int | tuple[int, ...], reduction: str, kind: str, name: str) -> None:
    """The loss is 0 and so is every gradient, whatever is asked for."""
    for more in ({}, {"token_weights": True, "class_weights": True}):
        given = inputs(n, 40, 64, kind=kind, bias=True, rank=3, ignored=1.0, **more)
        for how in ({}, {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 3.0}):
            with pyft.backend(name):
                found = run(given, reduction=reduction, **how)
                loss, metrics = loss_of(given, reduction=reduction, metrics=True, **how)
            for key, value in found.items():
                assert (value == 0).all(), key
            shape = given["labels"].shape if reduction == "none" else ()
            assert found["loss"].shape == loss.shape == shape
            assert [float(x) for x in metrics] == [0, 0, 0]


@BACKEND
def test_weights_that_are_all_zero(name: str) -> None:
    """A mean over nothing is 0, as it is over no tokens."""
    given = inputs(token_weights=True)
    given["token_weights"].zero_()
    with pyft.backend(name):
        found = run(given)
    assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize("lead", [(7,), (3, 7), (2, 3, 4), (1, 1), (4, 1)], ids=str)
@REDUCTION
def test_shifting(lead: tuple[int, ...], reduction: str) -> None:
    given = inputs(lead, bias=True, token_weights=True)
    found = run(given, shift=True, reduction=reduction)
    check(found, truth(given, shift=True, reduction=reduction))
    assert (found["hidden"][..., -1, :] == 0).all()
    by_hand = {**given, "labels": given["labels"].roll(-1, -1)}
    by_hand["labels"][..., -1] = IGNORED
    again = run(by_hand, reduction=reduction)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions(reduction: str) -> None:
    given = inputs(24, bias=True)
    expected = run(given, reduction=reduction)
    for lead in ((4, 6), (2, 3, 4), (24, 1)):
        shaped = dict(given)
        shaped["hidden"] = given["hidden"].detach().view(*lead, -1).requires_grad_()
        shaped["labels"] = given["labels"].view(lead)
        found = run(shaped, reduction=reduction)
        assert found["hidden"].shape == shaped["hidden"].shape
        for name, value in found.items():
            assert torch.equal(value.reshape(expected[name].shape), expected[name])
    one = inputs((), ignored=0.0)
    assert one["hidden"].dim() == 1
    check(run(one, reduction=reduction), truth(one, reduction=reduction))


def test_labels_of_32_bits() -> None:
    given = inputs((2, 9))
    for shift in (False, True):
        expected = run(given, shift=shift)
        found = run({**given, "labels": given["labels"].int()}, shift=shift)
        assert all(torch.equal(found[name], expected[name]) for name in found)
    strided = torch.stack([given["labels"], given["labels"] * 0 + 2**40], -1)[..., 0]
    found = run({**given, "labels": strided}, shift=True)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@REDUCTION
def test_weights_of_tokens_are_learned(reduction: str) -> None:
    given = inputs(bias=True, token_weights=True)
    given["token_weights"].requires_grad_()
    check(run(given, reduction=reduction), truth(given, reduction=reduction))
    given["hidden"], given["weight"], given["bias"] = (
        given[name].detach() for name in ("hidden", "weight", "bias")
    )
    check(run(given, reduction=reduction), truth(given, reduction=reduction))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    given = inputs(token_weights=True, class_weights=True)
    for name in ("token_weights", "class_weights"):
        given[name] = given[name].to(dtype)
    check(run(given, label_smoothing=0.1), truth(given, label_smoothing=0.1))


@BACKEND
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_torchs(smoothing: float, name: str) -> None:
    given = inputs(bias=True, class_weights=True)
    expected = nn.functional.cross_entropy(
        logits(given), given["labels"], given["class_weights"], label_smoothing=smoothing
    )
    with pyft.backend(name):
        found = loss_of(given, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)


@BACKEND
@pytest.mark.parametrize(
    "items", [7, 7.5, torch.tensor(7), torch.tensor(7.5), torch.tensor([7]), torch.tensor(7).int()]
)
def test_items_of_a_batch(items: float | Tensor, name: str) -> None:
    given = inputs(token_weights=True, rank=2)
    plain = float(items) if isinstance(items, Tensor) else items
    with pyft.backend(name):
        found = run(given, num_items_in_batch=items)
    assert found["loss"].shape == ()
    check(found, truth(given, num_items_in_batch=plain))


def test_micro_batches_add_up_to_one_large_batch() -> None:
    given = inputs((6, 11), bias=True)
    given["labels"][0] = IGNORED  # a micro-batch of which nothing counts
    items = int((given["labels"][:, 1:] != IGNORED).sum())
    expected = run(given, shift=True)
    leaves = [given[name] for name in ("hidden", "weight", "bias")]
    total = torch.zeros(())
    for i in range(6):
        part = {**given, "hidden": given["hidden"][i : i + 1], "labels": given["labels"][i : i + 1]}
        loss = loss_of(part, shift=True, num_items_in_batch=torch.tensor(items))
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, expected["loss"])
    for leaf, name in zip(leaves, ("hidden", "weight", "bias"), strict=True):
        torch.testing.assert_close(leaf.grad, expected[name])


@BACKEND
@REDUCTION
def test_metrics(reduction: str, name: str) -> None:
    given = inputs((3, 8), bias=True, rank=3, token_weights=True)
    keep = torch.cat([given["labels"][:, 1:], torch.full((3, 1), IGNORED)], 1) != IGNORED
    labels = given["labels"].roll(-1, 1)
    for grad in (True, False):
        with pyft.backend(name), torch.set_grad_enabled(grad):
            alone = loss_of(given, shift=True, reduction=reduction, softcap=4.0)
            loss, metrics = loss_of(
                given, shift=True, reduction=reduction, softcap=4.0, metrics=True
            )
        torch.testing.assert_close(loss, alone)
        u = logits(given, softcap=4.0)[keep]
        entropy = torch.distributions.Categorical(logits=u).entropy().mean()
        torch.testing.assert_close(metrics.accuracy, (u.argmax(1) == labels[keep]).float().mean())
        torch.testing.assert_close(metrics.entropy, entropy.detach())
        torch.testing.assert_close(metrics.tokens, keep.sum().float())
        assert not any(x.requires_grad for x in metrics)
        assert loss.requires_grad == grad


@pytest.mark.parametrize("rank", [None, 2])
def test_tied_to_the_embedding(rank: int | None) -> None:
    given = inputs(12, rank=rank, ignored=0.0)
    ids = torch.randint(37, (12,))
    expected = None
    for loss in (written_out, loss_of):
        weight = given["weight"].detach().clone().requires_grad_()
        tied = {**given, "hidden": torch.tanh(weight[ids]), "weight": weight}
        loss(tied).backward()
        expected = weight.grad if expected is None else expected
    torch.testing.assert_close(weight.grad, expected)


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
            found = run(given, reduction=reduction, budget=budget)
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
    expected = run(given, reduction=reduction)
    with torch.no_grad():
        given["hidden"][2], given["hidden"][5] = torch.nan, torch.inf
    with pyft.backend(name):
        found = run(given, reduction=reduction)
    check(found, {name: value.double() for name, value in expected.items()})


@REDUCTION
@BACKEND
def test_nobody_looks_at_weights_that_do_not_count(reduction: str, name: str) -> None:
    given = inputs(9, bias=True, rank=2, ignored=0.0, token_weights=True)
    given["labels"][[2, 5]] = IGNORED
    expected = run(given, reduction=reduction)
    given["token_weights"][2] = torch.nan
    with pyft.backend(name):
        found = run(given, reduction=reduction)
    check(found, {name: value.double() for name, value in expected.items()})


@pytest.mark.parametrize("reduction", ["mean", "none"])
@BACKEND
def test_labels_that_are_masked(reduction: str, name: str) -> None:
    """-inf in the bias: such tokens have no probability, and get no gradient."""
    given = inputs(9, bias=True, ignored=0.2)
    with torch.no_grad():
        given["bias"][1::2] = -torch.inf
    given["labels"] = given["labels"].where(given["labels"] < 0, given["labels"] // 2 * 2)
    with pyft.backend(name):
        found = run(given, reduction=reduction)
        _, metrics = loss_of(given, reduction=reduction, metrics=True)
    check(found, truth(given, reduction=reduction))
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
        found = run(given, softcap=softcap, reduction=reduction)
        wanted = truth(given, softcap=softcap, reduction=reduction)
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
    check(run(given, logit_scale=scale), truth(given, logit_scale=scale))


def test_threads_change_no_bit() -> None:
    given = inputs(70, 2003, 32, bias=True, rank=3)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for reduction in ("mean", "none"):
            found.append(loss_of(given, reduction=reduction).detach())
            again = run(given, reduction=reduction)
            assert all(map(torch.equal, again.values(), run(given, reduction=reduction).values()))
    torch.set_num_threads(1)
    for reduction in (0, 1):
        for other in found[reduction::2]:
            torch.testing.assert_close(other, found[reduction], rtol=1e-6, atol=1e-6)


def test_filter_that_leaves_out_nothing() -> None:
    given = inputs(40, 301, 16)
    for reduction in ("mean", "sum"):
        exact = run(given, reduction=reduction)
        check_near(run(given, reduction=reduction, gradient_filter=1e-37), exact)


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
    exact = run(given, reduction="sum")
    found = run(given, reduction="sum", gradient_filter=threshold)
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


def test_a_filter_changes_no_loss_without_gradients() -> None:
    given = inputs(9, 301)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(given, gradient_filter=True), loss_of(given))


def test_random_gradients_arriving() -> None:
    call = loss_call(inputs(9, bias=True, ignored=0.2), reduction="none")
    ys = call.forward()
    call.dys = [torch.zeros(9)]
    assert all((x == 0).all() for x in call.backward(ys, retain_graph=True))
    call.dys = [torch.zeros(9).index_fill(0, torch.tensor([2]), 1.0)]
    hidden = call.backward(ys)[0]
    assert (hidden[torch.arange(9) != 2] == 0).all()
    mean = loss_of(call.inputs)
    once = torch.autograd.grad(mean, call.inputs["weight"], retain_graph=True)[0]
    twice = torch.autograd.grad(mean, call.inputs["weight"], torch.tensor(-2.5))[0]
    torch.testing.assert_close(twice, -2.5 * once)


def test_a_loss_that_nobody_weighs_makes_no_nan() -> None:
    """0 times the loss, as a masked auxiliary one is."""
    given = inputs(9, bias=True, rank=2)
    (0 * loss_of(given)).backward()
    assert (given["hidden"].grad == 0).all()
