"""What the model forgets: loss and KL against the base on general text that training never sees.

For a passage's token t with context c, over general text,

    loss  = -log p_tuned(t | c)
    delta = -log p_tuned(t | c) + log p_base(t | c)            above 0: general text is forgotten
    KL    = sum_v p_base(v | c) (log p_base(v | c) - log p_tuned(v | c))     whole vocabulary, fp32

each averaged over tokens, with a 95 % interval from the same bootstrap over passages (see
evaluate.py). The interval of delta is a paired one: both losses of a passage are resampled
together, so what makes a passage hard cancels.

The base of an adapter is the very same model with the adapter switched off: nothing else is in
memory, and before the first step delta and KL are zero. Full fine-tuning overwrites its base:
`remember_base` then keeps, before training, the base's loss of every token in memory and its logits
in an unnamed temporary file, in the dtype the model gave them, so that the KL is exact. Where that
file would exceed its budget or does not fit on the disk there is no KL, only the loss.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyft.errors import PyftError, UsageError
from pyft.finetune.evaluate import (
    IGNORED,
    SequenceLosses,
    evaluating,
    flat_logits,
    joined,
    on_device,
    slabs,
    sum_by_sequence,
    targets,
    token_losses,
)

BASE_LOGITS_BYTES = 4 << 30
SAMPLE_CHARACTERS = 200_000  # how much text the characters per token are estimated on


@dataclass(frozen=True)
class Point:
    """General-text loss, KL(base || tuned) and loss change, nats per token, with 95 % intervals.

    The KL is None where the base's logits could not be kept (full fine-tuning only).
    """

    loss: float
    loss_low: float
    loss_high: float
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    delta: float
    delta_low: float
    delta_high: float


class GeneralText:
    """Passages of general text, those measured and those free for replay; the two never overlap.

    path: a .txt file (paragraphs between blank lines, grouped to about max_length tokens), a .jsonl
    file of {"text": ...} lines, or None for the text shipped with pyft. Longer texts become several
    passages, repeated ones count once, and a passage's tokens beyond max_length are left out. The
    sample is drawn by seed; at most half of the passages are measured, so that the measured ones
    are the same with replay and without.

    Raises UsageError (file and line) for a file that is missing, empty, not UTF-8 or of another
    kind.
    """

    def __init__(
        self, path: Path | None, tokenizer: Any, rows: int, max_length: int, seed: int = 0
    ) -> None:
        if path is None:
            from pyft import embedded

            path = Path(embedded.GENERAL_TEXT)
        self.source = str(path)
        self._tokenizer, self._max_length = tokenizer, max_length
        documents = _documents(path)
        sample = "\n\n".join(documents)[:SAMPLE_CHARACTERS]
        counted = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        limit = max(1, (max_length - 1) * len(sample) // max(1, len(counted)))
        texts = _grouped(documents, limit) if path.suffix != ".jsonl" else _cut(documents, limit)
        order = np.random.default_rng(seed).permutation(len(texts))
        kept = min(rows, math.ceil(len(texts) / 2))
        self.measured = self._encode([texts[index] for index in order[:kept]])
        self._free = [texts[index] for index in order[kept:]]
        if not self.measured:
            raise UsageError(
                f"{path}: no passage of at least 2 tokens to measure on; give more text"
            )

    @property
    def tokens(self) -> int:
        """Predicted tokens in the measured passages."""
        return sum(len(passage) - 1 for passage in self.measured)

    def replay(self, count: int) -> list[list[int]]:
        """Token ids of up to `count` passages that are not measured; fewer if there are no more."""
        return self._encode(self._free[:count])

    def batches(self, batch_tokens: int = 1024) -> Iterator[dict[str, Tensor]]:
        """The measured passages as packed batches, int64 [B, S]: one a row, then padding.

        Passages of like length share a batch of at most `batch_tokens` (or one passage); always in
        the same order.
        """
        group: list[list[int]] = []
        for passage in sorted(self.measured, key=len):
            if group and len(passage) * (len(group) + 1) > batch_tokens:
                yield _padded(group)
                group = []
            group.append(passage)
        yield _padded(group)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, verbose=False)["input_ids"]
        return [ids[: self._max_length] for ids in encoded if len(ids) >= 2]


def _padded(passages: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, passages))
    ids = torch.zeros(len(passages), width, dtype=torch.int64)
    labels, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, passage in enumerate(passages):
        length = len(passage)
        ids[row, :length] = torch.tensor(passage)
        labels[row, 1:length] = ids[row, 1:length]
        positions[row, :length] = torch.arange(length)
        positions[row, length:] = torch.arange(width - length)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


class BaseCache:
    """What full fine-tuning keeps of its base: token losses and, where they fit, logits on disk.

    why_no_kl says in words why the logits are missing; None when they are there. The file has no
    name and is gone with the process, however it ends.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.why_no_kl: str | None = None
        self._file: IO[bytes] | None = None
        self._dtype = torch.float32
        self._offsets: list[int] = []

    def open(self, directory: Path | None) -> None:
        """Start the temporary file in `directory` (default: the system's)."""
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (it lives as long as the cache)
        self._file = cast(IO[bytes], file)

    def drop(self, why: str) -> None:
        """Give the logits up and say why."""
        self.why_no_kl = why
        if self._file is not None:
            with suppress(OSError):  # closing writes what is buffered, on the disk that is full
                self._file.close()
        self._file = None

    def keep(self, logits: Tensor, rows: Tensor) -> None:
        """Append one batch's predicting rows of its logits [B*S, V] to the file."""
        if self._file is None:
            return
        self._dtype = logits.dtype
        self._offsets.append(self._file.tell())
        try:
            for part in slabs(len(rows), logits.shape[-1]):
                chunk = logits[rows[part]].contiguous().cpu()
                self._file.write(chunk.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            self.drop(
                f"the base's logits could not be written to a temporary file: {error.strerror}"
            )

    def read(self, index: int, part: slice, vocabulary: int) -> Tensor:
        """Rows `part` of batch `index` as they were kept, [rows, V] on the CPU."""
        assert self._file is not None, "the logits were not kept"
        row_bytes = vocabulary * self._dtype.itemsize
        self._file.seek(self._offsets[index] + part.start * row_bytes)
        data = bytearray(self._file.read((part.stop - part.start) * row_bytes))
        return torch.frombuffer(data, dtype=self._dtype).view(-1, vocabulary)


def remember_base(
    model: nn.Module,
    general: GeneralText,
    budget_bytes: int = BASE_LOGITS_BYTES,
    directory: Path | None = None,
) -> BaseCache:
    """Keep what `measure` needs of a model without an adapter; call it before its first step.

    The logits take tokens * vocabulary * bytes per logit on the disk that holds `directory`
    (default: the system's temporary directory); above `budget_bytes` they are not kept and no KL
    will be measured.
    """
    cache = BaseCache()
    with evaluating(model):
        for index, batch in enumerate(general.batches()):
            batch = on_device(model, batch)
            logits, wanted = flat_logits(model, batch), targets(batch)
            if index == 0:
                size = general.tokens * logits.shape[-1] * logits.dtype.itemsize
                if size <= budget_bytes:
                    cache.open(directory)
                else:
                    cache.drop(
                        f"the base's logits take {size / 2**30:.1f} GiB on disk, above the budget "
                        f"of {budget_bytes / 2**30:.1f} GiB; fewer general_rows would fit"
                    )
            cache.losses.append(token_losses(logits, wanted).cpu())
            cache.keep(logits, wanted.rows)
    return cache


def measure(model: nn.Module, general: GeneralText, base_cache: BaseCache | None = None) -> Point:
    """Loss, KL and loss change of `model` on the measured passages; see the module's equations.

    A PEFT model is its own base with the adapter off and takes no cache; a full model needs
    `remember_base`'s. Training mode, gradients and which parameters are trainable stay as they
    were. Raises PyftError for a loss that is not finite and for a model without an adapter and
    without a cache.
    """
    if base_cache is None and not hasattr(model, "disable_adapter"):
        raise PyftError(
            "forgetting needs a base: a PEFT model, or a cache of the base made before training"
        )
    tuned: list[SequenceLosses] = []
    change: list[SequenceLosses] = []
    divergence: list[SequenceLosses] = []
    with evaluating(model):
        for index, batch in enumerate(general.batches()):
            batch, where = on_device(model, batch), f"batch {index} of the general text"
            logits, wanted = flat_logits(model, batch), targets(batch)
            losses = token_losses(logits, wanted)
            tuned.append(sum_by_sequence(losses, wanted, where))
            if base_cache is None:
                with adapter_off(model):
                    base_logits = flat_logits(model, batch)
                base_losses = token_losses(base_logits, wanted)
            else:
                base_logits = None
                base_losses = base_cache.losses[index].to(losses.device)
            change.append(sum_by_sequence(losses - base_losses, wanted, where))
            if base_cache is None or base_cache.why_no_kl is None:
                kl = torch.empty_like(losses)
                for part in slabs(len(kl), logits.shape[-1]):
                    if base_logits is not None:
                        base_rows = base_logits[wanted.rows[part]]
                    else:
                        base_rows = cast(BaseCache, base_cache).read(index, part, logits.shape[-1])
                    kl[part] = token_kl(base_rows.to(logits.device), logits[wanted.rows[part]])
                divergence.append(sum_by_sequence(kl, wanted, where))
    loss, delta = (
        joined(tuned, general.source).estimate(),
        joined(change, general.source).estimate(),
    )
    kl_estimate = joined(divergence).estimate() if divergence else None
    return Point(
        loss=loss.mean,
        loss_low=loss.low,
        loss_high=loss.high,
        kl=kl_estimate.mean if kl_estimate else None,
        kl_low=kl_estimate.low if kl_estimate else None,
        kl_high=kl_estimate.high if kl_estimate else None,
        delta=delta.mean,
        delta_low=delta.low,
        delta_high=delta.high,
    )


def token_kl(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned) in nats of each row of two logits tensors [N, V], computed in fp32; [N]."""
    base_log, tuned_log = F.log_softmax(base.float(), -1), F.log_softmax(tuned.float(), -1)
    return F.kl_div(tuned_log, base_log, reduction="none", log_target=True).sum(-1)


def crossed(point: Point, budget: float | None) -> bool:
    """Whether the mean loss change exceeds the budget (nats per token); never without a budget.

    The mean decides, not a bound of its interval: a budget is a promise about the model that is
    kept, and waiting until the lower bound is above it would let the likely change pass it first.
    """
    return budget is not None and point.delta > budget


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """A PEFT model's adapter switched off inside, with `requires_grad` as it was afterwards.

    PEFT's own context leaves every adapter trainable behind it, also one that was loaded frozen.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _documents(path: Path) -> list[str]:
    """Paragraphs of a .txt file or texts of a .jsonl file, in order, each once."""
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "missing"
        raise UsageError(f"{path}: general text file is {kind}; give a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            f"{path}: general text is read from a .txt or .jsonl file; rename or convert it"
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    if path.suffix == ".jsonl":
        texts = [
            _text(line, f"{path}:{number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        texts = "\n".join(line.rstrip() for line in text.splitlines()).split("\n\n")
    documents = list(dict.fromkeys(stripped for text in texts if (stripped := text.strip("\n"))))
    if not documents:
        raise UsageError(f"{path}: empty; give a file with general text in it")
    return documents


def _text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f'{where}: not JSON ({error.msg}); write {{"text": "..."}}') from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UsageError(f'{where}: no "text" string; write {{"text": "..."}}')
    return str(row["text"])


def _grouped(paragraphs: list[str], limit: int) -> list[str]:
    """Neighbouring paragraphs joined while they fit `limit` characters; longer ones are cut."""
    groups: list[str] = []
    for piece in _cut(paragraphs, limit):
        if groups and len(groups[-1]) + 2 + len(piece) <= limit:
            groups[-1] += "\n\n" + piece
        else:
            groups.append(piece)
    return groups


def _cut(texts: list[str], limit: int) -> list[str]:
    """Each text in pieces of at most `limit` characters, cut at white space where there is any."""
    pieces = []
    for text in texts:
        while len(text) > limit:
            space = max(text.rfind(" ", 1, limit), text.rfind("\n", 1, limit))
            at = space if space > 0 else limit
            pieces.append(text[:at])
            text = text[at:].lstrip()
        pieces.append(text)
    return pieces
