"""The stand-in for logits: each use of it is one of the logits that the head would have given."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyft
from pyft.errors import UsageError
from pyft.integrations.lazy_logits import HeadCall, LazyLogits
from pyft.integrations.linears import adapted
from pyft.integrations.loss import set_loss

D, V = 6, 11


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(D, V)


def called(head: nn.Linear, x: Tensor) -> LazyLogits:
    given = adapted(head, x)
    assert given is not None
    return LazyLogits.of(HeadCall(x, given))


def real(y: Any) -> Any:
    return y.whole() if isinstance(y, LazyLogits) else y


def inputs() -> Tensor:
    return torch.randn(2, 3, D, requires_grad=True)


class Squares(torch.autograd.Function):
    """Somebody's loss kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def written_to(z: Tensor) -> Tensor:
    z[..., 2] = -3.0
    z *= 2
    z.clamp_(max=1.5)
    return z


def saved(z: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    found: Tensor = torch.load(file)
    return found


USES: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda z: z.argmax(-1),
    "index": lambda z: z[:, -1, 2:5],
    "boolean index": lambda z: z[z > 0],
    "softmax": lambda z: z.softmax(-1),
    "functional": lambda z: nn.functional.cross_entropy(z.view(-1, V), torch.arange(6)),
    "sum": torch.sum,
    "plus": lambda z: z + 1,
    "minus": lambda z: 1 - z,
    "power": lambda z: z**2,
    "one over": lambda z: 1 / z,
    "times a tensor": lambda z: z * torch.arange(1.0, V + 1),
    "times zero": lambda z: z * 0,
    "divided to integers": lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    "matmul": lambda z: z @ torch.ones(V, 2),
    "compared": lambda z: z > 0.1,
    "in a list": lambda z: torch.cat([z, torch.zeros(2, 3, 1)], -1),
    "by name": lambda z: torch.mul(input=z, other=3.0),
    "scaled": lambda z: z * 3,
    "scaled from the left": lambda z: 3 * z,
    "divided": lambda z: z / 3,
    "softcapped": lambda z: 5 * torch.tanh(z / 5.0),
    "softcapped twice": lambda z: torch.tanh(5 * torch.tanh(z)),
    "double": lambda z: z.double() * 0.1,
    "bfloat16": lambda z: z.to(torch.bfloat16),
    "to a dtype and a device": lambda z: z.to("cpu", torch.float64),
    "to integers": lambda z: z.to(torch.int32),
    "like another": lambda z: z.to(torch.zeros(1, dtype=torch.float64)),
    "contiguous": lambda z: z.contiguous(),
    "clone": lambda z: z.clone(),
    "transposed": lambda z: z.mT,
    "autograd function": Squares.apply,
    "checkpoint": lambda z: checkpoint(lambda t: t.exp(), z, use_reentrant=True),
    "checkpoint of the caller": lambda z: checkpoint(lambda t: t.exp(), z, use_reentrant=False),
    "compiled": lambda z: torch.compile(lambda t: t.exp().sum(), backend="eager")(z),
    "written to": written_to,
    "written to after a copy": lambda z: (z.float() * 1.0, written_to(z))[1],
    "copied before it is written to": lambda z: (z.double(), written_to(z))[0],
    "required": lambda z: z.requires_grad_() * 2,
}
VALUES: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data,
    "numpy": lambda z: z.detach().numpy(),
    "array": lambda z: np.asarray(z.detach()),
    "tolist": lambda z: z.tolist(),
    "item": lambda z: z[0, 0, 0].item(),
    "repr": lambda z: repr(z.detach()),
    "iteration": lambda z: [float(row.sum()) for row in z],
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "torch.save": saved,
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "type": lambda z: z.type(),
    "out": lambda z: torch.mul(torch.ones_like(z), 2, out=z.detach()),
    "foreach": lambda z: torch._foreach_norm([z])[0],
    "memory": lambda z: z.data_ptr() != 0,
}


