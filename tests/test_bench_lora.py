"""Groups of LoRA linears and the decoder layer in the harness: right answers beside peers, wrong
ones refused, work by formula.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from bench_clock import TINY, peers_of, rows_of, statuses
from torch import Tensor, nn

import pyft
from pyft.bench import peers
from pyft.bench.backends import VARIANTS, gradients
from pyft.bench.problem import Work
from pyft.bench.problems import decoder
from pyft.bench.problems.decoder import PLACES, attention_flops
from pyft.bench.problems.lora import group_work
from pyft.bench.shapes import Layer

PEERS = replace(TINY, peers=True)


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


@pytest.mark.slow
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


def test_work_of_groups() -> None:
    # M 4; 6x8 twice and 8x6: 3 * 2*4*6*8 operations; R 2: 3 * 2*4*2*(6+8) and 3 * 2*(6+8) elements
    shapes = {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
    work = group_work(4, shapes, 2, 100, 2, (8, 8))
    x = y = 4 * 8 * 2
    assert work["forward"] == Work(100 + x + y + 168, 1152 + 672, 96)
    assert work["backward"] == Work(100 + y + 2 * x + 336, 1152 + 2 * 672, 96)
    assert work["forward+backward"].flops == 2 * 1152 + 3 * 672
    # 10 x 10 scores of which half count, 2 heads of 4: two products forward, four backward
    assert attention_flops(10, 2, 4) == 6 * (2 * 50 * 2 * 4)
