"""pytest-benchmark over the harness of pyft.bench: what is measured and checked lies there.

Each problem is one benchmark: pytest-benchmark times ours, the first where there are several, and
``extra_info`` holds the harness's own interleaved figures: ratios to the peers with their spread,
GB/s, TFLOP/s, peak memory.
PYFT_BENCH_SHAPES and PYFT_BENCH_TOKENS are `pyft bench`'s --shapes and --tokens.
"""

import os
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

from pyft.bench.command import Options, to_request
from pyft.bench.problem import Case, Request
from pyft.bench.problems import OPS
from pyft.bench.report import describe, strict
from pyft.bench.run import measure
from pyft.bench.timing import Clock, clock_for

SECONDS = 2.0  # of interleaved timing for each problem
ROUNDS = 5  # of pytest-benchmark's own timing of ours


@cache
def request() -> Request:
    """What the environment asks for, on the GPU where there is one."""
    shapes, tokens = (os.environ.get(f"PYFT_BENCH_{name}") for name in ("SHAPES", "TOKENS"))
    return to_request(Options(peers=True, shapes=shapes, tokens=tokens))


@cache
def clock() -> Clock:
    """The clock of the request's device."""
    return clock_for(request().device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test named test_OP runs over that op's cases and their variants."""
    op = OPS[metafunc.function.__name__.removeprefix("test_")]
    cases = [(case, index) for case in op.cases(request()) for index in range(len(op.variants))]
    titles = (f"{case.title} {op.variants[index]}".split()[1:] for case, index in cases)
    names = ["-".join(words) for words in titles]
    metafunc.parametrize(("case", "variant"), cases, ids=names)


@pytest.fixture
def run(benchmark: Any) -> Callable[[Case, int], None]:
    """Check and measure one variant of a case; a wrong answer of ours fails the test."""

    def once(case: Case, variant: int) -> None:
        problem = next(islice(OPS[case.op].problems(case, request()), variant, None))
        rows, _ = measure(problem, request(), clock(), SECONDS)
        for row in rows:
            assert row["status"] == "ok", row["reason"]
        benchmark.extra_info.update(strict({**rows[0], "others": rows[1:]}))
        call = problem.ours[0].make()

        def finished() -> None:
            call.run()
            if request().device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(finished, rounds=ROUNDS, warmup_rounds=1)

    return once


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Versions and device, beside what pytest-benchmark notes itself."""
    found = describe(request().device, "make bench")
    machine_info["pyft"] = {key: found[key] for key in ("versions", "device")}
