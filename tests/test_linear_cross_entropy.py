"""linear_cross_entropy against torch's cross_entropy of the logits in float64: the loss and every
gradient, with every option and head, and what holds of every op.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import Call, check_near, check_rule
from loss_cases import (
    LOSS_BEHAVIOUR,
    adapter,
    check_double,
    inputs,
    logits,
    loss_call,
    loss_of,
    written_out,
)
from op_behaviours import gradcheck
from shapes import LINEAR_DTYPES, dtype_name
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyft
from pyft.errors import UsageError
from pyft.reference import linear_cross_entropy as reference

DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
Options = dict[str, Any]

# what is given, and how it is called
CASES: dict[str, tuple[Options, Options]] = {
    "mean": ({}, {}),
    "sum": ({"bias": True}, {"reduction": "sum"}),
    "none": ({"bias": True}, {"reduction": "none"}),
    "no labels ignored": ({"ignored": 0.0}, {}),
    "adapter": ({"rank": 3, "bias": True}, {}),
    "adapter, frozen head": ({"rank": 5, "frozen": "weight"}, {}),
    "adapter, none": ({"rank": 3, "frozen": "weight"}, {"reduction": "none"}),
    "frozen": ({"frozen": "weight"}, {}),
    "only the head": ({"frozen": "hidden", "bias": True}, {}),
    "only the bias": ({"frozen": "hidden weight", "bias": True}, {}),
    "capped": ({}, {"softcap": 2.5}),
    "capped and scaled": ({"bias": True}, {"softcap": 4.0, "logit_scale": 1.8}),
    "negative scale": ({"rank": 2}, {"logit_scale": -0.6}),
    "smoothing": ({"bias": True}, {"label_smoothing": 0.1}),
    "all smoothing": ({}, {"label_smoothing": 1.0}),
    "z-loss": ({}, {"z_loss": 0.2}),
    "classes": ({"class_weights": True, "bias": True}, {}),
    "classes, smoothing": ({"class_weights": True}, {"label_smoothing": 0.3}),
    "classes, smoothing, sum": (
        {"class_weights": True},
        {"label_smoothing": 0.3, "z_loss": 0.1, "reduction": "sum"},
    ),
    "tokens": ({"token_weights": True}, {}),
    "tokens, sum": ({"token_weights": True}, {"reduction": "sum"}),
    "tokens, none": ({"token_weights": True}, {"reduction": "none"}),
    "items": ({"token_weights": True}, {"num_items_in_batch": 23.5}),
    "shifted": ({"n": (3, 6)}, {"shift": True}),
    "shifted, none": ({"n": (2, 2, 4)}, {"shift": True, "reduction": "none"}),
    "all": (
        {"n": (2, 9), "bias": True, "rank": 3, "token_weights": True, "class_weights": True},
        {"softcap": 5.0, "logit_scale": 1.3, "label_smoothing": 0.2, "z_loss": 0.05, "shift": True},
    ),
    "all, none": (
        {"n": (2, 9), "bias": True, "rank": 3, "token_weights": True, "class_weights": True},
        {"softcap": 5.0, "label_smoothing": 0.2, "z_loss": 0.05, "reduction": "none"},
    ),
}  # fmt: skip
CASE = pytest.mark.parametrize("case", CASES)


def call(case: str, dtype: torch.dtype = torch.float32, **more: Any) -> Call:
    options, how = CASES[case]
    return loss_call(inputs(dtype=dtype, **options), **(how | more))


@CASE
@DTYPE
def test_error_rule(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        check_double(call(case, dtype))
    else:
        check_rule(lambda: call(case, dtype), draws=48)


@pytest.mark.parametrize("size", [(1, 37, 5), (33, 2, 3), (7, 129, 65), (40, 1001, 16)])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES[:2], ids=dtype_name)
def test_sizes(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, v, d = size
    for reduction in ("mean", "none"):
        check_rule(
            lambda r=reduction: loss_call(inputs(n, v, d, dtype, ignored=0.0), reduction=r),
            draws=12,
        )


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8_e4m3", "int4_zp", "mxfp4", "columns"])
def test_quantized_heads(kind: str, rank: int | None, reduction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_rule(
            lambda dtype=dtype: loss_call(
                inputs(9, 40, 96, dtype, kind, bias=True, rank=rank), reduction=reduction
            ),
            draws=12,
        )


def test_a_head_of_one_label() -> None:
    """There is nothing to learn: the loss is 0 but for the rounding of logits, and so is all."""
    for n, d in ((1, 1), (5, 3)):
        for reduction in ("mean", "none"):
            call = loss_call(inputs(n, 1, d, bias=True, ignored=0.0), reduction=reduction)
            size = logits(call.inputs).abs().max()
            for value in call.run().values():
                assert value.abs().max() <= 1e-6 * max(1.0, size)


def budget_of(rows: int, v: int = 37, itemsize: int = 4) -> float:
    return rows * v * itemsize / 2**20


@pytest.mark.parametrize("case", ["mean", "all", "all, none", "adapter", "none", "tokens"])
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_any_budget(case: str, kind: str) -> None:
    options, how = CASES[case]
    given = inputs(**{**options, "n": (4, 25), "kind": kind})
    expected = loss_call(given, **how).run()
    check = loss_call(given, **how)
    check.dtype = torch.float32
    check_rule(lambda: check, draws=1)
    for rows in (1, 2, 7, 99, 100, 1000):
        found = loss_call(given, **how, budget=budget_of(rows))
        found.dys = check.dys
        for name, value in found.run().items():
            wanted = check.expected(torch.float64)[name]
            error = (value.double() - wanted).abs().max()
            assert error <= 32 * 1.2e-7 * max(1.0, wanted.abs().max()), (rows, name)
    assert expected.keys() == check.run().keys()


def test_more_rows_than_labels_by_the_smallest_budget() -> None:
    """A column of the tiles for the head's gradient is larger than a row of logits."""
    call = loss_call(inputs(300, 3, 8, bias=True), budget=budget_of(1, 3))
    check_rule(lambda: call, draws=1)
    with pytest.raises(UsageError, match="budget"):
        loss_of(call.inputs, budget=budget_of(1, 3) * 0.99)


