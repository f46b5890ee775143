"""The training loop: transformers.Trainer with our order of rows, loss, checks and checkpoints.

The loss of one optimizer step is the token-weighted mean over its whole accumulation window,

    loss = sum over the window's supervised tokens of -log p(token) / number of those tokens

so that how a batch is cut into forward passes does not change it. Rows come in an order that
depends on the seed alone: one permutation per epoch, concatenated; a step takes the next
batch_size * gradient_accumulation rows, over the end of an epoch too. A resumed run skips what it
has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PrinterCallback, Trainer, TrainingArguments

from pyft.errors import PyftError
from pyft.finetune import checkpoint, describe
from pyft.finetune.config import Config
from pyft.integrations.head_loss import FusedLoss
from pyft.optim import AdamW8bit, Lion8bit, SGD8bit

SKIPPED_STEPS = 30  # fp16: halvings of the loss scale (from 2^16) before its overflow counts as NaN


def plan(config: Config, rows: int) -> tuple[int, list[int]]:
    """Optimizer steps of the run, and the row indices it takes, in order."""
    per_step = config.batch_size * config.gradient_accumulation
    total = max(1, round(config.epochs * rows))
    if config.max_steps is not None:
        total = config.max_steps * per_step
    order: list[int] = []
    while len(order) < total:
        order += np.random.default_rng([config.seed, len(order) // rows]).permutation(rows).tolist()
    return math.ceil(total / per_step), order[:total]


def token_mean_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of the labelled tokens, divided by the number of the whole window's.

    outputs.logits [B, S, V], any float dtype; labels [B, S], not shifted, -100 ignored; the loss is
    an fp32 scalar. Only labelled rows of the logits are made fp32.
    """
    labels = labels[:, 1:]
    wanted = labels != -100
    total = F.cross_entropy(outputs.logits[:, :-1][wanted].float(), labels[wanted], reduction="sum")
    count = wanted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / count.clamp(min=1)


def run_device() -> torch.device:
    """Where a run computes: the GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_in_fp32(model: Any, method: str, dtype: torch.dtype) -> torch.dtype | None:
    """Make trained weights fp32, so that AdamW loses no small update; the autocast dtype, if any.

    LoRA needs no autocast in bf16 and fp32: frozen layers run in their own dtype, and the adapter
    follows its input. fp16 needs it for loss scaling, full training to compute below fp32.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if dtype == torch.float16 or (method == "full" and dtype == torch.bfloat16):
        return dtype
    return None


