"""The one wrapper over torch.library: a differentiable op from a forward, its fake, and a backward.

An op is registered once (``pyft::name``, with fake and autograd, so that torch.compile, fake-tensor
tracing and selective checkpointing see it whole) and called through a short path where nothing
watches: the dispatcher costs tens of microseconds a call, a plain ``autograd.Function`` about half.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyft.errors import UsageError

_PLAIN = (Tensor, torch.nn.Parameter)


def plain(arguments: tuple[Any, ...]) -> bool:
    """Whether a call may skip the dispatcher: eager, no dispatch mode, no tensor subclass among the
    arguments.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for argument in arguments:
        if isinstance(argument, list):
            for part in argument:
                if isinstance(part, Tensor) and type(part) not in _PLAIN:
                    return False
        elif isinstance(argument, Tensor) and type(argument) not in _PLAIN:
            return False
    return True


class Primitive:
    """A function of plain tensors registered with torch.library, without a derivative of its own.

    ``forward`` is annotated as ``torch.library.custom_op`` asks, or comes with a schema; it returns
    fresh tensors and writes to none it is given. ``fake`` takes the same arguments and returns
    empty tensors of the right shapes.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        schema: str | None = None,
    ) -> None:
        self.name, self.forward = name, forward
        self.library = torch.library.custom_op(
            f"pyft::{name}", forward, mutates_args=(), schema=schema
        )
        self.library.register_fake(fake)

    def __call__(self, *arguments: Any) -> Any:
        """Run the forward; through the dispatcher where something watches."""
        return self.forward(*arguments) if plain(arguments) else self.library(*arguments)


class Op(Primitive):
    """A primitive with a derivative.

    ``save(ctx, inputs, output)`` keeps what the backward needs; ``backward(ctx, *gradients)``
    returns one gradient (or None) for each input and is built from primitives, so that it too is
    traced whole. The gradient of a list of tensors is None: they are constants.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None],
        backward: Callable[..., Any],
        schema: str | None = None,
    ) -> None:
        super().__init__(name, forward, fake, schema)
        self.library.register_autograd(_with_lists(backward), setup_context=_noting_lists(save))

        def forward_and_save(ctx: Any, *arguments: Any) -> Any:
            ctx.outputs_are_ours = True  # only the public function sees what it does not return
            found = forward(*arguments)
            save(ctx, arguments, found)
            return found

        methods = {
            "forward": staticmethod(forward_and_save),
            "backward": staticmethod(once_differentiable(backward)),
        }
        self.eager: Any = type(name, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> Any:
        """Run the op with autograd; through the dispatcher where something watches."""
        if plain(arguments):
            return self.eager.apply(*arguments)
        if not torch.compiler.is_compiling() and _transformed():
            raise UsageError(
                f"pyft::{self.name} cannot be differentiated by torch.func; use the backward, or "
                'pyft.backend("reference")'
            )
        return self.library(*arguments)


class _Slot(int):
    """Where a tensor is among those that were saved."""


def packed(arguments: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among an op's arguments, those in lists too, and the arguments without them."""
    tensors: list[Tensor] = []

    def without(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Slot(len(tensors) - 1)
        return [without(part) for part in value] if isinstance(value, list) else value

    return tensors, [without(value) for value in arguments]


def unpacked(tensors: Sequence[Tensor], rest: list[Any]) -> list[Any]:
    """The arguments of ``packed``."""

    def again(value: Any) -> Any:
        if isinstance(value, list):
            return [again(part) for part in value]
        return tensors[value] if isinstance(value, _Slot) else value

    return [again(value) for value in rest]


def _transformed() -> bool:
    """Whether torch.func differentiates: jvp would take a missing derivative for zero."""
    transform = torch._C._functorch.peek_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    return transform is not None and transform.key() in (kinds.Jvp, kinds.Grad)


def _noting_lists(save: Callable[..., None]) -> Callable[..., None]:
    """``save`` that also notes which inputs are lists of tensors, and how long they are."""

    def of_tensors(value: Any) -> bool:
        return isinstance(value, list) and all(x is None or isinstance(x, Tensor) for x in value)

    def noting(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lists = {i: len(value) for i, value in enumerate(inputs) if of_tensors(value)}
        save(ctx, inputs, output)

    return noting


def _with_lists(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` with a None for each tensor of a list, as torch.library asks; a plain
    ``autograd.Function`` takes one None for the whole list.
    """

    def expanded(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        found = backward(ctx, *gradients)
        lists = ctx.lists
        return tuple([None] * lists[i] if i in lists else value for i, value in enumerate(found))

    return expanded
