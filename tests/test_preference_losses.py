"""DPO, ORPO, SimPO, KTO and GRPO against their papers' formulas, written out token by token."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model
from error_rule import check_error
from preference_cases import LOSSES, SEQUENCES, fused_tokens, head, loss_and_gradients, plain_tokens
from torch import Tensor

import pyft
from pyft.errors import UsageError
from pyft.losses import (
    dpo,
    group_advantages,
    grpo,
    kto,
    orpo,
    sequence_logprobs,
    simpo,
)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_papers(name: str) -> None:
    ours, paper = LOSSES[name]
    seeds = range(4)
    truth = loss_and_gradients(plain_tokens, paper, torch.float64, seeds)
    exact = loss_and_gradients(fused_tokens, ours, torch.float64, seeds)
    for found, expected in zip(exact, truth, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    single = loss_and_gradients(fused_tokens, ours, torch.float32, seeds)
    reference = loss_and_gradients(plain_tokens, paper, torch.float32, seeds)
    for part, *three in zip(("loss", "hidden", "weight"), single, reference, truth, strict=True):
        check_error(part, *three)


def test_the_clips_of_the_cases_are_reached() -> None:
    hidden, weight, labels, b = head(0)
    logprob = plain_tokens(hidden, weight, labels)
    found = grpo(logprob, b.old, b.advantages, b.mask, b.reference)
    ratio, a = (logprob - b.old).exp().numpy(), b.advantages.numpy()[:, None]
    mask = b.mask.numpy()
    for part, expected in (
        (found.clipped_low, ((ratio < 0.8) & (a < 0))[mask].mean()),
        (found.clipped_high, ((ratio > 1.2) & (a > 0))[mask].mean()),
    ):
        assert 0 < expected < 1
        assert float(part) == pytest.approx(expected)
    d = (b.reference - logprob).numpy()[mask]
    assert found.kl is not None
    assert float(found.kl) == pytest.approx(np.mean(np.exp(d) - d - 1))
    assert not found.kl.requires_grad


def test_what_one_logs_of_pairs() -> None:
    chosen, rejected = torch.tensor([-3.0, -5.0, -1.0]), torch.tensor([-4.0, -2.0, -1.0])
    reference = torch.tensor([-3.5, -3.5, -1.0])
    found = dpo(chosen, rejected, reference, reference, beta=0.5)
    assert found.chosen_rewards.tolist() == [0.25, -0.75, 0.0]
    assert found.rejected_rewards.tolist() == [-0.25, 0.75, 0.0]
    assert float(found.margin) == pytest.approx((0.5 - 1.5 + 0) / 3)
    assert float(found.accuracy) == pytest.approx(1 / 3)
    found = simpo(chosen, rejected, beta=2.0)
    assert found.chosen_rewards.tolist() == [-6.0, -10.0, -2.0]
    assert float(found.margin) == pytest.approx(2 * (1 - 3 + 0) / 3)
    found = orpo(chosen, rejected, torch.tensor(0.0), beta=2.0)
    assert found.rejected_rewards.tolist() == [-8.0, -4.0, -2.0]
    unpaired = kto(chosen, rejected[:2], reference, reference[:2], torch.tensor([3.0, -1.0]), 0.5)
    assert unpaired.desirable_rewards.tolist() == [0.25, -0.75, 0.0]
    assert unpaired.undesirable_rewards.tolist() == [-0.25, 0.75]
    assert float(unpaired.kl) == 1.0
    assert float(unpaired.margin) == pytest.approx(-0.5 / 3 - 0.25)


def test_sequence_logprobs_of_shifted_labels() -> None:
    hidden, weight, labels, _ = head(1)
    labels[2] = -100
    tokens = pyft.linear_logprobs(hidden, weight, labels, shift=True)
    plain = plain_tokens(hidden[:, :-1], weight, labels[:, 1:])
    counts = (labels[:, 1:] != -100).sum(1)
    torch.testing.assert_close(sequence_logprobs(tokens.logprob), plain.sum(1))
    found = sequence_logprobs(tokens.logprob, mean=True, mask=tokens.argmax >= 0)
    torch.testing.assert_close(found, plain.sum(1) / counts.clamp(min=1))
    assert float(found[2]) == 0
    one = torch.zeros_like(labels)
    one[:, 1] = 1
    assert torch.equal(sequence_logprobs(tokens.logprob, mask=one), tokens.logprob[:, 1])


EDGES = (1e-6, 0.0, -1e-12, -1e-7, -1e-3, -1.0, -60.0, -1e3, -1e6, -1e30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_and_hopeless_models_give_numbers(dtype: torch.dtype) -> None:
    a, b = torch.cartesian_prod(*[torch.tensor(EDGES, dtype=dtype)] * 2).unbind(1)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    c, d = a.detach().flip(0), b.detach().roll(7)
    sign = torch.ones(len(a), dtype=dtype)
    sign[::2] = -1
    mask = torch.ones(len(a), 1, dtype=torch.bool)
    for found in (
        dpo(a, b, c, d).loss,
        dpo(a, b, c, d, 5.0, 0.5).loss,
        dpo(a, b, c, d, loss_type="hinge").loss,
        orpo(a, b, -a).loss,
        simpo(a, b).loss,
        kto(a, b, c, d, a - c).loss,
        kto(a, b, c, d, c - a).loss,
        grpo(a[:, None], b[:, None], sign, mask).loss,
        grpo(a[:, None], b[:, None], -sign, mask, c[:, None], beta=0.1).loss,
    ):
        assert found.isfinite()
        gradients = torch.autograd.grad(found, (a, b), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_odds_of_sure_models_are_exact() -> None:
    """Where 1 - p cancels: against the same in float64 with expm1."""
    sure = torch.tensor([-1e-6, -3e-5, -0.01, -0.5, -0.7, -5.0])
    other = torch.full_like(sure, -0.4)

    def log_odds(x: Any) -> Any:
        return x.double() - (-x.double().expm1()).log()

    for chosen, rejected in ((sure, other), (other, sure)):
        for i in range(len(sure)):
            leaves = [x[i : i + 1].clone().requires_grad_() for x in (chosen, rejected)]
            wide = [x.detach().double().requires_grad_() for x in leaves]
            loss = orpo(*leaves, torch.tensor(0.0), beta=1.0).loss
            truth = (1 + (log_odds(wide[1]) - log_odds(wide[0])).exp()).log().sum()
            assert loss.item() == pytest.approx(truth.item(), rel=2e-6)
            for g, expected in zip(
                torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True
            ):
                assert float(g) == pytest.approx(float(expected), rel=2e-6)


def test_a_rejected_answer_of_probability_1_is_pushed_down() -> None:
    chosen = torch.tensor([-1.0], requires_grad=True)
    rejected = torch.tensor([0.0], requires_grad=True)
    orpo(chosen, rejected, torch.tensor(0.0)).loss.backward()
    assert rejected.grad is not None
    assert chosen.grad is not None
    assert rejected.grad > 1e3
    assert chosen.grad < 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_ratios_that_overflow(advantage: float, log_ratio: float) -> None:
    logprob = torch.tensor([[-1.0]], requires_grad=True)
    old = logprob.detach() - log_ratio
    found = grpo(logprob, old, torch.tensor([advantage]), torch.ones(1, 1, dtype=torch.int64))
    found.loss.backward()
    assert logprob.grad is not None
    if log_ratio > 0 and advantage < 0:  # the one that is never clipped
        assert found.loss.item() == float(logprob.grad) == pytest.approx(math.exp(20))
    else:
        expected = -1.2 if log_ratio > 0 else 0.8 if advantage < 0 else 0.0
        assert found.loss.item() == pytest.approx(expected)
        assert float(logprob.grad) == 0


@pytest.mark.parametrize("far", [80.0, -80.0])
def test_the_kl_draws_a_policy_back(far: float) -> None:
    logprob = torch.tensor([[-100.0]], requires_grad=True)
    mask, reference = torch.ones(1, 1, dtype=torch.bool), logprob.detach() + far
    grpo(logprob, None, torch.zeros(1), mask, reference, beta=1.0).loss.backward()
    assert logprob.grad is not None
    assert logprob.grad.isfinite()
    assert logprob.grad * far < 0  # a step against it goes that way


def test_tokens_that_do_not_count_may_hold_anything() -> None:
    hidden, weight, labels, b = head(2)
    clean = plain_tokens(hidden, weight, labels).requires_grad_()
    expected = grpo(clean, b.old, b.advantages, b.mask, b.reference, beta=0.1)
    (gradient,) = torch.autograd.grad(expected.loss, clean)
    for garbage in (float("nan"), float("inf"), -float("inf"), 1e30):
        spoilt = [x.detach().where(b.mask, garbage) for x in (clean, b.old, b.reference)]
        leaf = spoilt[0].requires_grad_()
        found = grpo(leaf, spoilt[1], b.advantages, b.mask.long(), spoilt[2], beta=0.1)
        assert all(map(torch.equal, found, expected))
        assert torch.equal(torch.autograd.grad(found.loss, leaf)[0], gradient)
    assert torch.equal(sequence_logprobs(spoilt[2], mask=b.mask), sequence_logprobs(b.reference))


def test_the_first_step_is_the_policy_gradient() -> None:
    logprob = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    advantages = torch.tensor([2.0, -1.0, 5.0])
    grpo(logprob, None, advantages, mask).loss.backward()
    expected = -advantages.double()[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1) / 3
    torch.testing.assert_close(logprob.grad, expected)
    each = torch.rand(3, 5)
    (found,) = torch.autograd.grad(grpo(logprob, None, each, mask, loss_type="bnpo").loss, logprob)
    torch.testing.assert_close(found, -each.double() * mask / 7)


def test_batches_of_one_step_add_up() -> None:
    hidden, weight, labels, b = head(3)
    logprob = plain_tokens(hidden, weight, labels)
    whole = grpo(logprob, b.old, b.advantages, b.mask, loss_type="dapo").loss
    for items in (int(b.mask.sum()), b.mask.sum()):
        parts = [
            grpo(*(x[i : i + 2] for x in (logprob, b.old, b.advantages, b.mask)),
                 loss_type="dapo", num_items_in_batch=items).loss
            for i in range(0, SEQUENCES, 2)
        ]  # fmt: skip
        torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("size", [2, 4])
def test_group_advantages(size: int) -> None:
    rewards = torch.randn(8)
    groups = rewards.double().numpy().reshape(-1, size)
    centred = groups - groups.mean(1, keepdims=True)
    expected = centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    found = group_advantages(rewards, size)
    np.testing.assert_allclose(found.numpy(), expected.ravel(), rtol=1e-5, atol=1e-6)
    found = group_advantages(rewards, size, scale=False)
    np.testing.assert_allclose(found.numpy(), centred.ravel(), rtol=1e-5, atol=1e-6)
    right = torch.tensor([True, False] * 4)
    assert torch.equal(group_advantages(right, size, scale=False), right.float() - 0.5)


def test_a_group_of_equal_rewards_teaches_nothing() -> None:
    rewards = torch.tensor([0.1, 1e6 + 0.3, -7e9]).repeat_interleave(7)
    assert torch.equal(group_advantages(rewards, 7), torch.zeros(21))
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


def test_references_get_no_gradient() -> None:
    leaves = [torch.randn(4, requires_grad=True) for _ in range(5)]
    a, b, c, d, e = leaves
    tokens = [x[:, None] for x in leaves]
    mask = torch.ones(4, 1, dtype=torch.bool)
    for found in (
        dpo(a, b, c, d),
        kto(a, b, c, d, e),
        grpo(tokens[0], tokens[2], d, mask, tokens[4], beta=0.1),
    ):
        gradients = torch.autograd.grad(found.loss, leaves, allow_unused=True)
        assert gradients[0] is not None
        assert gradients[2] is gradients[3] is gradients[4] is None
        assert not any(x.requires_grad for x in found[1:] if x is not None)


def test_nothing_gives_zero() -> None:
    none = torch.zeros(0, requires_grad=True)
    some = torch.randn(3, requires_grad=True)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    tokens = some[:, None].expand(3, 2)
    empty = none[:, None].expand(0, 2)
    for loss, leaf in (
        (dpo(none, none, none, none), none),
        (simpo(none, none), none),
        (orpo(none, none, none.sum()), none),
        (kto(none, none, none, none, none), none),
        *(
            (grpo(*args, loss_type=kind, max_length=9 if kind == "dr_grpo" else None), leaf)
            for kind in ("grpo", "dr_grpo", "bnpo", "dapo")
            for args, leaf in (
                ((tokens, tokens, some, mask), some),
                ((empty, empty, none, mask[:0]), none),
            )
        ),
    ):
        assert loss.loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss.loss, leaf)[0], torch.zeros_like(leaf))
        assert all(x is None or not x.isnan().any() for x in loss)
    only = kto(some, none, torch.zeros(3), none, torch.zeros(()))
    torch.testing.assert_close(only.loss, (-0.1 * some).sigmoid().mean())
    assert float(only.margin) == 0


def test_half_precision_is_widened() -> None:
    x = [torch.randn(4).bfloat16() for _ in range(4)]
    found = dpo(*x)
    assert {part.dtype for part in found} == {torch.float32}
    torch.testing.assert_close(found.loss, dpo(*(part.float() for part in x)).loss)
    mixed = dpo(x[0], x[1], *(part.double() for part in x[2:]))
    assert mixed.loss.dtype == torch.float64


B, BS, ON = torch.zeros(4), torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sequence_logprobs(B), "logprob is (4,); need [B, S]"),
        (lambda: sequence_logprobs(BS.long()), "logprob is torch.int64"),
        (lambda: sequence_logprobs(BS, mean=True), "mean needs mask"),
        (lambda: sequence_logprobs(BS, mask=ON.float()), "mask is torch.float32"),
        (lambda: sequence_logprobs(BS, mask=ON[:2]), "mask is (2, 3); need (4, 3)"),
        (lambda: dpo(BS, BS, BS, BS), "chosen is (4, 3); need [B]"),
        (lambda: dpo(B, B[:3], B, B), "rejected is (3,); need (4,)"),
        (lambda: dpo(B, B, B, B.to("meta")), "reference_rejected is on meta"),
        (lambda: dpo(B, B, None, B), "reference_chosen is NoneType"),
        (lambda: dpo(B, B, B, B, beta=0.0), "beta is 0.0; need a number above 0"),
        (lambda: dpo(B, B, B, B, beta=float("nan")), "beta is nan"),
        (lambda: dpo(B, B, B, B, label_smoothing=0.6), "need a number 0 to 0.5"),
        (lambda: dpo(B, B, B, B, loss_type="Sigmoid"), "'Sigmoid' is not one of sigmoid, ipo"),
        (lambda: dpo(B, B, B, B, 0.1, 0.1, "ipo"), "label_smoothing is for loss_type 'sigmoid'"),
        (lambda: orpo(B, B, B[:2]), "nll is (2,); need (4,)"),
        (lambda: orpo(B, B, 1.0), "nll is float; pass a floating tensor [] or [B]"),
        (lambda: orpo(B, B, B, beta=-1.0), "beta is -1.0; need a number of at least 0"),
        (lambda: simpo(B, B, gamma_beta_ratio=float("inf")), "gamma_beta_ratio is inf"),
        (lambda: kto(B, B[:1], B[:1], B[:1], B), "reference_desirable is (1,); need (4,)"),
        (lambda: kto(B, B, B, B, BS), "kl is (4, 3); need [] or [M]"),
        (lambda: kto(B, B, B, B, B, desirable_weight=-1), "desirable_weight is -1"),
        (lambda: kto(B, B, B, B, B.to("meta")), "kl is on meta"),
        (lambda: group_advantages(B, 3), "4 rewards do not make groups of 3"),
        (lambda: group_advantages(B, 1), "group_size is 1; need an integer of at least 2"),
        (lambda: group_advantages(BS, 2), "rewards is (4, 3); need [B]"),
        (lambda: grpo(BS, BS[:2], B, ON), "old_logprob is (2, 3); need (4, 3)"),
        (lambda: grpo(BS, None, B[:2], ON), "advantages is (2,); need (4,)"),
        (lambda: grpo(BS, None, BS[:, :2], ON), "advantages is (4, 2); need (4, 3)"),
        (lambda: grpo(BS, None, B, None), "mask is NoneType; pass bool"),
        (lambda: grpo(BS, None, B, ON, beta=0.1), "beta is 0.1; pass reference_logprob"),
        (lambda: grpo(BS, None, B, ON, epsilon=1.5), "epsilon is 1.5; need a number 0 to 1"),
        (lambda: grpo(BS, None, B, ON, loss_type="ppo"), "'ppo' is not one of grpo"),
        (lambda: grpo(BS, None, B, ON, loss_type="dr_grpo"), "max_length is what 'dr_grpo'"),
        (lambda: grpo(BS, None, B, ON, max_length=3), "max_length is what 'dr_grpo'"),
        (lambda: grpo(BS, None, B, ON, num_items_in_batch=3), "num_items_in_batch is for"),
        (
            lambda: grpo(BS, None, B, ON, loss_type="dapo", num_items_in_batch=B),
            "num_items_in_batch is (4,); pass one number",
        ),
    ],
)
def test_bad_input_gets_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return peft.get_peft_model(build_model("llama"), config)


def tokens_of(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The log-probabilities of a causal model's labels, by its decoder and its head's weight."""
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    return pyft.linear_logprobs(hidden, model.lm_head.weight, labels, shift=True).logprob


