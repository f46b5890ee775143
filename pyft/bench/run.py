"""Check, measure and time: from a request to rows of results.

Every candidate is made and checked first; what fails or answers wrongly is reported and not timed.
The rest are timed together, interleaved, with a copy and, where there is one, a vendor matmul.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyft import __version__
from pyft.bench import peers
from pyft.bench.backends import resolve
from pyft.bench.memory import peak_bytes
from pyft.bench.problem import DTYPES, Candidate, Case, Problem, Request
from pyft.bench.problems import OPS
from pyft.bench.timing import Broken, Clock, Samples, clock_for, interleave, ratios, spread, taken
from pyft.errors import PyftError, UsageError
from pyft.formats import FORMATS

Row = dict[str, Any]
OK, WRONG, FAILED, MISSING, LEFT_OUT = "ok", "WRONG", "failed", "not installed", "not run"
COPY, MATMUL = "copy", "matmul"


def check_request(ops: Sequence[str], request: Request) -> None:
    """Raise UsageError for an unknown op, dtype or format, or a backend that cannot run here."""
    for op in ops:
        if op not in OPS:
            raise UsageError(f"bench: op {op!r} is unknown; use one of {', '.join(OPS)}")
    for known, given, option in (
        (DTYPES, request.dtypes, "dtype"),
        (FORMATS, request.formats, "format"),
    ):
        for name in given:
            if name not in known:
                raise UsageError(f"--{option}: {name!r} is not one of {', '.join(known)}")
    for op in ops:
        resolve(request.backends, OPS[op].backend_op, request.device)


def run(
    ops: Sequence[str],
    request: Request,
    budget: float,
    say: Callable[[str], None] = lambda line: None,
    clock: Clock | None = None,
) -> Iterator[list[Row]]:
    """The rows of each problem as soon as they are known.

    Args:
        ops: names in ``OPS``.
        request: what to measure, as ``check_request`` lets through.
        budget: seconds spent timing, shared equally among what is left to time; building and
            checking come on top, and no candidate is timed fewer than ``ROUNDS_MIN`` times.
        say: told the title of each case before it starts.
        clock: the device's own when None.
    """
    cases = [case for op in ops for case in OPS[op].cases(request)]
    clock = clock or clock_for(request.device)
    left = sum(len(OPS[case.op].variants) for case in cases)
    for index, case in enumerate(cases):
        say(f"{index + 1}/{len(cases)} {case.title}")
        problems = iter(OPS[case.op].problems(case, request))
        for _ in OPS[case.op].variants:
            try:
                problem = next(problems)
            except (RuntimeError, ImportError, PyftError) as error:  # no memory, an op not built
                yield [_result(case, "", {}) | {"status": FAILED, "reason": _line(error)}]
                break
            rows, spent = measure(problem, request, clock, max(0.0, budget / left))
            budget, left = budget - spent, left - 1
            yield rows
        if request.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    problem: Problem, request: Request, clock: Clock, budget: float
) -> tuple[list[Row], float]:
    """One row per candidate of ours with peers and ceilings beside it; seconds spent timing."""
    entries: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    warm: dict[str, float] = {}
    for candidate in [*problem.ours, *_wanted(problem.peers, request)]:
        entries[candidate.name] = _prepare(candidate, request.device, calls, warm)
    calls |= _ceilings(problem, request.device)
    start = time.monotonic()
    samples = _timed(calls, clock, budget, warm, entries)
    spent = time.monotonic() - start
    rows = []
    for candidate in problem.ours:
        row = _result(problem.case, problem.variant, entries[candidate.name])
        row |= {"backend": candidate.name, "bytes": problem.work.bytes, "flops": problem.work.flops}
        ours = samples.get(candidate.name)
        if ours is not None:
            row |= _rates(problem, ours, samples)
        row["peers"] = {
            peer.name: entries[peer.name] | _beside(ours, samples.get(peer.name))
            for peer in _wanted(problem.peers, request)
        }
        rows.append(row)
    return rows, spent


def _wanted(candidates: Sequence[Candidate], request: Request) -> list[Candidate]:
    """torch's own always; others when asked for."""
    return [peer for peer in candidates if request.peers or peer.package == "torch"]


