"""What `pyft bench` does: options to a request, results to the screen and to files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyft.bench import plot, report
from pyft.bench.problem import Request
from pyft.bench.problems import OPS
from pyft.bench.run import check_request, run
from pyft.bench.shapes import parse_layers
from pyft.errors import UsageError

BUDGET = 60.0  # seconds of timing
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Options:
    """The command's options as they were typed; None and empty take the defaults."""

    ops: Sequence[str] = ()
    peers: bool = False
    shapes: str | None = None
    shape: Sequence[str] = ()
    tokens: str | None = None
    dtype: str | None = None
    format: str | None = None
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    rank: int = 16
    budget: float = BUDGET
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


def bench(options: Options, command: str, progress: Callable[[str], None]) -> report.Report:
    """Measure what the options ask for; the files are written as results come in.

    Args:
        options: of the command line.
        command: the command line itself, for the report.
        progress: told what is being measured, a line a case.

    Raises:
        UsageError: an option that means nothing here.
    """
    ops = list(dict.fromkeys(options.ops)) or list(OPS)
    request = to_request(options)
    check_request(ops, request)
    if options.plot is not None:
        plot.require()
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        found = report.describe(request.device, command)
        for rows in run(ops, request, options.budget, progress):
            found["results"] += rows
            save(found, options)
    finally:
        torch.set_num_threads(threads)
    if options.plot is not None:
        plot.draw(found, options.plot)
    return found


def save(found: report.Report, options: Options) -> None:
    """Write the JSON and Markdown files as far as the report goes."""
    if options.json is not None and str(options.json) != "-":
        report.write(options.json, report.to_json(found) + "\n")
    if options.markdown is not None:
        report.write(options.markdown, report.markdown(found))


def to_request(options: Options) -> Request:
    """The options as the harness takes them."""
    if options.device not in DEVICES:
        raise UsageError(f"--device: {options.device!r} is not one of {', '.join(DEVICES)}")
    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        raise UsageError("--device: no GPU is visible to torch; use cpu")
    device = torch.device("cuda" if gpu and options.device != "cpu" else "cpu")
    for name in ("threads", "rank", "budget"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name}: {value} is not above 0")
    return Request(
        device,
        parse_layers(options.shapes, options.shape),
        _tokens(options.tokens),
        _names(options.dtype),
        _names(options.format) or ("nf4",),
        _names(options.backend) or ("auto",),
        options.peers,
        options.rank,
    )


def wrong(found: report.Report) -> int:
    """How many rows of ours could not be timed: a wrong answer, or a failure."""
    return sum(row["status"] != "ok" for row in found["results"])


def listing() -> Any:
    """The table of `pyft bench --list`: ops, sets of shapes, models."""
    from rich.console import Group
    from rich.table import Table

    from pyft.bench.shapes import LINEARS, MODELS, SETS

    ops = Table("op", "measures", "variants", title="Ops", title_justify="left")
    for op in OPS.values():
        ops.add_row(op.name, op.summary, ", ".join(filter(None, op.variants)))
    models = Table("model", *LINEARS, title="--shapes: N x K of each linear", title_justify="left")
    for model in MODELS.values():
        models.add_row(model.name, *(f"{n}x{k}" for n, k in model.linears().values()))
    return Group(ops, models, f"--shapes also takes the sets {', '.join(SETS)}.")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _tokens(text: str | None) -> tuple[int, ...]:
    counts = []
    for word in _names(text):
        if not word.isdecimal() or int(word) == 0:
            raise UsageError(f"--tokens: {word!r} is not a number of tokens, as in 512,2048")
        counts.append(int(word))
    return tuple(counts)
