"""Gated MLPs of a model, found by what they compute.

A module with two or three linears is run on a few numbers with stand-ins for them; from what the
stand-ins were called with and what comes out, it is seen which linear is the gate, which is up and
which is down, and what the activation is. Names play no part, nor do the weights.
"""

from itertools import permutations
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from pyft.integrations.fused import Fused, answers_of_double, hooked
from pyft.integrations.linears import adapted
from pyft.integrations.norms import norm_input_of, same_rows
from pyft.ops import glu
from pyft.ops.lora_mlp import lora_mlp

_SCALES = (1e-3, 0.3, 1.0, 3.0, 30.0, 1e3)  # of the rows: a clamp shows at some
_WIDTH = 16


class Gated(NamedTuple):
    """The names of a gated MLP's linears and its activation; no ``up``: the gate gives both."""

    gate: str
    up: str | None
    down: str
    activation: str


class _StandIn(nn.Module):
    """Answers with fixed numbers, or with what it is given, and remembers that."""

    def __init__(self, answer: Tensor | None) -> None:
        super().__init__()
        self.answer = answer
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """The answer, or x."""
        self.given.append(x)
        return x if self.answer is None else self.answer


def gated_mlp(module: nn.Module) -> Gated | None:
    """What a module is, if it is a gated MLP of linears and nothing else."""
    linears = [name for name, child in module.named_children() if _is_linear(child)]
    if len(linears) not in (2, 3) or next(module.parameters(recurse=False), None) is not None:
        return None
    if any(_has_state(child) for name, child in module.named_children() if name not in linears):
        return None
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(len(_SCALES), _WIDTH, generator=generator) for _ in range(3))
    gate, up = (t * torch.tensor(_SCALES)[:, None] for t in (gate, up))
    for names in permutations(linears):
        answers = [gate, up] if len(names) == 3 else [torch.cat((gate, up), -1)]
        stand_ins = [_StandIn(answer) for answer in [*answers, None]]
        children = {**module._modules, **dict(zip(names, stand_ins, strict=True))}
        found = answers_of_double(module, x, _modules=children)
        given = stand_ins[-1].given
        if found is None or not all(answer is of for answer, of in zip(found, given, strict=True)):
            continue
        if any(t is not x for stand_in in stand_ins[:-1] for t in stand_in.given):
            continue
        for activation in glu.ACTIVATIONS:
            wanted = glu.forward(gate, up, activation, "auto")
            if all(same_rows(answer, wanted, 1e-5) for answer in given):
                second = names[1] if len(names) == 3 else None
                return Gated(names[0], second, names[-1], activation)
    return None


def _has_state(module: nn.Module) -> bool:
    """Whether a module is more than a function of its input."""
    stateful = (
        next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    )
    drops = any(type(part).__name__.endswith("Dropout") for part in module.modules())
    return stateful or drops or any(map(hooked, module.modules()))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, LoraLayer):
        return isinstance(module.get_base_layer(), nn.Linear)
    return isinstance(module, nn.Linear)


class FusedMLP(Fused):
    """A gated MLP that runs ``pyft.lora_mlp``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if not args and not kwargs:
            y = _fused(self, x)
            if y is not None:
                return y
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def _fused(module: Any, x: Tensor) -> Tensor | None:
    gated: Gated = module._pyft_gated
    names = [name for name in gated[:3] if name is not None]
    linears = [getattr(module, name) for name in names]
    if any(map(hooked, module.children())):
        return None  # the module's own forward calls them
    given = [adapted(linear, x) for linear in linears]
    found = [entry for entry in given if entry is not None]
    if len(found) != len(given):
        return None
    rates = {entry.dropout_p for entry in found if entry.lora_a is not None}
    if len({(entry.dtype, entry.out_dtype) for entry in found}) != 1 or len(rates) > 1:
        return None
    dtype, out_dtype = found[0].dtype, found[0].out_dtype
    ranks = sum(entry.rank for entry in found[:-1])
    y = lora_mlp(
        x.to(dtype),
        found[0].projection,
        found[1].projection if len(found) == 3 else None,
        found[-1].projection,
        gated.activation,
        rates.pop() if rates else 0.0,
        norm_input=norm_input_of(x, ranks) if dtype == x.dtype else None,
        recompute=module._pyft_recompute,
    )
    return y.to(out_dtype)
