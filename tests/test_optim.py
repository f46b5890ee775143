"""Optimizers with 8-bit states: the same bits on every backend, torch's own trajectories, exact
zeros, clean states after NaN, and everything a torch.optim.Optimizer does.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import BLOCK, CASES, CPU, check
from torch import Tensor
from torch.nn import Parameter

import pyft
from pyft import native
from pyft.backend import PREFERENCE, obstacle
from pyft.errors import UsageError
from pyft.formats import dynamic_map
from pyft.ops.optim import (
    BUCKETS,
    Tables,
    Work,
    adamw_rule,
    code_tables,
    lion_rule,
    sgd_rule,
    start_table,
    update,
)
from pyft.optim import AdamW8bit, Lion8bit, SGD8bit
from pyft.reference import optim as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": lambda params, **more: AdamW8bit(params, lr=1e-2, weight_decay=0.1, **more),
    "lion": lambda params, **more: Lion8bit(params, lr=1e-2, weight_decay=0.1, **more),
    "sgd": lambda params, **more: SGD8bit(params, lr=1e-2, weight_decay=0.1, **more),
}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    (device, name)
    for device in DEVICES
    for name in PREFERENCE[device]
    if obstacle("optim", name) is None
]
BEST_ISA = native._cpu().best_isa()
ISAS = [name for name, level in native.ISAS.items() if level <= BEST_ISA]
N = 4096 + 3 * BLOCK + 7  # coded, with a partial block


def run(
    optimizer: Any, params: list[Parameter], steps: int, seed: int = 0, scale: float = 1.0
) -> None:
    """Steps with random gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            grad = torch.randn(param.shape, generator=generator) * scale
            param.grad = grad.to(param.dtype).to(param.device)
        optimizer.step()


