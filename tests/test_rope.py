"""rope against the reference in float64; that its gradient is its inverse, and what it keeps."""

from typing import Any

import pytest
import torch
from lora_cases import Call, check_close, check_rule, saved_bytes
from op_behaviours import BEHAVIOUR, check_refused, gradcheck
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, dtype_name
from torch import Tensor

import pyft
from pyft.errors import UsageError
from pyft.reference.rope import rope as reference

DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)

# What differs from 2 sequences of 5 tokens, 4 heads of 16 and 2 of keys, all dimensions turned.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "partial": {"rotary": 6},
    "interleaved": {"interleaved": True},
    "partial interleaved": {"interleaved": True, "rotary": 10},
    "one pair": {"rotary": 2, "d": 2},
    "odd head": {"rotary": 4, "d": 7},
    "odd head interleaved": {"rotary": 6, "d": 7, "interleaved": True},
    "a table each": {"tables": 2},
    "positions int64": {"positions": torch.int64},
    "positions int32": {"positions": torch.int32},
    "positions partial interleaved": {
        "positions": torch.int64, "rotary": 8, "interleaved": True,
    },
    "queries only": {"heads": (3, 0)},
    "queries only with positions": {"heads": (3, 0), "positions": torch.int64},
    "angles in fp32": {"angles": torch.float32},
    "angles in fp32 with positions": {"angles": torch.float32, "positions": torch.int64},
    "one token": {"s": 1, "b": 1, "heads": (1, 1)},
    "head of 128": {"d": 128, "s": 33},
}  # fmt: skip


def rope(
    dtype: torch.dtype = torch.float32,
    b: int = 2,
    heads: tuple[int, int] = (4, 2),
    s: int = 5,
    d: int = 16,
    rotary: int | None = None,
    interleaved: bool = False,
    tables: int = 1,
    positions: torch.dtype | None = None,
    angles: torch.dtype | None = None,
) -> Call:
    half = (d if rotary is None else rotary) // 2
    q, k = (torch.randn(b, h, s, d).to(dtype).requires_grad_() for h in heads)
    inputs: dict[str, Any] = {"q": q} | ({"k": k} if heads[1] else {})
    # A table is longer than the sequences, whose positions begin anew where a sequence is packed.
    angle = torch.randn(*((s + 4,) if positions else (tables, s)), half) * 3
    inputs["cos"], inputs["sin"] = (t.to(angles or dtype) for t in (angle.cos(), angle.sin()))
    if positions:
        restarts = torch.arange(s).repeat(b, 1) % 3 + torch.randint(0, 4, (b, 1))
        inputs["positions"] = restarts.to(positions)

    def of(function: Any) -> Any:
        def call(t: Any) -> tuple[Tensor, ...]:
            at = t.get("positions")
            if at is not None and function is reference:
                at = at.long()
            found = function(t["q"], t.get("k"), t["cos"], t["sin"], at, interleaved)
            assert (found[1] is None) == (heads[1] == 0)
            return tuple(y for y in found if y is not None)

        return call

    kept = ("cos", "sin") if angles else ()
    return Call("rope", inputs, of(pyft.rope), of(reference), kept, grows=False)


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES)
def test_error_rule(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        check_close(rope(dtype, **CASES[case]))
    else:
        check_rule(lambda: rope(dtype, **CASES[case]))


@BEHAVIOUR
@pytest.mark.parametrize("case", ["partial", "positions int32", "queries only"])
def test_behaviour(case: str, behaviour: Any) -> None:
    behaviour(rope(**CASES[case]))


@pytest.mark.parametrize("case", ["partial interleaved", "positions int64", "queries only"])
def test_gradcheck(case: str) -> None:
    gradcheck(rope(torch.float64, **{**CASES[case], "s": 3}))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 0, 3, 4)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    b, h, s, d = shape
    call = rope(b=b, heads=(h, 1), s=s, d=d)
    found = call.run()
    assert found["y0"].shape == found["q"].shape == shape
    assert found["y1"].shape == found["k"].shape == (b, 1, s, d)
    torch.testing.assert_close(found["y1"], call.expected(torch.float64)["y1"].float())


