"""What a run shows while it trains: a bar on a terminal, one plain line per log step elsewhere."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def say(console: Console, text: str) -> None:
    """One plain line: no markup, no highlighting, not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class TrainingProgress:
    """Loss, tokens per second and time left of a run of `steps` steps, shown from `start` on."""

    def __init__(self, console: Console, steps: int, start: int = 0) -> None:
        self._console, self._steps, self._start = console, steps, start
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=steps, completed=start, loss="-", speed="-")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float, log: bool) -> None:
        """Show one finished step; `log` says whether it is a log step."""
        if self._bar is not None:
            speed = f"{tokens_per_second:,.0f}"
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=speed)
        elif log:
            left = (time.monotonic() - self._began) / (step - self._start) * (self._steps - step)
            say(
                self._console,
                f"step {step}/{self._steps}  loss {loss:.4f}  "
                f"{tokens_per_second:,.0f} tokens/s  {clock(left)} left",
            )


def clock(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the libraries below neither log nor warn nor draw bars of their own; errors stay."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        accelerate.setLevel(level)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
