"""What happens after an optimizer step: the curve, measurements, the decision to stop, saving.

Training stops early when the general-text loss has risen by more than the budget, and then the
last measured step within the budget is exported; or when the validation loss was not better for
`patience` measurements, and the best step is exported, step 0 (the base) included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyft.errors import PyftError
from pyft.finetune import checkpoint
from pyft.finetune.evaluate import Estimate
from pyft.finetune.forgetting import Point, crossed
from pyft.finetune.loop import Loop
from pyft.finetune.progress import TrainingProgress


class Monitor(TrainerCallback):
    """After each step: the curve, the bar, measurements, the decision to stop, a checkpoint.

    `measure` returns the validation loss and the general-text point, None where there is none;
    `events` is a TensorBoard writer or None.
    """

    def __init__(
        self,
        loop: Loop,
        progress: checkpoint.Progress,
        measure: Callable[[], tuple[Estimate | None, Point | None]],
        display: TrainingProgress,
        events: Any = None,
    ) -> None:
        self._loop, self._progress, self._measure = loop, progress, measure
        self._display, self._events = display, events
        fifth = max(1, math.ceil(loop.steps / 5))
        self._eval_every = loop.job_config.eval_every or fifth
        self._save_every = loop.job_config.save_every or fifth
        self._learning_rate, self._mark = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A first checkpoint: an unwritable disk shows now, and the measurements are kept."""
        if state.global_step == 0:
            self._loop.save_progress(self._progress)
        self._mark = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate that this step uses."""
        optimizer: Any = self._loop.optimizer
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One optimizer step is done."""
        progress, loop, step = self._progress, self._loop, state.global_step
        progress.seconds += time.perf_counter() - self._mark
        progress.step = step
        progress.tokens += loop.step_tokens
        progress.window_loss += loop.step_loss * loop.step_items
        progress.window_tokens += loop.step_items
        last = step >= loop.steps
        wanted = False
        if last or step % self._eval_every == 0:
            wanted = self.measure()
        if last and progress.outcome is None:
            progress.outcome = "finished"
        log = progress.outcome is not None or step % loop.job_config.log_every == 0
        if log:
            self._point()
        speed = progress.tokens / progress.seconds
        self._display.step(step, loop.step_loss, speed, log)
        if wanted or progress.outcome is not None or step % self._save_every == 0:
            loop.save_progress(progress)
        control.should_training_stop |= progress.outcome is not None
        self._mark = time.perf_counter()

    def _point(self) -> None:
        """Add a point to the curve: the token-weighted mean loss since the one before."""
        progress = self._progress
        point = {
            "step": progress.step,
            "loss": progress.window_loss / max(1, progress.window_tokens),
            "learning_rate": self._learning_rate,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
        }
        progress.curve.append(point)
        progress.window_loss, progress.window_tokens = 0.0, 0
        self._scalars(
            progress.step, {"train/loss": point["loss"], "train/rate": self._learning_rate}
        )

    def measure(self) -> bool:
        """Measure now and decide; True when this step's weights may be the ones to export."""
        progress, config = self._progress, self._loop.job_config
        try:
            loss, point = self._measure()
        except PyftError as error:
            raise PyftError(f"step {progress.step}: {error}; {self._loop.last_good()}") from None
        candidate = False
        if point is not None:
            progress.forgetting.append({"step": progress.step, **plain(asdict(point))})
            self._scalars(progress.step, {"forgetting/delta": point.delta})
            if crossed(point, config.forgetting_budget):
                progress.crossed_at = progress.step
                progress.outcome = (
                    f"stopped: forgetting budget of {config.forgetting_budget:g} nats crossed at "
                    f"step {progress.step} ({point.delta:+.4f}); "
                    f"step {progress.within_step} is exported"
                )
            elif config.forgetting_budget is not None:
                progress.within_step, candidate = progress.step, True
        if loss is not None:
            estimate = plain(asdict(loss))
            progress.evaluations.append(
                {
                    "step": progress.step,
                    "loss": loss.mean,
                    "low": estimate["low"],
                    "high": estimate["high"],
                }
            )
            self._scalars(progress.step, {"validation/loss": loss.mean})
        if loss is None or progress.crossed_at is not None:
            return candidate
        if progress.best_loss is None or loss.mean < progress.best_loss:
            progress.best_loss, progress.best_step, progress.since_best = (
                loss.mean,
                progress.step,
                0,
            )
            return candidate or config.patience is not None
        progress.since_best += 1
        if config.patience is not None and progress.since_best >= config.patience:
            progress.outcome = (
                f"stopped: validation loss did not improve in {config.patience} measurements; "
                f"step {progress.best_step} is exported"
            )
        return candidate

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for NaN, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }
