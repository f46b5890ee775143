"""Norms and rotary embeddings of a model, found by what they compute.

A norm is a module of its own with a weight [D]; it is run on a few numbers with another weight,
and what it answers says whether it is an RMSNorm (its weight stored around 0 or around 1) or a
LayerNorm. A rotary embedding is the function ``apply_rotary_pos_emb`` an attention module calls; it
is run likewise.

A fused norm notes on the tensor it returns what it was taken of, so that the linears that read it
need not keep it, and leaves room beside its rows for what an adapter puts there.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional

from pyft.integrations.fused import Fused, answers_of_double, plain_class, replaced
from pyft.ops.norm import layer_norm, rms_norm
from pyft.ops.rope import rope
from pyft.ops.shared.group import NormInput

_NOTE = "_pyft_norm_input"
_ROTARY = "apply_rotary_pos_emb"


def norm_input_of(x: Tensor, ranks: int) -> NormInput | None:
    """What a fused norm noted on the tensor it returned, if nothing was written to it since; with
    its buffer, if that has room for so many ranks. Writing through ``.data`` is not noticed.
    """
    if torch.compiler.is_compiling():
        return None
    note = getattr(x, _NOTE, None)
    if note is None or note[0] != _state(x, note[1].h):
        return None
    norm_input: NormInput = note[1]
    buffer = norm_input.buffer
    if buffer is not None and buffer.shape[1] < x.shape[-1] + ranks:
        return norm_input._replace(buffer=None)
    return norm_input


def _state(x: Tensor, h: Tensor) -> tuple[int, ...]:
    """What changes when either is written to or given other memory."""
    storages = (x.untyped_storage()._cdata, h.untyped_storage()._cdata)
    return x._version, h._version, *storages


def kind_of_norm(module: nn.Module) -> str | None:
    """ "rms", "rms around 0" or "layer"; None where the module is no norm that we have."""
    named = dict(module.named_parameters(recurse=False))
    weight, bias, eps = named.get("weight"), named.get("bias"), _eps(module)
    if eps is None or weight is None or weight.dim() != 1 or set(named) - {"weight", "bias"}:
        return None
    if next(module.children(), None) is not None or weight.device.type == "meta":
        return None
    if module._buffers or replaced(module):
        return None
    generator = torch.Generator().manual_seed(0)
    d, root_eps = weight.shape[0], max(eps, 1e-12) ** 0.5
    # Rows of which eps is nothing, some, and all.
    scales = torch.tensor([[2.0, 30.0, 1e-2], [3 * root_eps, root_eps, 0.1 * root_eps]])
    x = (torch.randn(2, 3, d, generator=generator) + 0.25) * scales[:, :, None]
    w, b = (torch.randn(d, generator=generator) for _ in range(2))
    stand_ins = {"weight": nn.Parameter(w)} | ({} if bias is None else {"bias": nn.Parameter(b)})
    found = answers_of_double(module, x, _parameters={**module._parameters, **stand_ins})
    if found is None:
        return None
    root = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    wide = functional.layer_norm(x.double(), (d,), w.double(), None, eps)
    answers = {"layer": wide.float() if bias is None else wide.float() + b}
    if bias is None:
        answers |= {"rms": root * w, "rms around 0": root * (1 + w)}
    for kind, answer in answers.items():
        if all(same_rows(each, answer, 1e-4) for each in found):
            return kind
    return None


def same_rows(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether each row [.., D] is the wanted one, within so much of its largest value."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    largest = wanted.abs().amax(-1, keepdim=True)
    return bool(((found - wanted).abs() <= tolerance * largest).all())


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
            setattr(y, _NOTE, (_state(y, x), note))
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
    partial: bool  # whether it takes heads wider than cos and sin, whose other dimensions pass

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
    q, k = (torch.randn(2, heads, 3, 12, generator=generator) for heads in (2, 1))
    angle = torch.randn(2, 3, 4, generator=generator)

    def same(style: Style, width: int) -> bool | None:
        """Whether it turns heads this wide so; None where it cannot turn them."""
        table = angle.repeat_interleave(2, -1) if style.repeated else torch.cat((angle, angle), -1)
        heads = q[..., :width], k[..., :width]
        try:
            turned_q, turned_k = function(*heads, table.cos(), table.sin())
            found_q, found_k = rope(*heads, angle.cos(), angle.sin(), None, style.interleaved)
            assert found_k is not None
            same_q = torch.allclose(turned_q, found_q, atol=1e-5)
            return same_q and torch.allclose(turned_k, found_k, atol=1e-5)
        except Exception:  # whatever a function of another kind makes of it
            return None

    for interleaved, repeated in product((False, True), repeat=2):
        style = Style(interleaved, repeated, False)
        if same(style, 8):
            return style._replace(partial=bool(same(style, 12)))
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
    """``pyft.rope`` with the original's arguments, where it computes the same.

    That cos and sin say each angle twice is looked at once for each width of theirs: a GPU would
    have to be waited for.
    """
    twice: dict[int, bool] = {}  # width of cos -> whether it was seen to say each angle twice

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        plain = not args and not kwargs and q.dim() == 4 and cos.dim() == 3
        learned = cos.requires_grad or sin.requires_grad
        fits = cos.shape[-1] == q.shape[-1] or (style.partial and cos.shape[-1] < q.shape[-1])
        if plain and fits and not learned and q.dtype == k.dtype == cos.dtype:
            (cos_once, cos_again), (sin_once, sin_again) = style.angles(cos), style.angles(sin)
            width = cos.shape[-1]
            if width not in twice and not torch.compiler.is_compiling():
                if is_fake(cos):  # without numbers to look at it is traced as if they did
                    return rope(q, k, cos_once, sin_once, interleaved=style.interleaved)
                same = torch.equal(cos_once, cos_again) and torch.equal(sin_once, sin_again)
                twice[width] = same
            if twice.get(width, False):
                return rope(q, k, cos_once, sin_once, interleaved=style.interleaved)
        return original(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb
