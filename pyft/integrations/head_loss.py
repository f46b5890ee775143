"""The loss of transformers' causal models without their logits.

The model's own forward keeps running. While it does, and was given labels, its output head answers
with ``LazyLogits`` and its ``loss_function`` takes the loss of the head's input; whoever reads
``outputs.logits`` gets them. Without labels, in ``generate`` say, nothing differs.

The model gets a class of its own class's name, module and signature, by which transformers, PEFT
and Trainer look things up; ``pyft.integrations.loss`` says which models.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

from pyft.integrations.fused import Fused, hooked
from pyft.integrations.lazy_logits import HeadCall, LazyLogits
from pyft.integrations.linears import Adapted, FusedLinear, adapted
from pyft.ops.linear_cross_entropy import linear_cross_entropy
from pyft.quantized import QuantizedTensor


class _Expected(threading.local):
    """Which model is in a forward with labels, and its heads; each thread has its own."""

    model: Any = None
    heads: tuple[Any, ...] = ()


_expected = _Expected()


@contextmanager
def expecting(model: Any, heads: tuple[Any, ...]) -> Iterator[None]:
    """While a model's forward runs with labels: these heads may answer with stand-ins."""
    before = _expected.model, _expected.heads
    _expected.model, _expected.heads = model, heads
    try:
        yield
    finally:
        _expected.model, _expected.heads = before


def heads_of(model: Any) -> tuple[Any, ...]:
    """The linears that may be a model's output head: one, or what PEFT has put beside it."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return ()
    if isinstance(head, ModulesToSaveWrapper):
        return (head.original_module, *head.modules_to_save.values())
    return () if head is None else (head,)


class FusedHead(Fused):
    """An output head that answers with ``LazyLogits`` in a forward with labels."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own."""
        if not args and not kwargs and any(head is self for head in _expected.heads):
            given = as_loss_takes_it(self, x)
            if given is not None:
                return LazyLogits.of(HeadCall(x, given))
        found: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return found


class FusedAdaptedHead(FusedHead, FusedLinear):
    """A head with an adapter on it, otherwise a ``FusedLinear``."""


def as_loss_takes_it(head: Any, x: Tensor) -> Adapted | None:
    """The head as it is to run on x; None where its own forward has to."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return None
    if hooked(head) or any(_is_sharded(parameter) for parameter in head.parameters()):
        return None
    linear = head
    if isinstance(head, LoraLayer) and _is_bare(head):
        linear = head.get_base_layer()
    given = adapted(linear, x)
    if given is None or given.dropout_p > 0 or not x.dim() or not _is_parameter(given.weight):
        return None
    return given if x.shape[-1] == given.weight.shape[1] else None


def _is_bare(layer: Any) -> bool:
    """Whether no adapter is added to the base layer's output."""
    active = any(name in layer.lora_A for name in layer.active_adapters)
    if layer.disable_adapters:
        return not layer.merged
    return bool(layer.merged) or not active


def _is_parameter(weight: Tensor) -> bool:
    """Not a part of what a wrapper keeps elsewhere."""
    return isinstance(weight, nn.Parameter | QuantizedTensor)


def _is_sharded(parameter: Tensor) -> bool:
    """Of FSDP, of DeepSpeed's third stage, or a distributed tensor."""
    marks = ("_fsdp_flattened", "ds_id", "device_mesh")
    return any(hasattr(parameter, mark) for mark in marks)


LOSS_FUNCTION: Any = PreTrainedModel.loss_function
_transformers_own = LOSS_FUNCTION.fget


class FusedLoss(Fused):
    """A causal model whose loss needs no logits."""

    unnamed = True

    @property
    def loss_function(self) -> Any:
        """transformers' own; in a forward with labels one that takes ``LazyLogits`` as well."""
        original = _transformers_own(self)
        if _expected.model is not self or original is not ForCausalLMLoss:
            return original
        return functools.partial(_loss, original)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        LOSS_FUNCTION.fset(self, value)

    @classmethod
    def members(cls, plain: Any) -> dict[str, Any]:
        """A forward with the signature of the plain class's."""
        place = _place_of_labels(plain)

        @functools.wraps(plain.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            labels = args[place - 1] if len(args) >= place else kwargs.get("labels")
            if labels is None or torch.compiler.is_compiling():
                return plain.forward(self, *args, **kwargs)
            with expecting(self, heads_of(self)):
                return plain.forward(self, *args, **kwargs)

        return {"forward": forward}


def _place_of_labels(plain: Any) -> int:
    return list(inspect.signature(plain.forward).parameters).index("labels")


def _known(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


# What a loss of transformers may be told by name that ``_loss`` does not know of.
_OTHERS = (_known(ForCausalLMLoss) | _known(fixed_cross_entropy)) - {
    "logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels",
    "source", "target", "kwargs",
}  # fmt: skip


def _loss(
    original: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``ForCausalLMLoss`` of logits that need not exist; the mean over no token is 0, not NaN."""
    if isinstance(logits, LazyLogits):
        targets = labels if shift_labels is None else shift_labels
        known = not _OTHERS & kwargs.keys() and vocab_size == logits.shape[-1]
        if known and _fits(logits, targets, shift_labels is None, num_items_in_batch):
            return _of_head(logits, targets, num_items_in_batch, ignore_index, shift_labels is None)
        logits = logits.whole()
    return original(
        logits, labels, vocab_size, num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index, shift_labels=shift_labels, **kwargs,
    )  # fmt: skip


def _fits(logits: LazyLogits, labels: Any, shift: bool, items: Any) -> bool:
    if logits.made or not logits.rule.expressible or type(labels) is not Tensor:
        return False
    one = not isinstance(items, Tensor) or items.numel() == 1
    shape = logits.shape[:-1]
    alike = labels.shape == shape if shift else labels.numel() == shape.numel()
    return one and alike and labels.dtype in (torch.int64, torch.int32)


def _of_head(logits: LazyLogits, labels: Any, items: Any, ignore_index: int, shift: bool) -> Tensor:
    call, rule = logits.call, logits.rule
    weight, bias, a, b, scale, _, dtype, _ = call.given
    if items is not None:
        items = torch.as_tensor(items, device=call.x.device).reshape(())
    lora = None if a is None or b is None else (a, b, scale)
    loss: Tensor = linear_cross_entropy(
        call.x.to(dtype), weight, labels.to(call.x.device).reshape(call.x.shape[:-1]), bias, lora,
        ignore_index, softcap=rule.softcap, logit_scale=rule.logit_scale,
        num_items_in_batch=items, shift=shift,
    )  # fmt: skip
    return loss.float()
