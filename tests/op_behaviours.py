"""What must hold of every differentiable op, whatever it computes, said of one call of it."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_cases import Call, check_equal, check_near, check_rule, plain_tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import pyft
from pyft.errors import UsageError
from pyft.op import Op, Primitive
from pyft.quantized import QuantizedTensor


def only_reads_its_inputs(call: Call) -> None:
    tensors = [*plain_tensors(call.inputs)]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    call.run()
    arrived = [dy.clone() for dy in call.dys]
    call.run()
    assert all(map(torch.equal, call.dys, arrived))
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def second_backward_is_the_same(call: Call) -> None:
    """What was saved is not written over, and neither are the first gradients."""
    ys = call.forward()
    before = [y.detach().clone() for y in ys]
    first = call.backward(ys, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = call.backward(ys)
    for name, one, other in zip(call.leaves(), first, second, strict=True):
        assert torch.equal(one, other), (name, one, other)
    assert all(map(torch.equal, first, kept))
    assert all(map(torch.equal, ys, before))


def same_bits_twice(call: Call) -> None:
    check_equal(call.run(), call.run())


def gradients_add_up(call: Call) -> None:
    """Twice ``backward`` leaves twice the gradient in every leaf, each in memory of its own."""
    expected, leaves = call.run(), call.leaves()
    for _ in range(2):
        ys = [y for y in call.forward() if y.requires_grad]
        torch.autograd.backward(ys, call.dys[: len(ys)])
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        check_near({name: leaf.grad}, {name: 2 * expected[name]})
    places = [leaf.grad.data_ptr() for leaf in leaves.values() if leaf.numel()]  # type: ignore[union-attr]
    assert len(set(places)) == len(places)


def some_leaves_alone(call: Call) -> None:
    """Whatever subset requires a gradient, the gradients are the same."""
    expected, leaves = call.run(), call.leaves()
    subsets = [{name} for name in leaves]
    subsets += [{name for name in leaves if random.random() < 0.4} for _ in range(12)]
    for wanted in filter(None, subsets):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        found = dict(zip(call.leaves(), call.backward(call.forward()), strict=True))
        check_near(found, {name: expected[name] for name in call.leaves()})
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    assert not any(y.requires_grad for y in call.forward())


def strides_do_not_matter(call: Call) -> None:
    expected, inputs, dys = call.run(), dict(call.inputs), list(call.dys)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    def spaced(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype)
        return wide[..., 0].copy_(tensor)

    for change in (turned, spaced):
        for name, value in inputs.items():
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and not isinstance(value, QuantizedTensor)
            ):
                strided = change(value.detach()).requires_grad_(value.requires_grad)
                call.inputs[name] = strided
        call.dys = [change(dy) for dy in dys]
        check_near(call.run(), expected)


def under_checkpointing(call: Call) -> None:
    expected = call.run()
    for reentrant in (False, True):
        names = [name for name, value in call.inputs.items() if isinstance(value, Tensor)]
        tensors = [call.inputs[name] for name in names]

        def again(*values: Tensor, names: list[str] = names) -> tuple[Tensor, ...]:
            return tuple(call.op({**call.inputs, **dict(zip(names, values, strict=True))}))

        ys = checkpoint(again, *tensors, use_reentrant=reentrant)
        for leaf in call.leaves().values():
            leaf.grad = None
        pairs = [(y, dy) for y, dy in zip(ys, call.dys, strict=True) if y.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        for name, leaf in call.leaves().items():
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected[name]), (reentrant, name)


def compiles_whole(call: Call) -> None:
    expected, op = call.run(), call.op
    torch._dynamo.reset()
    call.op = torch.compile(op, backend="aot_eager", fullgraph=True)
    check_near(call.run(), expected)


def passes_opcheck(call: Call, fewest: int = 2) -> None:
    """Every op and primitive that the forward and the backward run, with what they are given."""
    seen: list[tuple[Primitive, tuple[Any, ...]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Primitive, Op):
            plain = kind.__call__

            def noting(self: Any, *arguments: Any, plain: Any = plain) -> Any:
                seen.append((self, arguments))
                return plain(self, *arguments)

            patch.setattr(kind, "__call__", noting)
        call.run()
    assert len(seen) >= fewest
    for op, arguments in seen:
        if not isinstance(op, Op):
            arguments = tree_map_only(Tensor, Tensor.detach, arguments)
        torch.library.opcheck(op.library, arguments)


def by_every_backend(call: Call) -> None:
    expected = call.run()
    for name in ("reference", "cpu"):
        with pyft.backend(name):
            check_near(call.run(), expected)
    for name in ("triton", "cuda"):
        with (
            pyft.backend(name),
            pytest.raises(UsageError, match=f"backend '{name}' cannot run {call.name}"),
        ):
            call.forward()


def backward_uses_the_backend_of_its_forward(call: Call) -> None:
    expected = call.run()
    with pyft.backend("cpu"):
        ys = call.forward()
    with pyft.backend("cuda"):
        found = call.backward(ys)
    for name, value in zip(call.leaves(), found, strict=True):
        assert torch.equal(value, expected[name]), name


def without_autograd(call: Call) -> None:
    ys = call.forward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = call.forward()
            assert all(map(torch.equal, again, ys))
            assert not any(y.requires_grad for y in again)


def writing_to_an_input_changes_nothing_or_raises(call: Call) -> None:
    """What was saved is what the gradients are of."""
    expected = call.run()
    for tensor in plain_tensors(call.inputs):
        before = tensor.detach().clone()
        ys = call.forward()
        with torch.no_grad():
            tensor.copy_(before.flip(0) if tensor.dim() else before + 1)
        try:
            found = call.backward(ys)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            check_equal(
                dict(zip(call.leaves(), found, strict=True)),
                {n: expected[n] for n in call.leaves()},
            )
        with torch.no_grad():
            tensor.copy_(before)


def under_hooks_of_saved_tensors(call: Call) -> None:
    """As those that keep them elsewhere."""
    expected = call.run()
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
        check_equal(call.run(), expected)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def under_a_dispatch_mode(call: Call) -> None:
    """By way of the dispatcher, as selective checkpointing goes."""
    expected = call.run()
    with Watching():
        check_equal(call.run(), expected)


def on_fake_tensors(call: Call) -> None:
    """A step is traced without computing: shapes, dtypes and strides of everything are right."""
    real, ys = call.run(), call.forward()
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    call.inputs = {name: fake(value) for name, value in call.inputs.items()}
    call.dys = [fake(dy) for dy in call.dys]
    with mode:
        found, outputs = call.run(), call.forward()
    assert found.keys() == real.keys()
    for name, value in found.items():
        assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype), name
    assert [y.stride() for y in outputs] == [y.stride() for y in ys]


BEHAVIOUR = pytest.mark.parametrize(
    "behaviour",
    [
        only_reads_its_inputs, second_backward_is_the_same, same_bits_twice, gradients_add_up,
        some_leaves_alone, strides_do_not_matter, under_checkpointing, compiles_whole,
        passes_opcheck, by_every_backend, backward_uses_the_backend_of_its_forward,
        without_autograd, on_fake_tensors, writing_to_an_input_changes_nothing_or_raises,
        under_hooks_of_saved_tensors, under_a_dispatch_mode,
    ],
    ids=lambda behaviour: behaviour.__name__,
)  # fmt: skip


def gradcheck(call: Call) -> None:
    """Of float64 inputs, against differences."""
    leaves = call.leaves()

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.op({**call.inputs, **dict(zip(leaves, values, strict=True))}))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def check_refused(call: Callable[[], Any], message: str) -> None:
    """One line that says what, where and what to write instead, on every backend."""
    for name in ("auto", "reference"):
        with pyft.backend(name), pytest.raises(UsageError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def check_autocast(make: Callable[[], Call], dtype: torch.dtype) -> None:
    """As if everything had been cast first; gradients come back in the leaves' own dtypes."""

    class Cast(Call):
        def run(self) -> dict[str, Tensor]:
            with torch.autocast("cpu", self.dtype):
                return super().run()

    def cast() -> Call:
        call = make()
        call.__class__ = Cast
        call.dtype = dtype
        return call

    found = cast().run()
    assert found["y0"].dtype == dtype
    assert all(found[name].dtype == leaf.dtype for name, leaf in make().leaves().items())
    check_rule(cast)
