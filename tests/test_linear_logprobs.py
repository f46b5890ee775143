"""linear_logprobs against log_softmax of the logits in float64: each of its values and every
gradient, teachers of every kind, ties, rows that do not count, and what holds of every op.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import Call, check_near, check_rule, weight_of
from loss_cases import (
    ADAPTER,
    IGNORED,
    LOSS_BEHAVIOUR,
    check_double,
    inputs,
    logits,
    logprobs_call,
    logprobs_of,
    written_out_logprobs,
)
from op_behaviours import gradcheck
from shapes import LINEAR_DTYPES, dtype_name
from torch import Tensor
from torch.nn import functional

import pyft
from pyft.errors import UsageError
from pyft.reference import linear_logprobs as reference

DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
Options = dict[str, Any]
CASES: dict[str, tuple[Options, Options]] = {
    "plain": ({}, {}),
    "bias": ({"bias": True}, {"entropy": True}),
    "adapter": ({"bias": True, "rank": 3}, {"entropy": True}),
    "frozen": ({"frozen": "weight", "rank": 2}, {}),
    "only the head": ({"frozen": "hidden", "bias": True}, {"entropy": True}),
    "capped": ({}, {"softcap": 2.5, "entropy": True}),
    "scaled": ({"bias": True}, {"logit_scale": -1.6, "softcap": 6.0, "entropy": True}),
    "shifted": ({"n": (3, 6)}, {"shift": True, "entropy": True}),
    "taught": ({"bias": True}, {"kl": True}),
    "taught, all": (
        {"n": (2, 7), "bias": True, "rank": 3},
        {
            "kl": True, "entropy": True, "softcap": 5.0, "logit_scale": 1.2, "shift": True,
            "teacher_softcap": 3.0, "teacher_scale": 0.6,
        },
    ),
}  # fmt: skip
CASE = pytest.mark.parametrize("case", CASES)


def call(case: str, dtype: torch.dtype = torch.float32, **more: Any) -> Call:
    options, how = CASES[case]
    return logprobs_call(taught(inputs(dtype=dtype, **options)), **(how | more))


def taught(given: Options, width: int = 13, kind: str = "dense") -> Options:
    """With a teacher of another hidden size."""
    dtype, lead = given["hidden"].dtype, given["labels"].shape
    v = given["weight"].shape[0]
    given["teacher.hidden"] = torch.randn(*lead, width).to(dtype)
    given["teacher.weight"] = weight_of(kind, v, width, dtype)
    return given


@CASE
@DTYPE
def test_error_rule(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        check_double(call(case, dtype))
    else:
        check_rule(lambda: call(case, dtype), draws=32)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp4", "columns"])
def test_quantized(kind: str) -> None:
    """The student's head or the teacher's."""
    check_rule(lambda: logprobs_call(inputs(9, 40, 96, kind=kind, rank=3, bias=True), entropy=True))
    check_rule(
        lambda: logprobs_call(taught(inputs(9, 40, 16), 64, kind), kl=True, teacher_softcap=4.0)
    )


@pytest.mark.parametrize("part", ["logprob", "lse", "entropy", "kl"])
def test_each_part_alone(part: str) -> None:
    """Whichever of them a loss is made of, by any budget."""
    given = taught(inputs(40, bias=True, rank=2))
    leaves = {n: given[n] for n in ("hidden", "weight", "bias", "a", "b")}
    doubles = {
        n: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in given.items()
    }
    wide = {n: doubles[n].requires_grad_() for n in leaves}
    arriving = torch.randn(40)
    wanted = written_out_logprobs(doubles, teacher=logits(doubles, prefix="teacher."))[part]
    expected = torch.autograd.grad(wanted, list(wide.values()), arriving.double())
    teacher = pyft.Teacher(given["teacher.hidden"], given["teacher.weight"])
    for rows in (1, 3, 1000):
        found = logprobs_of(given, entropy=True, teacher=teacher, budget=2 * rows * 37 * 4 / 2**20)
        value = getattr(found, part)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(value, list(leaves.values()), arriving)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
def test_teachers_of_any_budget(dtype: torch.dtype, frozen: str) -> None:
    """Nor does it matter in how many parts the head's gradient is taken."""
    given = taught(inputs(60, 37, 8, dtype, frozen=frozen))
    call = logprobs_call(given, kl=True, entropy=True)
    whole = call.run()
    for rows in (2, 6, 20):
        part = logprobs_call(
            given, kl=True, entropy=True, budget=rows * 37 * dtype.itemsize / 2**20
        )
        part.dys = call.dys
        for name, value in part.run().items():
            size = max(1.0, float(whole[name].abs().max()))
            error = float((value.double() - whole[name].double()).abs().max())
            assert error <= 16 * torch.finfo(dtype).eps * size, (rows, name)