def _prepare(
    candidate: Candidate,
    device: torch.device,
    calls: dict[str, Callable[[], Any]],
    warm: dict[str, float],
) -> Row:
    """Make, check and weigh a candidate; when its answer is right it joins ``calls``, and the
    seconds of its second call ``warm``.
    """
    ours = candidate.package == "pyft"
    entry: Row = {"version": __version__ if ours else peers.version(candidate.package)}
    if entry["version"] is None:
        return entry | {"status": MISSING, "reason": f"{candidate.package} not installed"}
    if candidate.left_out:
        return entry | {"status": LEFT_OUT, "reason": candidate.left_out}
    try:
        with nullcontext() if ours else peers.quiet():
            call = candidate.make()
            verdict = candidate.check(call.answer())
            if verdict.right:
                start = time.monotonic()
                entry["peak_bytes"] = peak_bytes(call.run, device)
                warm[candidate.name] = time.monotonic() - start
    except Exception as error:  # whatever a candidate raises is its result
        return entry | {"status": FAILED, "reason": _line(error)}
    entry |= {"error": verdict.error, "allowed": verdict.allowed}
    if not verdict.right:
        reason = f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
        return entry | {"status": WRONG, "reason": reason}
    calls[candidate.name] = call.run
    return entry | {"status": OK}


def _ceilings(problem: Problem, device: torch.device) -> dict[str, Callable[[], Any]]:
    """A copy of the op's largest tensor, and a vendor matmul of its shape where it has one."""
    source, target = _copied(problem.work.copied, device)
    found: dict[str, Callable[[], Any]] = {COPY: lambda: target.copy_(source)}
    if problem.matmul is not None:
        found[MATMUL] = problem.matmul
    return found


@lru_cache(maxsize=1)
def _copied(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)


def _timed(
    calls: dict[str, Callable[[], Any]],
    clock: Clock,
    budget: float,
    warm: dict[str, float],
    entries: dict[str, Row],
) -> Samples:
    """Samples of all calls; one that breaks while it is timed is noted and left out."""
    if not any(name in calls for name in entries):
        return {}
    while True:
        try:
            with peers.quiet():
                return interleave(calls, clock, budget, warm)
        except Broken as broken:
            entry = entries.setdefault(broken.name, {})
            entry |= {"status": FAILED, "reason": _line(broken.__cause__)}
            del calls[broken.name]


def _result(case: Case, variant: str, entry: Row) -> Row:
    return {
        "op": case.op,
        "variant": variant,
        "shape": case.shape,
        "layer": case.layer.source,
        "sizes": dict(case.sizes),
        "dtype": case.dtype,
        "format": case.format,
        "backend": "",
        "peers": {},
        **entry,
    }


def _rates(problem: Problem, ours: Sequence[float | None], samples: Samples) -> Row:
    """Time, bandwidth beside the copy's, and arithmetic beside the matmul's."""
    row = _times(ours)
    seconds = row["median_ms"] / 1e3
    row["gb_s"] = problem.work.bytes / seconds / 1e9
    copied = 2 * problem.work.copied
    if COPY in samples:
        times = ratios(samples[COPY], ours)  # its time over ours, round by round
        row["copy_gb_s"] = copied / spread(taken(samples[COPY])).median / 1e9
        row["copy_share"] = problem.work.bytes / copied * times.median
    if problem.work.flops:
        row["tflop_s"] = problem.work.flops / seconds / 1e12
    if MATMUL in samples:
        times = ratios(samples[MATMUL], ours)
        median = spread(taken(samples[MATMUL])).median
        row["matmul_tflop_s"] = problem.matmul_flops / median / 1e12
        row["matmul_share"] = problem.work.flops / problem.matmul_flops * times.median
    return row


def _times(samples: Sequence[float | None]) -> Row:
    found = spread([1e3 * value for value in taken(samples)])
    return {
        "median_ms": found.median,
        "p10_ms": found.p10,
        "p90_ms": found.p90,
        "rounds": found.count,
    }


def _beside(ours: Sequence[float | None] | None, theirs: Sequence[float | None] | None) -> Row:
    """A peer's times, and our time over its time."""
    if theirs is None:
        return {}
    row = _times(theirs)
    if ours is not None:
        found = ratios(ours, theirs)
        row |= {"ratio": found.median, "ratio_p10": found.p10, "ratio_p90": found.p90}
    return row


def _line(error: BaseException | None) -> str:
    """An exception as one short line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}".rstrip(": ")
