"""The ops around and inside the LoRA linears, in the harness: right answers in each dtype, wrong
ones refused, work by formula.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_clock import TINY, peers_of, rows_of, statuses
from torch import Tensor
from torch.nn.functional import silu

import pyft
from pyft.bench.problem import Work
from pyft.bench.problems.ablation import lora_matmul_work, skinny_work
from pyft.bench.problems.layers import _liger, layer_work
from pyft.ops import skinny
from pyft.ops.lora_matmul import LowRank, Wide

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
    assert statuses(rows_of(["skinny"], TINY)) == {"ok"}
    project = skinny.project
    monkeypatch.setattr(skinny, "project", lambda *a: project(*a) * 1.05)
    monkeypatch.setattr(skinny, "reduce", lambda s, x, scale, drop: s.t() @ x)  # nothing is dropped
    found = {row["variant"]: row["status"] for row in rows_of(["skinny"], TINY)}
    assert found == {
        "project": "WRONG",
        "reduce": "ok",
        "project+dropout": "WRONG",
        "reduce+dropout": "WRONG",
    }


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


def test_work_of_parts() -> None:
    # x 4x8, W 6x8, y 4x6, S 4x2, B 2x6 in 2 bytes
    assert lora_matmul_work(4, 6, 8, 2, 2) == Work(2 * (32 + 48 + 24 + 8 + 12), 2 * 24 * 10, 96)
    assert skinny_work(4, 8, 2, 2) == Work(2 * (32 + 16 + 8), 0, 64)
