"""lora_mlp against the reference in float64; what it keeps and makes again. ``test_lora_linear``
and ``test_lora_qkv`` have what its projections do.
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
    check_equal,
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
from pyft.ops.qlinear import FUSED_ROWS
from pyft.reference.lora_mlp import lora_mlp as reference

DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
MANY = max(FUSED_ROWS["cpu"].values()) + 6  # rows enough that a weight is decoded for them
SCALES = {"gate": SCALE, "up": 0.5, "down": 0.8}
NAMES = tuple(SCALES)

# What differs from 9 rows of 64, dense gate and up to 96, down to 64, adapters of rank 4, silu.
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    **{name: {"activation": name} for name in ("gelu", "gelu_tanh", "relu2")},
    "merged": {"merged": True},
    "merged nf4": {"merged": True, "kinds": ("nf4",) * 3, "m": MANY},
    "merged recomputed": {"merged": True, "recompute": True, "p": 0.2},
    "ranks differ": {"ranks": (1, 3, 64)},
    "rank 512": {"ranks": (512, 2, 512)},
    "no adapter on up": {"ranks": (4, None, 8)},
    "adapter on down only": {"ranks": (None, None, 3), "p": 0.5},
    "no adapter at all": {"ranks": (None, None, None)},
    "no bias": {"bias": False},
    "dropout": {"p": 0.3},
    "odd": {"m": (3, 1), "k": 65, "i": 33, "n": 7, "ranks": (3, 2, 1)},
    "one row": {"m": 1},
    "vector": {"m": ()},
    **{kind: {"kinds": (kind,) * 3} for kind in QUANTIZED},
    **{f"{kind}, many rows": {"kinds": (kind,) * 3, "m": MANY} for kind in QUANTIZED},
    "mixed": {"kinds": ("nf4", "dense", "int8"), "m": MANY, "ranks": (3, 5, 7)},
    "mixed, dropped": {"kinds": ("dense", "columns", "nf4"), "m": MANY, "p": 0.4},
    "recomputed": {"recompute": True, "kinds": ("nf4",) * 3, "m": MANY, "p": 0.3},
    "frozen a": {"frozen": "a"},
    "frozen a, recomputed": {"frozen": "a", "recompute": True},
    "frozen weights": {"frozen": "weight bias"},
    "frozen x": {"frozen_x": True, "p": 0.3},
}


def mlp(
    dtype: torch.dtype = torch.float32,
    m: int | tuple[int, ...] = 9,
    k: int = 64,
    i: int = 96,
    n: int = 64,
    ranks: tuple[int | None, ...] = (4, 4, 4),
    kinds: tuple[str, ...] = ("dense",) * 3,
    merged: bool = False,
    activation: str = "silu",
    bias: bool = True,
    p: float = 0.0,
    seed: int = SEED,
    recompute: bool = False,
    frozen: str = "",
    frozen_x: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> Call:
    lead = m if isinstance(m, tuple) else (m,)
    inputs: dict[str, Any] = {"x": torch.randn(*lead, k).to(dtype).requires_grad_(not frozen_x)}
    shapes = ((2 * i if merged else i, k), (i, k), (n, i))
    for name, shape, rank, kind in zip(NAMES, shapes, ranks, kinds, strict=True):
        if not (merged and name == "up"):
            inputs |= linear(name, *shape, rank, dtype, kind, bias, adapter_dtype, frozen)
    call = called(activation, p, recompute, seed)

    def specified(t: Any) -> tuple[Tensor]:
        return (reference(t["x"], *projections(t), activation, p, seed),)

    return Call("lora_mlp", inputs, lambda t: call(t, t["x"], None), specified)


def projections(t: Any) -> list[Any]:
    return [given(t, name, SCALES[name]) if f"{name}.weight" in t else None for name in NAMES]


def called(
    activation: str = "silu", p: float = 0.0, recompute: bool = False, seed: int = SEED
) -> Any:
    """The op as ``norm_input_cases`` calls it."""

    def call(t: Any, x: Tensor, norm_input: Any) -> tuple[Tensor]:
        static = {"dropout_p": p, "seed": seed, "recompute": recompute}
        return (pyft.lora_mlp(x, *projections(t), activation, norm_input=norm_input, **static),)

    return call


@DTYPE
@pytest.mark.parametrize("case", CASES)
def test_error_rule(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        check_close(mlp(dtype, **CASES[case]))
    else:
        check_rule(lambda: mlp(dtype, **CASES[case]), draws=12 if "m" in CASES[case] else 6)


BEHAVING: dict[str, dict[str, Any]] = {
    "dense": {"p": 0.3, "m": (2, 3)},
    "merged": {"merged": True, "kinds": ("nf4",) * 3, "m": MANY},
    "mixed": CASES["mixed"] | {"recompute": True, "ranks": (3, None, 7), "p": 0.3},
}


@BEHAVIOUR
@pytest.mark.parametrize("case", BEHAVING)
def test_behaviour(case: str, behaviour: Any) -> None:
    behaviour(mlp(**BEHAVING[case]))


@NORM_INPUT
@pytest.mark.parametrize("case", ["dense", "mixed", "recomputed", "merged nf4", "frozen a"])
def test_norm_input(case: str, check: Any) -> None:
    options = CASES[case] | {"m": MANY}
    call = called(p=options.get("p", 0.0), recompute=options.get("recompute", False))
    check(lambda **more: mlp(**options, **more).inputs, call)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_gradcheck(activation: str) -> None:
    small: dict[str, Any] = {"m": 2, "k": 3, "i": 4, "n": 2, "ranks": (2, None, 1), "p": 0.3}
    for more in ({}, {"merged": True}, {"recompute": True}, {"kinds": ("nf4", "dense", "nf4")}):
        gradcheck(mlp(torch.float64, activation=activation, **small, **more))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [0, (2, 0)], ids=str)
def test_empty_batch(m: int | tuple[int, ...], kind: str, recompute: bool) -> None:
    call = mlp(m=m, kinds=(kind,) * 3, p=0.5, recompute=recompute)
    found = call.run()
    assert found["y0"].shape == (*((m,) if isinstance(m, int) else m), 64)
    assert all((found[name] == 0).all() for name in call.leaves())


@pytest.mark.parametrize("adapter", QUANTIZED_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
def test_adapters_of_another_dtype(dtype: torch.dtype, adapter: torch.dtype) -> None:
    def make() -> Call:
        return mlp(dtype, kinds=("nf4",) * 3, m=MANY, adapter_dtype=adapter)

    found = make().run()
    assert all(found[f"{name}.{part}"].dtype == adapter for name in NAMES for part in "ab")
    check_rule(make)


@pytest.mark.parametrize("case", ["dense", "mixed", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast(dtype: torch.dtype, case: str) -> None:
    check_autocast(lambda: mlp(**CASES[case] | {"p": 0.2}), dtype)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_gate_and_up_of_one_weight(kind: str) -> None:
    """The gate's rows and then up's are what the two are apart."""
    call = mlp(merged=True, m=MANY, p=0.3)
    t = call.inputs
    apart = {name: value for name, value in t.items() if not name.startswith("gate")}
    for part in ("weight", "bias", "b"):
        apart[f"gate.{part}"], apart[f"up.{part}"] = t[f"gate.{part}"].detach().chunk(2)
    apart["gate.a"] = apart["up.a"] = t["gate.a"]
    arguments = [given(apart, name, scale) for name, scale in (("gate", SCALE), ("up", SCALE))]
    if kind == "nf4":
        whole = pyft.quantize(t["gate.weight"].detach())
        t["gate.weight"] = whole
        weights = whole.dequantize().chunk(2)
        arguments = [(w, *rest) for w, (_, *rest) in zip(weights, arguments, strict=True)]
    down = given(apart, "down", SCALES["down"])
    y = pyft.lora_mlp(t["x"], *arguments, down, dropout_p=0.3, seed=SEED)
    check_near({"y": call.forward()[0]}, {"y": y})


@pytest.mark.parametrize("case", ["dense", "merged nf4", "mixed, dropped", "frozen a", "gelu"])
def test_recompute_changes_no_gradient(case: str) -> None:
    call = mlp(**CASES[case])
    found = call.run()
    again = called(CASES[case].get("activation", "silu"), CASES[case].get("p", 0.0), recompute=True)
    call.op = lambda t: again(t, t["x"], None)
    check_equal(call.run(), found)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_what_is_kept(kind: str, merged: bool) -> None:
    """gate(x) and up(x), or with ``recompute`` neither; the adapters' inputs; never h."""
    options: dict[str, Any] = {"kinds": (kind,) * 3, "m": MANY, "p": 0.5, "merged": merged}
    adapters = MANY * (8 if merged else 12) * 4 + 8
    kept = {again: saved_bytes(mlp(**options, recompute=again)) for again in (False, True)}
    assert kept[True] <= adapters
    assert kept[False] <= adapters + 2 * MANY * 96 * 4


