"""The cross-entropy of a linear head, its logits and all.

    u = softcap tanh(scale (h Wᵀ + bias) / softcap)      h [N, D]   W [V, D]
    loss_i = (1 - ε) w_y (lse - u_y) + ε / V Σ_c w_c (lse - u_c) + z_loss lse²

    sum: Σ t_i loss_i      mean: that over Σ t_i w_y, or over ``num_items_in_batch``

over the rows whose label y is not ``ignore_index``, with t the weights of tokens and w those of
classes. Without such rows the loss is 0.
"""

import torch
from torch import Tensor

from pyft.reference.logits import capped


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """The loss, fp32 or float64: [] or with "none" [N], of rows hidden [N, D], labels [N]."""
    v, counted = weight.shape[0], labels != ignore_index
    hidden = hidden.where(counted[:, None], 0.0)
    u = capped(torch.nn.functional.linear(hidden, weight, bias), logit_scale, softcap)
    y = labels.where(counted, 0)
    w = u.new_ones(v) if class_weights is None else class_weights.to(u.dtype)
    t = u.new_ones(len(u)) if token_weights is None else token_weights.to(u.dtype)
    t = t.where(counted, 0.0)
    lse, target = u.logsumexp(1), u.gather(1, y[:, None])[:, 0]
    loss = (1 - label_smoothing) * w[y] * (lse - target) + z_loss * lse.square()
    if label_smoothing:
        loss = loss + label_smoothing / v * (w.sum() * lse - u @ w)
    loss = t * loss.where(t != 0, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    items = (t * w[y]).sum()
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=u.dtype, device=u.device)
    return loss.sum() / items.where(items != 0, 1.0)
