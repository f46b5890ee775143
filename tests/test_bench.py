"""The harness: what it refuses, times and counts. The figures themselves are not tested."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_clock import CPU, TINY, Seconds
from torch import Tensor

import pyft
from pyft.bench import report
from pyft.bench.memory import peak_bytes
from pyft.bench.problem import Call, Candidate, Case, Problem, Verdict, Work, close, exact, near
from pyft.bench.problems.dropout import dropout_work
from pyft.bench.problems.linear import linear_work
from pyft.bench.problems.optim import adamw8bit_work, adapter_shapes
from pyft.bench.problems.quantize import moved
from pyft.bench.run import measure
from pyft.bench.shapes import Layer
from pyft.bench.timing import Broken, CpuClock, interleave, plan_rounds, ratios, spread

SMALL = Layer(64, 128, "a layer")


def candidate(
    name: str, run: Callable[[], Any], check: Any = None, package: str = "torch"
) -> Candidate:
    right = check or (lambda found: Verdict(0.0, 0.0))
    return Candidate(name, lambda: Call(run, lambda: [torch.zeros(1)]), right, package)


def problem(ours: Sequence[Candidate], peers: Sequence[Candidate] = ()) -> Problem:
    case = Case("dequantize", "bf16", SMALL, {"N": 64, "K": 128}, "nf4")
    return Problem(case, "", Work(bytes=4000, flops=0, copied=1000), ours, peers)


# A wrong answer is never timed.


def test_a_wrong_answer_is_reported_and_not_timed():
    clock = Seconds()
    wrong = candidate("cpu", lambda: "ours", lambda found: Verdict(0.5, 0.1), "pyft")
    peer = candidate("torch", lambda: "theirs")
    (row,), _ = measure(problem([wrong], [peer]), TINY, clock, 0.0)
    assert "ours" not in clock.seen
    assert row["status"] == "WRONG"
    assert row["reason"] == "error 0.5, allowed 0.1"
    assert "median_ms" not in row
    assert row["peers"]["torch"]["median_ms"] == 1000.0
    assert "ratio" not in row["peers"]["torch"]
    assert report.cells({"shape": "", "layer": "", **row})[3] == "WRONG"


def test_nothing_is_timed_when_no_answer_is_right():
    clock = Seconds()
    wrong = candidate("cpu", lambda: "ours", lambda found: Verdict(float("nan"), 0.1), "pyft")
    (row,), _ = measure(problem([wrong]), TINY, clock, 0.0)
    assert clock.seen == []
    assert row["status"] == "WRONG"


def test_a_buffer_nobody_wrote_is_a_wrong_answer():
    truth = torch.randn(4)
    buffer = truth.clone()  # what an earlier run had left
    lazy = Candidate("cpu", lambda: Call(lambda: buffer, buffers=[buffer]), exact([truth]), "pyft")
    (row,), _ = measure(problem([lazy]), TINY, Seconds(), 0.0)
    assert row["status"] == "WRONG"


def test_a_peer_that_cannot_run_says_why():
    def fails() -> None:
        raise RuntimeError("no kernel for this device\nand a long story")

    absent = candidate("absent", lambda: None, package="no-such-package")
    broken = candidate("broken", fails)
    left_out = replace(candidate("left out", lambda: None), left_out="too slow")
    ours = candidate("cpu", lambda: "ours", package="pyft")
    request = replace(TINY, peers=True)
    (row,), _ = measure(problem([ours], [absent, broken, left_out]), request, Seconds(), 0.0)
    reasons = {name: (peer["status"], peer["reason"]) for name, peer in row["peers"].items()}
    assert reasons == {
        "absent": ("not installed", "no-such-package not installed"),
        "broken": ("failed", "RuntimeError: no kernel for this device"),
        "left out": ("not run", "too slow"),
    }
    assert row["status"] == "ok"
    assert len(report.remarks([row])) == 3


def test_a_call_that_breaks_while_timed_is_left_out():
    calls = iter(range(2))

    def twice() -> None:
        if next(calls, None) is None:
            raise RuntimeError("out of memory")

    ours = candidate("cpu", lambda: None, package="pyft")
    request = replace(TINY, peers=True)
    (row,), _ = measure(problem([ours], [candidate("peer", twice)]), request, Seconds(), 0.0)
    assert row["status"] == "ok"
    assert row["peers"]["peer"]["status"] == "failed"
    assert row["peers"]["peer"]["reason"] == "RuntimeError: out of memory"


def test_peers_are_asked_for():
    ours = candidate("cpu", lambda: None, package="pyft")
    others = [candidate("torch", lambda: None), candidate("other", lambda: None, package="peft")]
    (row,), _ = measure(problem([ours], others), TINY, Seconds(), 0.0)
    assert list(row["peers"]) == ["torch"]


def test_exact_is_exact():
    truth = torch.tensor([1.0, -2.0])
    check = exact([truth])
    assert check([truth.clone()]).right
    assert check([torch.tensor([1.0, -2.5])]) == Verdict(0.5, 0.0)
    assert not check([torch.tensor([1.0, float("nan")])]).right
    assert not check([truth.double()]).right
    assert not check([truth[:1]]).right


def test_close_follows_the_reference():
    x = torch.randn(100, 8, dtype=torch.float64)
    reference = x.bfloat16()
    check = close([reference], [x[[round(i * 99 / 31) for i in range(32)]]])
    assert check([reference]).right
    for row in (0, 50, 99):  # a wrong value anywhere, and NaN
        for value in (float(reference[row, 3]) + 0.5, float("nan")):
            wrong = reference.clone()
            wrong[row, 3] = value
            assert not check([wrong]).right
    assert not check([reference.float()]).right


def test_near_is_relative():
    truth = torch.randn(40, 8)
    assert near([truth], 0.1)([truth * 1.05]).right
    assert not near([truth], 0.1)([truth * 1.2]).right
    assert not near([truth], 0.1)([truth * float("nan")]).right
    assert not near([truth, truth], 0.1)([truth * float("nan"), truth]).right


# Timing.


def test_rounds_turn_and_the_slow_sit_out():
    clock = Seconds()
    plan = plan_rounds({"a": 1.0, "b": 1.0, "c": 4.0}, budget=36.0)
    assert plan.rounds == 12
    assert plan.strides == {"a": 1, "b": 1, "c": 4}
    assert [plan.order(i) for i in range(5)] == [
        ["a", "b", "c"],
        ["b", "a"],
        ["a", "b"],
        ["a", "b"],
        ["b", "c", "a"],
    ]
    assert clock.seen == []


def test_every_candidate_gets_a_few_rounds():
    plan = plan_rounds({"fast": 1e-6, "slow": 100.0}, budget=1.0)
    assert plan.rounds == 100
    assert sum("slow" in plan.order(i) for i in range(plan.rounds)) >= 3
    assert plan_rounds({"slow": 100.0}, budget=0.0).rounds == 3


def test_interleaving_is_in_rounds():
    clock = Seconds(lambda name: {"a": 1.0, "b": 2.0}[name])
    samples = interleave({"a": lambda: "a", "b": lambda: "b"}, clock, budget=0.0)
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert clock.seen[-6:] == ["a", "b", "b", "a", "a", "b"]


def test_interleaving_names_who_broke():
    def breaks() -> None:
        raise ValueError("broken")

    with pytest.raises(Broken) as error:
        interleave({"a": lambda: None, "b": breaks}, Seconds(), 0.0)
    assert error.value.name == "b"
    assert isinstance(error.value.__cause__, ValueError)


def test_a_ratio_is_taken_within_its_round():
    """A machine that slows down tenfold in the middle leaves the ratio as it is."""
    theirs = [1.0, 1.1, 1.2, 10.0, 11.0, 12.0, None]
    ours = [2.0, 2.2, 2.4, 20.0, 22.0, 24.0, 7.0]
    found = ratios(ours, theirs)
    assert found.count == 6
    assert (found.median, found.p10, found.p90) == pytest.approx((2.0, 2.0, 2.0))
    one_off = ratios([1.0] * 9 + [5.0], [1.0] * 10)
    assert (one_off.median, one_off.p10, one_off.p90) == (1.0, 1.0, 5.0)


def test_spread_is_nearest_rank():
    found = spread([float(i) for i in range(21)])
    assert (found.median, found.p10, found.p90, found.count) == (10.0, 2.0, 18.0, 21)
    assert spread([3.0]).p10 == spread([3.0]).p90 == 3.0


def test_rates_come_from_the_same_run():
    """Ours moves 4000 bytes in 1 s, the copy 2 x 1000 in 0.25 s: half its bandwidth."""
    ours = candidate("cpu", lambda: "ours", package="pyft")
    clock = Seconds(lambda result: 1.0 if result == "ours" else 0.25)
    (row,), _ = measure(problem([ours]), TINY, clock, 0.0)
    assert row["gb_s"] == pytest.approx(4000 / 1e9)
    assert row["copy_gb_s"] == pytest.approx(8000 / 1e9)
    assert row["copy_share"] == pytest.approx(0.5)
    with_matmul = replace(
        problem([ours]), work=Work(4000, 600, 1000), matmul=lambda: None, matmul_flops=300
    )
    (row,), _ = measure(with_matmul, TINY, clock, 0.0)
    assert row["tflop_s"] == pytest.approx(600 / 1e12)
    assert row["matmul_tflop_s"] == pytest.approx(1200 / 1e12)
    assert row["matmul_share"] == pytest.approx(0.5)


def test_the_cpu_clock_measures_the_call():
    clock = CpuClock(1 << 16)
    assert 0.02 <= clock.time(lambda: time.sleep(0.02)) < 1.0


# Memory.


def test_peak_bytes_of_a_known_case():
    def call() -> Tensor:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a
        c = torch.empty(700, dtype=torch.uint8)
        del b
        return c

    assert peak_bytes(call, CPU) == 1500
    before = torch.empty(5000, dtype=torch.uint8)
    assert peak_bytes(lambda: before.fill_(1), CPU) == 0
    assert peak_bytes(lambda: torch.empty(5000, dtype=torch.uint8), CPU) == 5000


def test_peak_bytes_sees_inside_an_op():
    w = torch.randn(64, 256)
    with pyft.backend("reference"):
        q = pyft.quantize(w)
        peak = peak_bytes(lambda: pyft.dequantize(q), CPU)
    assert peak > 2 * w.nbytes  # the reference's int64 codes live beside the output


def test_peak_bytes_survives_an_error():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0, CPU)
    assert peak_bytes(lambda: torch.empty(10, dtype=torch.uint8), CPU) == 10


# Formulas, against numbers worked out by hand.


def test_bytes_of_a_quantized_weight():
    # 128 x 256 = 32768 elements: 16384 bytes of codes, 512 scales of a byte, 2 nested, 1 offset
    stored = pyft.quantize(torch.randn(128, 256)).stored_bytes
    assert stored == 16384 + 512 + 2 * 4 + 4
    assert moved(32768, 2, stored) == Work(bytes=65536 + 16908, flops=0, copied=65536)


def test_work_of_a_linear():
    # M 4, N 6, K 8 in 2 bytes: x 64, y 48, W 24 as it is stored, copied 96 decoded
    plain = linear_work(4, 6, 8, 2, 24)
    assert plain["forward"] == Work(24 + 64 + 48, 2 * 4 * 6 * 8, 96)
    assert plain["backward"] == Work(24 + 48 + 64, 384, 96)
    assert plain["forward+backward"] == Work(272, 768, 96)
    # R 2: A 32 and B 24 bytes; x Aᵀ and S Bᵀ 2*4*2*(8+6) = 224 operations
    lora = linear_work(4, 6, 8, 2, 24, rank=2)
    assert lora["forward"] == Work(136 + 56, 384 + 224, 96)
    assert lora["backward"] == Work(136 + 64 + 2 * 56, 384 + 2 * 224, 96)  # x again; A, B, dA, dB


def test_work_of_a_step_and_of_dropout():
    # fp32: 3 x 4 + 4 bytes an element; 512 and 300 elements are 2 blocks each, 16 bytes a block
    assert adamw8bit_work([512, 300], 4) == Work(812 * 16 + 4 * 16, 0, 812 * 4)
    assert dropout_work(100, 2) == Work(400, 0, 200)


def test_adapters_of_a_known_model():
    shapes = adapter_shapes("Llama-3.1-8B", 16)
    assert len(shapes) == 32 * 7 * 2
    assert sum(n * k for n, k in shapes) == 41_943_040  # as PEFT counts them