@DTYPE
@pytest.mark.parametrize("case", ["full", "partial interleaved", "positions int64"])
def test_the_gradient_is_the_inverse(case: str, dtype: torch.dtype) -> None:
    """Turned forth by the forward and back by the backward, everything is where it was."""
    call = rope(dtype, **{**CASES[case], "angles": torch.float32})
    ys = call.forward()
    call.dys = [y.detach() for y in ys]
    for before, after in zip(call.leaves().values(), call.backward(ys), strict=True):
        error = (before.double() - after.double()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * before.abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_keeps_norms_and_turns_by_the_angle(interleaved: bool) -> None:
    call = rope(rotary=10, interleaved=interleaved)
    q, cos, sin = (call.inputs[name] for name in ("q", "cos", "sin"))
    y = call.forward()[0].detach()
    torch.testing.assert_close(y.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(y[..., 10:], q[..., 10:])
    first, second = (
        (slice(0, 10, 2), slice(1, 10, 2)) if interleaved else (slice(0, 5), slice(5, 10))
    )
    numbers = torch.complex(q[..., first], q[..., second]) * torch.complex(cos, sin)
    torch.testing.assert_close(torch.complex(y[..., first], y[..., second]), numbers)


def test_scores_depend_on_distances_only() -> None:
    inverse = 1e4 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = torch.arange(20.0, dtype=torch.float64)[:, None] * inverse
    q, k = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64)
    scores = []
    for start in (0, 9):
        at = torch.arange(start, start + 6)[None]
        turned_q, turned_k = pyft.rope(q, k, angle.cos(), angle.sin(), at)
        assert turned_k is not None
        scores.append(turned_q @ turned_k.mT)
    torch.testing.assert_close(scores[0], scores[1])


def test_positions_are_rows_of_the_tables() -> None:
    """Packed sequences: each token as at its own place in a sequence by itself."""
    call = rope(b=1, s=7, positions=torch.int64)
    call.inputs["positions"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    q, k, cos, sin = (call.inputs[name] for name in ("q", "k", "cos", "sin"))
    packed = call.forward()
    for begin, end in ((0, 3), (3, 7)):
        part = (slice(None), slice(None), slice(begin, end))
        tables = (cos[None, : end - begin], sin[None, : end - begin])
        alone = pyft.rope(q[part], k[part], *tables)
        for whole, apart in zip(packed, alone, strict=True):
            assert apart is not None
            assert torch.equal(whole[part], apart)


@DTYPE
def test_angles_of_another_dtype(dtype: torch.dtype) -> None:
    """fp32 ones are used as they are, others take q's dtype."""
    for angles in (torch.float32, torch.float64, torch.float16):
        call = rope(dtype, angles=angles)
        found = call.forward()
        assert all(y.dtype == dtype for y in found)
        seen = torch.float32 if angles == torch.float32 else dtype
        for name in ("cos", "sin"):
            call.inputs[name] = call.inputs[name].to(seen)
        assert all(map(torch.equal, found, call.forward()))


def test_angles_get_no_gradient() -> None:
    call = rope()
    call.inputs["cos"].requires_grad_()
    with pytest.raises(UsageError, match="cos and sin require a gradient"):
        call.forward()
    with pyft.backend("reference"):
        y = call.forward()[0]
    (found,) = torch.autograd.grad(y.sum(), call.inputs["cos"])
    assert found.abs().max() > 0


@pytest.mark.parametrize("wanted", ["q", "k"])
def test_only_one_output_is_used(wanted: str) -> None:
    call = rope()
    at = "qk".index(wanted)
    found, expected = (
        torch.autograd.grad(f(call.inputs)[at].square().sum(), call.inputs[wanted])[0]
        for f in (call.op, call.reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", ["full", "positions int64", "queries only"])
def test_keeps_neither_queries_nor_keys(case: str) -> None:
    """Beside the angles, which are the caller's, nothing."""
    call = rope(**CASES[case])
    held = {t.untyped_storage().data_ptr() for t in call.inputs.values()}
    call.inputs["q"] = call.inputs["q"].detach().clone().requires_grad_()
    assert held
    assert saved_bytes(call) == 0
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None)
    with hooks:
        call.forward()
    assert not any(t.untyped_storage().data_ptr() == call.inputs["q"].data_ptr() for t in kept)


def test_lies_in_memory_as_attention_reads_it() -> None:
    """[B, S, H, D], whatever the strides of the input."""
    for y in rope().forward():
        assert y.transpose(1, 2).is_contiguous()


Q, K, COS = torch.ones(2, 4, 3, 8), torch.ones(2, 1, 3, 8), torch.ones(1, 3, 4)
AT = torch.zeros(2, 3, dtype=torch.int64)
BAD: dict[str, tuple[Any, str]] = {
    "q": (lambda: pyft.rope(Q[0], None, COS, COS), r"rope: q is torch.float32 \(4, 3, 8\); pass"),
    "integers": (lambda: pyft.rope(Q.int(), None, COS, COS), "rope: q is torch.int32"),
    "k": (
        lambda: pyft.rope(Q, K[:, :, :2], COS, COS),
        r"k \(2, 1, 2, 8\) does not fit q .*\[2, H, 3, 8\]",
    ),
    "batch of k": (lambda: pyft.rope(Q, K[:1], COS, COS), r"k \(1, 1, 3, 8\) does not fit q"),
    "dtype of k": (
        lambda: pyft.rope(Q, K.half(), COS, COS),
        "q is torch.float32 and k is torch.float16; cast",
    ),
    "sin": (lambda: pyft.rope(Q, K, COS, COS[..., :3]), r"cos .*\(1, 3, 4\) and sin .*\(1, 3, 3\)"),
    "dtype of sin": (
        lambda: pyft.rope(Q, K, COS, COS.half()),
        "cos torch.float32 .* and sin torch.float16",
    ),
    "integer angles": (lambda: pyft.rope(Q, K, COS.int(), COS.int()), "must be floating tensors"),
    "tokens": (
        lambda: pyft.rope(Q, K, COS[:, :2], COS[:, :2]),
        r"cos \(1, 2, 4\) does not fit q .*\[2 or 1, 3, R/2\]",
    ),
    "batch": (
        lambda: pyft.rope(Q, K, COS.repeat(3, 1, 1), COS.repeat(3, 1, 1)),
        r"cos \(3, 3, 4\) does not fit",
    ),
    "too many": (lambda: pyft.rope(Q, K, torch.ones(1, 3, 5), torch.ones(1, 3, 5)), "with R <= 8"),
    "no angle": (lambda: pyft.rope(Q, K, COS[..., :0], COS[..., :0]), "does not fit q"),
    "no table": (lambda: pyft.rope(Q, K, COS, COS, AT), r"need \[P, R/2\] with R <= 8"),
    "no positions": (lambda: pyft.rope(Q, K, COS[0], COS[0]), r"cos \(3, 4\) does not fit q"),
    "positions": (
        lambda: pyft.rope(Q, K, COS[0], COS[0], AT[:1]),
        r"positions are torch.int64 \(1, 3\); need integers \(2, 3\)",
    ),
    "floating positions": (
        lambda: pyft.rope(Q, K, COS[0], COS[0], AT.float()),
        "positions are torch.float32",
    ),
    "device": (
        lambda: pyft.rope(Q, K, COS.to("meta"), COS.to("meta")),
        "q is on cpu and cos on meta; move one",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str) -> None:
    check_refused(*BAD[what])


@pytest.mark.parametrize("wrong", [-1, 9])
def test_positions_outside_the_tables(wrong: int) -> None:
    q, table = torch.randn(1, 2, 3, 8), torch.randn(9, 4)
    positions = torch.tensor([[0, 8, wrong]])
    with pytest.raises(UsageError, match=r"positions reach from .*rows 0 to 8"):
        pyft.rope(q, None, table, table, positions)
