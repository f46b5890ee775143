"""The ops of whole layers and their parts, in the harness: right answers beside peers, wrong ones
refused, work by formula.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from bench_clock import TINY, rows_of
from torch import Tensor, nn
from torch.nn.functional import silu

import pyft
from pyft.bench import peers
from pyft.bench.backends import VARIANTS, gradients
from pyft.bench.problem import Work
from pyft.bench.problems import decoder
from pyft.bench.problems.ablation import lora_matmul_work, skinny_work
from pyft.bench.problems.decoder import PLACES, attention_flops
from pyft.bench.problems.layers import _liger, layer_work
from pyft.bench.problems.lora import group_work
from pyft.bench.shapes import Layer
from pyft.ops.lora_matmul import LowRank, Wide

PEERS = replace(TINY, peers=True)
Rows = list[dict[str, Any]]


def statuses(rows: Rows) -> set[str]:
    return {row["status"] for row in rows}


def peers_of(rows: Rows) -> dict[str, set[str]]:
    """Each peer's statuses."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            found.setdefault(name, set()).add(peer["status"])
    return found


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("op", ["lora_qkv", "lora_mlp"])
def test_groups_beside_peft(op: str, dtype: str, format: str) -> None:
    rows = rows_of([op], replace(PEERS, dtypes=(dtype,), formats=(format,)))
    assert statuses(rows) == {"ok"}
    assert {row["format"] for row in rows} == {format, "plain"}
    wanted = {"torch frozen linears": {"ok"}, "peft": {"ok"}}
    if format != "int8":  # bitsandbytes' own is another
        wanted["peft+bitsandbytes"] = {"ok"}
    assert peers_of(rows) == wanted
    assert {row["peers"]["peft"]["version"] for row in rows if row["format"] == "plain"} == {
        peft.__version__
    }


def swapped(x: Tensor, gate: Any, up: Any, down: Any) -> Tensor:
    return pyft.ops.lora_mlp.lora_mlp(x, up, gate, down)


def scaled(x: Tensor, *projections: Any) -> Tensor:
    first = (*projections[0][:4], 1.9)
    return pyft.ops.lora_mlp.lora_mlp(x, first, *projections[1:])


def frozen_b(x: Tensor, *projections: Any) -> Tensor:
    """Its gradient is zero."""
    weight, bias, a, b, scale = projections[2]
    last = (weight, bias, a, b.detach() + 0 * b, scale)
    return pyft.ops.lora_mlp.lora_mlp(x, *projections[:2], last)


@pytest.mark.parametrize(
    ("wrong", "right_variants"),
    [(swapped, set()), (scaled, set()), (frozen_b, {"forward"})],
)
def test_a_wrong_mlp_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor], right_variants: set[str]
) -> None:
    monkeypatch.setattr(pyft, "lora_mlp", wrong)
    rows = rows_of(["lora_mlp"], TINY)
    assert statuses(rows) <= {"ok", "WRONG"}
    assert {row["variant"] for row in rows if row["status"] == "ok"} == right_variants
    assert not any("median_ms" in row for row in rows if row["status"] == "WRONG")


def test_wrong_queries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, q: Any, k: Any, v: Any) -> tuple[Tensor, ...]:
        return pyft.ops.lora_qkv.lora_qkv(x, q, v, k)

    monkeypatch.setattr(pyft, "lora_qkv", wrong)
    assert statuses(rows_of(["lora_qkv"], TINY)) == {"WRONG"}


WRONG_LAYERS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, weight, eps: torch.rms_norm(x, weight.shape, weight, 0.1),
    "layer_norm": lambda x, weight, bias, eps: torch.rms_norm(x, weight.shape, weight, eps),
    "rope": lambda q, k, cos, sin: pyft.ops.rope.rope(q, k, cos, -sin),
    "swiglu": lambda gate, up: silu(up) * gate,
    "geglu": lambda gate, up, approximate: silu(gate) * up,
}


