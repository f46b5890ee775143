"""lora_qkv against the reference in float64; what it keeps; that x is made again of the norm's
input. ``test_lora_linear`` has what one projection does.
"""

from typing import Any

import pytest
import torch
from lora_cases import (
    QUANTIZED,
    SCALE,
    SEED,
    Call,
    check_close,
    check_near,
    check_rule,
    given,
    linear,
    saved_bytes,
)
from norm_input_cases import NORM_INPUT, Normed, too_little_room_is_refused
from op_behaviours import BEHAVIOUR, check_autocast, check_refused, gradcheck
from scratch_tools import buffer, counting, fresh_scratch  # noqa: F401
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, dtype_name
from torch import Tensor

import pyft
from pyft.errors import UsageError
from pyft.ops.qlinear import FUSED_ROWS
from pyft.reference.lora_qkv import lora_qkv as reference

DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
NARROW = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
PARTS = ("weight", "bias", "a", "b")
MANY = max(FUSED_ROWS["cpu"].values()) + 6  # rows enough that a weight is decoded for them

# What differs from 9 rows of 96, dense projections to 32, 16 and 16 with adapters of rank 4.
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "ranks differ": {"ranks": (1, 3, 64)},
    "rank 512": {"ranks": (512, 512, 2)},
    "no adapter on k": {"ranks": (4, None, 8)},
    "no adapter at all": {"ranks": (None, None, None)},
    "no adapter at all, dropped": {"ranks": (None, None, None), "p": 0.5},
    "no bias": {"bias": False},
    "dropout": {"p": 0.3},
    "dropout of some": {"p": 0.5, "ranks": (None, 3, 5)},
    "odd": {"m": (3, 1), "k": 101, "ns": (33, 7, 1), "ranks": (3, 2, 1)},
    "one row": {"m": 1},
    "vector": {"m": ()},
    **{kind: {"kinds": (kind,) * 3} for kind in QUANTIZED},
    **{f"{kind}, many rows": {"kinds": (kind,) * 3, "m": MANY} for kind in QUANTIZED},
    "mixed": {"kinds": ("nf4", "dense", "int8"), "m": MANY, "ranks": (3, 5, 7)},
    "mixed, dropped": {"kinds": ("dense", "columns", "nf4"), "m": MANY, "p": 0.4},
    "nf4 of another dtype, odd": {"kinds": ("nf4",) * 3, "k": 100, "ns": (33, 7, 1), "m": MANY},
    "frozen a": {"frozen": "a"},
    "frozen weights": {"frozen": "weight bias"},
    "frozen x": {"frozen_x": True, "p": 0.3},
}


