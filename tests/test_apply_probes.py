"""apply fuses what computes the same and nothing else, and changes nothing but classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_peft import adapted, config, logits, tokens
from test_whole_models import calls, fused_parts
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import pyft
from pyft.errors import UsageError
from pyft.integrations.mlps import gated_mlp
from pyft.integrations.norms import kind_of_norm, style_of_rotary

D, WIDE = 12, 20
Forward = Callable[[Any, Tensor], Tensor]


def mlp(forward: Forward, **children: nn.Module) -> nn.Module:
    """A module with linears gate, up and down and this forward."""

    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    made = Made()
    linears = {"gate": nn.Linear(D, WIDE), "up": nn.Linear(D, WIDE), "down": nn.Linear(WIDE, D)}
    for name, child in (linears | children).items():
        setattr(made, name, child)
    return made


def gate(m: Any, x: Tensor) -> Tensor:
    return F.silu(m.gate(x))


OTHERS: dict[str, nn.Module] = {
    "dropout inside": mlp(lambda m, x: m.down(m.drop(gate(m, x) * m.up(x))), drop=nn.Dropout(0.5)),
    "functional dropout": mlp(
        lambda m, x: m.down(F.dropout(gate(m, x) * m.up(x), 0.5, m.training))
    ),
    "clamped gate": mlp(lambda m, x: m.down(F.silu(m.gate(x).clamp(max=7)) * m.up(x))),
    "clamped up": mlp(lambda m, x: m.down(gate(m, x) * m.up(x).clamp(-10, 10))),
    "up + 1": mlp(lambda m, x: m.down(gate(m, x) * (m.up(x) + 1))),
    "scaled input": mlp(lambda m, x: m.down(gate(m, x) * m.up(0.5 * x))),
    "scaled output": mlp(lambda m, x: 2 * m.down(gate(m, x) * m.up(x))),
    "residual": mlp(lambda m, x: x + m.down(gate(m, x) * m.up(x))),
    "learned activation": mlp(lambda m, x: m.down(m.act(m.gate(x)) * m.up(x)), act=nn.PReLU()),
    "relu": mlp(lambda m, x: m.down(F.relu(m.gate(x)) * m.up(x))),
    "up twice": mlp(lambda m, x: m.down(F.silu(m.up(x)) * m.up(x) + 0 * m.gate(x))),
    "batch norm": mlp(
        lambda m, x: m.down(m.bn(gate(m, x) * m.up(x))), bn=nn.BatchNorm1d(WIDE, affine=False)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("training", [False, True])
def test_other_mlps_are_left(name: str, training: bool) -> None:
    assert gated_mlp(OTHERS[name].train(training)) is None


def test_names_play_no_part() -> None:
    swapped = mlp(lambda m, x: m.gate(F.silu(m.down(x)) * m.up(x)))
    swapped.gate, swapped.down = nn.Linear(WIDE, D), nn.Linear(D, WIDE)
    found = gated_mlp(swapped)
    assert found is not None
    assert found[:3] == ("down", "up", "gate")


class Norm(nn.Module):
    def __init__(self, forward: Forward, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps, self.computes = nn.Parameter(torch.ones(D)), eps, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.computes(self, x)


def root(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


NORMS: dict[str, tuple[nn.Module, str | None]] = {
    "rms": (Norm(lambda m, x: m.weight * root(x, m.eps)), "rms"),
    "around 0": (Norm(lambda m, x: (1 + m.weight) * root(x, m.eps)), "rms around 0"),
    "LayerNorm": (nn.LayerNorm(D), "layer"),
    "LayerNorm without bias": (nn.LayerNorm(D, bias=False), "layer"),
    "LayerNorm without anything": (nn.LayerNorm(D, elementwise_affine=False), None),
    "another eps": (Norm(lambda m, x: m.weight * root(x, 1e-8)), None),
    "eps outside the root": (
        Norm(lambda m, x: m.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + m.eps)), None,
    ),
    "half of the width": (Norm(lambda m, x: m.weight * root(x[..., : D // 2], m.eps)), None),
    "scaled": (Norm(lambda m, x: 1.01 * m.weight * root(x, m.eps)), None),
    "clamped": (Norm(lambda m, x: m.weight * root(x.clamp(-20, 20), m.eps)), None),
    "dropout": (Norm(lambda m, x: F.dropout(m.weight * root(x, m.eps), 0.5, m.training)), None),
    "GroupNorm": (nn.GroupNorm(1, D), None),
    "BatchNorm": (nn.BatchNorm1d(D), None),
    "InstanceNorm": (nn.InstanceNorm1d(D, affine=True), None),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_what_they_compute(name: str) -> None:
    module, kind = NORMS[name]
    assert kind_of_norm(module) == kind


def rotate(x: Tensor, cos: Tensor, sin: Tensor, first: int = 0) -> Tensor:
    width = cos.shape[-1]
    part = x[..., first : first + width]
    one, two = part.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    turned = part * cos + torch.cat((-two, one), -1) * sin
    return torch.cat((x[..., :first], turned, x[..., first + width :]), -1)


def test_a_rotary_embedding_of_the_last_dimensions_is_not_taken_for_the_first() -> None:
    def last(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(rotate(t, cos, sin, t.shape[-1] - cos.shape[-1]) for t in (q, k))

    def first(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def broken(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        raise IndexError

    style = style_of_rotary(last)
    assert style is not None
    assert not style.partial
    style = style_of_rotary(first)
    assert style is not None
    assert style.partial
    assert style_of_rotary(broken) is None


def test_apply_leaves_buffers_attributes_and_random_numbers_alone() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
            self.bn, self.seen = nn.BatchNorm1d(D), [1]

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(2)
            return self.bn(self.c(F.silu(self.a(x)) * torch.rand_like(self.b(x))))

    model = nn.Sequential(Noting(), nn.BatchNorm1d(D)).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    pyft.apply(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model[0].seen == [1]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_forward_of_the_module_s_own_is_kept() -> None:
    model, ids = adapted(), tokens()
    for layer in model.base_model.model.model.layers:
        for module in (layer.mlp.down_proj, layer.input_layernorm, layer.self_attn.q_proj):
            old = module.forward
            module.forward = lambda x, *args, old=old, **kwargs: 2 * old(x, *args, **kwargs)
    expected = logits(model, ids)
    report = pyft.apply(model)
    torch.testing.assert_close(logits(model, ids), expected)
    assert "its forward was replaced" in {entry.why for entry in report.modules}


def test_a_hook_on_the_activation_runs() -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    before = logits(model, ids)
    for layer in model.base_model.model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, x, y: 5 * y)
    assert (logits(model, ids) - before).abs().max() > 1e-3


@pytest.mark.parametrize("quantized", [False, True])
def test_switching_to_a_larger_adapter(quantized: bool) -> None:
    model, ids = adapted(r=2), tokens()
    if quantized:
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                q = pyft.quantize(module.weight)
                module.weight = nn.Parameter(q, requires_grad=False)
    pyft.apply(model)
    model.add_adapter("larger", config(r=32))
    model.set_adapter("larger")
    model(input_ids=ids.repeat(1, 8), labels=ids.repeat(1, 8)).loss.backward()


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {}])
def test_plain_k_joins_q_and_v(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(target_modules=["q_proj", "v_proj"], **options), tokens()
    pyft.apply(model.train())
    with calls(monkeypatch) as seen:
        logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            logits(model, ids)
    assert seen["lora_qkv"] == 4
    assert seen["lora_linear"] == 0


class Between(nn.Module):
    """Something happens between q, k and v."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        if self.what == "no_grad":
            with torch.no_grad():
                q = self.q_proj(x)
        else:
            q = self.q_proj(x)
            x += 1
        return q * self.k_proj(x) * self.v_proj(x)