@pytest.mark.parametrize("op", WRONG_LAYERS)
def test_a_wrong_layer_is_refused(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    assert statuses(rows_of([op], TINY)) == {"ok"}
    monkeypatch.setattr(pyft, op, WRONG_LAYERS[op])
    assert statuses(rows_of([op], TINY)) == {"WRONG"}


@pytest.mark.parametrize("op", WRONG_LAYERS)
def test_layers_in_each_dtype_on_each_backend(op: str) -> None:
    request = replace(TINY, dtypes=("bf16", "fp16", "fp32"), backends=("all",))
    rows = rows_of([op], request)
    assert statuses(rows) == {"ok"}
    assert {row["backend"] for row in rows} >= {"cpu", "reference"}
    assert all(theirs == {"ok"} for theirs in peers_of(rows).values())


# The decoder layer.


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_decoder_layer_beside_its_peers(dtype: str) -> None:
    rows = rows_of(["decoder_layer"], replace(PEERS, dtypes=(dtype,)))
    assert statuses(rows) == {"ok"}
    assert peers_of(rows) == {
        "torch frozen layer": {"ok"},
        "peft+bitsandbytes": {"ok"},
        f"peft over {dtype}": {"ok"},
    }


def test_the_decoder_layer_is_what_users_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own classes over bitsandbytes' linears, and ours with everything fused."""
    seen: list[nn.Module] = []
    run = decoder._Llama.run

    def spy(llama: Any, layer: nn.Module, x: Tensor) -> Tensor:
        seen.append(layer)
        return run(llama, layer, x)

    monkeypatch.setattr(decoder._Llama, "run", spy)
    rows_of(["decoder_layer"], PEERS)
    kinds = {
        tuple(
            f"{type(child).__module__}.{type(child).__name__}"
            for child in (layer.get_submodule(place) for place in PLACES.values())
        )
        for layer in seen
    }
    assert ("peft.tuners.lora.bnb.Linear4bit",) * 7 in kinds
    assert ("peft.tuners.lora.layer.Linear",) * 7 in kinds
    assert ("torch.nn.modules.linear.Linear",) * 7 in kinds
    fused = [layer for layer in seen if "Fused" in type(layer.mlp).__name__]
    assert fused
    for name in ("mlp", "self_attn", "input_layernorm", "post_attention_layernorm"):
        assert "Fused" in type(fused[0].get_submodule(name)).__name__


def test_a_wrong_decoder_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(layer: nn.Module) -> None:
        pyft.apply(layer)
        layer.get_submodule(PLACES["k"]).scaling["default"] = 0.0

    monkeypatch.setattr(decoder, "_apply", forgets)
    assert statuses(rows_of(["decoder_layer"], TINY)) == {"WRONG"}


def test_a_layer_that_is_not_fused_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyft, "apply", lambda layer: SimpleNamespace(fused=6))
    (row,) = rows_of(["decoder_layer"], TINY)
    assert row["status"] == "failed"
    assert "fused 6 of 7 linears" in row["reason"]


def test_a_shape_that_is_no_llama() -> None:
    (row,) = rows_of(["decoder_layer"], replace(TINY, layers=[Layer(6, 10)]))
    assert row["status"] == "failed"
    assert "no Llama has such heads" in row["reason"]


# The parts.


def test_each_way_of_the_matmul() -> None:
    rows = rows_of(["lora_matmul"], replace(TINY, dtypes=("bf16", "fp32")))
    assert {(row["variant"], row["backend"]) for row in rows} == {
        ("forward", "augmented"),
        ("forward", "addmm"),
        ("backward", "addmm"),
    }
    assert statuses(rows) == {"ok"}
    assert peers_of(rows) == {"torch matmul alone": {"ok"}}


def test_a_wrong_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRank, "add_to", lambda low, out: None)
    found = {row["backend"]: row["status"] for row in rows_of(["lora_matmul"], TINY)}
    assert found == {"augmented": "ok", "addmm": "WRONG"}
    monkeypatch.setattr(Wide, "fill", lambda wide, weight, low: weight[:, -wide.tail :].zero_())
    assert statuses(rows_of(["lora_matmul"], TINY)) == {"WRONG"}


def test_wrong_skinny_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyft.ops import skinny

    assert statuses(rows_of(["skinny"], TINY)) == {"ok"}
    project = skinny.project
    monkeypatch.setattr(skinny, "project", lambda *a: project(*a) * 1.05)
    monkeypatch.setattr(skinny, "reduce", lambda s, x, scale, drop: s.t() @ x)  # nothing is dropped
    found = {row["variant"]: row["status"] for row in rows_of(["skinny"], TINY)}
    assert found == {
        "project": "WRONG",
        "reduce": "ok",
        "project, dropout": "WRONG",
        "reduce, dropout": "WRONG",
    }