def precision(amp: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `amp`; nothing when it is None."""
    return torch.autocast(run_device().type, dtype=amp, enabled=amp is not None)


def eight_bit(config: Config) -> tuple[type[torch.optim.Optimizer], dict[str, float]] | None:
    """The optimizer with 8-bit states that config asks for, as Trainer takes it; None for AdamW."""
    classes = {"adamw8bit": AdamW8bit, "lion8bit": Lion8bit, "sgd8bit": SGD8bit}
    if config.optimizer not in classes:
        return None
    return classes[config.optimizer], {"lr": config.learning_rate}


def checkpoint_activations(model: Any, config: Config) -> None:
    """Turn activation checkpointing on when config says so; unsaid, on a GPU."""
    on = config.gradient_checkpointing
    if not (torch.cuda.is_available() if on is None else on):
        return
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class Loop(Trainer):
    """One run. `lines[i]` are the data-file lines in packed row i, `tokens[i]` its real tokens.

    step_loss, step_items (supervised tokens) and step_tokens describe the step just done.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        rows: Dataset[Any],
        collate: Callable[[list[Any]], dict[str, Tensor]],
        lines: Sequence[Sequence[int]],
        tokens: Sequence[int],
        amp: torch.dtype | None,
    ) -> None:
        self.steps, self.order = plan(config, len(tokens))
        self.job_config, self.lines, self.row_tokens, self.collate = config, lines, tokens, collate
        self.directory = config.output / "checkpoints"
        self.step_loss, self.step_items, self.step_tokens = 0.0, 0, 0
        self._window_loss, self._micro, self._skipped = 0.0, 0, 0
        self._chosen: Dataset[Any] = Subset(rows, self.order)
        args = TrainingArguments(
            output_dir=str(self.directory),
            max_steps=self.steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant_with_warmup"
            if config.schedule == "constant"
            else config.schedule,
            warmup_steps=math.ceil(config.warmup * self.steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim="adamw_torch",
            seed=config.seed,
            bf16=amp == torch.bfloat16,
            fp16=amp == torch.float16,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._chosen,
            compute_loss_func=token_mean_loss,
            optimizer_cls_and_kwargs=eight_bit(config),
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows in our order; draws no global random number."""
        return DataLoader(
            self._chosen,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self._batch,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def _batch(self, items: list[Any]) -> dict[str, Any]:
        return {**self.collate(items), "use_cache": False}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As ``token_mean_loss``; without logits where ``pyft.apply`` has seen to that."""
        if not any(isinstance(module, FusedLoss) for module in model.modules()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one forward pass; PyftError when its loss is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged("loss", value, self._micro, self._micro + 1)
        self._micro += 1
        self._window_loss += value
        self.step_items = int(num_items_in_batch)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm; PyftError when it is not finite (fp16: when scaling cannot help)."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(float(norm)):
            self._skipped += 1
            if self.accelerator.scaler is None or self._skipped > SKIPPED_STEPS:
                raise self._diverged("gradient", float(norm), 0, self._micro)
        else:
            self._skipped = 0
        self.step_tokens = sum(self.row_tokens[index] for index in self._rows(0, self._micro))
        self.step_loss, self._window_loss, self._micro = self._window_loss, 0.0, 0
        return norm

    def _rows(self, first: int, last: int) -> list[int]:
        """The packed rows in forward passes first to last - 1 of the current step."""
        size = self.job_config.batch_size
        start = self.state.global_step * self.job_config.gradient_accumulation
        return self.order[(start + first) * size : (start + last) * size]

    def _diverged(self, what: str, value: float, first: int, last: int) -> PyftError:
        lines = sorted(
            {line for row in self._rows(first, last) for line in self.lines[row] if line}
        )
        rows = ", ".join(map(str, lines[:20])) + (" and more" if len(lines) > 20 else "")
        return PyftError(
            f"the {what} is {value} at step {self.state.global_step + 1}, on "
            f"{f'lines {rows} of {self.job_config.data}' if lines else 'general text'}; "
            f"{self.last_good()}; lower learning_rate, or look at these rows"
        )

    def last_good(self) -> str:
        """Where the newest checkpoint is, in words."""
        found = checkpoint.checkpoints(self.directory)
        return f"the last good checkpoint is {found[max(found)]}" if found else "no checkpoint yet"

    def save_progress(self, progress: checkpoint.Progress) -> Path:
        """Write an atomic checkpoint of this moment and prune the old ones."""

        def fill(place: Path) -> None:
            checkpoint.save_weights(self.model, place)
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            checkpoint.save_torch(place / "optimizer.pt", optimizer.state_dict())
            checkpoint.save_torch(place / "scheduler.pt", scheduler.state_dict())
            if self.accelerator.scaler is not None:
                scaler = self.accelerator.scaler.state_dict()
                checkpoint.save_torch(place / "scaler.pt", scaler)
            checkpoint.save_torch(place / "rng_state.pth", checkpoint.rng_state())
            self.state.save_to_json(str(place / "trainer_state.json"))

        host, device = describe.peak_host_bytes(), describe.peak_device_bytes()
        progress.peak_host_bytes = max(progress.peak_host_bytes, host)
        if device is not None:
            progress.peak_device_bytes = max(progress.peak_device_bytes or 0, device)
        protected = set()
        if self.job_config.patience is not None:
            protected.add(progress.best_step)
        if self.job_config.forgetting_budget is not None:
            protected.add(progress.within_step)
        keep = self.job_config.keep_checkpoints
        return checkpoint.save(self.directory, progress, fill, keep, protected)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trained weights only, in place; the base is already there."""
        checkpoint.load_weights(self.model, Path(resume_from_checkpoint))