BEHAVED = {
    "mean": lambda: call("mean"),
    "none": lambda: call("all, none"),
    "all": lambda: call("all"),
    "frozen": lambda: call("frozen"),
    "bf16": lambda: loss_call(inputs(6, 40, 64, torch.bfloat16, bias=True, token_weights=True)),
    "quantized": lambda: loss_call(
        inputs(6, 40, 64, kind="nf4", rank=3, bias=True, token_weights=True), num_items_in_batch=11
    ),
    "small budget": lambda: call("all", budget=budget_of(4)),
}


@LOSS_BEHAVIOUR
@pytest.mark.parametrize("name", BEHAVED)
def test_behaviour(name: str, behaviour: Any) -> None:
    behaviour(BEHAVED[name]())


@pytest.mark.parametrize("case", ["mean", "none", "all"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_for_any_length(case: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for n in (9, 14, 3):
            options, how = CASES[case]
            given = inputs(**{**options, "n": (2, n)})
            plain = loss_call(given, **how)
            expected = plain.run()
            plain.op = lambda i, how=how: [compiled(i, **how)]
            check_near(plain.run(), expected)


@pytest.mark.parametrize("case", ["mean", "none", "all", "adapter, frozen head"])
def test_autocast(case: str) -> None:
    options, how = CASES[case]
    options = options | {"n": (4, 33)}  # a mean over few tokens may be divided by next to nothing

    def cast() -> Call:
        made = loss_call(inputs(**options), **how)
        made.dtype = torch.bfloat16
        return made

    def run(made: Call) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return made.run()

    made = cast()
    found = run(made)
    assert found["y0"].dtype == torch.float32
    assert all(found[name].dtype == torch.float32 for name in made.leaves())

    class Cast(Call):
        def run(self) -> dict[str, Tensor]:
            return run(super())  # type: ignore[arg-type]

    def again() -> Call:
        made = cast()
        made.__class__ = Cast
        return made

    check_rule(again, draws=48)


@pytest.mark.parametrize("name", ["mean", "none", "all", "all, none", "classes, smoothing, sum"])
def test_gradcheck(name: str) -> None:
    options, how = CASES[name]
    sizes = {"n": 4, "v": 5, "d": 3} | {k: (2, 2) for k in options if k == "n"}
    gradcheck(loss_call(inputs(**{**options, **sizes, "dtype": torch.float64}), **how))


def test_gradcheck_of_the_reference() -> None:
    given = inputs(5, 7, 3, torch.float64, bias=True, class_weights=True, token_weights=True)
    tokens = given["token_weights"].double().requires_grad_()
    leaves = (given["hidden"], given["weight"], given["bias"], tokens)
    for reduction in ("mean", "sum", "none"):

        def function(*x: Tensor, reduction: str = reduction) -> Tensor:
            return reference.linear_cross_entropy(
                x[0], x[1], given["labels"], x[2], -100, reduction, 3.0, 1.2, 0.1, 0.01,
                given["class_weights"], x[3],
            )  # fmt: skip

        assert torch.autograd.gradcheck(function, leaves)


@CASE
def test_the_reference_is_torchs(case: str) -> None:
    options, how = CASES[case]
    given = inputs(**{**options, "n": 18, "dtype": torch.float64})
    how = {name: value for name, value in how.items() if name != "shift"}
    weight = given["weight"]
    if given["a"] is not None:
        weight = weight + adapter(given)[2] * given["b"] @ given["a"]
    found = reference.linear_cross_entropy(
        given["hidden"], weight, given["labels"], given["bias"], **how,
        class_weights=given["class_weights"], token_weights=given["token_weights"],
    )  # fmt: skip
    torch.testing.assert_close(found, written_out(given, **how))


@settings(derandomize=True, max_examples=30)
@given(st.data())
def test_shapes_and_options(data: st.DataObject) -> None:
    draw, flag = data.draw, st.booleans()
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    v, d = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    frozen = " ".join(draw(st.sets(st.sampled_from(["hidden", "weight", "bias", "a", "b"]))))
    given = inputs(
        lead, v, d, torch.float64, bias=draw(flag), rank=draw(st.sampled_from([None, 1, 4])),
        ignored=draw(st.sampled_from([0.0, 0.5, 1.0])), token_weights=draw(flag),
        class_weights=draw(flag), frozen=frozen,
    )  # fmt: skip
    if given["class_weights"] is not None:
        given["class_weights"] += 0.1  # a mean over classes that all weigh nothing is another test
    how = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "logit_scale": draw(st.sampled_from([1.0, -1.5, 0.3])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.02])),
        "shift": bool(lead) and draw(flag),
    }
    budget = draw(st.sampled_from([None, v * 8 / 2**20, 3 * v * 8 / 2**20]))
    check_double(loss_call(given, **how, budget=budget))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_refused_by_torch_func(reduction: str) -> None:
    given = inputs()
    given = {n: x.detach() if isinstance(x, Tensor) else x for n, x in given.items()}

    def of(hidden: Tensor) -> Tensor:
        return loss_of({**given, "hidden": hidden}, reduction=reduction).sum()

    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(UsageError, match=r"torch\.func"):
            transform(of)(given["hidden"])
        with pyft.backend("reference"):
            found = transform(of)(given["hidden"])
    tangent = torch.func.jvp(
        lambda x: written_out({**given, "hidden": x}, reduction).sum(),
        (given["hidden"],), (given["hidden"],),
    )  # fmt: skip
    torch.testing.assert_close(found, tangent)


def test_fake_sizes_of_a_large_vocabulary() -> None:
    """Nothing of the logits' size is made where a step is traced."""
    with FakeTensorMode():
        hidden = torch.empty(2, 8192, 2304, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(256000, 2304, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(2, 8192, dtype=torch.int64)
        loss = pyft.linear_cross_entropy(hidden, weight, labels, shift=True)
        loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.dtype == torch.bfloat16


def test_evaluation_is_the_loss_of_training() -> None:
    given = inputs(bias=True, rank=3)
    expected = loss_of(given).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = loss_of(given)
            torch.testing.assert_close(found, expected)
            plain, metrics = loss_of(given, metrics=True)
            torch.testing.assert_close(plain, expected)
            u = logits(given)[given["labels"] != -100]
            right = (u.argmax(-1) == given["labels"][given["labels"] != -100]).float().mean()
            torch.testing.assert_close(metrics.accuracy, right)
