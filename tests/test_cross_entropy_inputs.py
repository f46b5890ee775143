"""Bad input to linear_cross_entropy and linear_logprobs gets one line: what, where, and what to
write instead. Nothing is read that is not there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import inputs
from op_behaviours import check_refused

import pyft
from pyft.errors import UsageError

N, V, D = (3, 5), 37, 24
META = torch.device("meta")


def given(**changed: Any) -> dict[str, Any]:
    made = inputs(N, V, D, ignored=0.0)
    return {
        "hidden": made["hidden"].detach(), "weight": made["weight"].detach(),
        "labels": made["labels"], **changed,
    }  # fmt: skip


def with_label(value: int, where: tuple[int, ...] = (1, 3), **changed: Any) -> dict[str, Any]:
    made = given(**changed)
    made["labels"][where] = value
    return made


def lora(a: tuple[int, ...] = (3, D), b: tuple[int, ...] = (V, 3), scale: Any = 1.0) -> Any:
    return torch.ones(a), torch.ones(b), scale


def learned(x: Any) -> Any:
    return x.requires_grad_() if isinstance(x, torch.Tensor) else x


BOTH: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "label too large": (lambda: with_label(V), r"labels\[1, 3\] is 37; need 0 to 36"),
    "label far too large": (lambda: with_label(2**40), r"1099511627776"),
    "label negative": (lambda: with_label(-1), r"labels\[1, 3\] is -1; need 0 to 36"),
    "label of another index": (lambda: with_label(-100, ignore_index=-1), "-100"),
    "label under shift": (lambda: with_label(V, shift=True), r"labels\[1, 3\] is 37"),
    "first label that is bad": (
        lambda: with_label(V + 1, (0, 2), shift=True),
        r"labels\[0, 2\] is 38",
    ),
    "labels float": (lambda: given(labels=torch.zeros(N)), "labels.*torch.float32"),
    "labels bool": (lambda: given(labels=torch.zeros(N).bool()), "labels.*torch.bool"),
    "labels uint8": (lambda: given(labels=torch.zeros(N).byte()), "labels.*torch.uint8"),
    "labels of another shape": (
        lambda: given(labels=torch.zeros(3, 4).long()),
        r"\(3, 5, 24\) and labels \(3, 4\)",
    ),
    "labels of too many dimensions": (
        lambda: given(labels=torch.zeros(3, 5, 1).long()), r"labels.*\(3, 5, 1\)"
    ),
    "labels flat": (lambda: given(labels=torch.zeros(15).long()), r"labels.*\(15,\)"),
    "labels elsewhere": (
        lambda: given(labels=torch.zeros(N, device=META).long()), "labels.*meta|meta.*labels"
    ),
    "shift of one token": (
        lambda: given(hidden=torch.ones(D), labels=torch.tensor(3), shift=True),
        "shift",
    ),
    "hidden integers": (lambda: given(hidden=torch.ones(*N, D).long()), "hidden.*torch.int64"),
    "hidden scalar": (lambda: given(hidden=torch.ones(())), r"hidden.*\(\)"),
    "hidden of another width": (
        lambda: given(hidden=torch.ones(*N, D + 1)), r"\(3, 5, 25\).*\(37, 24\)|\(37, 24\).*25"
    ),
    "weight of another dtype": (
        lambda: given(weight=torch.ones(V, D).bfloat16()), "torch.float32.*torch.bfloat16"
    ),
    "weight of one dimension": (lambda: given(weight=torch.ones(D)), r"weight.*\(24,\)"),
    "weight transposed": (lambda: given(weight=torch.ones(D, V)), r"weight.*\(24, 37\)"),
    "weight elsewhere": (lambda: given(weight=torch.ones(V, D, device=META)), "weight.*meta"),
    "no labels in the head": (lambda: given(weight=torch.ones(0, D)), r"weight.*\(0, 24\)"),
    "bias of another length": (lambda: given(bias=torch.ones(V - 1)), r"bias.*\(36,\)"),
    "bias of integers": (lambda: given(bias=torch.ones(V).long()), "bias.*torch.int64"),
    "bias elsewhere": (lambda: given(bias=torch.ones(V, device=META)), "bias.*meta"),
    "a of another width": (lambda: given(lora=lora(a=(3, D + 1))), r"lora_a.*\(3, 25\)"),
    "b of another length": (lambda: given(lora=lora(b=(V + 1, 3))), r"lora_b.*\(38, 3\)"),
    "ranks that differ": (lambda: given(lora=lora(b=(V, 4))), r"lora_b.*\(37, 4\)"),
    "a of one dimension": (lambda: given(lora=lora(a=(D,))), r"lora_a.*\(24,\)"),
    "lora of two": (lambda: given(lora=lora()[:2]), "lora"),
    "softcap 0": (lambda: given(softcap=0.0), "softcap.*0"),
    "softcap negative": (lambda: given(softcap=-2.0), "softcap.*-2"),
    "softcap NaN": (lambda: given(softcap=float("nan")), "softcap.*nan"),
    "softcap infinite": (lambda: given(softcap=float("inf")), "softcap.*inf"),
    "scale NaN": (lambda: given(logit_scale=float("nan")), "logit_scale.*nan"),
    "scale infinite": (lambda: given(logit_scale=float("inf")), "logit_scale.*inf"),
    "budget too small": (lambda: given(budget=36 * 4 / 2**20), "budget.*37"),
    "budget 0": (lambda: given(budget=0), "budget.*0"),
    "budget negative": (lambda: given(budget=-1.0), "budget.*-1"),
    "budget NaN": (lambda: given(budget=float("nan")), "budget.*nan"),
}  # fmt: skip

ONE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "reduction": (lambda: given(reduction="avg"), "reduction.*'avg'.*mean.*sum.*none"),
    "reduction None": (lambda: given(reduction=None), "reduction.*None"),
    "smoothing negative": (lambda: given(label_smoothing=-0.1), "label_smoothing.*-0.1"),
    "smoothing above 1": (lambda: given(label_smoothing=1.1), "label_smoothing.*1.1"),
    "smoothing NaN": (lambda: given(label_smoothing=float("nan")), "label_smoothing.*nan"),
    "z-loss negative": (lambda: given(z_loss=-1.0), "z_loss.*-1"),
    "z-loss NaN": (lambda: given(z_loss=float("nan")), "z_loss.*nan"),
    "items with sum": (
        lambda: given(reduction="sum", num_items_in_batch=3), "num_items_in_batch"
    ),
    "items with none": (
        lambda: given(reduction="none", num_items_in_batch=3), "num_items_in_batch"
    ),
    "items 0": (lambda: given(num_items_in_batch=0), "num_items_in_batch.*0"),
    "items negative": (lambda: given(num_items_in_batch=-2), "num_items_in_batch.*-2"),
    "items of several": (lambda: given(num_items_in_batch=torch.ones(2)), "num_items_in_batch"),
    "class weights too short": (
        lambda: given(class_weights=torch.ones(V - 1)), r"class_weights.*\(36,\).*37"
    ),
    "class weights of two dimensions": (
        lambda: given(class_weights=torch.ones(V, 1)), r"class_weights.*\(37, 1\)"
    ),
    "class weights integers": (
        lambda: given(class_weights=torch.ones(V).long()), "class_weights.*torch.int64"
    ),
    "class weights elsewhere": (
        lambda: given(class_weights=torch.ones(V, device=META)), "class_weights.*meta"
    ),
    "class weights that learn": (
        lambda: given(class_weights=torch.ones(V, requires_grad=True)), "class_weights.*grad"
    ),
    "token weights of another shape": (
        lambda: given(token_weights=torch.ones(3, 4)), r"token_weights.*\(3, 4\)"
    ),
    "token weights integers": (
        lambda: given(token_weights=torch.ones(N).long()), "token_weights.*torch.int64"
    ),
    "token weights elsewhere": (
        lambda: given(token_weights=torch.ones(N, device=META)), "token_weights.*meta"
    ),
    "filter with smoothing": (
        lambda: given(gradient_filter=True, label_smoothing=0.1), "gradient_filter"
    ),
    "filter negative": (lambda: given(gradient_filter=-0.1), "gradient_filter.*-0.1"),
    "filter NaN": (lambda: given(gradient_filter=float("nan")), "gradient_filter.*nan"),
    "filter of tokens": (
        lambda: given(gradient_filter=True, reduction="none"), "gradient_filter.*none"
    ),
    "filter of a quantized head": (
        lambda: given(gradient_filter=True, weight=pyft.quantize(torch.ones(V, D), "int8", 32)),
        "gradient_filter",
    ),
}  # fmt: skip


def teacher(**changed: Any) -> dict[str, Any]:
    named = {"hidden": torch.ones(*N, 7), "weight": torch.ones(V, 7)} | changed
    return given(teacher=pyft.Teacher(**named))


TEACHER: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "other labels": (lambda: teacher(weight=torch.ones(V + 1, 7)), r"teacher.*38|38.*teacher"),
    "other rows": (lambda: teacher(hidden=torch.ones(3, 4, 7)), r"teacher.*\(3, 4, 7\)"),
    "other width": (lambda: teacher(hidden=torch.ones(*N, 8)), "teacher.*8"),
    "integers": (lambda: teacher(hidden=torch.ones(*N, 7).long()), "teacher.*torch.int64"),
    "elsewhere": (lambda: teacher(hidden=torch.ones(*N, 7, device=META)), "teacher.*meta"),
    "softcap": (lambda: teacher(softcap=0.0), "softcap.*0"),
    "scale": (lambda: teacher(logit_scale=float("nan")), "logit_scale.*nan"),
    "bias": (lambda: teacher(bias=torch.ones(V - 1)), r"teacher.*bias.*\(36,\)|bias.*\(36,\)"),
    "not a teacher": (lambda: given(teacher=torch.ones(3)), "teacher"),
}


@pytest.mark.parametrize("what", BOTH)
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs"])
def test_refusals(op: str, what: str) -> None:
    make, message = BOTH[what]
    check_refused(lambda: getattr(pyft, op)(**make()), f"(?s)^{op}.*({message})")


@pytest.mark.parametrize("what", ONE)
def test_refusals_of_the_loss(what: str) -> None:
    make, message = ONE[what]
    check_refused(
        lambda: pyft.linear_cross_entropy(**make()), f"(?s)^linear_cross_entropy.*({message})"
    )


@pytest.mark.parametrize("what", TEACHER)
def test_refusals_of_a_teacher(what: str) -> None:
    make, message = TEACHER[what]
    check_refused(lambda: pyft.linear_logprobs(**make()), f"(?s)^linear_logprobs.*({message})")


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_bias_and_a_teacher_of_other_dtypes(name: str) -> None:
    """They are cast, and gradients come back in their own."""
    made = inputs(9, bias=True, ignored=0.0)
    bias = made["bias"].detach().bfloat16().requires_grad_()
    hidden, weight = torch.randn(9, 7).bfloat16(), torch.randn(V, 7).bfloat16()
    with pyft.backend(name):
        found = pyft.linear_logprobs(
            made["hidden"], made["weight"], made["labels"], bias,
            teacher=pyft.Teacher(hidden, weight),
        )  # fmt: skip
        wanted = pyft.linear_logprobs(
            made["hidden"], made["weight"], made["labels"], bias.float(),
            teacher=pyft.Teacher(hidden.float(), weight.float()),
        )  # fmt: skip
    torch.testing.assert_close(found.lse, wanted.lse)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=0.02, atol=0.02)
    found.lse.sum().backward()
    assert bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_no_items_in_a_batch_of_which_nothing_counts(name: str) -> None:
    made = inputs(9, ignored=1.0)
    with pyft.backend(name):
        loss = pyft.linear_cross_entropy(
            made["hidden"], made["weight"], made["labels"], num_items_in_batch=torch.tensor(0)
        )
    loss.backward()
    assert loss == 0
    assert (made["hidden"].grad == 0).all()


@pytest.mark.parametrize("what", ["softcap 0", "labels float", "b of another length"])
def test_refusals_under_compile(what: str) -> None:
    make, message = BOTH[what]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i: pyft.linear_cross_entropy(**i), backend="aot_eager", fullgraph=False
    )
    with pytest.raises(Exception, match=f"(?s){message}"):
        compiled(make())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gradient", [True, False])
def test_labels_are_looked_at_when_a_compiled_one_runs(reduction: str, gradient: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h, w, y: pyft.linear_cross_entropy(h, w, y, reduction=reduction),
        backend="aot_eager",
    )
    made = given()
    made["hidden"].requires_grad_(gradient)
    compiled(made["hidden"], made["weight"], made["labels"])
    with pytest.raises(UsageError, match="37"):
        compiled(*with_label(V, hidden=made["hidden"]).values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("label", [V, -1, 2**62, -(2**62)])
def test_a_bad_label_far_behind(label: int, reduction: str, gradient: bool) -> None:
    """In another chunk, whatever is computed."""
    hidden = torch.randn(500, D, requires_grad=gradient)
    labels = torch.randint(V, (500,))
    labels[:100] = -100
    labels[411] = label
    for ops in (
        lambda **o: pyft.linear_cross_entropy(*o.pop("x"), reduction=reduction, **o),
        lambda **o: pyft.linear_logprobs(*o.pop("x"), **o),
    ):
        for shift in (False, True):
            with pytest.raises(UsageError, match=rf"labels\[411\] is {label};") as caught:
                ops(x=(hidden, torch.randn(V, D), labels), shift=shift, budget=0.01)
            assert "\n" not in str(caught.value)


def test_the_label_that_a_shift_drops_is_not_looked_at() -> None:
    made = with_label(10**6, (1, 0), shift=True)
    expected = pyft.linear_cross_entropy(**made | {"labels": made["labels"].clamp(max=V - 1)})
    assert torch.equal(pyft.linear_cross_entropy(**made), expected)


def test_the_smallest_budget_that_is_named_will_do() -> None:
    """What the message says to give can be given."""
    made = inputs(9, 128256, 8)
    with pytest.raises(UsageError, match="budget") as caught:
        pyft.linear_cross_entropy(made["hidden"], made["weight"], made["labels"], budget=0.1)
    number = [word for word in str(caught.value).split() if word[0].isdigit()][-1]
    pyft.linear_cross_entropy(made["hidden"], made["weight"], made["labels"], budget=float(number))


def test_names_of_backends() -> None:
    made = given()
    for name in ("triton", "cuda"):
        for op in (pyft.linear_cross_entropy, pyft.linear_logprobs):
            with (
                pyft.backend(name),
                pytest.raises(UsageError, match=f"backend '{name}' cannot run {op.__name__}") as e,
            ):
                op(**made)
            assert "\n" not in str(e.value)
    double = {n: x.double() if x.is_floating_point() else x for n, x in made.items()}
    for op in (pyft.linear_cross_entropy, pyft.linear_logprobs):
        with pyft.backend("cpu"), pytest.raises(UsageError, match=r"in torch\.float64; use ref"):
            op(**double)
