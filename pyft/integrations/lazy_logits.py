"""Logits that are made when somebody reads them.

    logits = after tanh(before z), or before z        z = h Wᵀ + bias + s (h Aᵀ) Bᵀ

A ``LazyLogits`` stands where a model's logits would: a tensor of their shape, dtype and device
without memory. It notes what a loss over the head's input can do itself (times and divided by a
number, tanh, another floating dtype) and answers questions about its shape. Whatever else is asked
of it is asked of the real logits, made then and kept, with the gradient they would have had.

What does not come through Python, as the input of somebody's autograd function, finds a node of
autograd (``_Edge``) that gives the head's gradients, and an operator that asks for its values.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from pyft.errors import UsageError
from pyft.integrations.linears import Adapted
from pyft.ops.lora_linear import lora_linear
from pyft.quantized import QuantizedTensor

_Step = Callable[[Tensor], Tensor]


class Rule(NamedTuple):
    """What the logits are of the head's output z: after tanh(before z), or before z."""

    before: float = 1.0
    after: float | None = None

    def times(self, factor: float) -> "Rule":
        """Multiplied by a number."""
        if self.after is None:
            return Rule(self.before * factor)
        return Rule(self.before, self.after * factor)

    @property
    def softcap(self) -> float | None:
        """As the loss takes it: softcap tanh(logit_scale z / softcap)."""
        return self.after

    @property
    def logit_scale(self) -> float:
        """As the loss takes it."""
        return self.before * (1.0 if self.after is None else self.after)

    @property
    def expressible(self) -> bool:
        """Whether the loss takes it."""
        fits = isfinite(self.logit_scale) and isfinite(self.before)
        return fits and (self.after is None or (isfinite(self.after) and self.after > 0))


AS_IT_IS = Rule()


class HeadCall:
    """One call of an output head: its input and parameters, and what else its answer depends on."""

    def __init__(self, x: Tensor, given: Adapted) -> None:
        device = x.device.type
        self.x, self.given = x, given
        self.inference = torch.is_inference_mode_enabled()
        self.autocast = (device, torch.get_autocast_dtype(device))
        self.casts = torch.is_autocast_enabled(device)
        self.versions = self._versions()

    @property
    def leaves(self) -> list[Tensor | None]:
        """The input and what of the head may get a gradient."""
        return [self.x, self.given.weight, self.given.bias, self.given.lora_a, self.given.lora_b]

    def _versions(self) -> list[int]:
        stored = [t.packed if isinstance(t, QuantizedTensor) else t for t in self.leaves]
        return [t._version for t in stored if t is not None and not t.is_inference()]

    def output(self, leaves: list[Tensor | None], grad: bool) -> Tensor:
        """z of the head with these leaves.

        Raises:
            UsageError: the head's input or parameters were written to since the call.
        """
        if self.versions != self._versions():
            raise UsageError(
                "these logits were not made in the model's forward, and the output head has "
                "changed since: read outputs.logits before the optimizer's step"
            )
        x, weight, bias, a, b = leaves
        assert x is not None
        assert weight is not None
        device, dtype = self.autocast
        casts = torch.autocast(device, dtype, self.casts)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(grad), casts:
            if a is None:
                return nn.functional.linear(x, weight, bias)
            given = self.given
            z = lora_linear(x.to(given.dtype), weight, a, b, given.scale, bias, given.dropout_p)
            return z.to(given.out_dtype)


