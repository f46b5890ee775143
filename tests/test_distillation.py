"""Distillation from a teacher's whole distribution, and from its log-probabilities of samples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build_model
from error_rule import check_error
from torch import Tensor

import pyft
from pyft.errors import UsageError
from pyft.losses import distillation, grpo, reverse_kl

TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = (3, 5), 61, 16, 64


def problem(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """hidden, weight and bias of the student, labels with ignored ones, and the teacher's three;
    values that every dtype has.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    student = [normal(*TOKENS, WIDTH), normal(VOCABULARY, WIDTH) / 4, normal(VOCABULARY)]
    teacher = [
        normal(*TOKENS, TEACHER_WIDTH),
        normal(VOCABULARY, TEACHER_WIDTH) / 8,
        normal(VOCABULARY),
    ]
    labels = torch.randint(VOCABULARY, TOKENS, generator=generator)
    labels[0, :2] = labels[2, 4] = -100
    return student, labels, teacher


def logits(head: list[Tensor], scale: float = 1.0, softcap: float | None = None) -> Tensor:
    hidden, weight, bias = head
    z = scale * (hidden @ weight.t() + bias)
    return z if softcap is None else softcap * (z / softcap).tanh()


def hinton(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """T² Σ q log(q / p) of logits over T, token after token."""
    terms = []
    for z, v in zip(student[mask], teacher[mask], strict=True):
        p, q = (z / temperature).exp(), (v / temperature).exp()
        p, q = p / p.sum(), q / q.sum()
        terms.append((q * (q / p).log()).sum())
    return temperature**2 * torch.stack(terms).mean()


def distilled(
    student: list[Tensor],
    labels: Tensor,
    teacher: pyft.Teacher,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    hidden, weight, bias = student
    tokens = pyft.linear_logprobs(
        hidden, weight, labels, bias, teacher=teacher, logit_scale=1 / temperature,
        softcap=None if softcap is None else softcap / temperature,
    )  # fmt: skip
    assert tokens.kl is not None
    return distillation(tokens.kl, tokens.argmax >= 0, temperature)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradients_are_hintons(temperature: float, softcap: float | None) -> None:
    """Student and teacher differ in their hidden size, and in the teacher's other softcap."""

    def both(dtype: torch.dtype, plain: bool) -> list[Tensor]:
        found = []
        for seed in range(4):
            student, labels, teacher = problem(seed, dtype)
            leaves = [x.requires_grad_() for x in student]
            cap = None if softcap is None else 2 * softcap
            if plain:
                z, v = logits(leaves, 1.0, softcap), logits(teacher, 1.0, cap)
                loss = hinton(z, v, labels != -100, temperature)
            else:
                cap = None if cap is None else cap / temperature
                taught = pyft.Teacher(*teacher, softcap=cap, logit_scale=1 / temperature)
                loss = distilled(leaves, labels, taught, temperature, softcap)
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        return [torch.stack(part) for part in zip(*found, strict=True)]

    truth = both(torch.float64, plain=True)
    for found, expected in zip(both(torch.float64, plain=False), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    single, reference = both(torch.float32, plain=False), both(torch.float32, plain=True)
    names = ("loss", "hidden", "weight", "bias")
    for name, *three in zip(names, single, reference, truth, strict=True):
        check_error(name, *three)


def test_at_high_temperature_logits_are_matched() -> None:
    """Equation 4 of the paper: dz -> (z - v) / N for logits of mean 0, whatever T is."""
    z, v = (x - x.mean() for x in torch.randn(2, VOCABULARY, dtype=torch.float64))
    hidden = torch.eye(1, dtype=torch.float64)
    for temperature in (1e3, 1e4):
        weight = z[:, None].clone().requires_grad_()
        teacher = pyft.Teacher(hidden, v[:, None], logit_scale=1 / temperature)
        tokens = pyft.linear_logprobs(
            hidden, weight, torch.zeros(1, dtype=torch.int64), teacher=teacher,
            logit_scale=1 / temperature,
        )  # fmt: skip
        assert tokens.kl is not None
        one = torch.ones(1, 1, dtype=torch.bool)
        distillation(tokens.kl[None], one, temperature).backward()
        assert weight.grad is not None
        torch.testing.assert_close(
            weight.grad[:, 0], (z - v) / VOCABULARY, rtol=0, atol=10 / temperature
        )


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_quantized_teacher(name: str) -> None:
    student, labels, (hidden, weight, bias) = problem(1, torch.float32)
    stored = pyft.quantize(weight, name)
    leaves = [x.requires_grad_() for x in student]
    loss = distilled(leaves, labels, pyft.Teacher(hidden, stored, bias))
    plain = [hidden, pyft.dequantize(stored), bias]
    wide = [x.detach().double().requires_grad_() for x in student]
    truth = hinton(
        logits(wide), logits([x.double() for x in plain]), labels != -100, temperature=1.0
    )
    assert abs(loss.item() - truth.item()) < 1e-5 * truth.item()
    for found, expected in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    student, labels, teacher = problem(2, torch.float64)
    taught = [x.requires_grad_() for x in teacher]
    lora = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 64), (61, 2))]
    leaf = student[0].requires_grad_()
    loss = distilled(student, labels, pyft.Teacher(*taught, lora=(*lora, 0.5)))
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 0
    assert all(x.grad is None for x in (*taught, *lora))
    a, b = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    loss = reverse_kl(a, b, torch.ones(2, 3, dtype=torch.bool))
    assert torch.autograd.grad(loss, b, allow_unused=True) == (None,)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student, labels, _ = problem(3, torch.float64)
    leaves = [x.requires_grad_() for x in student]
    teacher = pyft.Teacher(*student, logit_scale=1 / 3)
    loss = distilled(leaves, labels, teacher, temperature=3.0)
    assert abs(loss.item()) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, leaves))


