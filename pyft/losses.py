"""Preference, policy-gradient and distillation losses, made of per-token log-probabilities.

    tokens = pyft.linear_logprobs(hidden, weight, labels, shift=True)
    chosen, rejected = sequence_logprobs(tokens.logprob).chunk(2)
    with torch.no_grad(), model.disable_adapter():  # the reference: the same model
        ...
    found = dpo(chosen, rejected, reference_chosen, reference_rejected)
    found.loss.backward()

B sequences (or pairs), S tokens; log-probabilities are natural logarithms, in any floating dtype;
arithmetic and results are fp32, or float64 where an input is. Losses are scalars to minimise.
References, advantages and old log-probabilities get no gradient, nor does anything beside a loss.
Where a mask is 0 the inputs may hold anything; a batch of none gives 0. No value is read back from
a GPU, so that values of tensors are not checked.

No finite log-probability gives NaN or infinity: ORPO's are at most -eps of their dtype, a
log-ratio that is exponentiated is at most 20, each with the gradient that it has there.

Every function raises UsageError where shapes, dtypes, devices or numbers do not fit.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyft.errors import UsageError
from pyft.ops.shared.logprob_input import (
    check_like,
    check_name,
    check_number,
    counting,
    divisor,
    tensors,
)

__all__ = [
    "Policy", "Preference", "Unpaired", "distillation", "dpo", "group_advantages", "grpo", "kto",
    "orpo", "reverse_kl", "sequence_logprobs", "simpo",
]  # fmt: skip

_MOST = 20.0  # of a log-ratio: e^20 is 5e8
_SCALE_EPS = 1e-4  # added to a group's standard deviation


class Preference(NamedTuple):
    """Of pairs: the loss, and what one logs."""

    loss: Tensor  # []
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]
    margin: Tensor  # [], the mean of chosen - rejected rewards
    accuracy: Tensor  # [], the part of pairs with chosen > rejected


class Unpaired(NamedTuple):
    """Of desirable and undesirable sequences: the loss, and what one logs."""

    loss: Tensor  # []
    desirable_rewards: Tensor  # [B]
    undesirable_rewards: Tensor  # [B']
    margin: Tensor  # [], the difference of their means; 0 where one of them is empty
    kl: Tensor  # [], the estimate that was used


class Policy(NamedTuple):
    """Of sampled sequences: the loss, and means over the tokens that count."""

    loss: Tensor  # []
    kl: Tensor | None  # [], to the reference; None without one
    clipped_low: Tensor  # [], the part of tokens with ratio < 1 - epsilon and advantage < 0
    clipped_high: Tensor  # [], that with ratio > 1 + epsilon_high and advantage > 0


def sequence_logprobs(logprob: Tensor, mean: bool = False, mask: Tensor | None = None) -> Tensor:
    """Log-probability of each sequence [B], of its tokens' [B, S], which are 0 where ignored.

    Args:
        logprob: [B, S], as ``TokenLogprobs.logprob``.
        mean: divide by how many tokens count; 0 where none does.
        mask: bool or integer [B, S], which tokens count; ``tokens.argmax >= 0`` of TokenLogprobs
            fits its labels, shifted or not. A mean needs it; a sum of all needs none.
    """
    op = "sequence_logprobs"
    (logprob,) = tensors(op, "[B, S]", logprob=logprob)
    if mask is None and mean:
        raise UsageError(f"{op}: mean needs mask; pass the tokens' argmax >= 0")
    if mask is None:
        return logprob.sum(1)
    counts = counting(op, mask, logprob)
    total = logprob.where(counts, 0.0).sum(1)
    return total / counts.sum(1).clamp(min=1) if mean else total


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> Preference:
    """Direct preference optimization of sequences' log-probabilities [B]; rewards are
    beta (policy - reference), h their difference between chosen and rejected over beta.

        sigmoid  -(1 - ε) log σ(beta h) - ε log σ(-beta h)      ε = label_smoothing, 0 to 0.5
        ipo      (h - 1 / (2 beta))²
        hinge    max(0, 1 - beta h)

    Give ``ipo`` means of the tokens, as its authors and TRL do, or h grows with the lengths.

    Sources: Rafailov et al., Direct Preference Optimization (2023); smoothing: Mitchell, A note on
    DPO with noisy preferences (2023); Azar et al., A General Theoretical Paradigm to Understand
    Learning from Human Preferences (2023); hinge: Liu et al., Statistical Rejection Sampling
    Improves Preference Optimization (2023).
    """
    op = "dpo"
    chosen, rejected, reference_chosen, reference_rejected = tensors(
        op, "[B]", chosen=chosen, rejected=rejected, reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )  # fmt: skip
    check_name(op, loss_type, ("sigmoid", "ipo", "hinge"))
    check_number(op, "beta", beta, 0, above=True)
    check_number(op, "label_smoothing", label_smoothing, 0, 0.5)
    if label_smoothing and loss_type != "sigmoid":
        raise UsageError(f"{op}: label_smoothing is for loss_type 'sigmoid', not {loss_type!r}")
    of_chosen = chosen - reference_chosen.detach()
    of_rejected = rejected - reference_rejected.detach()
    h = of_chosen - of_rejected
    if loss_type == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type == "hinge":
        losses = (1 - beta * h).relu()
    else:
        losses = -(1 - label_smoothing) * logsigmoid(beta * h)
        if label_smoothing:
            losses = losses - label_smoothing * logsigmoid(-beta * h)
    return _preference(_mean(losses), beta, of_chosen, of_rejected)


def orpo(chosen_mean: Tensor, rejected_mean: Tensor, nll: Tensor, beta: float = 0.1) -> Preference:
    """Odds ratio preference optimization: nll - beta log σ(log odds(chosen) - log odds(rejected)),
    odds = p / (1 - p) with log p the mean of a sequence's tokens [B].

    ``nll`` [] or [B] is the negative log-likelihood of the chosen ones, as ``linear_cross_entropy``
    gives it; its mean is taken. beta is λ of the paper, at least 0. Rewards are beta log p.

    Source: Hong, Lee and Thorne, ORPO: Monolithic Preference Optimization without Reference Model
    (2024).
    """
    op = "orpo"
    given = {"chosen_mean": chosen_mean, "rejected_mean": rejected_mean}
    chosen_mean, rejected_mean = tensors(op, "[B]", **given)
    (nll,) = tensors(op, "[] or [B]", nll=nll)
    check_like(op, "nll", nll, chosen_mean, nll.dim())
    check_number(op, "beta", beta, 0)
    ratio = logsigmoid(_log_odds(chosen_mean) - _log_odds(rejected_mean))
    return _preference(_mean(nll) - beta * _mean(ratio), beta, chosen_mean, rejected_mean)


def simpo(
    chosen_mean: Tensor, rejected_mean: Tensor, beta: float = 2.0, gamma_beta_ratio: float = 0.25
) -> Preference:
    """Simple preference optimization: -log σ(beta (chosen - rejected - gamma / beta)) of the means
    of sequences' tokens [B]; rewards are beta times these.

    Source: Meng, Xia and Chen, SimPO: Simple Preference Optimization with a Reference-Free Reward
    (2024).
    """
    op = "simpo"
    given = {"chosen_mean": chosen_mean, "rejected_mean": rejected_mean}
    chosen_mean, rejected_mean = tensors(op, "[B]", **given)
    check_number(op, "beta", beta, 0, above=True)
    check_number(op, "gamma_beta_ratio", gamma_beta_ratio, 0)
    losses = -logsigmoid(beta * (chosen_mean - rejected_mean - gamma_beta_ratio))
    return _preference(_mean(losses), beta, chosen_mean, rejected_mean)


def kto(
    policy_desirable: Tensor,
    policy_undesirable: Tensor,
    reference_desirable: Tensor,
    reference_undesirable: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Unpaired:
    """Kahneman-Tversky optimization of sequences' log-probabilities, [B] desirable and [B']
    undesirable, either of which may be empty; r = policy - reference, rewards are beta r.

        mean over both of  w (1 - σ(beta (r - z)))  and  w' (1 - σ(beta (z - r)))

    z = max(0, mean of ``kl``) estimates KL(policy || reference). ``kl`` [] or [M] is policy -
    reference of prompts with answers to other prompts; zeros [] to go without. Where processes
    share a batch, pass its mean over all of them.

    Source: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization (2024).
    """
    op = "kto"
    good, reference_good = tensors(
        op, "[B]", policy_desirable=policy_desirable, reference_desirable=reference_desirable
    )
    bad, reference_bad = tensors(
        op, "[B]", policy_undesirable=policy_undesirable,
        reference_undesirable=reference_undesirable,
    )  # fmt: skip
    (kl,) = tensors(op, "[] or [M]", kl=kl)
    for name, x in (("policy_undesirable", bad), ("kl", kl)):
        check_like(op, name, x, good, 0)
    check_number(op, "beta", beta, 0, above=True)
    check_number(op, "desirable_weight", desirable_weight, 0)
    check_number(op, "undesirable_weight", undesirable_weight, 0)
    z = _mean(kl.detach()).clamp(min=0)
    of_good, of_bad = good - reference_good.detach(), bad - reference_bad.detach()
    # 1 - σ(x) is σ(-x), which loses nothing where σ(x) is near 1
    losses = [
        desirable_weight * (beta * (z - of_good)).sigmoid(),
        undesirable_weight * (beta * (of_bad - z)).sigmoid(),
    ]
    rewards = beta * of_good.detach(), beta * of_bad.detach()
    both = good.numel() and bad.numel()
    margin = _mean(rewards[0]) - _mean(rewards[1]) if both else torch.zeros_like(z)
    return Unpaired(_mean(torch.cat(losses)), *rewards, margin, z)


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Advantages [B] of rewards [B], those of one prompt's answers beside each other: reward - the
    group's mean, and with ``scale`` over its standard deviation (of n - 1) + 1e-4. A group of equal
    rewards has 0. Without ``scale`` they are those of Dr. GRPO. Rewards may be integers or bool.

    Source: Shao et al., DeepSeekMath (2024).
    """
    op = "group_advantages"
    if isinstance(rewards, Tensor) and not rewards.is_complex():
        rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    (rewards,) = tensors(op, "[B]", rewards=rewards)
    if not isinstance(group_size, int) or group_size < 2:
        raise UsageError(f"{op}: group_size is {group_size}; need an integer of at least 2")
    if len(rewards) % group_size:
        raise UsageError(f"{op}: {len(rewards)} rewards do not make groups of {group_size}")
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards differ by 0, whatever their mean rounds to
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        variance = advantages.square().sum(1, keepdim=True) / (group_size - 1)
        advantages = advantages / (variance.sqrt() + _SCALE_EPS)
    return advantages.flatten()