def qkv(
    dtype: torch.dtype = torch.float32,
    m: int | tuple[int, ...] = 9,
    k: int = 96,
    ns: tuple[int, ...] = (32, 16, 16),
    ranks: tuple[int | None, ...] = (4, 4, 4),
    kinds: tuple[str, ...] = ("dense",) * 3,
    bias: bool = True,
    p: float = 0.0,
    scales: tuple[float, ...] = (SCALE, 0.5, 2.0),
    frozen: str = "",
    frozen_x: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> Call:
    lead = m if isinstance(m, tuple) else (m,)
    inputs: dict[str, Any] = {"x": torch.randn(*lead, k).to(dtype).requires_grad_(not frozen_x)}
    for name, n, rank, kind in zip("qkv", ns, ranks, kinds, strict=True):
        inputs |= linear(name, n, k, rank, dtype, kind, bias, adapter_dtype, frozen)

    def op(t: Any) -> tuple[Tensor, ...]:
        projections = (given(t, name, scale) for name, scale in zip("qkv", scales, strict=True))
        return pyft.lora_qkv(t["x"], *projections, dropout_p=p, seed=SEED)

    def specified(t: Any) -> list[Tensor]:
        projections = [given(t, name, scale) for name, scale in zip("qkv", scales, strict=True)]
        return reference(t["x"], projections, p, SEED)

    return Call("lora_qkv", inputs, op, specified)


@DTYPE
@pytest.mark.parametrize("case", CASES)
def test_error_rule(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        check_close(qkv(dtype, **CASES[case]))
    else:
        check_rule(lambda: qkv(dtype, **CASES[case]), draws=12 if "row" in case else 6)


BEHAVING = {
    "dense": {"p": 0.3, "m": (2, 3)},
    "mixed": CASES["mixed"] | {"ranks": (3, None, 7)},
    "few rows": {"kinds": ("nf4", "columns", "mxfp4"), "p": 0.3},
}


@BEHAVIOUR
@pytest.mark.parametrize("case", BEHAVING)
def test_behaviour(case: str, behaviour: Any) -> None:
    behaviour(qkv(**BEHAVING[case]))


def called(p: float = 0.0) -> Any:
    """The op as ``norm_input_cases`` calls it."""

    def call(t: Any, x: Tensor, norm_input: Any) -> tuple[Tensor, ...]:
        projections = (given(t, name) for name in "qkv")
        return pyft.lora_qkv(x, *projections, dropout_p=p, seed=SEED, norm_input=norm_input)

    return call


@NORM_INPUT
@pytest.mark.parametrize("case", ["dense", "mixed", "dropout", "frozen a", "frozen weights"])
def test_norm_input(case: str, check: Any) -> None:
    options = CASES[case] | {"m": MANY}
    check(lambda **more: qkv(**options, **more).inputs, called(options.get("p", 0.0)))


def test_gradcheck() -> None:
    gradcheck(qkv(torch.float64, (2, 2), 5, (3, 2, 2), (2, None, 1), p=0.3))
    gradcheck(qkv(torch.float64, 3, 5, (3, 2, 2), (2, None, 1), ("nf4", "dense", "dense")))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [0, (2, 0)], ids=str)
def test_empty_batch(m: int | tuple[int, ...], kind: str) -> None:
    call = qkv(m=m, kinds=(kind,) * 3, p=0.5)
    found = call.run()
    lead = (m,) if isinstance(m, int) else m
    assert [found[f"y{i}"].shape for i in range(3)] == [(*lead, n) for n in (32, 16, 16)]
    assert all((found[name] == 0).all() for name in call.leaves())


@pytest.mark.parametrize("adapter", QUANTIZED_DTYPES, ids=dtype_name)
@NARROW
def test_adapters_of_another_dtype(dtype: torch.dtype, adapter: torch.dtype) -> None:
    def make() -> Call:
        return qkv(dtype, kinds=("nf4",) * 3, m=MANY, adapter_dtype=adapter)

    found = make().run()
    assert all(found[f"{name}.a"].dtype == found[f"{name}.b"].dtype == adapter for name in "qkv")
    check_rule(make)


@pytest.mark.parametrize("case", ["dense", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast(dtype: torch.dtype, case: str) -> None:
    check_autocast(lambda: qkv(**CASES[case] | {"p": 0.2}), dtype)


def test_a_scale_is_a_scale() -> None:
    """alpha / R, or alpha / sqrt(R) of rsLoRA: whatever it is, it multiplies, and 0 is none."""
    call = qkv(scales=(8 / 4, 8 / 4**0.5, 0.0))
    for name in "kv":
        call.inputs |= {f"{name}.{part}": call.inputs[f"q.{part}"] for part in PARTS}
    q, k, v = call.forward()
    check_near({"k": k - v}, {"k": 2 * (q - v)})
    x, w, bias = (call.inputs[name] for name in ("x", "q.weight", "q.bias"))
    check_near({"v": v}, {"v": torch.nn.functional.linear(x, w, bias)})


def test_one_mask_for_all_three_and_for_the_linear() -> None:
    call = qkv(p=0.5, ns=(16, 16, 16), scales=(SCALE,) * 3)
    x = call.inputs["x"]
    dropped = pyft.dropout(x, 0.5, SEED)
    for name, y in zip("qkv", call.forward(), strict=True):
        w, bias, a, b, scale = given(call.inputs, name)
        alone = pyft.lora_linear(x, w, a, b, scale, bias, 0.5, SEED)
        plain = torch.nn.functional.linear(x, w, bias) + scale * dropped @ a.t() @ b.t()
        check_near({"alone": alone, "plain": plain}, {"alone": y, "plain": y})


def test_dropout_without_a_seed_follows_torch() -> None:
    call = qkv()
    arguments = (call.inputs["x"], *(given(call.inputs, name) for name in "qkv"))
    torch.manual_seed(1)
    first, second = (pyft.lora_qkv(*arguments, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert all(map(torch.equal, first, pyft.lora_qkv(*arguments, dropout_p=0.5)))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("used", [0, 1, 2])
def test_only_one_output_is_used(used: int) -> None:
    call = qkv(kinds=("nf4", "dense", "nf4"), m=MANY)
    op, reference_of_all = call.op, call.reference
    call.op = lambda t: (op(t)[used],)
    found = call.run()
    # What the others' gradients are without them: zero.
    call.reference = lambda t: (reference_of_all(t)[used], *(0 * y for y in reference_of_all(t)))
    call.dys += [torch.zeros(MANY, n) for n in (32, 16, 16)]
    wanted = call.expected(torch.float64)
    check_near(found, {name: wanted[name].float() for name in found})


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_keeps_x_and_s_only(kind: str, p: float) -> None:
    call = qkv(kinds=(kind,) * 3, m=MANY, p=p, frozen="weight")
    assert saved_bytes(call) <= MANY * 12 * 4 + 8  # S and a seed; x is the caller's
    call.inputs["x"] = torch.randn(MANY, 96) * 1
    held = call.inputs.pop("x")
    call.inputs = {"z": held, **call.inputs}
    op, call.op = call.op, lambda t: op({**t, "x": t["z"] * 1})
    assert saved_bytes(call) <= MANY * (12 + 96) * 4 + 8


def test_a_frozen_a_does_not_keep_x() -> None:
    """LoRA-FA: B's gradient needs S alone."""
    call = qkv(kinds=("nf4",) * 3, m=MANY, frozen="a weight")
    op = call.op
    call.op = lambda t: op({**t, "x": t["x"] * 1})
    assert saved_bytes(call) <= MANY * 12 * 4
    for name in "qkv":
        call.inputs[f"{name}.b"].requires_grad_(False)
    assert saved_bytes(call) == 0


@pytest.mark.parametrize("way", ["plain", "told", "beside"])
def test_small_scratch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than the scratch may hold are decoded and multiplied slab by slab; what the
    adapters put beside them counts too.
    """
    wide = {"k": 512, "ns": (512, 600, 90), "kinds": ("nf4",) * 3, "m": MANY}
    normed = Normed(lambda **options: qkv(**wide, **options).inputs, called())
    expected = normed.run(way)
    pyft.limit_scratch(1 << 20)
    with counting(monkeypatch) as decodes:
        found = normed.run(way)
    assert len(decodes) > 6
    check_near(found, expected)
    memory = buffer().memory
    assert memory is not None
    assert memory.nbytes <= 1 << 20


def test_too_little_room() -> None:
    too_little_room_is_refused(lambda **more: qkv(**CASES["mixed"], **more).inputs, called())


X, W, A, B = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8), torch.ones(4, 3)
GOOD = (W, None, A, B, 1.0)
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "x": ((X[:, :7], GOOD, GOOD, GOOD), r"lora_qkv: q_proj: x \(2, 7\) and weight \(4, 8\)"),
    "k": ((X, GOOD, (W[:, :7], None, A, B, 1.0), GOOD), r"lora_qkv: k_proj: x \(2, 8\) and weight"),
    "v": (
        (X, GOOD, GOOD, (W, None, A, B.t(), 1.0)),
        r"v_proj: lora_a .*need \[R, 8\] and \[4, R\]",
    ),
    "only a": ((X, GOOD, (W, None, A, None, 1.0), GOOD), "k_proj: lora_a and lora_b go together"),
    "bias": ((X, (W, W[0], A, B, 1.0), GOOD, GOOD), r"q_proj: bias \(8,\) does not fit weight"),
    "dtype": (
        (X, (W.half(), None, A, B, 1.0), GOOD, GOOD),
        "q_proj: x is torch.float32 and weight",
    ),
    "integers": (
        (X.int(), GOOD, GOOD, GOOD),
        "lora_qkv: q_proj: x is torch.int32; pass a floating",
    ),
    "device": ((X, (W.to("meta"), *GOOD[1:]), GOOD, GOOD), "x is on cpu and weight on meta"),
    "too few": (
        (X, GOOD[:4], GOOD, GOOD),
        r"q_proj must be \(weight, bias, lora_a, lora_b, scale\)",
    ),
    "a tensor": ((X, GOOD, W, GOOD), r"k_proj must be \(weight, bias"),
    "p": ((X, GOOD, GOOD, GOOD, 1.0), r"lora_qkv: dropout probability 1.0 is outside \[0, 1\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str) -> None:
    arguments, message = BAD[what]
    check_refused(lambda: pyft.lora_qkv(*arguments), message)


def test_torch_func_is_refused() -> None:
    x, w = torch.randn(3, 8), torch.randn(4, 8)

    def loss(x: torch.Tensor) -> torch.Tensor:
        given = (w, None, None, None, 1.0)
        return sum(y.sum() for y in pyft.lora_qkv(x, given, given, given))  # type: ignore[return-value]

    with pytest.raises(UsageError, match=r"torch\.func"):
        torch.func.grad(loss)(x)
    with pyft.backend("reference"):
        torch.testing.assert_close(torch.func.grad(loss)(x), 3 * w.sum(0).expand(3, 8))