def test_a_teacher_with_everything() -> None:
    given = inputs(9, bias=True)
    hidden, weight = torch.randn(9, 5), torch.randn(37, 5)
    bias, a, b = torch.randn(37), torch.randn(2, 5), torch.randn(37, 2)
    named = {"hidden": hidden, "weight": weight, "bias": bias, "a": a, "b": b}
    teacher = pyft.Teacher(hidden, weight, bias, (a, b, ADAPTER), 3.0, -0.7)
    for tensor in named.values():
        tensor.requires_grad_()
    wanted = written_out_logprobs(given, teacher=logits(named, -0.7, 3.0).detach())["kl"]
    for name in ("auto", "reference"):
        with pyft.backend(name):
            found = logprobs_of(given, teacher=teacher).kl
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        found.sum().backward()
        assert all(tensor.grad is None for tensor in named.values())
    assert (found >= -1e-6).all()


def test_its_own_teacher() -> None:
    """A model says the same as itself."""
    given = inputs(40, 300, 24, ignored=0.0)
    teacher = pyft.Teacher(given["hidden"].detach(), given["weight"].detach())
    found = logprobs_of(given, teacher=teacher)
    assert (found.kl.abs() <= 4e-6).all()
    gradient = torch.autograd.grad(found.kl.sum(), given["hidden"])[0]
    assert gradient.abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_masked_labels_and_their_teacher(name: str) -> None:
    """-inf where neither has a probability."""
    given = taught(inputs(9, bias=True, ignored=0.0))
    mask = torch.zeros(37).index_fill(0, torch.arange(1, 37, 2), -torch.inf)
    with torch.no_grad():
        given["bias"] += mask
    given["labels"] = given["labels"] // 2 * 2
    teacher = pyft.Teacher(given["teacher.hidden"], given["teacher.weight"], mask)
    with pyft.backend(name):
        found = logprobs_of(given, entropy=True, teacher=teacher)
    for part in ("logprob", "lse", "entropy", "kl"):
        assert getattr(found, part).isfinite().all(), part
    kept = {**given, "bias": given["bias"].detach()[::2], "weight": given["weight"][::2]}
    kept["labels"] = given["labels"] // 2
    kept["teacher.weight"] = given["teacher.weight"][::2]
    wanted = written_out_logprobs(kept, teacher=logits(kept, prefix="teacher."))
    for part in ("logprob", "lse", "entropy", "kl"):
        torch.testing.assert_close(getattr(found, part), wanted[part], rtol=1e-5, atol=1e-5)
    found.kl.sum().backward()
    assert given["hidden"].grad.isfinite().all()


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
def test_ties_go_to_the_first(dtype: torch.dtype, name: str) -> None:
    # every logit seven times, and exact
    weight = torch.randint(-3, 4, (11, 8)).to(dtype).repeat(7, 1)
    hidden = torch.randint(-3, 4, (23, 8)).to(dtype)
    labels = torch.randint(77, (23,))
    with pyft.backend(name):
        found = pyft.linear_logprobs(hidden, weight, labels).argmax
        zeros = pyft.linear_logprobs(hidden * 0, weight, labels).argmax
    assert found.dtype == torch.int64
    assert torch.equal(found, functional.linear(hidden, weight[:11]).argmax(1))
    assert (zeros == 0).all()


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("n", [0, 4, (0, 3), (2, 3)])
def test_no_row_counts(n: int | tuple[int, ...], name: str) -> None:
    given = taught(inputs(n, bias=True, rank=2, ignored=1.0))
    teacher = pyft.Teacher(given["teacher.hidden"], given["teacher.weight"])
    with pyft.backend(name):
        found = logprobs_of(given, entropy=True, teacher=teacher)
    assert (found.argmax == -1).all()
    floats = [found.logprob, found.lse, found.entropy, found.kl]
    assert all(x.shape == given["labels"].shape for x in (*floats, found.argmax))
    assert all((x == 0).all() for x in floats)
    sum(x.sum() for x in floats).backward()
    assert all((given[n].grad == 0).all() for n in ("hidden", "weight", "bias", "a", "b"))


