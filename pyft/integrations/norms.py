"""Norms and rotary embeddings of a model, found by what they compute.

A norm is a module of its own with a weight [D]; it is run on a few numbers with another weight,
and what it answers says whether it is an RMSNorm (its weight stored around 0 or around 1) or a
LayerNorm. A rotary
embedding is the function ``apply_rotary_pos_emb`` an attention module calls; it is run likewise.

A fused norm notes on the tensor it returns what it was taken of, so that the linears that read it
need not keep it, and leaves room beside its rows for what an adapter puts there.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional

from pyft.integrations.fused import Fused, answer_of_double, plain_class
from pyft.ops.norm import layer_norm, rms_norm
from pyft.ops.rope import rope
from pyft.ops.shared.group import NormInput

_NOTE = "_pyft_norm_input"
_ROTARY = "apply_rotary_pos_emb"


def norm_input_of(x: Tensor) -> NormInput | None:
    """What a fused norm noted on the tensor it returned, if nothing was written to it since."""
    if torch.compiler.is_compiling():
        return None
    note = getattr(x, _NOTE, None)
    if note is None or note[0] != x._version:
        return None
    norm_input: NormInput = note[1]
    return norm_input


def kind_of_norm(module: nn.Module) -> str | None:
    """ "rms", "rms around 0" or "layer"; None where the module is no norm that we have."""
    named = dict(module.named_parameters(recurse=False))
    weight, bias, eps = named.get("weight"), named.get("bias"), _eps(module)
    if eps is None or weight is None or weight.dim() != 1 or set(named) - {"weight", "bias"}:
        return None
    if next(module.children(), None) is not None or weight.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    d = weight.shape[0]
    x, w, b = (torch.randn(*shape, generator=generator) for shape in ((3, d), (d,), (d,)))
    x = 2 * x + 0.5
    stand_ins = {"weight": nn.Parameter(w)} | ({} if bias is None else {"bias": nn.Parameter(b)})
    found = answer_of_double(module, x, _parameters=stand_ins)
    if found is None or found.shape != x.shape:
        return None
    root = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    answers = {"layer": functional.layer_norm(x, (d,), w, None if bias is None else b, eps)}
    if bias is None:
        answers |= {"rms": root * w, "rms around 0": root * (1 + w)}
    for kind, answer in answers.items():
        if torch.allclose(found, answer, rtol=1e-4, atol=1e-4):
            return kind
    return None


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return None


class FusedNorm(Fused):
    """A norm that runs ``pyft.rms_norm`` or ``pyft.layer_norm``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own."""
        module: Any = self
        weight, kind, tail = module.weight, module._pyft_kind, module._pyft_tail
        if args or kwargs or weight.dtype != x.dtype:
            found: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        eps = _eps(module) or 0.0
        if kind == "layer":
            bias = getattr(module, "bias", None)
            return layer_norm(x, weight, bias, eps)  # type: ignore[return-value]
        offset = 1.0 if kind == "rms around 0" else 0.0
        noting = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        tail = tail if noting else 0
        y: Tensor = rms_norm(x, weight, eps, offset=offset, tail=tail)  # type: ignore[assignment]
        if noting:
            note = NormInput(x, weight, eps, offset, _buffer(y, tail))
            setattr(y, _NOTE, (y._version, note))
        return y


def _buffer(y: Tensor, tail: int) -> Tensor | None:
    """The rows of y with what lies beside them, apart from y's history."""
    rows, d = y.shape[:-1].numel(), y.shape[-1]
    if not tail or not rows:
        return None
    return y.data.as_strided((rows, d + tail), (d + tail, 1))


def rotary_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function a module's forward turns queries and keys by, if it is one of its globals."""
    forward = plain_class(module).forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    function: Callable[..., Any] | None = forward.__globals__.get(_ROTARY)
    return function


class Style(NamedTuple):
    """How a rotary embedding pairs dimensions, and how its cos and sin say each angle twice."""

    interleaved: bool
    repeated: bool  # each angle beside itself; otherwise all the angles, and then all again

    def angles(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Each angle of cos or sin [.., R] once, and once more."""
        half = table.shape[-1] // 2
        if self.repeated:
            return table[..., 0::2], table[..., 1::2]
        return table[..., :half], table[..., half:]


@cache
def style_of_rotary(function: Callable[..., Any]) -> Style | None:
    """None where it computes something else."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (2, 1))
    angle = torch.randn(2, 3, 4, generator=generator)
    for style in (Style(i, r) for i in (False, True) for r in (False, True)):
        table = angle.repeat_interleave(2, -1) if style.repeated else torch.cat((angle, angle), -1)
        try:
            found = function(q, k, table.cos(), table.sin())
            turned_q, turned_k = found
        except (TypeError, RuntimeError, ValueError):
            continue
        wanted_q, wanted_k = rope(q, k, angle.cos(), angle.sin(), interleaved=style.interleaved)
        same = torch.allclose(turned_q, wanted_q, atol=1e-5)
        if same and wanted_k is not None and torch.allclose(turned_k, wanted_k, atol=1e-5):
            return style
    return None


class FusedRotary(Fused):
    """An attention module whose queries and keys ``pyft.rope`` turns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        plain = type(self).plain
        forward = _TURNING.get(plain) or with_rope(plain)
        return forward(self, *args, **kwargs)


_TURNING: dict[Any, Callable[..., Any]] = {}  # a module's own class -> its forward with rope


def with_rope(plain: Any) -> Callable[..., Any]:
    """The class's forward with another ``apply_rotary_pos_emb`` among its globals."""
    forward: Any = plain.forward
    original = forward.__globals__[_ROTARY]
    style = style_of_rotary(original)
    assert style is not None  # or the module would not be fused
    names = {**forward.__globals__, _ROTARY: _rotary(original, style)}
    names.pop("__name__", None)  # by which torch.compile would look the original up
    copy = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    _TURNING[plain] = copy
    return copy


def _rotary(original: Callable[..., Any], style: Style) -> Callable[..., Any]:
    """``pyft.rope`` with the original's arguments, where it computes the same."""
    twice: list[bool] = []  # whether cos and sin were seen to say each angle twice

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        plain = not args and not kwargs and q.dim() == 4 and cos.dim() == 3
        if plain and q.dtype == k.dtype == cos.dtype and cos.shape[-1] <= q.shape[-1]:
            (cos_once, cos_again), (sin_once, sin_again) = style.angles(cos), style.angles(sin)
            if not twice and not torch.compiler.is_compiling():
                if is_fake(cos):  # without numbers to look at it is traced as if they did
                    return rope(q, k, cos_once, sin_once, interleaved=style.interleaved)
                same = torch.equal(cos_once, cos_again) and torch.equal(sin_once, sin_again)
                twice.append(same)
            if twice and twice[0]:
                return rope(q, k, cos_once, sin_once, interleaved=style.interleaved)
        return original(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb
