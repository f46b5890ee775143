"""Numbers of linear_cross_entropy that are easy to get wrong: labels of every kind, rows that do
not count, divisors, and what comes beside the loss.
"""

import pytest
import torch
from loss_cases import (
    IGNORED,
    check_values,
    inputs,
    logits,
    loss_and_gradients,
    loss_call,
    loss_of,
    true_loss_and_gradients,
    written_out,
)
from torch import Tensor, nn

import pyft

MIB = 2**20
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
BACKEND = pytest.mark.parametrize("name", ["auto", "reference"])


@BACKEND
@REDUCTION
@pytest.mark.parametrize("ignored", [0, -1, 36, 5000, -(2**62)])
def test_other_labels_to_ignore(ignored: int, reduction: str, name: str) -> None:
    given = inputs(ignored=0.0, bias=True)
    given["labels"][::3] = ignored
    with pyft.backend(name):
        found = loss_and_gradients(given, ignore_index=ignored, reduction=reduction)
    check_values(found, true_loss_and_gradients(given, ignore_index=ignored, reduction=reduction))
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
                found = loss_and_gradients(given, reduction=reduction, **how)
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
        found = loss_and_gradients(given)
    assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize("lead", [(7,), (3, 7), (2, 3, 4), (1, 1), (4, 1)], ids=str)
@REDUCTION
def test_shifting(lead: tuple[int, ...], reduction: str) -> None:
    given = inputs(lead, bias=True, token_weights=True)
    found = loss_and_gradients(given, shift=True, reduction=reduction)
    check_values(found, true_loss_and_gradients(given, shift=True, reduction=reduction))
    assert (found["hidden"][..., -1, :] == 0).all()
    by_hand = {**given, "labels": given["labels"].roll(-1, -1)}
    by_hand["labels"][..., -1] = IGNORED
    by_hand["token_weights"] = given["token_weights"].roll(-1, -1)
    again = loss_and_gradients(by_hand, reduction=reduction)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions(reduction: str) -> None:
    given = inputs(24, bias=True)
    expected = loss_and_gradients(given, reduction=reduction)
    for lead in ((4, 6), (2, 3, 4), (24, 1)):
        shaped = dict(given)
        shaped["hidden"] = given["hidden"].detach().view(*lead, -1).requires_grad_()
        shaped["labels"] = given["labels"].view(lead)
        found = loss_and_gradients(shaped, reduction=reduction)
        assert found["hidden"].shape == shaped["hidden"].shape
        for name, value in found.items():
            assert torch.equal(value.reshape(expected[name].shape), expected[name])
    one = inputs((), ignored=0.0)
    assert one["hidden"].dim() == 1
    check_values(
        loss_and_gradients(one, reduction=reduction),
        true_loss_and_gradients(one, reduction=reduction),
    )


def test_labels_of_32_bits() -> None:
    given = inputs((2, 9))
    for shift in (False, True):
        expected = loss_and_gradients(given, shift=shift)
        found = loss_and_gradients({**given, "labels": given["labels"].int()}, shift=shift)
        assert all(torch.equal(found[name], expected[name]) for name in found)
    strided = torch.stack([given["labels"], given["labels"] * 0 + 2**40], -1)[..., 0]
    found = loss_and_gradients({**given, "labels": strided}, shift=True)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@REDUCTION
def test_weights_of_tokens_are_learned(reduction: str) -> None:
    given = inputs(bias=True, token_weights=True)
    given["token_weights"].requires_grad_()
    check_values(
        loss_and_gradients(given, reduction=reduction),
        true_loss_and_gradients(given, reduction=reduction),
    )
    given["hidden"], given["weight"], given["bias"] = (
        given[name].detach() for name in ("hidden", "weight", "bias")
    )
    check_values(
        loss_and_gradients(given, reduction=reduction),
        true_loss_and_gradients(given, reduction=reduction),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    given = inputs(token_weights=True, class_weights=True)
    for name in ("token_weights", "class_weights"):
        given[name] = given[name].to(dtype)
    check_values(
        loss_and_gradients(given, label_smoothing=0.1),
        true_loss_and_gradients(given, label_smoothing=0.1),
    )


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
        found = loss_and_gradients(given, num_items_in_batch=items)
    assert found["loss"].shape == ()
    check_values(found, true_loss_and_gradients(given, num_items_in_batch=plain))


def test_micro_batches_add_up_to_one_large_batch() -> None:
    given = inputs((6, 11), bias=True)
    given["labels"][0] = IGNORED  # a micro-batch of which nothing counts
    items = int((given["labels"][:, 1:] != IGNORED).sum())
    expected = loss_and_gradients(given, shift=True)
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
