"""What must hold of an op that is told what its input is the RMSNorm of (``pyft.NormInput``): each
check takes ``make(dtype=, frozen=)``, which draws the op's inputs, and ``call(inputs, x,
norm_input)``, the op.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from error_rule import check_error
from lora_cases import check_equal, check_near, plain_tensors, saved_by
from op_behaviours import check_refused
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyft
from pyft import NormInput, UsageError

Make = Callable[..., dict[str, Any]]
Op = Callable[[dict[str, Any], Tensor, NormInput | None], Sequence[Tensor]]

EPS = 1e-5


class Normed:
    """h [M, K] and a norm's weight, and the op run on the norm of h in one of several ways."""

    def __init__(self, make: Make, call: Op, dtype: torch.dtype = torch.float32, **options: Any):
        self.inputs, self.call = make(dtype=dtype, **options), call
        self.h: Tensor = self.inputs.pop("x").detach().requires_grad_()
        self.weight = torch.randn(self.h.shape[-1]).to(dtype).requires_grad_()
        self.offset = 1.0
        self.dys: list[Tensor] = []
        of_x = {n: t for n, t in self.inputs.items() if not n.startswith("down")}
        ranks = [t.shape[0] for n, t in of_x.items() if n.endswith(".a") and t is not None]
        self.tail = sum(ranks) + 3

    def outputs(self, way: str, h: Tensor | None = None) -> list[Tensor]:
        """way: "plain", "told", or "beside", which leaves room for the adapters' inputs."""
        h = self.h if h is None else h
        static = {"offset": self.offset, "tail": self.tail if way == "beside" else 0}
        x = pyft.rms_norm(h, self.weight, EPS, **static)
        assert isinstance(x, Tensor)
        told = None
        if way != "plain":
            place = room(x, self.tail) if way == "beside" else None
            told = NormInput(h, self.weight, EPS, self.offset, place)
        return list(self.call(self.inputs, x, told))

    def leaves(self) -> dict[str, Tensor]:
        named = {**self.inputs, "h": self.h, "norm": self.weight}
        return {n: t for n, t in named.items() if isinstance(t, Tensor) and t.requires_grad}

    def gradients(self, ys: Sequence[Tensor], retain_graph: bool = False) -> dict[str, Tensor]:
        if not self.dys:
            self.dys = [torch.randn_like(y) for y in ys]
        leaves = self.leaves()
        found = torch.autograd.grad(ys, list(leaves.values()), self.dys, retain_graph)
        return dict(zip(leaves, found, strict=True))

    def run(self, way: str) -> dict[str, Tensor]:
        ys = self.outputs(way)
        return {f"y{i}": y.detach() for i, y in enumerate(ys)} | self.gradients(ys)


def room(x: Tensor, tail: int) -> Tensor:
    """The rows of x and the columns beside them."""
    rows, columns = x.shape[:-1].numel(), x.shape[-1] + tail
    return x.data.as_strided((rows, columns), (columns, 1))


def the_same_without_the_buffer(make: Make, call: Op) -> None:
    """x made again has the same bits, and so has everything."""
    for dtype in (torch.float32, torch.bfloat16):
        normed = Normed(make, call, dtype)
        check_equal(normed.run("told"), normed.run("plain"))


def within_the_rule_beside_x(make: Make, call: Op) -> None:
    """One matmul for base and adapter: not the same bits, but no worse than twice the error."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        normed = Normed(make, call, dtype)
        truth = Normed(make, call)
        for name in ("h", "weight"):
            setattr(truth, name, getattr(normed, name).detach().double().requires_grad_())
        truth.inputs = {
            n: exact(t, dtype) if isinstance(t, Tensor) else t for n, t in normed.inputs.items()
        }
        found, plain = normed.run("beside"), normed.run("plain")
        truth.dys = [dy.double() for dy in normed.dys]
        exactly = truth.run("plain")
        for name, value in found.items():
            check_error(name, value, plain[name], exactly[name])


def exact(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    value = tensor.detach().to(dtype)
    if isinstance(value, pyft.QuantizedTensor):
        value = value.dequantize()
    return value.double().requires_grad_(tensor.requires_grad)


def x_is_not_kept(make: Make, call: Op) -> None:
    normed = Normed(make, call)
    own = [*plain_tensors(normed.inputs), normed.h, normed.weight]
    size = normed.h.nbytes

    def kept(way: str) -> int:
        return sum(t.untyped_storage().nbytes() for t in saved_by(lambda: normed.outputs(way), own))

    needed = any(
        n.startswith(("q", "k", "v", "gate", "up")) and n.endswith((".a", ".weight"))
        for n in normed.leaves()
    )
    assert kept("plain") - kept("told") == (size if needed else 0)
    assert kept("beside") == kept("told")


def only_the_tail_is_written(make: Make, call: Op) -> None:
    """And x's version says nothing of it: others may have saved x."""
    normed = Normed(make, call)
    x = pyft.rms_norm(normed.h, normed.weight, EPS, offset=1.0, tail=normed.tail)
    assert isinstance(x, Tensor)
    beside = room(x, normed.tail)
    rest = beside[:, -3:]  # more room than there are adapters
    before, version = x.detach().clone(), x._version
    rest.fill_(7)
    other = x * x  # saves x
    told = NormInput(normed.h, normed.weight, EPS, 1.0, beside)
    for _ in range(2):  # another op may use the same room
        ys = normed.call(normed.inputs, x, told)
    assert torch.equal(x, before)
    assert x._version == version
    assert (rest == 7).all()
    torch.autograd.grad([*ys, other], normed.h, [*map(torch.ones_like, ys), torch.ones_like(other)])