# Peers that need a GPU, as far as a CPU can tell.


def test_a_peer_that_writes_over_its_inputs_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return silu(gate) * up

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            gate, up = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
                found = torch.autograd.grad(silu(leaves[0]) * leaves[1], leaves, dy)
            gate.data.copy_(found[0])
            up.data.copy_(found[1])
            return gate, up

    name = "liger_kernel.transformers.functional"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(liger_swiglu=Overwrites.apply))
    inputs = [torch.randn(3, 5, requires_grad=True) for _ in range(2)]
    dy = torch.randn(3, 5)
    before = [leaf.detach().clone() for leaf in inputs]
    wanted = torch.autograd.grad(silu(inputs[0]) * inputs[1], inputs, dy)
    candidate = _liger("swiglu", "backward", (inputs, [dy]), lambda found: None)  # type: ignore[arg-type, return-value]
    call = candidate.make()
    for ours, truth in zip(call.answer(), wanted, strict=True):
        torch.testing.assert_close(ours, truth)
    call.run()
    assert all(torch.equal(leaf, was) for leaf, was in zip(inputs, before, strict=True))


def test_a_compiled_layer_runs_each_variant() -> None:
    w, a, b, dy = (torch.randn(*shape) for shape in ((8, 6), (2, 6), (8, 2), (3, 8)))
    x = torch.randn(3, 6, requires_grad=True)
    layer = peers.peft_lora(peers.torch_linear(w), a, b, 2.0)
    compiled = peers.compiled(layer)
    inputs = [x, *(part for part in layer.parameters() if part.requires_grad)]
    makers = gradients(lambda x, *_: compiled(x), inputs, dy)
    truth = dy @ w + 2 * dy @ b @ a
    for variant in VARIANTS:  # in the harness's order
        call = makers[variant]()
        call.run()
        found = call.answer()
        if variant != "forward":
            torch.testing.assert_close(found[variant == "forward+backward"], truth)


# Formulas, against numbers worked out by hand.


def test_work_of_layers() -> None:
    # 5 rows of 8 in 2 bytes are 80 bytes
    assert layer_work("rms_norm", {"M": 5, "D": 8}, 2) == {
        "forward": Work(160, 0, 80),
        "backward": Work(240, 0, 80),
        "forward+backward": Work(400, 0, 80),
    }
    swiglu = layer_work("swiglu", {"M": 5, "D": 8}, 2)
    assert (swiglu["forward"].bytes, swiglu["backward"].bytes) == (240, 400)
    # 4 heads and 1 of 128 in and out, cos and sin of 64 each: (2 * 5 + 1) * 128 elements a token
    rope = layer_work("rope", {"M": 3, "H": 4, "Hkv": 1, "D": 128}, 2)
    assert rope["forward"] == rope["backward"] == Work(3 * 11 * 128 * 2, 0, 3 * 4 * 128 * 2)


def test_work_of_groups() -> None:
    # M 4; 6x8 twice and 8x6: 3 * 2*4*6*8 operations; R 2: 3 * 2*4*2*(6+8) and 3 * 2*(6+8) elements
    shapes = {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
    work = group_work(4, shapes, 2, 100, 2, (8, 8))
    x = y = 4 * 8 * 2
    assert work["forward"] == Work(100 + x + y + 168, 1152 + 672, 96)
    assert work["backward"] == Work(100 + y + 2 * x + 336, 1152 + 2 * 672, 96)
    assert work["forward+backward"].flops == 2 * 1152 + 3 * 672


def test_work_of_parts() -> None:
    # x 4x8, W 6x8, y 4x6, S 4x2, B 2x6 in 2 bytes
    assert lora_matmul_work(4, 6, 8, 2, 2) == Work(2 * (32 + 48 + 24 + 8 + 12), 2 * 24 * 10, 96)
    assert skinny_work(4, 8, 2, 2) == Work(2 * (32 + 16 + 8), 0, 64)
    # 10 x 10 scores of which half count, 2 heads of 4: two products forward, four backward
    assert attention_flops(10, 2, 4) == 6 * (2 * 50 * 2 * 4)