@pytest.mark.parametrize("frozen", ["weight", "a weight"])
def test_x_is_kept_where_it_is_needed(frozen: str) -> None:
    call = mlp(m=MANY, frozen=frozen)
    op = call.op
    held = saved_bytes(call)
    call.op = lambda t: op({**t, "x": t["x"] * 1})
    assert saved_bytes(call) - held == (0 if "a" in frozen.split() else MANY * 64 * 4)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**64 - 1])
def test_masks_of_any_seed(seed: int) -> None:
    """Down's input is dropped by the mask of seed + 1, the last seed's by that of the first."""
    call = mlp(p=0.5, seed=seed)
    found = call.run()
    with pyft.backend("reference"):
        check_near(found, call.run())
    reference_call = mlp(p=0.5, seed=seed)
    reference_call.inputs, reference_call.dys = call.inputs, call.dys
    check_near(found, {n: v.float() for n, v in reference_call.expected(torch.float64).items()})


def test_dropout_without_a_seed_follows_torch() -> None:
    call = mlp()
    arguments = (call.inputs["x"], *projections(call.inputs))
    torch.manual_seed(1)
    first, second = (pyft.lora_mlp(*arguments, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, pyft.lora_mlp(*arguments, dropout_p=0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("way", ["plain", "told", "beside"])
def test_small_scratch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than the scratch may hold are decoded and multiplied slab by slab; what the
    adapters put beside them counts too.
    """
    wide = {"k": 512, "i": 1024, "n": 512, "kinds": ("nf4",) * 3, "m": MANY}
    normed = Normed(lambda **options: mlp(**wide, **options).inputs, called())
    expected = normed.run(way)
    pyft.limit_scratch(1 << 20)
    with counting(monkeypatch) as decodes:
        found = normed.run(way)
    assert len(decodes) > 9
    check_near(found, expected)
    memory = buffer().memory
    assert memory is not None
    assert memory.nbytes <= 1 << 20


def test_too_little_room() -> None:
    too_little_room_is_refused(lambda **more: mlp(**CASES["mixed"], **more).inputs, called())


X, W, A, B = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8), torch.ones(4, 3)
IN, OUT = (W, None, A, B, 1.0), (torch.ones(8, 4), None, None, None, 1.0)
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "x": ((X[:, :7], IN, IN, OUT), r"lora_mlp: gate: x \(2, 7\) and weight \(4, 8\) do not fit"),
    "up": ((X, IN, (W[:, :7], None, A, B, 1.0), OUT), r"lora_mlp: up: x \(2, 8\) and weight"),
    "down": ((X, IN, IN, IN), r"lora_mlp: down: x \(0, 4\) and weight \(4, 8\) do not fit"),
    "features": ((X, IN, (W[:2], None, None, None, 1.0), OUT), "gate gives 4 features and up 2"),
    "odd": ((X, (W[:3], None, None, None, 1.0), None, OUT), "gate gives 3 features and up is None"),
    "merged": ((X, IN, None, OUT), r"lora_mlp: down: x \(0, 2\) and weight \(8, 4\) do not fit"),
    "b": ((X, (W, None, A, A, 1.0), IN, OUT), r"gate: lora_a \(3, 8\) and lora_b \(3, 8\) do not"),
    "only b": ((X, IN, (W, None, None, B, 1.0), OUT), "up: lora_a and lora_b go together"),
    "bias": ((X, IN, IN, (OUT[0], X, None, None, 1.0)), r"down: bias \(2, 8\) does not fit"),
    "dtype": ((X.half(), IN, IN, OUT), "gate: x is torch.float16 and weight is torch.float32"),
    "tuple": ((X, IN, W, OUT), r"lora_mlp: up must be \(weight, bias, lora_a, lora_b, scale\)"),
    "activation": ((X, IN, IN, OUT, "tanh"), "activation 'tanh' is not one of silu, gelu, gelu_"),
    "p": ((X, IN, IN, OUT, "silu", -0.1), r"lora_mlp: dropout probability -0.1 is outside \[0, 1"),
    "device": ((X, IN, IN, (OUT[0].to("meta"), *OUT[1:])), "x is on cpu and weight on meta"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str) -> None:
    arguments, message = BAD[what]
    check_refused(lambda: pyft.lora_mlp(*arguments), message)
