"""Which models take their loss of the head's input, and giving it to them.

Whether a model's forward does what is needed is seen by running it on two tokens with a stand-in
for everything below the head, and what it gives to ``loss_function``: names play no part.
"""

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.random import fork_rng
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from pyft.backend import select
from pyft.integrations.fused import (
    Fused,
    fuse,
    fused_class,
    hooked,
    own_dict,
    plain_class,
    replaced,
    unfuse,
)
from pyft.integrations.head_loss import (
    LOSS_FUNCTION,
    FusedAdaptedHead,
    FusedHead,
    FusedLoss,
    expecting,
    heads_of,
)
from pyft.integrations.lazy_logits import LazyLogits
from pyft.integrations.linears import FusedLinear, obstacle, weight_of
from pyft.quantized import QuantizedTensor

_TRL = "TRL's trainers keep their own loss"
# Set by accelerate where it has replaced a forward: the one before.
_BEFORE_HOOKS = "_old_forward"


def set_loss(model: nn.Module) -> Iterator[tuple[str, Any, str, str]]:
    """Let the causal models in a model take their loss of the head's input: name, module, what it
    runs and what there is to know, or why it was left.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        heads = heads_of(module) if isinstance(module, PreTrainedModel) else ()
        if not heads or id(heads[0]) in seen or not _takes_labels(module):
            continue
        seen |= {id(head) for head in heads}
        why = _fuse(module, heads)
        if why:
            _unfuse(module, heads)
            yield name, module, f"{plain_class(module).__name__}'s own loss", why
        else:
            known = f"output head and loss, logits on request; {_slower(heads)}{_TRL}"
            device = select("linear_cross_entropy", next(heads[0].parameters()).device)
            yield name, module, f"pyft.linear_cross_entropy on {device}", known


def reset_loss(model: nn.Module) -> None:
    """What ``set_loss`` changed, as it was."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _unfuse(module, heads_of(module))


def _takes_labels(model: Any) -> bool:
    return "labels" in inspect.signature(plain_class(model).forward).parameters


def _fuse(model: Any, heads: tuple[Any, ...]) -> str:
    """Fuse a model and its head; why not, or "" """
    why = _replaced(model) or next(filter(None, map(_no_head, heads)), "")
    if why:
        return why
    if inspect.getattr_static(plain_class(model), "loss_function") is not LOSS_FUNCTION:
        return "it has a loss_function of its own"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss is {getattr(model.loss_function, '__name__', 'of its own')}"
    for head in heads:
        fuse(head, FusedAdaptedHead if isinstance(head, LoraLayer) else FusedHead)
    why = _probe(model, heads)
    if not why:
        fuse(model, FusedLoss)
        if _BEFORE_HOOKS in model.__dict__:
            model.__dict__[_BEFORE_HOOKS] = types.MethodType(type(model).forward, model)
    return why


def _unfuse(model: Any, heads: tuple[Any, ...]) -> None:
    for head in heads:
        own = plain_class(head)
        if issubclass(type(head), FusedAdaptedHead):
            head.__class__ = fused_class(FusedLinear, own)
        elif issubclass(type(head), FusedHead):
            unfuse(head)
    plain, fused = plain_class(model), cast(Any, type(model))
    if not issubclass(fused, FusedLoss) or "plain" not in vars(fused):
        return
    before = model.__dict__.get(_BEFORE_HOOKS)
    if getattr(before, "__func__", None) is fused.forward:
        model.__dict__[_BEFORE_HOOKS] = types.MethodType(plain.forward, model)
    model.__class__ = plain  # its notes are not ours


def _replaced(model: Any) -> str:
    """Why a model's forward cannot be gone round; "" where its class has it."""
    if isinstance(model, Fused) and not isinstance(model, FusedLoss):
        return "another part of it is fused"
    if not replaced(model):
        return ""
    before = getattr(model.__dict__.get(_BEFORE_HOOKS), "__func__", None)
    if before is not None and before in (plain_class(model).forward, type(model).forward):
        return ""
    forward = model.__dict__["forward"]
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    if code is not None and "fused_lm_head" in code.co_varnames:
        return "a trainer of TRL's has replaced its forward, and keeps a loss of its own"
    return "its forward was replaced"


def _no_head(head: Any) -> str:
    """Why a module is no head of ours; "" where it is one."""
    if not replaced(head) and hooked(head):
        return "hooks on its output head"
    if isinstance(head, LoraLayer):
        why = "it is a variant of LoRA" if head.lora_variant else obstacle(head)
        return f"the adapter on its output head: {why}" if why else ""
    if plain_class(head) is not nn.Linear:
        return f"its output head is {plain_class(head).__name__}, not torch.nn.Linear"
    if replaced(head):
        return "its output head's forward was replaced"
    weight = head.weight
    if weight.device.type == "meta":
        return "its output head is offloaded"
    plain = not isinstance(weight, QuantizedTensor)
    if plain and (not weight.is_floating_point() or weight.dtype.itemsize < 2):
        return f"its output head's weight is {weight.dtype}"
    return ""


def _slower(heads: tuple[Any, ...]) -> str:
    """What makes a head's logits after all."""
    layers = [head for head in heads if isinstance(head, LoraLayer)]
    rates = [drop.p for x in layers for drop in x.lora_dropout.values() if hasattr(drop, "p")]
    return "while the head's adapter drops inputs the logits are made; " if any(rates) else ""


@contextmanager
def _evaluating(modules: tuple[Any, ...]) -> Iterator[None]:
    """Without the dropout of these modules."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


class _Below(nn.Module):
    """Stands for what makes the head's input, and has the other attributes of it."""

    def __init__(self, of: Any, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["of"], self.__dict__["hidden"] = of, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["of"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever it is asked for, the hidden states are all there is."""
        return _Outputs(self.__dict__["hidden"])


class _Outputs(dict[str, Any]):
    """Outputs of a model below its head, by name and by place."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.get(key)
        return tuple(self.values())[key]


def _probe(model: Any, heads: tuple[Any, ...]) -> str:
    """Run the model's own forward over two tokens without what is below the head: why its loss is
    not of the head's output, or "".
    """
    prefix = getattr(model, "base_model_prefix", "")
    below = model._modules.get(prefix)
    if below is None:
        return "what is below its output head cannot be told apart"
    weight = weight_of(heads[0]) if isinstance(heads[0], LoraLayer) else heads[0].weight
    ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
    dtype = torch.float32 if isinstance(weight, QuantizedTensor) else weight.dtype
    hidden = torch.zeros(1, 2, weight.shape[1], dtype=dtype, device=weight.device)
    given: list[Any] = []

    def loss(logits: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        given.append(logits)
        return hidden.new_zeros(())

    plain = plain_class(model)
    double = plain.__new__(plain)
    modules = {**model._modules, prefix: _Below(below, hidden)}
    double.__dict__ = own_dict(model) | {"_modules": modules, "_loss_function": loss}
    devices = [hidden.device] if hidden.is_cuda else []
    try:
        expected = expecting(double, heads_of(double))
        with torch.no_grad(), fork_rng(devices), _evaluating(heads), expected:
            plain.forward(double, input_ids=ids, labels=ids)
    except Exception as error:  # whatever a model of another kind makes of it
        if not given:
            return f"its forward does not run on two tokens ({type(error).__name__})"
    if not given:
        return "its forward does not call loss_function"
    (logits, *_) = given
    if not isinstance(logits, LazyLogits) or logits.made:
        return "its forward does more with the logits than the loss can"
    return "" if logits.rule.expressible else "its logits are scaled in a way the loss is not"
