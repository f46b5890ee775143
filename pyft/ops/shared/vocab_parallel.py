"""A head whose rows are spread over the ranks of a process group: each has the logits of its own
part of the vocabulary.

A rank's sums over its part are merged with the others'; each is differentiable in its own, the
others are constants to it. hidden and lora_a, of which every rank has all, get the sum of what the
ranks found. Source: Shoeybi et al., Megatron-LM (2019).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyft.ops.logits import Statistics


class _Shared(torch.autograd.Function):
    """A tensor every rank has; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None


def entering_shards(hidden: Tensor, lora: Any, group: Any) -> tuple[Tensor, Any]:
    """hidden and lora as the parts of a head take them."""
    hidden = _Shared.apply(hidden, group)  # type: ignore[no-untyped-call]
    if lora is not None:
        lora = (_Shared.apply(lora[0], group), *lora[1:])  # type: ignore[no-untyped-call]
    return hidden, lora


def shard_of(columns: int, device: torch.device, group: Any) -> tuple[int, int]:
    """The first label of this rank's part of so many columns, and how many labels there are."""
    if group is None:
        return 0, columns
    counts = _gathered(torch.tensor([columns], device=device), group)[:, 0].tolist()
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def merged(part: Statistics, first: int, group: Any, counts: Tensor) -> Statistics:
    """The sums over all columns of those over this rank's; 0, and argmax -1, where a row does not
    count.
    """
    rank, rows = dist.get_rank(group), len(part.lse)
    own = [x.double() if x.numel() else x.new_zeros(rows, dtype=torch.float64) for x in part[:6]]
    places = part.argmax.double() + first if part.argmax.numel() else own[5]
    of_all = _gathered(torch.stack([x.detach() for x in (*own, places)]), group)

    def each(i: int) -> Tensor:
        """[ranks, N], this rank's differentiable."""
        others = of_all[:, i]
        return torch.cat((others[:rank], own[i][None], others[rank + 1 :]))

    lses, targets, smooths, means, crosses, tops = map(each, range(6))
    lse = lses.logsumexp(0)
    share = (lses - lse).exp()
    means = means.where(share > 0, 0.0)  # a part that is masked out has none
    top, best = tops.max(0)
    argmax = of_all[:, 6].long().gather(0, best[None])[0]
    sums = (targets.sum(0), smooths.sum(0), (share * means).sum(0), crosses.sum(0), top, argmax)
    return Statistics(
        *(
            x.where(counts, -1 if x.dtype == torch.int64 else 0).to(own_x.dtype)
            if own_x.numel()
            else own_x
            for x, own_x in zip((lse, *sums), part, strict=True)
        )
    )


def _gathered(x: Tensor, group: Any) -> Tensor:
    """[ranks, ...] of every rank's x."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)
