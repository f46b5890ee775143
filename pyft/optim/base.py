"""The base of the optimizers with 8-bit states: what is stepped together, what a state is, how it
is saved and loaded. The public classes are in ``pyft.optim``.
"""

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.formats import dynamic_map
from pyft.ops.optim import BLOCK, Rule, Tables, Work, update
from pyft.optim.paging import Pager

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CODED = 4096  # elements from which a parameter's states are coded

# What a state's code of 0 is: the first moment has the signed map, the second the unsigned one.
ZERO_CODES = tuple(dynamic_map(signed).index(0.0) for signed in (True, False))


class _Stored(Tensor):
    """A loaded state that keeps its dtype and device where ``Optimizer`` casts it."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(Tensor)


class _Launch(NamedTuple):
    """What one call of ``update`` takes together."""

    group: int
    device: torch.device
    dtype: torch.dtype
    step: int
    paged: bool


class Optimizer8bit(torch.optim.Optimizer):
    """What the optimizers share; a subclass names its states and has the two methods below."""

    STATES: tuple[str, ...]  # the first moment's name, and the second's

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._tables = Tables()
        self._pagers: dict[torch.device, Pager] = {}
        super().__init__(params, defaults)

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        """The scalars of step 1, 2, ..."""
        raise NotImplementedError

    def _check(self, group: dict[str, Any]) -> None:
        """Raise UsageError for a hyperparameter out of its range."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own; see ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        try:
            self._check(param_group)
            for index in range(len(param_group["params"])):
                self._check_parameter(param_group, index)
        except UsageError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns what ``closure`` returns.

        Raises:
            UsageError: a gradient that is sparse or of another dtype than its parameter; nothing
                has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._check_gradient(group, index)
        launches: dict[_Launch, list[Work]] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is None or param.numel() == 0:
                    continue
                state = self.state[param]
                if not state:
                    self._start(param, state, group["paged"])
                state["step"] += 1
                dense = param.detach().contiguous()
                if not param.is_contiguous():
                    copies.append((param, dense))
                work = Work(dense, param.grad.contiguous(), *self._states(state))
                paged = work.first.device != param.device
                key = _Launch(number, param.device, param.dtype, state["step"], paged)
                launches.setdefault(key, []).append(work)
        for number, (key, works) in enumerate(launches.items()):
            rule = self._rule(self.param_groups[key.group], key.step)
            if key.paged:
                self._pager(key.device).update(works, rule, number)
            else:
                update(works, rule, self._tables, number)
        for param, dense in copies:
            param.copy_(dense)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; waits for states on their way to the host."""
        self._drain()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, bit for bit; the tensors are copied.

        Raises:
            UsageError: states of another optimizer, or of parameters of another size.
        """
        self._drain()
        params = [param for group in self.param_groups for param in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        of = dict(zip(saved, params, strict=False))  # of unequal length: refused below
        kept = {}
        for index, state in state_dict["state"].items():
            if index in of:
                self._check_state(state, of[index], f"state[{index}]")
                state = {
                    key: value.as_subclass(_Stored) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
            kept[index] = state
        paged = [group["paged"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": kept})
        for group, keep in zip(self.param_groups, paged, strict=True):
            group["paged"] = keep
            for param in group["params"]:
                for key, value in self.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        coded = param.numel() >= LEAST_CODED
                        place = _empty(param, value.shape, value.dtype, keep and coded)
                        self.state[param][key] = place.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        self._drain()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._tables = Tables()
        self._pagers = {}
        super().__setstate__(state)

    def _drain(self) -> None:
        for pager in self._pagers.values():
            pager.queues.drain()

    def _pager(self, device: torch.device) -> Pager:
        if device not in self._pagers:
            self._pagers[device] = Pager(device)
        return self._pagers[device]

    def _start(self, param: Tensor, state: dict[str, Any], paged: bool) -> None:
        """States of no history."""
        state["step"] = 0
        n = param.numel()
        for name, zero_code in zip(self.STATES, ZERO_CODES, strict=False):
            if n < LEAST_CODED:
                state[name] = _empty(param, (n,), torch.float32, False).zero_()
                continue
            state[name] = _empty(param, (n,), torch.uint8, paged).fill_(zero_code)
            blocks = (-(-n // BLOCK),)
            state[f"{name}_absmax"] = _empty(param, blocks, torch.float32, paged).zero_()

    def _states(self, state: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        first, second = (*self.STATES, "")[:2]
        return (
            state[first],
            state.get(second),
            state.get(f"{first}_absmax"),
            state.get(f"{second}_absmax"),
        )

    def _name(self, group: dict[str, Any], index: int) -> str:
        """A parameter in words, for messages."""
        if "param_names" in group:
            return f"{type(self).__name__}: parameter {group['param_names'][index]!r}"
        number = next(i for i, known in enumerate(self.param_groups) if known is group)
        return f"{type(self).__name__}: parameter {index} of group {number}"

    def _check_parameter(self, group: dict[str, Any], index: int) -> None:
        param = group["params"][index]
        if param.dtype not in DTYPES:
            raise UsageError(
                f"{self._name(group, index)} is {param.dtype}; use float32, bfloat16 or float16"
            )
        if param.layout != torch.strided or hasattr(param, "to_local"):
            raise UsageError(
                f"{self._name(group, index)} is a {type(param).__name__} of layout {param.layout}; "
                "pass a plain, strided tensor"
            )

    def _check_gradient(self, group: dict[str, Any], index: int) -> None:
        param = group["params"][index]
        if param.grad.layout != torch.strided:
            raise UsageError(
                f"{self._name(group, index)} has a sparse gradient; make it dense (sparse=False)"
            )
        if param.grad.dtype != param.dtype or param.dtype not in DTYPES:
            raise UsageError(
                f"{self._name(group, index)} is {param.dtype} with a gradient of "
                f"{param.grad.dtype}; both must be the same: float32, bfloat16 or float16"
            )
        state = self.state.get(param)
        if state:
            device = self._states(state)[0].device
            if device != param.device and not (group["paged"] and device.type == "cpu"):
                raise UsageError(
                    f"{self._name(group, index)} is on {param.device} and its states on {device}; "
                    "make the optimizer after moving the model"
                )

    def _check_state(self, state: dict[str, Any], param: Tensor, where: str) -> None:
        """Refuse a loaded state that this optimizer would not have made for ``param``."""
        n = param.numel()
        expected: dict[str, tuple[torch.dtype, int]] = {}
        for name in self.STATES:
            coded = n >= LEAST_CODED
            expected[name] = (torch.uint8 if coded else torch.float32, n)
            if coded:
                expected[f"{name}_absmax"] = (torch.float32, -(-n // BLOCK))
        found = {
            key: (value.dtype, value.numel())
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        if found != expected or not isinstance(state.get("step"), int):
            raise UsageError(
                f"{type(self).__name__}: {where} has {_described(state)}; it must have step, "
                + ", ".join(f"{key} {dtype} [{size}]" for key, (dtype, size) in expected.items())
            )

    def _check_range(self, name: str, value: Any, above: float, below: float, text: str) -> None:
        if isinstance(value, Tensor) or not (
            isinstance(value, int | float) and isfinite(value) and above <= value < below
        ):
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise UsageError(f"{type(self).__name__}: {name} is {shown}; write a number {text}")

    def _check_common(self, group: dict[str, Any]) -> None:
        self._check_range("lr", group["lr"], 0, 1e30, "from 0 up")
        self._check_range("weight_decay", group["weight_decay"], 0, 1e30, "from 0 up")

    def _check_betas(self, betas: Any) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise UsageError(f"{type(self).__name__}: betas is {betas!r}; write two numbers")
        for i, beta in enumerate(betas):
            self._check_range(f"betas[{i}]", beta, 0, 1, "from 0 to below 1")


def _empty(param: Tensor, shape: Iterable[int], dtype: torch.dtype, paged: bool) -> Tensor:
    """Memory for a state of ``param``."""
    if paged and param.is_cuda:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    return torch.empty(tuple(shape), dtype=dtype, device=param.device)


def _described(state: dict[str, Any]) -> str:
    shown = (
        f"{key} {value.dtype} [{value.numel()}]" if isinstance(value, Tensor) else str(key)
        for key, value in state.items()
    )
    return ", ".join(shown) or "nothing"
