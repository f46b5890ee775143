"""Log-probabilities of labels under a linear head, and what else one looks at in logits.

    u = softcap tanh(scale (h Wᵀ + bias) / softcap)      h [N, D]   W [V, D]
    logprob = log p_y   lse = log Σ exp(u_c)   entropy = -Σ p_c log p_c   kl = Σ q_c log(q_c / p_c)

with p = softmax(u) and q that of a teacher's logits. Where a label is ``ignore_index`` all are 0
and argmax is -1.
"""

import torch
from torch import Tensor

from pyft.reference.logits import capped


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, lse, entropy, kl [N] and argmax int64 [N] of rows hidden [N, D], labels [N];
    ``teacher`` is a teacher's logits [N, V].
    """
    counted = labels != ignore_index
    hidden = hidden.where(counted[:, None], 0.0)
    u = capped(torch.nn.functional.linear(hidden, weight, bias), logit_scale, softcap)
    log_p = u.log_softmax(1)
    logprob = log_p.gather(1, labels.where(counted, 0)[:, None])[:, 0]
    seen = log_p.where(log_p > -torch.inf, 0.0)  # 0 log 0 is 0, and so is its derivative
    entropy = -(log_p.exp() * seen).sum(1)
    kl = torch.zeros_like(logprob)
    if teacher is not None:
        log_q = teacher.to(u.dtype).log_softmax(1)
        kl = (log_q.exp() * (log_q - log_p).where(log_q > -torch.inf, 0.0)).sum(1)
    found = (x.where(counted, 0.0) for x in (logprob, u.logsumexp(1), entropy, kl))
    return *found, u.argmax(1).where(counted, -1)  # type: ignore[return-value]