def test_what_was_not_asked_for() -> None:
    given = inputs((2, 5))
    found = logprobs_of(given)
    assert found.entropy is None
    assert found.kl is None
    assert found.logprob.shape == (2, 5)
    assert (found.logprob <= 0).all()
    assert not found.argmax.requires_grad
    keep = given["labels"] != IGNORED
    assert torch.equal(found.argmax[keep], logits(given).argmax(-1)[keep])
    assert (found.argmax[~keep] == -1).all()
    wanted = written_out_logprobs(given)["logprob"]
    torch.testing.assert_close(found.logprob, wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_row_that_is_not_finite(value: float, name: str) -> None:
    given = inputs(9, bias=True, ignored=0.0)
    clean = written_out_logprobs(given)
    with torch.no_grad():
        given["hidden"][4, 0] = value
    others = torch.arange(9) != 4
    with pyft.backend(name):
        found = logprobs_of(given, entropy=True)
        gradient = torch.autograd.grad(found.entropy.sum() + found.lse.sum(), given["hidden"])[0]
    for part in ("logprob", "lse", "entropy"):
        number = getattr(found, part)[4]
        assert number.isnan() if value != torch.inf else not number.isfinite(), part
        torch.testing.assert_close(getattr(found, part)[others], clean[part][others])
    assert gradient[others].isfinite().all()
    assert gradient[4].isnan().all()
    assert torch.equal(found.argmax[others], clean["argmax"][others])
    assert 0 <= found.argmax[4] < 37


def test_one_label_has_no_choice() -> None:
    given = inputs(7, 1, 8, bias=True, ignored=0.0)
    found = logprobs_of(given, entropy=True)
    assert found.logprob.abs().max() <= 1e-6
    assert found.entropy.abs().max() <= 1e-6
    torch.testing.assert_close(found.lse, logits(given)[:, 0])


@pytest.mark.parametrize("size", [50.0, 3e4])
def test_sure_predictions(size: float) -> None:
    """Their entropy is 0 and never far below, their log-probability 0 and never above."""
    hidden = torch.eye(8)[:5] * size
    weight, labels = torch.eye(8).repeat(9, 1)[:70][:8], torch.arange(5)
    found = pyft.linear_logprobs(hidden, weight, labels, entropy=True)
    assert (found.logprob.abs() <= 1e-6 * size).all()
    assert (found.logprob <= 0).all()
    assert (found.entropy >= -1e-6 * size).all()


BEHAVED = {
    "plain": lambda: call("plain"),
    "adapter": lambda: call("adapter"),
    "taught": lambda: call("taught, all"),
    "quantized": lambda: logprobs_call(inputs(6, 40, 64, kind="int8", rank=3), entropy=True),
}


@LOSS_BEHAVIOUR
@pytest.mark.parametrize("name", BEHAVED)
def test_behaviour(name: str, behaviour: Any) -> None:
    behaviour(BEHAVED[name]())


@pytest.mark.parametrize("case", ["plain", "adapter", "scaled", "taught, all"])
def test_gradcheck(case: str) -> None:
    options, how = CASES[case]
    sizes = {"n": (2, 3) if "n" in options else 4, "v": 5, "d": 3}
    given = inputs(**{**options, **sizes, "dtype": torch.float64})
    gradcheck(logprobs_call(taught(given, 2), **how))


def test_gradcheck_of_the_reference() -> None:
    given = inputs(5, 7, 3, torch.float64, bias=True)
    teacher = torch.randn(5, 7).double()

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        return reference.linear_logprobs(
            x[0], x[1], given["labels"], x[2], -100, 1.2, 3.0, teacher
        )[:4]

    leaves = (given["hidden"], given["weight"], given["bias"])
    assert torch.autograd.gradcheck(function, leaves)
    wanted = written_out_logprobs(given, 3.0, 1.2, teacher=teacher)
    for value, part in zip(function(*leaves), ("logprob", "lse", "entropy", "kl"), strict=True):
        torch.testing.assert_close(value, wanted[part])


@settings(derandomize=True, max_examples=25)
@given(st.data())
def test_shapes_and_options(data: st.DataObject) -> None:
    draw, flag = data.draw, st.booleans()
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    v, d = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    frozen = " ".join(draw(st.sets(st.sampled_from(["hidden", "weight", "bias", "a", "b"]))))
    problem = inputs(
        lead, v, d, torch.float64, bias=draw(flag), rank=draw(st.sampled_from([None, 1, 4])),
        ignored=draw(st.sampled_from([0.0, 0.5, 1.0])), frozen=frozen,
    )  # fmt: skip
    call = logprobs_call(
        taught(problem, draw(st.integers(1, 20))),
        kl=draw(flag),
        entropy=draw(flag),
        softcap=draw(st.sampled_from([None, 3.0])),
        logit_scale=draw(st.sampled_from([1.0, -1.5])),
        shift=bool(lead) and draw(flag),
        budget=draw(st.sampled_from([None, v * 16 / 2**20, 6 * v * 8 / 2**20])),
    )
    check_double(call)


def test_compiles_for_any_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(logprobs_of, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (9, 14, 3):
            plain = logprobs_call(inputs(n, bias=True, rank=2), entropy=True)
            expected = plain.run()
            plain.op = lambda i: [
                getattr(compiled(i, entropy=True), p) for p in ("logprob", "lse", "entropy")
            ]
            check_near(plain.run(), expected)


def test_refused_by_torch_func() -> None:
    given = inputs()

    def of(hidden: Tensor) -> Tensor:
        return logprobs_of({**given, "hidden": hidden}).logprob.sum()

    with pytest.raises(UsageError, match=r"torch\.func"):
        torch.func.grad(of)(given["hidden"].detach())


def test_autocast() -> None:
    given = inputs(bias=True, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = logprobs_of(given, entropy=True)
    cast = {
        n: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in given.items()
    }
    wanted = logprobs_of(cast, entropy=True)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    found.logprob.sum().backward()
    assert given["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["logprob", "lse", "entropy", "kl"])
@pytest.mark.parametrize("strides", ["sum", "expand", "stack"])
def test_gradients_of_any_strides(name: str, strides: str) -> None:
    """Where every row counts no copy makes them adjacent: a sum's has stride 0, a stack's 2."""
    n, v, d = 9, 37, 13
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d)
    teacher, labels = pyft.Teacher(torch.randn(n, d), torch.randn(v, d)), torch.arange(n)
    shares = torch.arange(1.0, n + 1)
    through, plainly = {
        "sum": (lambda x: x.sum(), torch.ones(n)),
        "expand": (lambda x: x.expand(3, n).sum(), torch.full((n,), 3.0)),
        "stack": (lambda x: (torch.stack([x, x.detach()], 1) * shares[:, None]).sum(), shares),
    }[strides]

    def values() -> Tensor:
        options = {"entropy": True, "teacher": teacher}
        found: Tensor = getattr(pyft.linear_logprobs(hidden, weight, labels, **options), name)
        return found

    (found,) = torch.autograd.grad(through(values()), hidden)
    (expected,) = torch.autograd.grad(values(), hidden, plainly.clone())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 5.0, 10.0])
def test_kl_of_a_teacher_that_is_near(size: float) -> None:
    """A difference of sums over logits would lose it; one of log-sum-exps loses their rounding."""
    n, v, d = 16, 4000, 32
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * size / d**0.5
    near = hidden + 0.01 * torch.randn(n, d)
    labels = torch.zeros(n, dtype=torch.long)
    found = pyft.linear_logprobs(hidden, weight, labels, teacher=pyft.Teacher(near, weight)).kl
    p, q = ((x.double() @ weight.double().t()).log_softmax(1) for x in (hidden, near))
    wide = (q.exp() * (q - p)).sum(1)
    rounded = torch.finfo(torch.float32).eps * float((hidden @ weight.t()).logsumexp(1).max())
    assert found is not None
    assert (found - wide).abs().max() <= rounded
