"""What tests of differentiable ops share: one call of an op with its inputs, its reference as the
specification, and the error rule over outputs and gradients.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from error_rule import check_error
from torch import Tensor

import pyft
from pyft.quantized import QuantizedTensor

SCALE, SEED = 1.7, 1234
Inputs = Mapping[str, Any]
Function = Callable[[Inputs], Sequence[Tensor]]


def grads(y: Tensor, leaves: Mapping[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return dict(zip(leaves, found, strict=True))


class Call:
    """An op and its reference, both functions of the same named inputs; those whose names are in
    ``kept`` the op takes in a dtype of their own. ``grows``: absolute inputs bound every sum.
    """

    def __init__(
        self,
        name: str,
        inputs: Inputs,
        op: Function,
        reference: Function,
        kept: Collection[str] = (),
        grows: bool = True,
    ) -> None:
        self.name, self.inputs, self.op, self.reference = name, dict(inputs), op, reference
        self.kept, self.grows = kept, grows
        self.dtype: torch.dtype = next(iter(self.inputs.values())).dtype
        self.dys: list[Tensor] = []

    def leaves(self) -> dict[str, Tensor]:
        pairs = self.inputs.items()
        return {name: t for name, t in pairs if isinstance(t, Tensor) and t.requires_grad}

    def run(self) -> dict[str, Tensor]:
        """The op's outputs and gradients."""
        return self._both(self.op(self.inputs), self.leaves())

    def forward(self) -> list[Tensor]:
        return list(self.op(self.inputs))

    def backward(self, ys: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor]:
        """Gradients of the leaves."""
        outputs = [(y, dy) for y, dy in zip(ys, self._arriving(ys), strict=True) if y.requires_grad]
        kept, dys = zip(*outputs, strict=True)
        leaves = list(self.leaves().values())
        return list(torch.autograd.grad(kept, leaves, dys, retain_graph))

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The reference's, its inputs those the kernel sees, computed in ``dtype``."""
        return self._of_reference(dtype, lambda tensor: tensor)

    def magnitude(self) -> dict[str, Tensor]:
        """What each quantity would be with nothing cancelling: the scale of its rounding."""
        found = self._of_reference(torch.float64, torch.abs if self.grows else lambda t: t)
        return {name: value.abs() for name, value in found.items()}

    def _of_reference(
        self, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        inputs: dict[str, Any] = {}
        leaves: dict[str, Tensor] = {}
        for name, given in self.inputs.items():
            value = given
            if isinstance(given, Tensor) and given.is_floating_point():
                value = given.detach()
                seen = value.dtype if name in self.kept else self.dtype
                if isinstance(value, QuantizedTensor):
                    value = value.to(seen).dequantize()
                if dtype == torch.float64:
                    value = change(value.to(seen).double())
                if given.requires_grad:
                    value = leaves[name] = value.clone().requires_grad_()
                value = value.to(seen if dtype != torch.float64 else dtype)
            inputs[name] = value
        ys = self.reference(inputs)
        return self._both(ys, leaves, change)

    def _both(
        self,
        ys: Sequence[Tensor],
        leaves: Mapping[str, Tensor],
        change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> dict[str, Tensor]:
        found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        if leaves:
            dys = [change(dy.to(y.dtype)) for y, dy in zip(ys, self._arriving(ys), strict=True)]
            pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
            outputs, arriving = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, list(leaves.values()), arriving)
            found |= dict(zip(leaves, gradients, strict=True))
        return found

    def _arriving(self, ys: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that arrive at the outputs, drawn once."""
        if not self.dys:
            self.dys = [torch.randn(y.shape).to(self.dtype) for y in ys]
        return self.dys


def check_rule(make: Callable[[], Any], *arguments: Any, draws: int = 6) -> None:
    """The error rule over several draws: one number alone may be right by chance."""
    found, in_dtype, truth = [], [], []
    for _ in range(draws):
        call = make()
        found.append(call.run(*arguments))
        in_dtype.append(call.expected(call.dtype, *arguments))
        truth.append(call.expected(torch.float64, *arguments))
    assert found[0].keys() == truth[0].keys()
    for name in truth[0]:
        triple = [
            torch.stack([d[name].detach() for d in draw]) for draw in (found, in_dtype, truth)
        ]
        check_error(name, triple[0].to(in_dtype[0][name].dtype), *triple[1:])


def check_close(call: Any, *arguments: Any) -> None:
    """Within a few roundings of the largest magnitude: for float64, for shapes of one number."""
    found, truth, magnitude = (
        call.run(*arguments),
        call.expected(torch.float64, *arguments),
        call.magnitude(*arguments),
    )
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.shape == truth[name].shape, name
        assert value.isfinite().all(), name
        if value.numel():
            error = (value.double() - truth[name]).abs().max()
            assert error <= 8 * torch.finfo(call.dtype).eps * magnitude[name].max(), name


def check_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """To the bit."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def check_near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same but for the order in which sums are taken: a few roundings of the largest value."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert value.shape == wanted[name].shape, name
        if value.numel():
            eps = torch.finfo(value.dtype).eps
            error = (value.double() - wanted[name].double()).abs().max()
            assert error <= 16 * eps * wanted[name].abs().max(), name


def saved_by(call: Callable[[], Any], own: Sequence[Tensor]) -> list[Tensor]:
    """What a call keeps for its backward, beyond tensors whose storage the caller holds anyway;
    each storage once.
    """
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    held = {tensor.untyped_storage().data_ptr() for tensor in own}
    found = []
    for tensor in saved:
        place = tensor.untyped_storage().data_ptr()
        if tensor.numel() and place not in held:
            found.append(tensor)
            held.add(place)
    return found


def plain_tensors(inputs: Inputs) -> list[Tensor]:
    """Of the inputs; of quantized ones what they store."""
    found: list[Tensor] = []
    for value in inputs.values():
        if isinstance(value, QuantizedTensor):
            found += value.parts()
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def saved_bytes(call: Call) -> int:
    """What the forward keeps beyond its inputs."""
    kept = saved_by(call.forward, plain_tensors(call.inputs))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


# A weight [N, K] of each kind, and the inputs of a linear over it.
QUANTIZED = ("nf4", "int8", "mxfp4", "columns")


def weight_of(kind: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """ "columns": the columns are stored in another order."""
    dense = (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype)
    store = dense.float() if dtype == torch.float64 else dense
    if kind == "dense":
        return dense
    if kind != "columns":
        return pyft.quantize(store, kind, 32 if kind == "mxfp4" else 64)
    q = pyft.quantize(store, "int4_zp", 32)
    parts = [*q.parts(), torch.randperm(k).int()]
    return QuantizedTensor(parts, "int4_zp", 32, (n, k), store.dtype)


def linear(
    prefix: str,
    n: int,
    k: int,
    r: int | None,
    dtype: torch.dtype,
    kind: str = "dense",
    bias: bool = True,
    adapter_dtype: torch.dtype | None = None,
    frozen: str = "",
) -> dict[str, Any]:
    """prefix.weight, .bias, .a [R, K] and .b [N, R]; no adapter where r is None. All require a
    gradient but those named in ``frozen``.
    """
    adapter = adapter_dtype or dtype
    made: dict[str, Any] = {"weight": weight_of(kind, n, k, dtype), "bias": None}
    if bias:
        made["bias"] = torch.randn(n).to(dtype)
    made["a"] = None if r is None else (torch.randn(r, k) / max(k, 1) ** 0.5).to(adapter)
    made["b"] = None if r is None else torch.randn(n, r).to(adapter)
    for name, tensor in made.items():
        if tensor is not None and not isinstance(tensor, QuantizedTensor):
            tensor.requires_grad_(name not in frozen.split())
    return {f"{prefix}.{name}": tensor for name, tensor in made.items()}


def given(inputs: Inputs, prefix: str, scale: float = SCALE) -> tuple[Any, ...]:
    """(weight, bias, lora_a, lora_b, scale), as an op and as its reference take it."""
    return (*(inputs[f"{prefix}.{name}"] for name in ("weight", "bias", "a", "b")), scale)