class LazyLogits(Tensor):
    """The logits [..., V] of a ``HeadCall``."""

    _call: HeadCall
    _steps: tuple[_Step, ...]
    _own: bool  # whether nothing but us gave it its place in autograd
    _plain: Tensor | None  # without gradient, where autograd is already past
    _whole: Tensor | None
    rule: Rule

    @staticmethod
    def of(
        call: HeadCall, steps: tuple[_Step, ...] = (), rule: Rule = AS_IT_IS, dtype: Any = None
    ) -> "LazyLogits":
        """What ``steps`` make of the head's output: by ``rule``, in ``dtype``."""
        made: LazyLogits = _Edge.apply(call, steps, rule, dtype, *call.leaves)  # type: ignore[no-untyped-call]
        made._own = torch.is_grad_enabled()
        return made

    @property
    def made(self) -> bool:
        """Whether the logits exist."""
        return self._whole is not None or self._plain is not None

    @property
    def call(self) -> HeadCall:
        """Of which it is the answer."""
        return self._call

    def whole(self) -> Tensor:
        """The logits, made once."""
        if self._whole is None:
            if not self.requires_grad:
                self._whole = self._of_values()
            elif self._own and self._plain is None and not _keeps_for_others():
                self._whole = self._made(True)
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    self._whole = _Connected.apply(self, self._of_values())  # type: ignore[no-untyped-call]
        assert self._whole is not None
        return self._whole

    def _of_values(self) -> Tensor:
        if self._plain is None:
            self._plain = self._made(False) if self._whole is None else self._whole.detach()
        return self._plain

    def _made(self, grad: bool) -> Tensor:
        z = self._call.output(self._call.leaves, grad)
        return _stepped(z, self._steps, grad)

    def _then(self, step: _Step, rule: Rule, dtype: torch.dtype) -> "LazyLogits":
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.requires_grad):
            return LazyLogits.of(self._call, (*self._steps, step), rule, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever is done with it in Python."""
        kwargs = kwargs or {}
        if func in _ABOUT and args and isinstance(args[0], LazyLogits) and args[0]._whole is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        noted = _noted(func, args, kwargs)
        if noted is not None:
            return noted
        args, kwargs = pytree.tree_map_only(LazyLogits, LazyLogits.whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever is done with it below autograd."""
        given = pytree.tree_map_only(LazyLogits, LazyLogits._of_values, (args, kwargs or {}))
        return func(*given[0], **given[1])


def _keeps_for_others() -> bool:
    """Whether what autograd saves now is of somebody's region: a checkpoint's that reads us."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _stepped(z: Tensor, steps: tuple[_Step, ...], grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad):
        for step in steps:
            z = step(z)
    return z


class _Edge(torch.autograd.Function):
    """The head as a node of autograd, whose output has no values yet."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: HeadCall, steps: tuple[_Step, ...], rule: Rule, dtype: Any, *leaves: Any
    ) -> LazyLogits:
        """leaves: ``HeadCall.leaves``."""
        ctx.call, ctx.steps = call, steps
        ctx.set_materialize_grads(False)  # zeros would be as large as the logits
        shape = (*call.x.shape[:-1], call.given.weight.shape[0])
        made: LazyLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, shape, dtype=dtype or call.given.out_dtype, device=call.x.device
        )
        made._call, made._steps, made.rule = call, steps, rule
        made._plain = made._whole = None
        return made

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of each leaf that wants one."""
        call: HeadCall = ctx.call
        wants = ctx.needs_input_grad[4:]
        if gradient is None:
            return (None,) * (4 + len(wants))
        leaves = [
            leaf.detach().requires_grad_() if want and leaf is not None else leaf
            for leaf, want in zip(call.leaves, wants, strict=True)
        ]
        z = _stepped(call.output(leaves, True), ctx.steps, True)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(z, wanted, gradient))
        return (*[None] * 4, *(next(found) if want else None for want in wants))


class _Connected(torch.autograd.Function):
    """Values that lie where a stand-in is in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, stand_in: LazyLogits, values: Tensor) -> Tensor:  # type: ignore[override]
        """The values."""
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """As it comes."""
        return gradient, None


def _noted(func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """What is known of the answer without any logits; None where they have to be made."""
    x = next((arg for arg in args[:2] if isinstance(arg, LazyLogits)), None)
    if x is None or x.made or (x.requires_grad and not x._own):
        return None
    rest = [arg for arg in args if arg is not x]
    if func in _TIMES or (func in _OVER and args[0] is x):
        if kwargs or len(rest) != 1 or not _is_number(rest[0]):
            return None
        factor = rest[0] if func in _TIMES else 1.0 / rest[0]
        return x._then(lambda z: func(z, rest[0]), x.rule.times(factor), _dtype(x))
    if func in _TANH and not rest and not kwargs and x.rule.after is None:
        return x._then(torch.tanh, Rule(x.rule.before, 1.0), _dtype(x))
    if func is Tensor.clone and not rest and not kwargs:
        return x._then(torch.clone, x.rule, _dtype(x))
    if func is Tensor.contiguous and not rest and not kwargs:
        return x
    dtype = _CASTS.get(func) if not rest and not kwargs else None
    if func is Tensor.to and kwargs.keys() <= {"dtype", "device", "non_blocking"}:
        dtype = _cast_of(x, rest, kwargs)
    if dtype is None or not dtype.is_floating_point:
        return None
    if dtype == _dtype(x):
        return x
    return x._then(lambda z: z.to(dtype), x.rule, dtype)


def _dtype(x: LazyLogits) -> torch.dtype:
    dtype: torch.dtype = x.dtype
    return dtype


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value) and value != 0


def _cast_of(x: LazyLogits, rest: list[Any], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype ``Tensor.to`` is asked for; None where it moves to another device."""
    if any(isinstance(arg, Tensor) for arg in rest):
        return None
    device, dtype, *_ = torch._C._nn._parse_to(*rest, **kwargs)
    if device is not None and torch.empty(0, device=device).device != x.device:
        return None
    return dtype or _dtype(x)


_TIMES = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.multiply, torch.multiply}
_OVER = {Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide, torch.true_divide}
_TANH = {Tensor.tanh, torch.tanh}
_CASTS = {
    Tensor.float: torch.float32,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.double: torch.float64,
}
_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "itemsize",
    "nbytes", "is_cuda", "is_cpu", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_sparse_csr",
    "is_quantized", "is_nested",
)  # fmt: skip
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, torch.numel,
    Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point, torch.is_floating_point,
    Tensor.is_complex, torch.is_complex, Tensor.is_inference, torch.is_inference,
    Tensor.get_device, Tensor.element_size, Tensor.__len__,
}  # fmt: skip
