"""Shared by the tests of the harness: a clock that only says what it was told to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyft.bench.problem import Request
from pyft.bench.run import run
from pyft.bench.shapes import Layer

CPU = torch.device("cpu")
Rows = list[dict[str, Any]]
TINY = Request(CPU, layers=[Layer(64, 128)], tokens=[5])


class Seconds:
    """A clock that runs a call and says what it was told to; it remembers who ran."""

    def __init__(self, seconds: Callable[[Any], float] = lambda result: 1.0) -> None:
        self.seconds = seconds
        self.seen: list[Any] = []

    def time(self, call: Callable[[], Any]) -> float:
        self.seen.append(call())
        return self.seconds(self.seen[-1])


def rows_of(ops: Sequence[str], request: Request) -> Rows:
    """All rows of the ops, one second each."""
    return [row for rows in run(ops, request, 0.0, clock=Seconds()) for row in rows]


def statuses(rows: Rows) -> set[str]:
    return {row["status"] for row in rows}


def peers_of(rows: Rows) -> dict[str, set[str]]:
    """Each peer's statuses."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            found.setdefault(name, set()).add(peer["status"])
    return found
