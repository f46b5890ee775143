"""A head whose labels are spread over 2 and 3 processes gives the loss, the values and the
gradients of the whole head, on every rank. One group of three processes over gloo runs every case
once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import pyft

V, D, N = 41, 32, (3, 9)
# Where each rank's part of the labels begins and ends
PARTS = {2: [(0, 13), (13, 41)], 3: [(0, 5), (5, 6), (6, 41)]}
SHARDED = ("weight", "bias", "b")
HEAD = ("hidden", "weight", "bias", "a", "b", "token_weights")
LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "bias": True},
    "none": {"reduction": "none", "a": True},
    "adapter": {"a": True, "bias": True, "frozen": "weight"},
    "classes": {"class_weights": True},
    "smoothing": {"class_weights": True, "label_smoothing": 0.2, "bias": True},
    "plain smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.3, "softcap": 4.0, "logit_scale": 1.4},
    "tokens": {"token_weights": True, "reduction": "sum"},
    "learned tokens": {"token_weights": True, "frozen": "hidden weight"},
    "items": {"num_items_in_batch": 31, "shift": True},
    "metrics": {"metrics": True, "a": True},
    "small budget": {"budget": 41 * 4 / 2**20, "bias": True},
    "reference": {"bias": True, "a": True, "backend": "reference"},
    "all ignored": {"ignored": True, "a": True},
    "quantized": {"quantized": True, "a": True},
    "everything": {
        "class_weights": True, "label_smoothing": 0.1, "bias": True, "a": True, "metrics": True,
        "token_weights": True, "z_loss": 0.1, "softcap": 6.0, "shift": True,
    },
}  # fmt: skip
LOGPROBS: dict[str, dict[str, Any]] = {
    "plain": {"bias": True},
    "entropy": {"entropy": True, "a": True},
    "shifted": {"entropy": True, "shift": True, "softcap": 3.0},
    "all ignored": {"ignored": True, "entropy": True},
}
GIVEN = ("bias", "a", "class_weights", "token_weights", "frozen", "ignored", "quantized")


def problem(case: dict[str, Any], begin: int = 0, end: int = V) -> dict[str, Any]:
    """The same numbers in every process, of the labels from ``begin`` to ``end``."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    made: dict[str, Any] = {
        "hidden": normal(*N, D), "weight": normal(V, D) / 3, "bias": normal(V), "a": normal(2, D),
        "b": normal(V, 2) / 2, "class_weights": normal(V).abs(), "token_weights": normal(*N).abs(),
    }  # fmt: skip
    made["labels"] = torch.randint(V, N, generator=g)
    made["labels"][0, :6] = torch.tensor([0, 4, 5, 6, 13, 40])  # the borders of every part
    made["labels"][1, ::2] = -100
    if case.get("ignored"):
        made["labels"].fill_(-100)
    for name in ("bias", "a", "class_weights", "token_weights"):
        if not case.get(name):
            made[name] = None
    if made["a"] is None:
        made["b"] = None
    for name in HEAD:
        if made[name] is not None:
            if name in SHARDED:
                made[name] = made[name][begin:end].clone()
            made[name].requires_grad_(name not in case.get("frozen", ""))
    if case.get("quantized"):
        made["weight"] = pyft.quantize(made["weight"].detach(), "int8", 32)
    return made


