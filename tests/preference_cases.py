"""Losses of pyft.losses, and their papers' formulas written out token by token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pyft
from pyft.losses import dpo, grpo, kto, orpo, sequence_logprobs, simpo

SEQUENCES, TOKENS, WIDTH, VOCABULARY = 6, 7, 16, 53


class Batch(NamedTuple):
    """What stands beside the policy's log-probabilities; the first half is chosen or desirable."""

    reference: Tensor  # [B, S]
    old: Tensor  # [B, S]
    advantages: Tensor  # [B]
    mask: Tensor  # bool [B, S]
    kl: Tensor  # [B]

    def to(self, dtype: torch.dtype) -> "Batch":
        return Batch(*(x if x.dtype == torch.bool else x.to(dtype) for x in self))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def totals(logprob: Tensor, mask: Tensor, average: bool = False) -> list[Tensor]:
    """Of each sequence, one token after the other."""
    found = []
    for row, counts in zip(logprob, mask, strict=True):
        tokens = [x for x, counted in zip(row, counts, strict=True) if counted]
        found.append(sum(tokens) / (len(tokens) if average else 1))
    return found


def average(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def pairs(logprob: Tensor, batch: Batch, mean: bool = False) -> list[tuple[Tensor, ...]]:
    """(chosen, rejected, reference's chosen, reference's rejected) of each pair."""
    half = len(logprob) // 2
    policy, reference = (totals(x, batch.mask, mean) for x in (logprob, batch.reference))
    return [(policy[i], policy[i + half], reference[i], reference[i + half]) for i in range(half)]


def paper_dpo(logprob: Tensor, batch: Batch, beta: float, smoothing: float = 0.0) -> Tensor:
    losses = []
    for chosen, rejected, reference_chosen, reference_rejected in pairs(logprob, batch):
        h = beta * (chosen - reference_chosen) - beta * (rejected - reference_rejected)
        losses.append(-(1 - smoothing) * sigmoid(h).log() - smoothing * sigmoid(-h).log())
    return average(losses)


def paper_ipo(logprob: Tensor, batch: Batch, tau: float) -> Tensor:
    return average(
        [((c - rc) - (r - rr) - 1 / (2 * tau)) ** 2 for c, r, rc, rr in pairs(logprob, batch, True)]
    )


def paper_hinge(logprob: Tensor, batch: Batch, beta: float) -> Tensor:
    margins = [beta * ((c - rc) - (r - rr)) for c, r, rc, rr in pairs(logprob, batch)]
    return average([(1 - m) if m < 1 else 0 * m for m in margins])


def paper_orpo(logprob: Tensor, batch: Batch, weight: float) -> Tensor:
    half = len(logprob) // 2
    counted = logprob[:half][batch.mask[:half]]
    losses = []
    for chosen, rejected, *_ in pairs(logprob, batch, True):
        odds = [p.exp() / (1 - p.exp()) for p in (chosen, rejected)]
        losses.append(-sigmoid((odds[0] / odds[1]).log()).log())
    return -counted.sum() / len(counted) + weight * average(losses)


def paper_simpo(logprob: Tensor, batch: Batch, beta: float, gamma: float) -> Tensor:
    found = pairs(logprob, batch, True)
    return average([-sigmoid(beta * c - beta * r - gamma).log() for c, r, *_ in found])


def paper_kto(logprob: Tensor, batch: Batch, beta: float, good: float, bad: float) -> Tensor:
    """Desirable ones: the first third."""
    many = len(logprob) // 3
    z = max(0.0, float(np.mean(batch.kl.double().numpy())))
    losses = []
    policy, reference = (totals(x, batch.mask) for x in (logprob, batch.reference))
    for i, (one, other) in enumerate(zip(policy, reference, strict=True)):
        r = one - other
        value = good * sigmoid(beta * (r - z)) if i < many else bad * sigmoid(beta * (z - r))
        losses.append((good if i < many else bad) - value)
    return average(losses)


def paper_grpo(
    logprob: Tensor, batch: Batch, kind: str, high: float = 0.2, beta: float = 0.0, length: int = 0
) -> Tensor:
    sequences, tokens = [], []
    for i, row in enumerate(logprob):
        of_row = []
        for t in range(len(row)):
            if not batch.mask[i, t]:
                continue
            ratio, a = (row[t] - batch.old[i, t]).exp(), batch.advantages[i]
            clipped = min(max(ratio, ratio.new_tensor(0.8)), ratio.new_tensor(1 + high))
            ratio_to_reference = (batch.reference[i, t] - row[t]).exp()
            kl = ratio_to_reference - ratio_to_reference.log() - 1
            of_row.append(-min(ratio * a, clipped * a) + beta * kl)
        sequences.append(sum(of_row) / len(of_row))
        tokens += of_row
    if kind == "grpo":
        return average(sequences)
    return sum(tokens) / (len(logprob) * length if kind == "dr_grpo" else len(tokens))


def our_pairs(logprob: Tensor, batch: Batch, mean: bool = False) -> tuple[Tensor, ...]:
    both = (sequence_logprobs(x, mean, batch.mask) for x in (logprob, batch.reference))
    policy, reference = both
    return (*policy.chunk(2), *reference.chunk(2))


def our_orpo(logprob: Tensor, batch: Batch) -> Tensor:
    chosen, rejected, *_ = our_pairs(logprob, batch, True)
    counts = batch.mask[: len(chosen)]
    nll = -logprob[: len(chosen)].sum() / counts.sum()
    return orpo(chosen, rejected, nll, 0.3).loss


def our_kto(logprob: Tensor, batch: Batch, sign: float) -> Tensor:
    many = len(logprob) // 3
    policy, reference = (sequence_logprobs(x) for x in (logprob, batch.reference))
    good, bad = (slice(0, many), slice(many, None))
    return kto(
        policy[good], policy[bad], reference[good], reference[bad], sign * batch.kl, 0.4, 1.5, 0.7
    ).loss


def our_grpo(logprob: Tensor, b: Batch, kind: str, **options: Any) -> Tensor:
    return grpo(logprob, b.old, b.advantages, b.mask, b.reference, loss_type=kind, **options).loss


Loss = Callable[[Tensor, Batch], Tensor]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "dpo": (
        lambda x, b: dpo(*our_pairs(x, b)).loss,
        lambda x, b: paper_dpo(x, b, 0.1),
    ),
    "dpo-smoothed": (
        lambda x, b: dpo(*our_pairs(x, b), beta=0.5, label_smoothing=0.2).loss,
        lambda x, b: paper_dpo(x, b, 0.5, 0.2),
    ),
    "ipo": (
        lambda x, b: dpo(*our_pairs(x, b, True), beta=0.3, loss_type="ipo").loss,
        lambda x, b: paper_ipo(x, b, 0.3),
    ),
    "hinge": (
        lambda x, b: dpo(*our_pairs(x, b), beta=0.2, loss_type="hinge").loss,
        lambda x, b: paper_hinge(x, b, 0.2),
    ),
    "orpo": (our_orpo, lambda x, b: paper_orpo(x, b, 0.3)),
    "simpo": (
        lambda x, b: simpo(*our_pairs(x, b, True)[:2], beta=2.5, gamma_beta_ratio=0.4).loss,
        lambda x, b: paper_simpo(x, b, 2.5, 1.0),
    ),
    "kto": (
        lambda x, b: our_kto(x, b, 1.0),
        lambda x, b: paper_kto(x, b, 0.4, 1.5, 0.7),
    ),
    "kto-kl-below-0": (
        lambda x, b: our_kto(x, b, -1.0),
        lambda x, b: paper_kto(x, b._replace(kl=-b.kl), 0.4, 1.5, 0.7),
    ),
    "grpo": (
        lambda x, b: our_grpo(x, b, "grpo"),
        lambda x, b: paper_grpo(x, b, "grpo"),
    ),
    "grpo-kl": (
        lambda x, b: our_grpo(x, b, "grpo", beta=0.3, epsilon_high=0.28),
        lambda x, b: paper_grpo(x, b, "grpo", 0.28, 0.3),
    ),
    "dr_grpo": (
        lambda x, b: our_grpo(x, b, "dr_grpo", max_length=20),
        lambda x, b: paper_grpo(x, b, "dr_grpo", length=20),
    ),
    "bnpo": (
        lambda x, b: our_grpo(x, b, "bnpo", beta=0.1),
        lambda x, b: paper_grpo(x, b, "bnpo", beta=0.1),
    ),
    "dapo": (
        lambda x, b: our_grpo(x, b, "dapo", epsilon_high=0.28),
        lambda x, b: paper_grpo(x, b, "dapo", 0.28),
    ),
}


