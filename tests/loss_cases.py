"""What tests of the losses over a linear head share: calls of them, and what they are worth with
the logits written out, made of torch's own cross_entropy and log_softmax.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lora_cases import Call, weight_of
from op_behaviours import BEHAVIOUR, passes_opcheck
from torch import Tensor
from torch.nn import functional

import pyft
from pyft.ops.linear_logprobs import TokenLogprobs

IGNORED = -100
ADAPTER = 1.7  # scale of the adapters here
HEAD = ("hidden", "weight", "bias", "a", "b")
OWN = ("token_weights", "class_weights", "teacher.hidden", "teacher.weight")  # kept in their dtype


def inputs(
    n: int | tuple[int, ...] = 9,
    v: int = 37,
    d: int = 24,
    dtype: torch.dtype = torch.float32,
    kind: str = "dense",
    bias: bool = False,
    rank: int | None = None,
    ignored: float = 0.3,
    token_weights: bool = False,
    class_weights: bool = False,
    frozen: str = "",
) -> dict[str, Any]:
    """hidden [*n, D], weight [V, D], bias [V], a [R, D], b [V, R], labels [*n] and weights; all of
    the head require a gradient but those named in ``frozen``. Logits are a few in size.
    """
    lead = n if isinstance(n, tuple) else (n,)
    made: dict[str, Any] = {"hidden": torch.randn(*lead, d).to(dtype)}
    made["weight"] = (
        weight_of(kind, v, d, dtype)
        if kind != "dense"
        else (2 * torch.randn(v, d) / max(d, 1) ** 0.5).to(dtype)
    )
    made["bias"] = torch.randn(v).to(dtype) if bias else None
    made["a"] = (torch.randn(rank, d) / max(d, 1) ** 0.5).to(dtype) if rank else None
    made["b"] = (torch.randn(v, rank) / 3).to(dtype) if rank else None
    for name in HEAD:
        if isinstance(made[name], Tensor) and (name != "weight" or kind == "dense"):
            made[name].requires_grad_(name not in frozen.split())
    labels = torch.randint(v, lead)
    made["labels"] = labels.where(torch.rand(lead) >= ignored, IGNORED)
    made["token_weights"] = torch.rand(lead) + 0.1 if token_weights else None
    made["class_weights"] = torch.rand(v) + 0.1 if class_weights else None
    if class_weights:
        made["class_weights"][v // 2] = 0.0
    return made


def adapter(given: Mapping[str, Any]) -> tuple[Tensor, Tensor, float] | None:
    return None if given["a"] is None else (given["a"], given["b"], ADAPTER)


def logits(
    given: Mapping[str, Any], scale: float = 1.0, softcap: float | None = None, prefix: str = ""
) -> Tensor:
    """u [..., V], in fp32 or float64; the product in hidden's dtype."""
    hidden, weight, bias, a, b = (given.get(prefix + name) for name in HEAD)
    z = functional.linear(hidden, weight, bias)
    if a is not None:
        z = z + ADAPTER * functional.linear(functional.linear(hidden, a), b)
    u = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def shifted(of_labels: Tensor, last: float) -> Tensor:
    """Labels, or what belongs to them, at the tokens that predict them."""
    return torch.cat([of_labels[..., 1:], torch.full_like(of_labels[..., :1], last)], -1)


def written_out(
    given: Mapping[str, Any],
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORED,
    num_items_in_batch: float | Tensor | None = None,
    shift: bool = False,
) -> Tensor:
    """The loss of all the logits, by torch's cross_entropy."""
    labels, weights = given["labels"].long(), given.get("class_weights")
    of_tokens = given.get("token_weights")
    if shift:
        labels = shifted(labels, ignore_index)
        of_tokens = None if of_tokens is None else shifted(of_tokens, 0.0)
    u = logits(given, logit_scale, softcap)
    flat, y = u.reshape(-1, u.shape[-1]), labels.reshape(-1)
    keep = y != ignore_index
    w = None if weights is None else weights.to(u.dtype)
    kept, classes = flat[keep], y[keep]
    loss = functional.cross_entropy(
        kept, classes, w, reduction="none", label_smoothing=label_smoothing
    )
    loss = loss + z_loss * kept.logsumexp(1).square()
    t = torch.ones_like(loss)
    if of_tokens is not None:
        t = of_tokens.reshape(-1)[keep].to(u.dtype)
    loss = loss * t
    if reduction == "none":
        return torch.zeros_like(flat[:, 0]).masked_scatter(keep, loss).reshape(labels.shape)
    total = loss.sum()
    if reduction == "sum" or not len(loss):
        return total
    counts = t if w is None else t * w[classes]
    return total / (counts.sum() if num_items_in_batch is None else num_items_in_batch)


