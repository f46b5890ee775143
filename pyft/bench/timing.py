"""Timing A against B: alternately in one process, medians, and the spread of the rounds' ratios.

A round runs every candidate once, starting one further along the list than the last round did. A
candidate too slow for every round takes part in every s-th. The first candidate takes part in all:
ratios are taken within a round, so that what the machine did in between cancels.

Before each call the cache is filled with something else: a fast call on a warm cache is another
measurement. It is filled by reading: what was written would be written back while the call runs. On
CUDA the filling also hides the launch, and events on the stream take the time.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

ROUNDS_MIN = 3
ROUNDS_MAX = 100
WARM_UP_SECONDS = 0.05
FLUSH_BYTES_MAX = 512 << 20


class Clock(Protocol):
    """Measures one call in seconds."""

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call; its result is freed after the time is taken."""


class CpuClock:
    """Wall time, on a cache of ``cache_bytes`` that holds none of the call's data."""

    def __init__(self, cache_bytes: int) -> None:
        self._other = torch.zeros(min(2 * cache_bytes, FLUSH_BYTES_MAX) // 4 or 1)

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self._other.sum()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result
        return seconds


class CudaClock:
    """Events on the current stream around the call, the second-level cache flushed before."""

    def __init__(self, device: torch.device, cache_bytes: int) -> None:
        size = min(max(2 * cache_bytes, 256 << 20), FLUSH_BYTES_MAX)
        self._device = device
        self._other = torch.zeros(size // 4, device=device)

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._other.sum()
            start.record()
            result = call()
            end.record()
            end.synchronize()
            del result
            return float(start.elapsed_time(end)) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    if device.type == "cuda":
        return CudaClock(device, torch.cuda.get_device_properties(device).L2_cache_size)
    return CpuClock(cpu_cache_bytes())


def cpu_cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes[1:], default=sizes[0])


@dataclass(frozen=True)
class Plan:
    """How many rounds, and every how many of them each candidate takes part."""

    rounds: int
    strides: Mapping[str, int]

    def order(self, index: int) -> list[str]:
        """Who runs in a round, in order."""
        names = list(self.strides)
        turn = index % len(names)
        turned = names[turn:] + names[:turn]
        return [name for name in turned if index % self.strides[name] == 0]


def plan_rounds(seconds: Mapping[str, float], budget: float) -> Plan:
    """Share ``budget`` seconds equally among candidates of which one call takes ``seconds``.

    The first gets the number of rounds; others take part as often as their share allows, at least
    ROUNDS_MIN times.
    """
    share = budget / len(seconds)
    wanted = {
        name: max(ROUNDS_MIN, min(ROUNDS_MAX, int(share / max(each, 1e-9))))
        for name, each in seconds.items()
    }
    rounds = wanted[next(iter(wanted))]
    strides = {name: max(1, rounds // count) for name, count in wanted.items()}
    return Plan(rounds, strides)


class Broken(Exception):
    """A call raised while it was timed; the cause is its exception."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


Samples = dict[str, list[float | None]]  # per candidate and round; None where it sat out


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    clock: Clock,
    budget: float,
    warm: Mapping[str, float] | None = None,
) -> Samples:
    """Warm every call up, then time them in rounds within about ``budget`` seconds.

    ``warm`` has the seconds of calls made before; the slow among them need no other.

    Raises:
        Broken: a call raised.
    """
    began = time.perf_counter()
    estimates = {
        name: seconds for name, seconds in (warm or {}).items() if seconds > WARM_UP_SECONDS
    }
    overheads = dict(estimates)
    for name, call in calls.items():
        spent = 0.0
        while name not in estimates or 0.0 < spent < min(WARM_UP_SECONDS, budget / 20):
            start = time.perf_counter()
            estimates[name] = _one(name, call, clock)
            overheads[name] = time.perf_counter() - start
            spent += overheads[name]
    left = budget - (time.perf_counter() - began)
    costs = {name: max(estimates[name], overheads[name]) for name in calls}
    plan = plan_rounds(costs, left)
    samples: Samples = {name: [None] * plan.rounds for name in calls}
    for index in range(plan.rounds):
        for name in plan.order(index):
            samples[name][index] = _one(name, calls[name], clock)
    return samples


def _one(name: str, call: Callable[[], Any], clock: Clock) -> float:
    try:
        return clock.time(call)
    except Exception as error:
        raise Broken(name) from error


@dataclass(frozen=True)
class Spread:
    """A median and the 10th and 90th percentiles."""

    median: float
    p10: float
    p90: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median and nearest-rank 10th and 90th percentiles of at least one value."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered),
        ordered[math.floor(0.1 * last)],
        ordered[math.ceil(0.9 * last)],
        len(ordered),
    )


def taken(samples: Sequence[float | None]) -> list[float]:
    """The rounds in which a candidate took part."""
    return [value for value in samples if value is not None]


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Spread:
    """Our time over theirs, taken within each round in which both took part."""
    pairs = zip(ours, theirs, strict=True)
    return spread([a / b for a, b in pairs if a is not None and b is not None])