def head(seed: int) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """hidden [B, S, D] and weight [V, D] in float64, labels with ignored ones, and a batch of
    log-probabilities about as near to the policy's as after a few steps.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(SEQUENCES, TOKENS, WIDTH), normal(VOCABULARY, WIDTH) / 4
    labels = torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=generator)
    for i in range(SEQUENCES):
        labels[i, : i % 3] = -100
        labels[i, TOKENS - i % 2 :] = -100
    near = plain_tokens(hidden, weight, labels)
    old, reference = near + 0.4 * normal(*near.shape), near + 0.5 * normal(*near.shape)
    mask = labels != -100
    old, reference = old * mask, reference * mask
    kl = normal(SEQUENCES).abs()
    advantages = normal(SEQUENCES).abs()
    advantages[1::2] *= -1
    return hidden, weight, labels, Batch(reference, old, advantages, mask, kl)


def plain_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """From all logits."""
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    kept = labels.clamp(min=0)[..., None]
    return logprobs.gather(-1, kept)[..., 0] * (labels != -100)


def fused_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return pyft.linear_logprobs(hidden, weight, labels).logprob


def loss_and_gradients(
    tokens: Callable[..., Tensor], loss: Loss, dtype: torch.dtype, seeds: range
) -> list[Tensor]:
    """The losses, and gradients for hidden and weight, of several batches each."""
    found: list[list[Tensor]] = []
    for seed in seeds:
        hidden, weight, labels, batch = head(seed)
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        value = loss(tokens(*leaves, labels), batch.to(dtype))
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    return [torch.stack(part) for part in zip(*found, strict=True)]