def run(kind: str, case: dict[str, Any], part: tuple[int, int], group: Any) -> dict[str, Tensor]:
    """Values, and the gradients of a weighted sum of them."""
    made = problem(case, *part)
    options = {name: value for name, value in case.items() if name not in (*GIVEN, "backend")}
    lora = None if made["a"] is None else (made["a"], made["b"], 1.5)
    arguments = (made["hidden"], made["weight"], made["labels"], made["bias"], lora)
    with pyft.backend(case.get("backend", "auto")):
        if kind == "loss":
            weights = {name: made[name] for name in ("class_weights", "token_weights")}
            result = pyft.linear_cross_entropy(*arguments, **options, **weights, group=group)
            loss, metrics = result if case.get("metrics") else (result, ())
            found = {"loss": loss, **{f"metric {i}": x for i, x in enumerate(metrics)}}
        else:
            values = pyft.linear_logprobs(*arguments, **options, group=group)
            names = ("logprob", "lse", "argmax", "entropy", "kl")
            found = {n: x for n, x in zip(names, values, strict=True) if x is not None}
        g = torch.Generator().manual_seed(3)
        leaves = [n for n in HEAD if isinstance(made[n], Tensor) and made[n].requires_grad]
        total = sum(
            (x * torch.randn(x.shape, generator=g)).sum() for x in found.values() if x.requires_grad
        )
        gradients = torch.autograd.grad(total, [made[n] for n in leaves], retain_graph=True)
        again = torch.autograd.grad(total, [made[n] for n in leaves])
    assert all(map(torch.equal, gradients, again))
    found |= {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def refusals(part: tuple[int, int], group: Any) -> dict[str, str]:
    """What bad labels are answered on this rank."""
    answers = {}
    for name, label in (("high", V), ("negative", -3)):
        made = problem({}, *part)
        made["labels"][2, 4] = label
        try:
            pyft.linear_cross_entropy(
                made["hidden"], made["weight"], made["labels"], group=group
            ).item()
        except pyft.UsageError as error:
            answers[name] = str(error)
    made = problem({"quantized": True}, *part)
    try:
        pyft.linear_cross_entropy(
            made["hidden"], made["weight"], made["labels"],
            class_weights=torch.ones(part[1] - part[0] + 1), group=group,
        )  # fmt: skip
    except pyft.UsageError as error:
        answers["classes"] = str(error)
    made = problem({}, *part)
    head = (made["hidden"], made["weight"])
    refused: dict[str, Callable[[], Any]] = {
        "teacher": lambda: pyft.linear_logprobs(
            *head, made["labels"], teacher=pyft.Teacher(*head), group=group
        ),
        "filter": lambda: pyft.linear_cross_entropy(
            *head, made["labels"], gradient_filter=True, group=group
        ),
    }
    for name, call in refused.items():
        try:
            call()
        except pyft.UsageError as error:
            answers[name] = str(error)
    return answers


def work(rank: int, folder: str) -> None:
    """What one process does; its answers go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    try:
        two = dist.new_group([0, 1])
        found: dict[Any, Any] = {}
        for size, group in ((2, two), (3, dist.group.WORLD)):
            if rank < size:
                part = PARTS[size][rank]
                for kind, cases in (("loss", LOSSES), ("logprobs", LOGPROBS)):
                    for name, case in cases.items():
                        try:
                            found[size, kind, name] = run(kind, case, part, group)
                        except Exception as error:
                            found[size, kind, name] = f"{type(error).__name__}: {error}"
                found[size, "refusals"] = refusals(part, group)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    target: Callable[..., Any] = work
    mp.spawn(target, (str(folder),), nprocs=3)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def whole(kind: str, case: dict[str, Any]) -> dict[str, Tensor]:
    return run(kind, case, (0, V), None)


@pytest.mark.parametrize("size", PARTS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("loss", n) for n in LOSSES] + [("logprobs", n) for n in LOGPROBS],
    ids=str,
)
def test_parts_are_the_whole(ranks: list[dict[Any, Any]], size: int, kind: str, name: str) -> None:
    expected = whole(kind, (LOSSES if kind == "loss" else LOGPROBS)[name])
    found = [rank[size, kind, name] for rank in ranks[:size]]
    assert not [x for x in found if isinstance(x, str)], found
    for one in found:
        assert one.keys() == expected.keys()
    for key, wanted in expected.items():
        parts = [one[key] for one in found]
        if key[2:] in SHARDED:
            joined = torch.cat(parts)
        else:
            joined = parts[0]
            assert all(torch.equal(joined, part) for part in parts), "ranks differ"
        assert joined.dtype == wanted.dtype
        # an entropy is a difference of numbers of the size of lse
        size = expected["lse"] if key == "entropy" else wanted
        scale = max(float(size.abs().max()), 1e-3)
        torch.testing.assert_close(
            joined, wanted, rtol=1e-5, atol=2e-6 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("size", PARTS)
def test_labels_that_no_rank_has(ranks: list[dict[Any, Any]], size: int) -> None:
    """Every rank refuses, so that none waits for another."""
    for rank in ranks[:size]:
        answers = rank[size, "refusals"]
        assert set(answers) == {"high", "negative", "classes", "teacher", "filter"}
        assert f"{V}" in answers["high"]
        assert "[2, 4]" in answers["high"] or "(2, 4)" in answers["high"]
        assert "-3" in answers["negative"]
        assert f"{V}" in answers["classes"]
        assert "teacher" in answers["teacher"]
        assert "gradient_filter" in answers["filter"]


def test_a_group_of_one_is_the_whole(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name in ("mean", "everything", "none"):
            found = run("loss", LOSSES[name], (0, V), dist.group.WORLD)
            for key, wanted in whole("loss", LOSSES[name]).items():
                torch.testing.assert_close(found[key], wanted, rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()