def grpo(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    reference_logprob: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    loss_type: str = "grpo",
    num_items_in_batch: float | Tensor | None = None,
    max_length: int | None = None,
) -> Policy:
    """Group relative policy optimization of tokens' log-probabilities.

        ratio = exp(logprob - old)        KL = exp(d) - d - 1, d = reference - logprob
        token = -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta KL

        grpo     mean over sequences of the mean over tokens
        dr_grpo  sum over tokens / (B max_length)
        bnpo     sum over tokens / how many there are in this batch
        dapo     sum over tokens / num_items_in_batch, or as bnpo where that is None

    Args:
        logprob: [B, S], of the policy that learns.
        old_logprob: [B, S], of the policy that sampled; None: the same, a ratio of 1.
        advantages: [B], as ``group_advantages`` gives them, or [B, S].
        mask: bool or integer [B, S], which tokens count: the answer's.
        reference_logprob: [B, S] or None; needed where beta is above 0.
        epsilon, epsilon_high: how far a ratio may go below and above 1; None: the same.
        beta: weight of the KL to the reference.
        loss_type: how tokens are summed up.
        num_items_in_batch: tokens of all batches that make one step together.
        max_length: the most tokens that an answer may have.

    Sources: Shao et al., DeepSeekMath (2024); KL: Schulman, Approximating KL Divergence (2020);
    dr_grpo: Liu et al., Understanding R1-Zero-Like Training (2025); epsilon_high and dapo: Yu et
    al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale (2025).
    """
    op = "grpo"
    others = {"old_logprob": old_logprob, "reference_logprob": reference_logprob}
    given = {name: x for name, x in others.items() if x is not None}
    logprob, *rest = tensors(op, "[B, S]", logprob=logprob, **given)
    known = dict(zip(given, rest, strict=True))
    (advantages,) = tensors(op, "[B] or [B, S]", advantages=advantages)
    counts = counting(op, mask, logprob)
    check_like(op, "advantages", advantages, logprob, advantages.dim())
    high = epsilon if epsilon_high is None else epsilon_high
    check_number(op, "epsilon", epsilon, 0, 1)
    check_number(op, "epsilon_high", high, 0)
    check_number(op, "beta", beta, 0)
    check_name(op, loss_type, ("grpo", "dr_grpo", "bnpo", "dapo"))
    if beta and reference_logprob is None:
        raise UsageError(f"{op}: beta is {beta:g}; pass reference_logprob, or beta=0")
    if (max_length is not None) != (loss_type == "dr_grpo"):
        raise UsageError(f"{op}: max_length is what 'dr_grpo', and no other, divides by")
    if num_items_in_batch is not None and loss_type != "dapo":
        raise UsageError(f"{op}: num_items_in_batch is for loss_type 'dapo', not {loss_type!r}")

    a = advantages if advantages.dim() == 2 else advantages[:, None]
    a = a.detach().where(counts, 0.0)
    old = known.get("old_logprob", logprob).detach()
    ratio = _at_most((logprob - old).where(counts, 0.0), _MOST).exp()
    losses = -torch.min(ratio * a, ratio.clamp(1 - epsilon, 1 + high) * a)
    tokens = divisor(op, None, counts)
    kl = None
    if reference_logprob is not None:
        d = (known["reference_logprob"].detach() - logprob).where(counts, 0.0)
        d = _at_most(d, _MOST)
        each = d.expm1() - d
        kl = (each.detach() / tokens).sum()
        if beta:
            losses = losses + beta * each
    if loss_type == "grpo":
        loss = _mean(losses.sum(1) / counts.sum(1).clamp(min=1))
    elif loss_type == "dr_grpo":
        check_number(op, "max_length", max_length, 1)
        loss = losses.sum() / (max(1, len(losses)) * (max_length or 1))
    else:
        loss = losses.sum() / divisor(op, num_items_in_batch, counts)
    low_ones = (ratio < 1 - epsilon) & (a < 0)
    high_ones = (ratio > 1 + high) & (a > 0)
    return Policy(loss, kl, low_ones.sum() / tokens, high_ones.sum() / tokens)


