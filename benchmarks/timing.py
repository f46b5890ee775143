"""Timing: A against B, alternately in one process."""

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronised(function: Callable[[], object]) -> Callable[[], None]:
    """The function, waiting for the GPU when there is one: a launch is not the work."""

    def call() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


def ratio(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 15
) -> dict[str, float]:
    """Time two functions alternately: medians in milliseconds, their ratio, and the spread of the
    pairs' ratios.
    """
    times: tuple[list[float], list[float]] = ([], [])
    functions = (synchronised(ours), synchronised(theirs))
    for function in functions:
        function()
    for _ in range(repeats):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append(1e3 * (time.perf_counter() - start))
    pairs = sorted(a / b for a, b in zip(*times, strict=True))
    return {
        "ours_ms": statistics.median(times[0]),
        "theirs_ms": statistics.median(times[1]),
        "ratio": statistics.median(times[0]) / statistics.median(times[1]),
        "ratio_p10": pairs[len(pairs) // 10],
        "ratio_p90": pairs[-1 - len(pairs) // 10],
    }