@pytest.mark.parametrize("name", USES)
def test_use_with_gradient(head: nn.Linear, name: str) -> None:
    x, use = inputs(), USES[name]
    leaves: list[Any] = [x, *head.parameters()]
    found, expected = use(called(head, x)), use(head(x))
    assert found.dtype == expected.dtype
    assert found.requires_grad == expected.requires_grad
    torch.testing.assert_close(real(found), expected, rtol=0, atol=0)
    if found.requires_grad:
        ways, gradients = torch.randn_like(expected), []
        for y in (found, expected):
            y.backward(ways)
            gradients.append([leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", VALUES)
def test_use_of_the_values(head: nn.Linear, name: str) -> None:
    x, use = inputs(), VALUES[name]
    found, expected = use(called(head, x)), use(head(x))
    assert type(found) is type(expected)
    if isinstance(found, Tensor | np.ndarray | list):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ["plus", "scaled", "softcapped", "autograd function", "clone"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_use_without_gradient(head: nn.Linear, name: str, mode: Any) -> None:
    x, use = inputs(), USES[name]
    with mode():
        stand_in, plain = called(head, x), head(x)
        after = use(stand_in.clone())
    assert not real(after).requires_grad
    assert real(stand_in).is_inference() == plain.is_inference()
    found = use(stand_in)
    assert not real(found).requires_grad
    torch.testing.assert_close(real(found), use(plain), rtol=0, atol=0)
    with mode():
        detached = use(called(head, x))
        with torch.enable_grad():
            torch.testing.assert_close(real(detached), use(head(x)).detach(), rtol=0, atol=0)


def test_scaled_without_gradient_stays_so(head: nn.Linear) -> None:
    stand_in = called(head, inputs())
    with torch.no_grad():
        scaled = stand_in * 2.0
    assert isinstance(scaled, LazyLogits)
    assert not scaled.requires_grad
    assert not (scaled + 0).requires_grad
    assert (stand_in + 0).requires_grad
    with torch.no_grad():
        read = called(head, inputs())
        assert not (read + 0).requires_grad


def test_read_without_gradient_first(head: nn.Linear) -> None:
    x = inputs()
    stand_in = called(head, x)
    with torch.no_grad():
        stand_in.argmax(-1)
    (found,) = torch.autograd.grad(stand_in.sum(), x)
    (expected,) = torch.autograd.grad(head(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_what_is_known_without_the_logits(head: nn.Linear) -> None:
    x = inputs()
    stand_in, plain = called(head, x), head(x)
    for about in (
        lambda z: (z.shape, z.size(-1), z.dim(), z.ndim, z.numel(), len(z), z.stride()),
        lambda z: (z.dtype, z.device, z.is_floating_point(), z.element_size(), z.is_contiguous()),
        lambda z: (z.requires_grad, z.is_leaf, z.is_cuda, z.get_device(), torch.is_tensor(z)),
        lambda z: (torch.is_floating_point(z), torch.numel(z), isinstance(z, Tensor)),
    ):
        assert about(stand_in) == about(plain)
    assert stand_in.grad_fn is not None
    for same in (stand_in.float(), stand_in.contiguous(), stand_in.to("cpu"), stand_in.to(x.dtype)):
        assert same is stand_in
    capped = 30.0 * torch.tanh((stand_in * 2).bfloat16() / 30.0)
    assert isinstance(capped, LazyLogits)
    assert not stand_in.made
    assert not capped.made
    assert capped.rule.softcap == 30
    assert capped.rule.logit_scale == pytest.approx(2)


def test_made_once(head: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    output = HeadCall.output

    def noted(call: HeadCall, *args: Any) -> Tensor:
        calls.append(call)
        return output(call, *args)

    monkeypatch.setattr(HeadCall, "output", noted)
    stand_in = called(head, inputs())
    (stand_in + 1, stand_in[0], stand_in.softmax(-1), repr(stand_in))
    assert len(calls) == 1
    stand_in.sum().backward()
    assert len(calls) == 1


def test_read_after_the_head_has_changed(head: nn.Linear) -> None:
    """Never other logits than the forward's."""
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    kept, read = called(head, inputs()), called(head, inputs())
    expected = (read + 0).detach()
    read.sum().backward()
    optimizer.step()
    assert torch.equal(read, expected)
    with pytest.raises(UsageError, match=r"read outputs.logits before the optimizer's step"):
        kept.argmax(-1)
    assert kept.shape == read.shape
    x = torch.randn(2, D)
    stand_in = called(head, x)
    x.add_(1)
    with pytest.raises(UsageError, match="has changed since"):
        stand_in.sum()
    read = called(head, x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.backward()


def test_autocast_is_the_forward_s(head: nn.Linear) -> None:
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        stand_in, expected = called(head, x), head(x)
    assert stand_in.dtype == torch.bfloat16
    assert torch.equal(stand_in, expected)


def test_a_copy_a_collective_makes(head: nn.Linear) -> None:
    """An operator that is called without Python's tensors in between."""
    stand_in, copied = called(head, inputs()), torch.zeros(2, 3, V)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        copied.copy_(stand_in)
    assert torch.equal(copied, stand_in)


def test_pieces_of_a_model_s_outputs(tmp_path: Any) -> None:
    """What is kept of a step can be kept without the model."""
    from conftest import build_model

    model = build_model("llama")
    list(set_loss(model))
    ids = torch.randint(3, 4096, (1, 5))
    outputs = model(input_ids=ids, labels=ids)
    torch.save({"logits": outputs.logits}, tmp_path / "logits.pt")
    pyft.revert(model)
    stored = torch.load(tmp_path / "logits.pt")["logits"]
    assert type(stored) is Tensor
    assert torch.equal(stored, model(input_ids=ids).logits)
