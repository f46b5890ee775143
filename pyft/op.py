"""The one wrapper over torch.library: a differentiable op from a forward, its fake, and a backward.

An op is registered once (``pyft::name``, with fake and autograd, so that torch.compile, fake-tensor
tracing and selective checkpointing see it whole) and called through a short path where nothing
watches: the dispatcher costs tens of microseconds a call, a plain ``autograd.Function`` about half.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def plain(arguments: tuple[Any, ...]) -> bool:
    """Whether a call may skip the dispatcher: eager, no dispatch mode, no tensor subclass among the
    arguments.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(argument) in _PLAIN for argument in arguments if isinstance(argument, Tensor))


class Primitive:
    """A function of plain tensors registered with torch.library, without a derivative of its own.

    ``forward`` is annotated as ``torch.library.custom_op`` asks; it returns fresh tensors and
    writes to none it is given. ``fake`` takes the same arguments and returns empty tensors of the
    right shapes.
    """

    def __init__(self, name: str, forward: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.forward = forward
        self.library = torch.library.custom_op(f"pyft::{name}", forward, mutates_args=())
        self.library.register_fake(fake)

    def __call__(self, *arguments: Any) -> Any:
        """Run the forward; through the dispatcher where something watches."""
        return self.forward(*arguments) if plain(arguments) else self.library(*arguments)


class Op(Primitive):
    """A primitive with a derivative.

    ``save(ctx, inputs, output)`` keeps what the backward needs; ``backward(ctx, *gradients)``
    returns one gradient (or None) for each input and is built from primitives, so that it too is
    traced whole.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None],
        backward: Callable[..., Any],
    ) -> None:
        super().__init__(name, forward, fake)
        self.library.register_autograd(backward, setup_context=save)
        methods = {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(save),
            "backward": staticmethod(once_differentiable(backward)),
        }
        self.eager: Any = type(name, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> Any:
        """Run the op with autograd; through the dispatcher where something watches."""
        return self.eager.apply(*arguments) if plain(arguments) else self.library(*arguments)
