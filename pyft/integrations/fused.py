"""Giving a module of somebody else's a forward of ours, in place, and taking it back.

A fused module gets a subclass of its own class, made of a mixin of ours and that class; what it
notes for itself lies in its ``__dict__`` under names that begin with ``_pyft``. Parameters, hooks,
buffers and methods stay the module's own.
"""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyft.errors import UsageError

NOTES = "_pyft"
_CONTAINERS = (dict, list, set)


class Fused:
    """Mixed in before the module's own class, which is kept in ``plain``."""

    plain: Any
    unnamed = False  # whether the fused class goes by the plain one's name and module

    @classmethod
    def members(cls, plain: Any) -> dict[str, Any]:
        """What a class fused of this plain one has besides."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the name of the module's own class: the fused one is made where it is read."""
        mixin: Any = type(self).__mro__[1]
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (mixin, type(self).plain), *reduced[2:])


def fuse(module: nn.Module, mixin: Any, **notes: Any) -> None:
    """Put ``mixin`` before the module's own class, and set its notes anew."""
    if not isinstance(module, mixin):
        module.__class__ = fused_class(mixin, plain_class(module))
    module.__dict__.update({f"{NOTES}_{name}": value for name, value in notes.items()})


def unfuse(module: nn.Module) -> None:
    """Give the module its own class back and drop the notes.

    Raises UsageError where its class was changed again since.
    """
    if isinstance(module, Fused):
        if "plain" not in vars(type(module)):
            raise UsageError(
                f"revert: {type(module).__name__} was made of a fused module after apply; revert "
                "the model before it is sharded or wrapped"
            )
        module.__class__ = type(module).plain
    for name in [name for name in module.__dict__ if name.startswith(f"{NOTES}_")]:
        del module.__dict__[name]


def plain_class(module: nn.Module) -> Any:
    """The class a module has without us."""
    return type(module).plain if isinstance(module, Fused) else type(module)


@cache
def fused_class(mixin: Any, plain: Any) -> Any:
    """The class of a fused module."""
    name, module = f"Fused{plain.__name__}", __name__
    if mixin.unnamed:
        name, module = plain.__name__, plain.__module__
    body = {"plain": plain, "__module__": module, **mixin.members(plain)}
    return type(name, (mixin, plain), body)


def _new(mixin: Any, plain: Any) -> Any:
    fused = fused_class(mixin, plain)
    return fused.__new__(fused)


def answers_of_double(module: nn.Module, x: Tensor, **parts: dict[str, Any]) -> list[Tensor] | None:
    """What the module's own forward makes of x with other children or parameters, in training and
    in evaluation; None where it makes no tensor of it. The module, its buffers and the random
    numbers stay as they are.
    """
    plain: Any = plain_class(module)
    found = []
    for training in (True, False):
        double = plain.__new__(plain)
        double.__dict__ = {**own_dict(module), "training": training, **parts}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                answer = plain.forward(double, x)
        except Exception:  # whatever a module of another kind makes of it
            return None
        if not isinstance(answer, Tensor):
            return None
        found.append(answer)
    return found


def own_dict(module: nn.Module) -> dict[str, Any]:
    """A module's ``__dict__`` for a double of it, which may add to what it holds."""
    return {k: copy.copy(v) if isinstance(v, _CONTAINERS) else v for k, v in vars(module).items()}


def hooked(module: nn.Module) -> bool:
    """Whether something would miss this module's call if it were not called."""
    return bool(
        replaced(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def replaced(module: nn.Module) -> bool:
    """Whether the module itself, not its class, says what its forward is: accelerate's hooks do."""
    return "forward" in module.__dict__