@pytest.mark.parametrize("what", ["no_grad", "written to"])
def test_something_between_q_and_k(what: str) -> None:
    model = get_peft_model(Between(what), config(task_type=None))
    x = torch.randn(5, 8)
    parameters = [p for n, p in model.named_parameters() if "k_proj.lora" in n]

    def answers() -> list[Tensor]:
        y = model(x)
        if what == "written to":  # q's own gradient has lost its input, as without us
            return [y.detach()]
        return [y.detach(), *torch.autograd.grad(y.sum(), parameters)]

    expected = answers()
    pyft.apply(model)
    for _ in range(4):
        torch.testing.assert_close(answers(), expected, atol=1e-5, rtol=1e-5)


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: pyft.rms_norm(x, None, 1e-5),  # type: ignore[return-value,dict-item]
    "rms_norm with room": lambda x: pyft.rms_norm(x, None, 1e-5, tail=3),  # type: ignore[return-value,dict-item]
    "layer_norm": lambda x: pyft.layer_norm(x, None, None, 1e-5),  # type: ignore[return-value,dict-item]
    "swiglu": lambda x: pyft.swiglu(x, x),
    "relu2": pyft.relu2,
    "rope": lambda x: pyft.rope(x[None, None], None, *torch.ones(2, 1, 5, 4))[0],
    "lora_linear": lambda x: pyft.lora_linear(x, torch.ones(3, 8), None, None),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_may_be_written_to(name: str) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad((OUTPUTS[name](x) * 3).sum(), x)
    (found,) = torch.autograd.grad(OUTPUTS[name](x).mul_(3).sum(), x)
    torch.testing.assert_close(found, expected)


def test_an_adapter_on_a_linear_of_a_group() -> None:
    model, ids = adapted(target_modules=["q_proj", "v_proj"]), tokens()
    pyft.apply(model)
    model.add_adapter("more", config(target_modules=["q_proj", "k_proj", "v_proj"]))
    model.set_adapter("more")
    report = pyft.apply(model)
    assert fused_parts(report)["pyft.lora_qkv on cpu"] == 2
    found = logits(model, ids)
    pyft.revert(model)
    torch.testing.assert_close(found, logits(model, ids))


def test_revert_of_a_module_whose_class_was_changed_since() -> None:
    model = nn.Sequential(LlamaRMSNorm(D))
    pyft.apply(model)
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    with pytest.raises(UsageError, match="revert"):
        pyft.revert(model)
