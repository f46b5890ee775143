"""The base of the optimizers with 8-bit states: what is stepped together, what a state is, how it
is saved and loaded. The public classes are in ``pyft.optim``.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.formats import dynamic_map
from pyft.ops.optim import BLOCK, Rule, Tables, Work, backend_of, update
from pyft.optim.paging import Pager

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CODED = 4096  # elements from which a parameter's states are coded
STEPS = 1 << 53  # a count of steps is below

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
            UsageError: a gradient that is sparse or of another dtype than its parameter, states on
                another device, or a backend that cannot run there; nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._check_gradient(group, index)
        launches: dict[_Launch, list[Tensor]] = {}
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is not None and param.numel() > 0:
                    key = self._launch_of(number, param)
                    launches.setdefault(key, []).append(param)
        rules = []
        for key, params in launches.items():
            backend_of(params[0])
            rules.append(self._rule(self.param_groups[key.group], key.step))
        for number, ((key, params), rule) in enumerate(zip(launches.items(), rules, strict=True)):
            self._run(key, params, rule, number)
        return loss

    def _launch_of(self, number: int, param: Tensor) -> _Launch:
        """Where the next step of ``param``, in group ``number``, belongs."""
        group, state = self.param_groups[number], self.state.get(param)
        if state:
            first = self._states(state)[0]
            paged = first.dtype == torch.uint8 and first.device != param.device
        else:
            paged = group["paged"] and param.is_cuda and param.numel() >= LEAST_CODED
        step = state["step"] + 1 if state else 1
        return _Launch(number, param.device, param.dtype, step, paged)

    def _run(self, key: _Launch, params: list[Tensor], rule: Rule, number: int) -> None:
        """Step ``params`` together, and only then count it."""
        works = []
        for param in params:
            assert param.grad is not None
            state = self.state[param]
            if not state:
                self._start(param, state, key.paged)
            dense = param.detach().contiguous()
            works.append(Work(dense, param.grad.contiguous(), *self._states(state)))
        if key.paged:
            self._pager(key.device).update(works, rule, number)
        else:
            update(works, rule, self._tables, number)
        for param, work in zip(params, works, strict=True):
            if not param.is_contiguous():
                param.copy_(work.param)
            self.state[param]["step"] = key.step

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; waits for states on their way to the host."""
        self._drain()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, bit for bit; the tensors are copied.

        A hyperparameter that a saved group lacks keeps this optimizer's value.

        Raises:
            UsageError: what is no state dict, groups or parameters of another number, a
                hyperparameter out of its range, states of another optimizer or of parameters of
                another size; nothing has been loaded then.
        """
        self._drain()
        groups = self._loaded_groups(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        of = dict(zip((i for group in groups for i in group["params"]), params, strict=True))
        kept = {}
        for index, state in state_dict["state"].items():
            if index in of:
                self._check_state(state, of[index], f"state[{_shown(index)}]")
                state = {
                    key: value.as_subclass(_Stored) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
            kept[index] = state
        super().load_state_dict({**state_dict, "state": kept, "param_groups": groups})
        for group in self.param_groups:
            for param in group["params"]:
                for key, value in self.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        paged = group["paged"] and param.numel() >= LEAST_CODED
                        place = _empty(param, value.shape, value.dtype, paged)
                        self.state[param][key] = place.copy_(value)

    def _loaded_groups(self, state_dict: Any) -> list[dict[str, Any]]:
        """The groups of a state dict, complete and checked, to be loaded; ``paged`` is ours."""
        name = type(self).__name__
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
            raise UsageError(
                f"{name}: what to load has no dict 'state'; pass what state_dict() gave"
            )
        saved = state_dict.get("param_groups")
        if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
            raise UsageError(
                f"{name}: what to load has no list 'param_groups' of dicts; pass what "
                "state_dict() gave"
            )
        if len(saved) != len(self.param_groups):
            raise UsageError(
                f"{name}: what to load has {len(saved)} parameter groups, the optimizer "
                f"{len(self.param_groups)}; make it with the same groups"
            )
        merged = []
        seen: set[object] = set()
        for i, (group, loaded) in enumerate(zip(self.param_groups, saved, strict=True)):
            where, count = f"{name}: loaded param_groups[{i}]", len(group["params"])
            for key in ("params", "param_names") if "param_names" in loaded else ("params",):
                names = loaded.get(key)
                if not isinstance(names, list) or len(names) != count:
                    raise UsageError(
                        f"{where}: {key} is {_shown(names)}; this parameter group has {count}, "
                        "write a list of as many"
                    )
            for index in loaded["params"]:
                if not isinstance(index, int | str) or index in seen:
                    raise UsageError(
                        f"{where}: params has {_shown(index)}; write each parameter's number once"
                    )
                seen.add(index)
            merged.append({**group, **loaded, "paged": group["paged"]})
            try:
                self._check(merged[-1])
            except UsageError as error:
                raise UsageError(f"loaded param_groups[{i}]: {error}") from None
        return merged

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
        made: dict[str, Any] = {"step": 0}
        n = param.numel()
        for name, zero_code in zip(self.STATES, ZERO_CODES, strict=False):
            if n < LEAST_CODED:
                made[name] = _empty(param, (n,), torch.float32, False).zero_()
                continue
            made[name] = _empty(param, (n,), torch.uint8, paged).fill_(zero_code)
            blocks = (-(-n // BLOCK),)
            made[f"{name}_absmax"] = _empty(param, blocks, torch.float32, paged).zero_()
        state.update(made)

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
            states = [tensor for tensor in self._states(state) if tensor is not None]
            elsewhere = [tensor.device for tensor in states if tensor.device != param.device]
            coded_on_host = states[0].dtype == torch.uint8 and all(t.is_cpu for t in states)
            if elsewhere and not (group["paged"] and coded_on_host):
                raise UsageError(
                    f"{self._name(group, index)} is on {param.device} and its states on "
                    f"{elsewhere[0]}; make the optimizer after moving the model"
                )

    def _check_state(self, state: Any, param: Tensor, where: str) -> None:
        """Refuse a loaded state that this optimizer would not have made for ``param``."""
        n = param.numel()
        expected: dict[str, tuple[object, list[int]]] = {}
        for name in self.STATES:
            coded = n >= LEAST_CODED
            expected[name] = (torch.uint8 if coded else torch.float32, [n])
            if coded:
                expected[f"{name}_absmax"] = (torch.float32, [-(-n // BLOCK)])
        where = f"{type(self).__name__}: {where}"
        if not isinstance(state, dict):
            raise UsageError(f"{where} is {_shown(state)}; it must be a dict")
        found = {key: _kind(value) for key, value in state.items() if key != "step"}
        if found != expected or "step" not in state:
            raise UsageError(
                f"{where} has {_described(state)}; it must have step, "
                + ", ".join(f"{key} {dtype} {shape}" for key, (dtype, shape) in expected.items())
            )
        step = state["step"]
        if type(step) is not int or not 0 <= step < STEPS:
            raise UsageError(
                f"{where} has step {_shown(step)}; it must be an integer from 0 to below 2**53"
            )

    def _check_range(self, name: str, value: Any, above: float, below: float, text: str) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not above <= value < below
        ):
            raise UsageError(
                f"{type(self).__name__}: {name} is {_shown(value)}; write a number {text}"
            )

    def _check_common(self, group: dict[str, Any]) -> None:
        self._check_range("lr", group["lr"], 0, 1e30, "from 0 up")
        self._check_range("weight_decay", group["weight_decay"], 0, 1e30, "from 0 up")
        for name in ("maximize", "nesterov", "paged"):
            value = group.get(name, False)
            if not isinstance(value, bool):
                raise UsageError(
                    f"{type(self).__name__}: {name} is {_shown(value)}; write True or False"
                )

    def _check_betas(self, betas: Any) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise UsageError(f"{type(self).__name__}: betas is {_shown(betas)}; write two numbers")
        for i, beta in enumerate(betas):
            self._check_range(f"betas[{i}]", beta, 0, 1, "from 0 to below 1")


def _empty(param: Tensor, shape: Iterable[int], dtype: torch.dtype, paged: bool) -> Tensor:
    """Memory for a state of ``param``."""
    if paged and param.is_cuda:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=True)
    return torch.empty(tuple(shape), dtype=dtype, device=param.device)


def _kind(value: Any) -> tuple[object, list[int]]:
    """What of a state has to be right: its dtype, if it is dense, and its shape."""
    if not isinstance(value, Tensor):
        return _shown(value), []
    return value.dtype if value.layout == torch.strided else value.layout, list(value.shape)


def _described(state: dict[str, Any]) -> str:
    shown = []
    for key, value in state.items():
        kind, shape = _kind(value)
        name = key if isinstance(key, str) and key.isidentifier() else _shown(key)
        shown.append(f"{name} {kind} {shape}" if isinstance(value, Tensor) else f"{name} {kind}")
    return ", ".join(shown) or "nothing"


def _shown(value: Any) -> str:
    """A wrong value in words, on one line."""
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, str | float | None):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 1 << 64 else f"of {value.bit_length()} bits"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"
