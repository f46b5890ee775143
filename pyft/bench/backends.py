"""Our implementations as candidates: one per backend asked for."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import pyft
from pyft.backend import BACKENDS, PREFERENCE, obstacle, select
from pyft.bench.problem import Call, Candidate, Check, Request
from pyft.errors import UsageError

VARIANTS = ("forward", "backward", "forward+backward")  # of ``gradients``


def resolve(names: Sequence[str], op: str, device: torch.device) -> dict[str, str]:
    """The backends that run ``op`` on ``device``, and the name that ``pyft.backend`` is given for
    each: "auto" where it is the one chosen there, as what an op is made of is chosen then too.

    Args:
        names: of backends, "auto", or "all" for each one.
        op: a key of ``pyft.backend.IMPLEMENTATIONS``.
        device: where it runs.

    Raises:
        UsageError: an unknown name, or a backend that cannot run here.
    """
    found: dict[str, str] = {}
    for name in names:
        if name == "all":
            for option in PREFERENCE.get(device.type, ("reference",)):
                if obstacle(op, option) is None:
                    found.setdefault(option, option)
        elif name in ("auto", *BACKENDS):
            with pyft.backend(name):
                found.setdefault(select(op, device), name)
        else:
            raise UsageError(f"--backend: {name!r} is not one of auto, all, {', '.join(BACKENDS)}")
    return found


def on_backends(
    request: Request, op: str, make: Callable[[], Call], check: Check
) -> list[Candidate]:
    """A candidate per backend; all of a call, its making included, runs on the backend."""

    def on(shown: str, name: str) -> Candidate:
        def make_there() -> Call:
            with pyft.backend(name):
                call = make()
            outputs = None if call.outputs is None else _inside(name, call.outputs)
            return Call(_inside(name, call.run), outputs, call.buffers)

        return Candidate(shown, make_there, check, "pyft")

    return [on(*pair) for pair in resolve(request.backends, op, request.device).items()]


def _inside(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        block: AbstractContextManager[None] = pyft.backend(name)
        with block:
            return function()

    return run


def gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], dy: Tensor | Sequence[Tensor]
) -> dict[str, Callable[[], Call]]:
    """Forward, backward and both as calls; the backward alone runs over a graph it keeps.

    ``function`` returns one tensor or several, ``dy`` are the gradients of them.
    """

    def forward() -> Call:
        return Call(lambda: function(*inputs), lambda: detached(function(*inputs)))

    def detached(y: Any) -> list[Tensor]:
        return [part.detach() for part in ((y,) if isinstance(y, Tensor) else y)]

    def backward() -> Call:
        y = function(*inputs)
        return Call(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True))

    def both() -> Call:
        def outputs() -> list[Tensor]:
            y = function(*inputs)
            return [*detached(y), *torch.autograd.grad(y, inputs, dy)]

        return Call(lambda: torch.autograd.grad(function(*inputs), inputs, dy), outputs)

    return dict(zip(VARIANTS, (forward, backward, both), strict=True))