def two_ops_share_the_room(make: Make, call: Op) -> None:
    """What the first kept is not what the second writes over."""
    normed, other = Normed(make, call), Normed(make, call)
    expected = normed.run("told")
    x = pyft.rms_norm(normed.h, normed.weight, EPS, offset=1.0, tail=normed.tail)
    assert isinstance(x, Tensor)
    told = NormInput(normed.h, normed.weight, EPS, 1.0, room(x, normed.tail))
    ys = normed.call(normed.inputs, x, told)
    normed.call(other.inputs, x, told)
    check_near(normed.gradients(ys), {name: expected[name] for name in normed.leaves()})


def twice_backward_and_twice_the_same(make: Make, call: Op) -> None:
    for way in ("told", "beside"):
        normed = Normed(make, call, torch.bfloat16)
        ys = normed.outputs(way)
        first = normed.gradients(ys, retain_graph=True)
        check_equal(normed.gradients(ys), first)
        check_equal(normed.run(way), normed.run(way))


def under_checkpointing(make: Make, call: Op) -> None:
    for way in ("told", "beside"):
        normed = Normed(make, call)
        expected = normed.gradients(normed.outputs(way))
        for reentrant in (False, True):

            def again(h: Tensor, way: str = way, normed: Normed = normed) -> tuple[Tensor, ...]:
                return tuple(normed.outputs(way, h))

            for leaf in normed.leaves().values():
                leaf.grad = None
            torch.autograd.backward(
                checkpoint(again, normed.h, use_reentrant=reentrant), normed.dys
            )
            found = {name: leaf.grad for name, leaf in normed.leaves().items()}
            check_equal(found, expected)  # type: ignore[arg-type]


def compiled(make: Make, call: Op) -> None:
    """Where nothing may be written beside x, the room is left alone."""
    for way in ("told", "beside"):
        normed = Normed(make, call)
        expected = normed.run("plain")
        torch._dynamo.reset()
        whole = torch.compile(normed.outputs, backend="aot_eager", fullgraph=True)
        ys = whole(way)
        check_near(normed.gradients(ys), {name: expected[name] for name in normed.leaves()})


def weight_of_any_strides_and_dtype(make: Make, call: Op) -> None:
    normed = Normed(make, call)
    expected = normed.run("plain")
    dense, spaced = normed.weight.detach(), torch.full((len(normed.weight), 2), 9.0)
    spaced[:, 0] = dense
    for weight in (spaced[:, 0], dense.double()):
        normed.weight = weight.requires_grad_()
        found = normed.run("told")
        assert found["norm"].dtype == weight.dtype
        check_near({name: value.float() for name, value in found.items()}, expected)


def input_of_any_strides(make: Make, call: Op) -> None:
    normed = Normed(make, call)
    expected = normed.run("plain")
    wide = torch.full((*normed.h.shape, 2), 9.0)
    wide[..., 0] = normed.h.detach()
    for h in (normed.h.detach().mT.contiguous().mT, wide[..., 0]):
        normed.h = h.requires_grad_()
        check_near(normed.run("told"), expected)


def writing_to_h_raises(make: Make, call: Op) -> None:
    """Instead of making another x again."""
    for way in ("told", "beside"):
        normed = Normed(make, call)
        h = normed.h.detach().clone()
        x = pyft.rms_norm(h, normed.weight, EPS, tail=normed.tail)
        assert isinstance(x, Tensor)
        place = room(x, normed.tail) if way == "beside" else None
        ys = normed.call(normed.inputs, x.detach(), NormInput(h, normed.weight, EPS, 0.0, place))
        leaves = [t for n, t in normed.leaves().items() if n.endswith((".a", "gate.weight"))]
        h.add_(1)
        if leaves:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])


def under_autocast(make: Make, call: Op) -> None:
    """x of autocast's dtype is no longer the norm of h: it is kept after all."""
    normed = Normed(make, call)
    with torch.autocast("cpu", torch.bfloat16):
        ys = {way: normed.outputs(way) for way in ("plain", "told", "beside")}
    expected = normed.gradients(ys["plain"])
    for way in ("told", "beside"):
        check_equal(normed.gradients(ys[way]), expected)


def what_does_not_fit_is_refused(make: Make, call: Op) -> None:
    inputs = make(dtype=torch.float32)
    x: Tensor = inputs.pop("x")
    wide = torch.ones(*x.shape[:-1], x.shape[-1] + 1)
    for told, message in (
        (NormInput(x[:-1], None, EPS), r"norm_input.h is .* and x .*; they must be alike"),
        (NormInput(wide, None, EPS), r"norm_input.h is .* and x .*; they must be alike"),
        (NormInput(x.half(), None, EPS), r"norm_input.h is torch.float16"),
        (NormInput(x, wide[0], EPS), r"norm_input.weight .* does not fit x"),
        (NormInput(x, None, EPS, 0.0, wide), r"norm_input.buffer is not what x lies in"),
    ):
        check_refused(lambda told=told: call(inputs, x, told), message)


def too_little_room_is_refused(make: Make, call: Op) -> None:
    normed = Normed(make, call)
    normed.tail -= 4  # one column less than the adapters have
    with pytest.raises(UsageError, match=r"norm_input.buffer"):
        normed.outputs("beside")


NORM_INPUT = pytest.mark.parametrize(
    "check",
    [
        the_same_without_the_buffer, within_the_rule_beside_x, x_is_not_kept,
        only_the_tail_is_written, two_ops_share_the_room, twice_backward_and_twice_the_same,
        under_checkpointing, compiled, weight_of_any_strides_and_dtype, input_of_any_strides,
        writing_to_h_raises, under_autocast, what_does_not_fit_is_refused,
    ],
    ids=lambda check: check.__name__,
)  # fmt: skip