def loss_of(given: Mapping[str, Any], **options: Any) -> Any:
    """pyft.linear_cross_entropy of them."""
    return pyft.linear_cross_entropy(
        given["hidden"], given["weight"], given["labels"], given["bias"], adapter(given),
        class_weights=given.get("class_weights"), token_weights=given.get("token_weights"),
        **options,
    )  # fmt: skip


OURS = ("budget", "gradient_filter", "group")  # options that do not change what is computed


def loss_call(given: Mapping[str, Any], **options: Any) -> Call:
    same = {name: value for name, value in options.items() if name not in OURS}
    return Call(
        "linear_cross_entropy",
        given,
        lambda i: [loss_of(i, **options)],
        lambda i: [written_out(i, **same)],
        kept=OWN,
        grows=False,
    )


PARTS = ("logprob", "lse", "entropy", "kl")


def logprobs_of(given: Mapping[str, Any], **options: Any) -> TokenLogprobs:
    return pyft.linear_logprobs(
        given["hidden"], given["weight"], given["labels"], given["bias"], adapter(given), **options
    )


def written_out_logprobs(
    given: Mapping[str, Any],
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    ignore_index: int = IGNORED,
    teacher: Tensor | None = None,
) -> dict[str, Tensor]:
    """logprob, lse, entropy, argmax and with a teacher's logits kl, of all the logits."""
    labels = given["labels"].long()
    if shift:
        labels = shifted(labels, ignore_index)
    u, keep = logits(given, logit_scale, softcap), labels != ignore_index
    log_p = u.log_softmax(-1)
    terms = (log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0.0)
    found = {
        "logprob": log_p.gather(-1, labels.where(keep, 0)[..., None])[..., 0],
        "lse": u.logsumexp(-1),
        "entropy": -terms.sum(-1),
        "argmax": u.argmax(-1),
    }
    if teacher is not None:
        log_q = teacher.log_softmax(-1)
        found["kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
    return {n: x.where(keep, -1 if n == "argmax" else 0) for n, x in found.items()}


def logprobs_call(
    given: Mapping[str, Any],
    kl: bool = False,
    teacher_softcap: float | None = None,
    teacher_scale: float = 1.0,
    **options: Any,
) -> Call:
    """With ``kl`` of the teacher in "teacher.hidden", "teacher.weight"."""
    same = {name: value for name, value in options.items() if name not in (*OURS, "entropy")}
    names = [n for n in PARTS if (kl or n != "kl") and (options.get("entropy") or n != "entropy")]

    def op(i: Mapping[str, Any]) -> list[Tensor]:
        teacher = None
        if kl:
            teacher = pyft.Teacher(
                i["teacher.hidden"], i["teacher.weight"],
                softcap=teacher_softcap, logit_scale=teacher_scale,
            )  # fmt: skip
        found = logprobs_of(i, teacher=teacher, **options)
        return [getattr(found, name) for name in names]

    def reference(i: Mapping[str, Any]) -> list[Tensor]:
        teacher = logits(i, teacher_scale, teacher_softcap, "teacher.") if kl else None
        found = written_out_logprobs(i, teacher=teacher, **same)
        return [found[name] for name in names]

    return Call("linear_logprobs", given, op, reference, kept=OWN, grows=False)


def check_double(call: Call) -> None:
    """In float64, whose truth is rounded like it: a few dozen roundings of numbers about 1."""
    found, truth = call.run(), call.expected(torch.float64)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.shape == truth[name].shape, name
        assert value.dtype == torch.float64, name
        if value.numel():
            size = max(1.0, float(truth[name].abs().max()))
            error = float((value - truth[name]).abs().max())
            assert error <= 64 * torch.finfo(torch.float64).eps * size, (name, error)


def op_passes_opcheck(call: Call) -> None:
    """Its backward may have nothing left to run."""
    passes_opcheck(call, 1)


def nearly_without_autograd(call: Call) -> None:
    """Other code runs where no gradient is wanted; it comes to the same."""
    ys = call.forward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = call.forward()
            for one, other in zip(again, ys, strict=True):
                torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)
            assert not any(y.requires_grad for y in again)


_REPLACED = {"passes_opcheck": op_passes_opcheck, "without_autograd": nearly_without_autograd}
LOSS_BEHAVIOUR = pytest.mark.parametrize(
    "behaviour",
    [_REPLACED.get(one.__name__, one) for one in BEHAVIOUR.args[1]],
    ids=lambda behaviour: behaviour.__name__,
)


def loss_and_gradients(given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The loss and the gradients of its sum."""
    loss = loss_of(given, **options)
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def true_loss_and_gradients(given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
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


def check_values(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-5
) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        size = max(float(wanted[name].abs().max()), 1e-3) if value.numel() else 1.0
        error = float((value.double() - wanted[name]).abs().max()) if value.numel() else 0.0
        assert error <= tolerance * size, (name, error, size)