def test_a_student_comes_nearer_to_its_teacher() -> None:
    teacher = build_model("llama", hidden_size=96, intermediate_size=128, vocab_size=512)
    student = build_model("llama", vocab_size=512, num_hidden_layers=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ids = torch.randint(3, 512, (4, 16))
    labels = ids.clone()
    labels[:, :3] = -100

    def kl() -> float:
        """Over all of the vocabulary, of the tokens that count, from all logits."""
        with torch.no_grad():
            z, v = (model(ids).logits[:, :-1].double() for model in (student, teacher))
        return float(hinton(z, v, labels[:, 1:] != -100, 1.0))

    def loss() -> Tensor:
        with torch.no_grad():
            taught = teacher.get_decoder()(input_ids=ids).last_hidden_state
        hidden = student.get_decoder()(input_ids=ids).last_hidden_state
        tokens = pyft.linear_logprobs(
            hidden, student.lm_head.weight, labels, shift=True,
            teacher=pyft.Teacher(taught, teacher.lm_head.weight),
        )  # fmt: skip
        assert tokens.kl is not None
        return distillation(tokens.kl, tokens.argmax >= 0)

    before = kl()
    assert loss().item() == pytest.approx(before, rel=1e-5)
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert kl() < before / 3
    assert loss().item() == pytest.approx(kl(), rel=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


def test_reverse_kl_is_right_on_average() -> None:
    """Value and gradient, each possible sample weighted by how probable it is, are those of the
    KL(student || teacher); the gradient of the difference itself would be 0.
    """
    z = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    log_q = torch.randn(VOCABULARY, dtype=torch.float64).log_softmax(0)
    log_p = z.log_softmax(0)
    p = log_p.detach().exp()
    one = torch.ones(1, 1, dtype=torch.bool)
    losses = [reverse_kl(log_p[i].view(1, 1), log_q[i].view(1, 1), one) for i in range(VOCABULARY)]
    found = (p * torch.stack(losses)).sum()
    truth = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(found, truth)
    expected = torch.autograd.grad(truth, z, retain_graph=True)
    assert expected[0].abs().max() > 0.01
    torch.testing.assert_close(torch.autograd.grad(found, z, retain_graph=True), expected)
    naive = torch.autograd.grad((p * (log_p - log_q)).sum(), z)[0]
    assert naive.abs().max() < 1e-12


def test_reverse_kl_of_tokens() -> None:
    """As a policy gradient with advantages log q - log p, over the tokens that count."""
    student, labels, teacher = problem(4, torch.float64)
    hidden, weight, bias = (x.requires_grad_() for x in student)
    tokens = pyft.linear_logprobs(hidden, weight, labels, bias)
    with torch.no_grad():
        taught = pyft.linear_logprobs(teacher[0], teacher[1], labels, teacher[2]).logprob
    mask = labels != -100
    loss = reverse_kl(tokens.logprob, taught, mask)
    difference = (tokens.logprob - taught).detach()
    torch.testing.assert_close(loss, difference[mask].mean())
    policy = grpo(tokens.logprob, None, -difference, mask, loss_type="bnpo").loss
    found, expected = (
        torch.autograd.grad(x, [hidden, weight], retain_graph=True) for x in (loss, policy)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_tokens_that_do_not_count_may_hold_anything(garbage: float) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    kl = torch.rand(2, 3)
    spoilt = kl.where(mask.bool(), garbage).requires_grad_()
    loss = distillation(spoilt, mask)
    torch.testing.assert_close(loss, kl[mask.bool()].mean())
    (gradient,) = torch.autograd.grad(loss, spoilt)
    torch.testing.assert_close(gradient, mask / 3)
    loss = reverse_kl(spoilt, spoilt.detach() - 0.5, mask)
    assert float(loss.detach()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, spoilt)[0], 0.5 * mask / 3)


def test_no_tokens_give_zero() -> None:
    for shape in ((2, 3), (0, 3), (2, 0)):
        kl = torch.rand(shape, requires_grad=True)
        none = torch.zeros(shape, dtype=torch.bool)
        for loss in (distillation(kl, none), reverse_kl(kl, kl.detach(), none)):
            assert loss.item() == 0
            assert torch.equal(torch.autograd.grad(loss, kl)[0], torch.zeros(shape))


def test_batches_of_one_step_add_up() -> None:
    kl, other, mask = torch.rand(4, 3), torch.rand(4, 3), torch.rand(4, 3) > 0.4
    for items in (int(mask.sum()), mask.sum()):
        parts = [distillation(kl[i], mask[i], 2.0, items) for i in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(sum(parts), distillation(kl, mask, 2.0))
        parts = [reverse_kl(kl[i], other[i], mask[i], items) for i in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(sum(parts), reverse_kl(kl, other, mask))


def test_sure_tokens_give_numbers() -> None:
    edges = torch.tensor([[1e-6, 0.0, -1e-12, -1e-3, -60.0, -1e6, -1e30]])
    logprob = edges.clone().requires_grad_()
    loss = reverse_kl(logprob, edges.flip(1), torch.ones(1, 7, dtype=torch.bool))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logprob)[0].isfinite().all()


KL, ON = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: distillation(None, ON), "kl is None; give linear_logprobs a teacher"),
        (lambda: distillation(KL[0], ON[0]), "kl is (3,); need [B, S]"),
        (lambda: distillation(KL, ON[:1]), "mask is (1, 3); need (2, 3)"),
        (lambda: distillation(KL, KL), "mask is torch.float32; pass bool"),
        (lambda: distillation(KL, ON, 0.0), "temperature is 0.0; need a number above 0"),
        (lambda: distillation(KL, ON, math.inf), "temperature is inf"),
        (lambda: distillation(KL, ON, 1.0, -1), "num_items_in_batch is -1; need a number of at"),
        (lambda: reverse_kl(KL, KL[:, :2], ON), "teacher_logprob is (2, 2); need (2, 3)"),
        (lambda: reverse_kl(KL, KL.int(), ON), "teacher_logprob is torch.int32"),
        (lambda: reverse_kl(KL, KL.to("meta"), ON), "teacher_logprob is on meta"),
    ],
)
def test_bad_input_gets_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_is_that_of_trl() -> None:
    """TRL leaves T² to the learning rate."""
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.sdft.loss_utils import compute_sampled_token_self_distillation_loss

    student, labels, teacher = problem(5, torch.float64)
    leaf = student[0].requires_grad_()
    z, v = logits(student), logits(teacher)
    expected = GKDTrainer.generalized_jsd_loss(z, v, labels, beta=0.0, temperature=2.0)
    taught = pyft.Teacher(*teacher, logit_scale=0.5)
    torch.testing.assert_close(distilled(student, labels, taught, 2.0), 4 * expected)
    mask, sampled = labels != -100, labels.clamp(min=0)
    each = compute_sampled_token_self_distillation_loss(z, v, sampled, distillation_alpha=1.0)
    of_student, of_teacher = (
        x.log_softmax(-1).gather(-1, sampled[..., None])[..., 0] for x in (z, v)
    )
    torch.testing.assert_close(
        torch.autograd.grad(reverse_kl(of_student, of_teacher, mask), leaf, retain_graph=True),
        torch.autograd.grad(each[mask].mean(), leaf),
    )
