"""Giving a module of somebody else's a forward of ours, in place, and taking it back.

A fused module gets a subclass of its own class, made of a mixin of ours and that class; what it
notes for itself lies in its ``__dict__`` under names that begin with ``_pyft``. Parameters, hooks,
buffers and methods stay the module's own.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NOTES = "_pyft"


class Fused:
    """Mixed in before the module's own class, which is kept in ``plain``."""

    plain: Any

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
    """Give the module its own class back and drop the notes."""
    if isinstance(module, Fused):
        module.__class__ = type(module).plain
    for name in [name for name in module.__dict__ if name.startswith(f"{NOTES}_")]:
        del module.__dict__[name]


def plain_class(module: nn.Module) -> Any:
    """The class a module has without us."""
    return type(module).plain if isinstance(module, Fused) else type(module)


@cache
def fused_class(mixin: Any, plain: Any) -> Any:
    """The class of a fused module."""
    name = f"Fused{plain.__name__}"
    return type(name, (mixin, plain), {"plain": plain, "__module__": __name__})


def _new(mixin: Any, plain: Any) -> Any:
    fused = fused_class(mixin, plain)
    return fused.__new__(fused)


def answer_of_double(module: nn.Module, x: Tensor, **parts: dict[str, Any]) -> Tensor | None:
    """What the module's own forward makes of x with other children or parameters; None where it
    makes no tensor of it.
    """
    plain: Any = plain_class(module)
    double = plain.__new__(plain)
    double.__dict__ = {**module.__dict__, **parts}
    try:
        with torch.no_grad():
            found = plain.forward(double, x)
    except Exception:  # whatever a module of another kind makes of it
        return None
    return found if isinstance(found, Tensor) else None


def hooked(module: nn.Module) -> bool:
    """Whether something would miss this module's call if it were not called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