def distillation(
    kl: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """T² times the mean of the tokens' KL(teacher || student) [B, S] over those that count.

    ``kl`` is ``TokenLogprobs.kl`` where logits of student and teacher are divided by T: logit_scale
    and, if there is one, softcap of both over T. T² keeps the gradient's size whatever T is.
    ``num_items_in_batch``: divide by this many tokens, those of all batches of a step.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015).
    """
    op = "distillation"
    if kl is None:
        raise UsageError(f"{op}: kl is None; give linear_logprobs a teacher")
    (kl,) = tensors(op, "[B, S]", kl=kl)
    counts = counting(op, mask, kl)
    check_number(op, "temperature", temperature, 0, above=True)
    total = kl.where(counts, 0.0).sum()
    return temperature**2 * total / divisor(op, num_items_in_batch, counts)


def reverse_kl(
    logprob: Tensor,
    teacher_logprob: Tensor,
    mask: Tensor,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """KL(student || teacher) as estimated on tokens [B, S] that the student sampled: the mean of
    logprob - teacher_logprob over those that count (or their sum over ``num_items_in_batch``).

    The gradient is that of E[log p - log q] over what is sampled, token by token:
    (log p - log q) d log p; the difference's own has mean 0. For tokens of an older policy give
    their teacher_logprob - logprob to ``grpo`` as advantages [B, S].

    Sources: Agarwal et al., On-Policy Distillation of Language Models (2024); Gu et al., MiniLLM
    (2024).
    """
    op = "reverse_kl"
    logprob, teacher_logprob = tensors(
        op, "[B, S]", logprob=logprob, teacher_logprob=teacher_logprob
    )
    counts = counting(op, mask, logprob)
    ratio = (logprob - teacher_logprob).detach().where(counts, 0.0)
    logprob = logprob.where(counts, 0.0)
    total = (ratio + ratio * (logprob - logprob.detach())).sum()
    return total / divisor(op, num_items_in_batch, counts)


def _preference(loss: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Preference:
    chosen, rejected = beta * chosen.detach(), beta * rejected.detach()
    better = (chosen > rejected).to(chosen.dtype)
    return Preference(loss, chosen, rejected, _mean(chosen - rejected), _mean(better))


def _mean(x: Tensor) -> Tensor:
    """0 of none."""
    return x.sum() / max(1, x.numel())


def _at_most(x: Tensor, most: float) -> Tensor:
    """Clamped, but with the gradient of x everywhere: none would leave it there for good."""
    return x.detach().clamp(max=most) + (x - x.detach())


def _log_odds(logprob: Tensor) -> Tensor:
    """log p - log(1 - p) of log p; those above -eps are rounding errors of a sum of logits."""
    logprob = _at_most(logprob, -torch.finfo(logprob.dtype).eps)
    return logprob - (-logprob.expm1()).log()