def test_dpo_raises_the_margin_without_a_second_model() -> None:
    model = adapted()
    base = build_model("llama")
    ids = torch.randint(3, 4096, (8, 12))
    labels = ids.clone()
    labels[:, :4] = -100

    def reference() -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            return tokens_of(model.base_model.model, ids, labels)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    found = []
    for _ in range(30):
        policy = sequence_logprobs(tokens_of(model.base_model.model, ids, labels))
        with torch.no_grad():
            expected = tokens_of(base, ids, labels)
        torch.testing.assert_close(reference(), expected, rtol=0, atol=0)
        result = dpo(*policy.chunk(2), *sequence_logprobs(reference()).chunk(2))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        found.append(result)
    assert float(found[0].margin) == 0
    assert found[0].loss.item() == pytest.approx(math.log(2))
    assert found[-1].margin > 1
    assert found[-1].accuracy == 1
    assert found[-1].loss < 0.3


def test_orpo_and_simpo_are_those_of_trl() -> None:
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = -torch.rand(2, 9) * 3
    nll = torch.tensor(1.7)
    stand_in = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(stand_in, chosen, rejected)
    found = orpo(chosen, rejected, nll, beta=0.3)
    torch.testing.assert_close(found.loss, nll - losses.mean())
    torch.testing.assert_close(found[1:3], tuple(rewards))
    stand_in.__dict__.update(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.0, beta=2.0
    )
    losses, *rewards = CPOTrainer.cpo_loss(stand_in, chosen, rejected)
    found = simpo(chosen, rejected, beta=2.0, gamma_beta_ratio=0.25)
    torch.testing.assert_close(found.loss, losses.mean())
    torch.testing.assert_close(found[1:3], tuple(rewards))