def parameters(
    dtype: torch.dtype = torch.float32, device: str = "cpu", sizes: tuple[int, ...] = (N, 100)
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(7)
    made = (torch.randn(n, generator=generator) for n in sizes)
    return [Parameter(x.to(dtype).to(device)) for x in made]


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures hold the same values, tensors bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_bits_are_the_references(monkeypatch: pytest.MonkeyPatch, name: str, isa: str) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    assert check(CASES[name], native, CPU) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [2, 3])
def test_number_of_threads_changes_nothing(threads: int) -> None:
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        params = parameters(sizes=(700_001, 5, 300_000, 4096))
        optimizer = AdamW8bit(params)
        run(optimizer, params, 2)
        found.append([[p.data for p in params], optimizer.state_dict()["state"]])
    assert same(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_trajectory_of_a_backend_is_the_references(
    device: str, backend: str, name: str, dtype: torch.dtype
) -> None:
    found = []
    for place, implementation in ((device, backend), ("cpu", "reference")):
        params = parameters(dtype, place)
        optimizer = OPTIMIZERS[name](params)
        with pyft.backend(implementation):
            run(optimizer, params, 4)
        found.append([[p.data for p in params], optimizer.state_dict()["state"]])
    assert same(*found)


@pytest.mark.parametrize("signed", [True, False])
def test_reference_takes_the_nearest_code(signed: bool) -> None:
    codes = torch.tensor(dynamic_map(signed))
    x = torch.rand(20 * BLOCK, dtype=torch.float64) ** 4
    x = (x * (1 if not signed else torch.randn_like(x).sign())).float()
    x[::BLOCK] = 1.0
    state, absmax = torch.zeros(len(x), dtype=torch.uint8), torch.zeros(20)
    finite = torch.ones(20, dtype=torch.bool)
    reference._encode(x.view(-1, BLOCK), state, absmax, finite, signed)
    if not signed:
        assert not ((state == 0) & (x > 0)).any()
        state = torch.where((state == 1) & (x < codes[1] / 2), 0, state)
    distance = (x.double()[:, None] - codes.double()).abs()
    chosen = distance.gather(1, state.long()[:, None])[:, 0]
    slack = torch.finfo(torch.float32).eps * x.abs()  # midpoints are fp32 numbers
    assert (chosen <= distance.amin(dim=1) + slack).all()
    assert torch.equal(absmax, torch.ones(20))


def test_no_bucket_has_two_midpoints() -> None:
    """What the look-up by exponent and seven bits rests on, and that it counts midpoints."""
    tables, starts = code_tables(CPU), start_table(CPU).long()
    assert starts.shape == (3, BUCKETS)
    low = ((torch.arange(23 << 7) + (104 << 7)).int() << 16).view(torch.float32)
    high = ((torch.arange(23 << 7) + (104 << 7) + 1).int() << 16).view(torch.float32)
    for row, map_row, sign in ((0, 0, 1), (1, 0, -1), (2, 2, 1)):
        midpoints = tables[map_row + 1, :255] * sign
        inside = (midpoints >= low[:, None]) & (midpoints < high[:, None])
        assert inside.sum(dim=1).max() == 1
        middle = (low + high) / 2 * sign
        below = (tables[map_row + 1, :255] < middle[:, None]).sum(dim=1)
        start = starts[row, : 23 << 7]
        looked_up = start + (middle > tables[map_row + 1][start])
        assert torch.equal(looked_up, below)
    # below the first bucket there is none at all
    for midpoints in (tables[1, :255], tables[3, :255]):
        assert midpoints.abs().min() >= low[1]


# ---- trajectories --------------------------------------------------------------------------------


def close_to(found: Tensor, truth: Tensor, steps: int) -> None:
    """To rounding: each of the steps may add two units in the last place of the largest value."""
    allowed = 2 * steps * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (found.double() - truth.double()).abs().max() <= allowed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0, "lr": 0.1},
        {"betas": (0.5, 0.9), "eps": 1e-4},
        {"maximize": True},
    ],
    ids=str,
)
def test_adamw_follows_torch(options: dict[str, Any]) -> None:
    ours, theirs = parameters(sizes=(1000, 3)), parameters(sizes=(1000, 3))
    run(AdamW8bit(ours, **options), ours, 20)
    run(torch.optim.AdamW(theirs, foreach=False, **options), theirs, 20)
    for found, truth in zip(ours, theirs, strict=True):
        close_to(found.data, truth.data, 20)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3},
        {"nesterov": True, "weight_decay": 0.1},
        {"dampening": 0.4},
        {"maximize": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_sgd_follows_torch(options: dict[str, Any]) -> None:
    options = {"lr": 0.05, "momentum": 0.8} | options
    ours, theirs = parameters(sizes=(1000, 3)), parameters(sizes=(1000, 3))
    run(SGD8bit(ours, **options), ours, 20)
    run(torch.optim.SGD(theirs, foreach=False, **options), theirs, 20)
    for found, truth in zip(ours, theirs, strict=True):
        close_to(found.data, truth.data, 20)


@pytest.mark.parametrize("maximize", [False, True])
def test_lion_follows_its_paper(maximize: bool) -> None:
    lr, (beta1, beta2), decay, steps = 1e-2, (0.9, 0.99), 0.1, 20
    ours = parameters(sizes=(1000,))
    p, m = ours[0].detach().double().clone(), torch.zeros(1000, dtype=torch.float64)
    optimizer = Lion8bit(ours, lr, (beta1, beta2), decay, maximize=maximize)
    run(optimizer, ours, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        g = torch.randn(1000, generator=generator).double() * (-1 if maximize else 1)
        direction = (beta1 * m + (1 - beta1) * g).sign()
        p = p - lr * (direction + decay * p)
        m = beta2 * m + (1 - beta2) * g
    close_to(ours[0].data, p, steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_are_stepped_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    """A first step from equal values: torch in fp32, rounded, but for what rounds on an edge."""
    ours = parameters(dtype, sizes=(3000,))
    theirs = [Parameter(ours[0].detach().float())]
    grad = torch.randn(3000).to(dtype)
    ours[0].grad, theirs[0].grad = grad, grad.float()
    AdamW8bit(ours, lr=1e-2).step()
    torch.optim.AdamW(theirs, lr=1e-2).step()
    differs = ours[0].data != theirs[0].data.to(dtype)
    assert differs.float().mean() < 1e-3


@pytest.mark.parametrize(
    ("make", "peer", "options"),
    [
        (AdamW8bit, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
        (SGD8bit, torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}),
    ],
)
def test_converges_like_fp32_states(make: Any, peer: Any, options: dict[str, Any]) -> None:
    """A noisy linear regression, 8192 weights. The states' codes are within 1 part in 14 (m) or in
    28 (v) of what they stand for above a tenth of their block's largest, so steps differ by a few
    percent and the optimum, where both end, does not: the excess losses stay within a factor 2.
    """
    x = torch.randn(512, 128)
    truth = torch.randn(64, 128)
    y = x @ truth.t() + 0.1 * torch.randn(512, 64)
    best = torch.linalg.lstsq(x, y).solution.t()
    floor = (x @ best.t() - y).square().mean()

    def excess(kind: Any) -> float:
        w = Parameter(torch.zeros(64, 128))
        optimizer = kind([w], **options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
        for _ in range(300):
            optimizer.zero_grad()
            (x @ w.t() - y).square().mean().backward()
            optimizer.step()
            schedule.step()
        return float((x @ w.detach().t() - y).square().mean() - floor)

    start = float(y.square().mean() - floor)
    found, fp32 = excess(make), excess(peer)
    assert found < 1e-5 * start
    assert found <= 2 * fp32 + 1e-6 * start


# ---- zeros, NaN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_gradient_history_means_no_step(name: str, backend: str) -> None:
    """Elements whose gradient is always 0 stay, beside others in the same blocks that move."""
    params = parameters()
    before = [p.detach().clone() for p in params]
    makers = {"adamw": AdamW8bit, "lion": Lion8bit, "sgd": SGD8bit}
    optimizer = makers[name](params, lr=0.1, weight_decay=0.0)
    still = [torch.rand(p.shape) < 0.5 for p in params]
    with pyft.backend(backend):
        for _ in range(5):
            for p, mask in zip(params, still, strict=True):
                p.grad = torch.randn(p.shape).masked_fill(mask, 0.0)
            optimizer.step()
    for p, mask, start in zip(params, still, before, strict=True):
        assert torch.equal(p[mask], start[mask])
        assert (p[~mask] != start[~mask]).all()


@pytest.mark.parametrize("make", [AdamW8bit, Lion8bit])
def test_no_gradient_history_means_decay_only(make: Callable[..., Any]) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    make(params, lr=0.5, weight_decay=0.25).step()
    for p, start in zip(params, before, strict=True):
        assert torch.equal(p.data, start * 0.875)


def test_a_second_moment_above_zero_is_not_stored_as_zero() -> None:
    param = Parameter(torch.ones(N))
    param.grad = torch.full((N,), 1e-6)
    param.grad[::BLOCK] = 1e3
    optimizer = AdamW8bit([param], lr=1e-3, weight_decay=0.0)
    optimizer.step()
    codes = optimizer.state[param]["exp_avg_sq"]
    assert (codes > 0).all()
    assert (codes[1:BLOCK] == 1).all()
    optimizer.step()
    assert (param - 1).abs().max() < 3e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["reference", *ISAS])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_leaves_its_blocks_as_they_were(
    monkeypatch: pytest.MonkeyPatch, name: str, backend: str, value: float
) -> None:
    if backend != "reference":
        monkeypatch.setenv("PYFT_CPU_ISA", backend)
    with pyft.backend("reference" if backend == "reference" else "cpu"):
        params, healthy = parameters(), parameters()
        optimizer, other = OPTIMIZERS[name](params), OPTIMIZERS[name](healthy)
        run(optimizer, params, 2)
        run(other, healthy, 2)
        before = copy.deepcopy([[p.data for p in params], optimizer.state_dict()["state"]])
        grads = [torch.randn(p.shape) for p in params]
        bad = [2 * BLOCK + 5, N - 1]  # a whole block and the partial one
        for p, h, g in zip(params, healthy, grads, strict=True):
            h.grad, p.grad = g.clone(), g.clone()
        params[0].grad[bad] = value
        params[1].grad[3] = value
        optimizer.step()
        other.step()
    skipped = torch.zeros(N, dtype=torch.bool)
    skipped[2 * BLOCK : 3 * BLOCK] = skipped[N // BLOCK * BLOCK :] = True
    blocks = skipped[::BLOCK]
    assert torch.equal(params[0].data, torch.where(skipped, before[0][0], healthy[0].data))
    assert torch.equal(params[1].data, before[0][1])  # all of it is one block
    for key, state in optimizer.state[params[0]].items():
        if isinstance(state, Tensor):
            kept, new = before[1][0][key], other.state[healthy[0]][key]
            assert torch.equal(
                state, torch.where(skipped if len(state) == N else blocks, kept, new)
            )
    for key, state in optimizer.state[params[1]].items():
        assert key == "step" or torch.equal(state, before[1][1][key])


def test_the_first_gradient_may_be_nan() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer = AdamW8bit(params)
    optimizer.step()
    assert all(torch.equal(p.data, start) for p, start in zip(params, before, strict=True))
    run(optimizer, params, 1)
    assert all(p.isfinite().all() and (p != start).all() for p, start in zip(params, before))  # noqa: B905


# ---- a torch.optim.Optimizer ---------------------------------------------------------------------


def _saved(optimizer: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_round_trip_is_exact(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = OPTIMIZERS[name](params)
    run(optimizer, params, 3)
    state = optimizer.state[params[0]]
    assert {t.dtype for t in state.values() if isinstance(t, Tensor)} == {
        torch.uint8,
        torch.float32,
    }
    copies = [Parameter(p.detach().clone()) for p in params]
    other = OPTIMIZERS[name](copies)
    saved = _saved(optimizer)
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert same(other.state_dict(), optimizer.state_dict())
    run(optimizer, params, 3, seed=1)
    run(other, copies, 3, seed=1)
    assert same([p.data for p in copies], [p.data for p in params])
    assert same(other.state_dict(), optimizer.state_dict())
    assert same(saved, before)  # what was loaded is a copy


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(clone: Callable[[Any], Any]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = AdamW8bit(params)
    run(optimizer, params, 2)
    twin = clone(optimizer)
    copies = twin.param_groups[0]["params"]
    run(optimizer, params, 2, seed=1)
    run(twin, copies, 2, seed=1)
    assert same([p.data for p in copies], [p.data for p in params])
    assert same(twin.state_dict(), optimizer.state_dict())


def test_groups_have_options_of_their_own() -> None:
    a, b = parameters(sizes=(N, N))
    optimizer = AdamW8bit([{"params": [a], "lr": 0.0}], lr=1e-2)
    optimizer.add_param_group({"params": [b], "weight_decay": 0.0})
    start = a.detach().clone(), b.detach().clone()
    run(optimizer, [a, b], 1)
    assert torch.equal(a.data, start[0])
    assert (b != start[1]).all()


def test_parameters_without_a_gradient_are_left_alone() -> None:
    a, b = parameters(sizes=(N, N))
    optimizer = AdamW8bit([a, b])
    run(optimizer, [a], 3)
    assert b not in optimizer.state
    run(optimizer, [a, b], 1)
    assert optimizer.state[a]["step"] == 4
    assert optimizer.state[b]["step"] == 1
    optimizer.zero_grad()
    before = a.detach().clone()
    optimizer.step()
    assert torch.equal(a.data, before)


def test_steps_are_counted_for_each_parameter() -> None:
    """A parameter that joins later is corrected for its own first step, as in torch."""
    ours, theirs = parameters(sizes=(50, 60)), parameters(sizes=(50, 60))
    for params, make in ((ours, AdamW8bit), (theirs, torch.optim.AdamW)):
        optimizer = make(params)
        run(optimizer, params[:1], 3)
        run(optimizer, params, 3, seed=1)
    for found, truth in zip(ours, theirs, strict=True):
        close_to(found.data, truth.data, 6)


def test_closure_scheduler_and_hooks() -> None:
    param = Parameter(torch.ones(5))
    optimizer = AdamW8bit([param], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(param.grad.sum().item()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert seen == [10.0]


def test_grad_scaler() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = params[0].detach().clone()
    for value in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(params[0].sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0].data, before) == (value != 1.0)


def test_parameters_and_gradients_in_any_layout() -> None:
    """Transposed, strided and channels-last parameters step as their contiguous copies do."""
    base = torch.randn(3, 80, 64)
    views = [
        base[0].t(),
        base[1][:, ::2],
        torch.randn(2, 64, 8, 9).to(memory_format=torch.channels_last),
        base[2],
    ]
    grads = [torch.randn(view.shape) for view in views]
    grads[3] = grads[3].t().contiguous().t()
    ours = [Parameter(view) for view in views]
    plain = [Parameter(view.contiguous().clone()) for view in views]
    optimizer, other = AdamW8bit(ours), AdamW8bit(plain)
    for _ in range(3):
        for a, b, g in zip(ours, plain, grads, strict=True):
            a.grad, b.grad = g.clone(memory_format=torch.preserve_format), g.contiguous()
        optimizer.step()
        other.step()
    for a, b, view in zip(ours, plain, views, strict=True):
        assert a.stride() == view.stride()
        assert torch.equal(a, b)
    assert same(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_empty_and_scalar_parameters() -> None:
    params = [Parameter(torch.empty(0, 4)), Parameter(torch.tensor(2.0))]
    optimizer = AdamW8bit(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[1].item() < 2.0


def test_a_step_is_one_launch_and_its_table_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[Tensor] = []
    launch = native.optim
    monkeypatch.setattr(native, "optim", lambda *a: (tables.append(a[0]), launch(*a)))
    params = parameters(sizes=(N, 3, 5000, 4095, 1))
    optimizer = AdamW8bit(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        optimizer.step()
    assert len(tables) == 3
    assert tables[0] is tables[1] is tables[2]
    for p in params:
        p.grad = p.grad.clone()
    optimizer.step()
    assert tables[3] is not tables[2]


def test_only_steps_that_were_made_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two launches fails: what the first one stepped is counted, the rest not."""
    launch, calls = native.optim, []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of something")
        launch(*arguments)

    first = [parameters()[0], Parameter(torch.randn(6, 4).t())]
    second = [Parameter(p.detach().clone()) for p in first]
    optimizer = AdamW8bit([{"params": first}, {"params": second}])
    run(optimizer, first + second, 1)
    before = copy.deepcopy([p.data for p in first + second])
    monkeypatch.setattr(native, "optim", failing)
    with pytest.raises(RuntimeError, match="out of something"):
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in first + second] == [2, 2, 1, 1]
    moved = [not torch.equal(p, x) for p, x in zip(first + second, before, strict=True)]
    assert moved == [True, True, False, False]
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in first + second] == [3, 3, 2, 2]


def test_a_step_that_cannot_be_made_changes_nothing() -> None:
    """A backend that does not run here, and a rule without a value, in the second group."""
    params = parameters()
    optimizer = AdamW8bit([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    with pyft.backend("triton"), pytest.raises(UsageError, match="cannot run optim"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    before = copy.deepcopy([[p.data for p in params], optimizer.state_dict()["state"]])
    optimizer.param_groups[1]["betas"] = (1.0, 1.0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert same([[p.data for p in params], optimizer.state_dict()["state"]], before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_default_device_changes_nothing(backend: str) -> None:
    """Tables made while another device is the default are the same, and are kept for later."""
    found = []
    for place in ("cpu", "meta"):
        for table in (code_tables, start_table):
            table.cache_clear()
        reference._map.cache_clear()
        params = parameters()
        optimizer = AdamW8bit(params)
        for p in params:
            p.grad = p.detach().cos()
        with pyft.backend(backend), torch.device(place):
            optimizer.step()
            twin = copy.deepcopy(optimizer)
            twin.load_state_dict(optimizer.state_dict())
            tables = [code_tables(CPU), start_table(CPU)]
        found.append([[p.data for p in params], twin.state_dict()["state"], tables])
    assert same(*found)


def test_a_backward_through_values_before_the_step_is_refused() -> None:
    param = Parameter(torch.ones(N))
    loss = param.square().sum()
    param.grad = torch.ones(N)
    AdamW8bit([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fake_tensors_have_states_and_no_update() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        param = Parameter(torch.empty(N))
        param.grad = torch.empty(N)
        optimizer = AdamW8bit([param])
        optimizer.step()
    state = optimizer.state[param]
    assert isinstance(state["exp_avg"], FakeTensor)
    assert state["exp_avg_absmax"].shape == (-(-N // BLOCK),)


def test_trainer_trains_saves_and_resumes(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(96, 64)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.linear(x) - labels).square().mean()}

    data = [{"x": torch.randn(96), "labels": torch.randn(64)} for _ in range(8)]

    def train(steps: int, resume: bool) -> Trainer:
        options = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
            lr_scheduler_type="constant", logging_strategy="no",
        )  # fmt: skip
        classes = (AdamW8bit, {"lr": 1e-2, "weight_decay": 0.1})
        trainer = Trainer(Model(), options, train_dataset=data, optimizer_cls_and_kwargs=classes)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return trainer

    whole = train(4, resume=False)
    resumed = train(4, resume=True)
    for found, truth in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, truth)
    assert same(resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])


# ---- wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (AdamW8bit, {"lr": -1.0}, "lr is -1.0; write a number from 0 up"),
        (AdamW8bit, {"lr": float("nan")}, "lr is nan"),
        (AdamW8bit, {"lr": torch.tensor(0.1)}, "lr is a tensor; write a number"),
        (AdamW8bit, {"lr": "1e-3"}, "lr is '1e-3'"),
        (AdamW8bit, {"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0; write a number from 0 to below 1"),
        (AdamW8bit, {"betas": 0.9}, "betas is 0.9; write two numbers"),
        (AdamW8bit, {"eps": 0.0}, "eps is 0.0; write a number above 0"),
        (AdamW8bit, {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (Lion8bit, {"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        (SGD8bit, {"momentum": 0.0}, "momentum is 0.0; .* use torch.optim.SGD"),
        (SGD8bit, {"dampening": 1.5}, "dampening is 1.5"),
        (SGD8bit, {"nesterov": True, "dampening": 0.1}, "nesterov needs dampening=0"),
    ],
)
def test_refuses_hyperparameters(make: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        make([Parameter(torch.ones(3))], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_refuses_a_parameter(dtype: torch.dtype) -> None:
    good, bad = Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(UsageError, match=rf"parameter 1 of group 0 is {dtype}; use float32"):
        AdamW8bit([good, bad])
    optimizer = AdamW8bit([good])
    with pytest.raises(UsageError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(UsageError, match=r"parameter 'w\.b' is"):
        AdamW8bit([("w.a", good), ("w.b", bad)])


def test_refuses_an_integer_parameter() -> None:
    with pytest.raises(UsageError, match=r"is torch\.int64; use float32"):
        AdamW8bit([Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)])


def test_refuses_a_gradient_and_touches_nothing() -> None:
    first = Parameter(torch.ones(4, 3))
    table = torch.nn.Embedding(4, 3, sparse=True)
    first.grad = torch.ones(4, 3)
    table(torch.tensor([1])).sum().backward()
    optimizer = AdamW8bit([first, table.weight])
    with pytest.raises(UsageError, match="parameter 1 of group 0 has a sparse gradient"):
        optimizer.step()
    assert torch.equal(first.data, torch.ones(4, 3))
    assert not optimizer.state


def test_refuses_the_state_of_another_optimizer() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params)
    run(theirs, params, 1)
    ours = AdamW8bit(params)
    with pytest.raises(UsageError, match=r"state\[0\] has .*exp_avg torch.float32.*it must have"):
        ours.load_state_dict(theirs.state_dict())
    other = AdamW8bit(parameters(sizes=(N + 1, 100)))
    run(ours, params, 1)
    with pytest.raises(UsageError, match=rf"exp_avg torch.uint8 \[{N}\]"):
        other.load_state_dict(ours.state_dict())
    with pytest.raises(UsageError, match="params is a list of 2; this parameter group has 1"):
        AdamW8bit(params[:1]).load_state_dict(ours.state_dict())
    with pytest.raises(UsageError, match="has 1 parameter groups, the optimizer 2"):
        AdamW8bit([{"params": p} for p in params]).load_state_dict(ours.state_dict())


def refused(make: Any, change: Callable[[dict[str, Any]], Any], text: str) -> None:
    """That a changed state dict is refused with one line, and nothing of it is loaded."""
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = copy.deepcopy(saved)
    result = change(loaded)
    with pytest.raises(UsageError, match=text) as caught:
        optimizer.load_state_dict(loaded if result is None else result)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert same(optimizer.state_dict(), saved)


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (
            AdamW8bit,
            {"eps": 0.0},
            r"param_groups\[0\]: AdamW8bit: eps is 0.0; write a number",
        ),
        (AdamW8bit, {"lr": torch.tensor(0.1)}, "lr is a tensor; write a number"),
        (AdamW8bit, {"lr": True}, "lr is True"),
        (AdamW8bit, {"lr": 10**400}, "lr is of 1329 bits"),
        (AdamW8bit, {"lr": 10**5000}, "lr is of 16610 bits"),
        (AdamW8bit, {"betas": (1, 1)}, r"betas\[0\] is 1; write a number"),
        (AdamW8bit, {"betas": [torch.ones(9, 9)] * 3}, "betas is a list of 3; write two numbers"),
        (AdamW8bit, {"betas": None}, "betas is None"),
        (AdamW8bit, {"maximize": torch.ones(3)}, "maximize is a tensor; write True or False"),
        (Lion8bit, {"weight_decay": float("nan")}, "weight_decay is nan"),
        (Lion8bit, {"betas": (0.9, float("inf"))}, r"betas\[1\] is inf"),
        (SGD8bit, {"momentum": 0.0}, "momentum is 0.0"),
        (SGD8bit, {"nesterov": True, "dampening": 0.5}, "nesterov needs dampening=0"),
        (SGD8bit, {"nesterov": "yes"}, "nesterov is 'yes'; write True or False"),
        (SGD8bit, {"params": [0]}, "params is a list of 1; this parameter group has 2"),
        (SGD8bit, {"params": None}, "params is None"),
        (SGD8bit, {"params": [0, 0]}, "params has 0; write each parameter's number once"),
        (SGD8bit, {"params": [[], 0]}, "params has a list of 0"),
        (SGD8bit, {"param_names": ["a"]}, "param_names is a list of 1"),
    ],
)
def test_refuses_loaded_hyperparameters(make: Any, options: dict[str, Any], text: str) -> None:
    refused(make, lambda loaded: loaded["param_groups"][0].update(options), text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda loaded: [loaded], "no dict 'state'"),
        (lambda loaded: loaded.pop("state") and None, "no dict 'state'"),
        (lambda loaded: loaded.update(state=[]), "no dict 'state'"),
        (lambda loaded: loaded.pop("param_groups") and None, "no list 'param_groups'"),
        (lambda loaded: loaded.update(param_groups={}), "no list 'param_groups'"),
        (lambda loaded: loaded.update(param_groups=[[]]), "no list 'param_groups'"),
        (lambda loaded: loaded["param_groups"].append({"params": []}), "has 2 parameter groups"),
        (lambda loaded: loaded["param_groups"][0].pop("params") and None, "params is None"),
    ],
)
def test_refuses_what_is_no_state_dict(change: Any, text: str) -> None:
    refused(AdamW8bit, change, text)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (-1, "has step -1; it must be an integer from 0"),
        (2**53, "has step 9007199254740992"),
        (10**400, "has step of 1329 bits"),
        (True, "has step True"),
        (3.0, "has step 3.0"),
        (torch.tensor(3), "has step a tensor"),
    ],
    ids=["negative", "2**53", "10**400", "True", "3.0", "tensor"],
)
def test_refuses_a_loaded_count(step: Any, text: str) -> None:
    refused(Lion8bit, lambda loaded: loaded["state"][1].update(step=step), text)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ([1, 2], r"state\[1\] is a list of 2; it must be a dict"),
        (None, "is None; it must be a dict"),
        ({}, r"has nothing; it must have step, exp_avg torch.float32 \[100\]"),
        ({"exp_avg": torch.zeros(100)}, "it must have step"),
        ({"step": 1, "exp_avg": torch.zeros(10, 10)}, r"exp_avg torch.float32 \[10, 10\]; it must"),
        ({"step": 1, "exp_avg": torch.zeros(100).to_sparse()}, "exp_avg torch.sparse_coo"),
        ({"step": 1, "exp_avg": torch.zeros(100), "more": range(3)}, "more of type range"),
    ],
    ids=["list", "None", "empty", "no step", "shape", "sparse", "more"],
)
def test_refuses_a_loaded_state(state: Any, text: str) -> None:
    refused(Lion8bit, lambda loaded: loaded["state"].update({1: state}), text)


def test_a_hyperparameter_that_is_not_saved_is_kept() -> None:
    params = parameters()
    optimizer = AdamW8bit(params, betas=(0.5, 0.75), maximize=True)
    run(optimizer, params, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("betas", "maximize", "paged"):
        del saved["param_groups"][0][name]
    saved["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["maximize"], group["lr"]) == ((0.5, 0.75), True, 0.25)
    run(optimizer, params, 1)


def test_refuses_states_left_behind_by_the_parameter() -> None:
    param = Parameter(torch.ones(N))
    optimizer = AdamW8bit([param])
    run(optimizer, [param], 1)
    state = optimizer.state[param]
    state["exp_avg"] = state["exp_avg"].to("meta")
    with pytest.raises(UsageError, match="is on cpu and its states on meta"):
        run(optimizer, [param], 1)


@pytest.mark.parametrize(("n", "moved"), [(100, ()), (N, ("exp_avg_sq",))])
def test_refuses_states_on_the_host_that_are_not_coded_or_not_all_there(
    n: int, moved: tuple[str, ...]
) -> None:
    """The parameter moved after a step: only coded states may stay behind, and be paged."""
    param = Parameter(torch.ones(n))
    optimizer = AdamW8bit([param], paged=True)
    run(optimizer, [param], 1)
    state = optimizer.state.pop(param)
    elsewhere = Parameter(torch.empty(n, device="meta"))
    optimizer.param_groups[0]["params"][0] = elsewhere
    elsewhere.grad = torch.empty(n, device="meta")
    optimizer.state[elsewhere] = state | {name: state[name].to("meta") for name in moved}
    with pytest.raises(UsageError, match="is on meta and its states on cpu"):
        optimizer.step()
    assert optimizer.state[elsewhere]["step"] == 1


# ---- the op --------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 1500),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 15),
    rule=st.sampled_from(
        [
            adamw_rule(1, 1e-3, (0.9, 0.999), 1e-8, 0.0, False),
            adamw_rule(900, 1e-3, (0.9, 0.95), 1e-8, 0.1, False),
            lion_rule(1e-3, (0.9, 0.99), 0.0, False),
            sgd_rule(7, 1e-3, 0.9, 0.0, 0.0, True, False),
        ]
    ),
)
def test_repeated_steps_have_the_references_bits(
    n: int, seed: int, exponent: int, rule: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-n // BLOCK)
    codes = [torch.full((n,), code, dtype=torch.uint8) for code in (127, 0)]
    absmax = [torch.zeros(blocks) for _ in range(2)]
    if rule.algorithm != reference.ADAMW:
        codes[1] = absmax[1] = None  # type: ignore[call-overload]
    param = torch.randn(n, generator=generator)
    works = []
    for _ in range(2):
        mine = [None if t is None else t.clone() for t in (param, *codes, *absmax)]
        works.append(Work(mine[0], param, *mine[1:]))  # type: ignore[arg-type]
    for _ in range(3):
        grad = torch.randn(n, generator=generator) * 10.0**exponent
        for i, name in enumerate(("cpu", "reference")):
            works[i] = works[i]._replace(grad=grad)
            with pyft.backend(name):
                update([works[i]], rule, Tables())
    assert same(list(works[0]), list(works[1]))
