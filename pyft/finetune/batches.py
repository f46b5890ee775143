"""Encoded rows as packed batches, and general text mixed in for replay."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from pyft.errors import UsageError
from pyft.finetune.config import Config
from pyft.finetune.forgetting import GeneralText
from pyft.finetune.packing import PackedDataset, collate, pack
from pyft.finetune.template import Encoded


class Packed:
    """Packed rows of `encoded`; lines[i] and tokens[i]: the file lines and real tokens in row i.

    supervised is the number of tokens with a loss in all of them. Line 0 is general text.
    """

    def __init__(self, encoded: Sequence[Encoded], config: Config, tokenizer: Any) -> None:
        lengths = [len(row.input_ids) for row in encoded]
        bins = pack(lengths, config.max_length, config.seed, config.pack)
        self.rows = PackedDataset(list(encoded), bins, config.max_length)
        self.lines = [[encoded[index].line for index in row] for row in bins]
        self.tokens = [sum(lengths[index] for index in row) for row in bins]
        self.supervised = sum(row.supervised for row in encoded)
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id = next(token for token in known if token is not None)

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """Packed rows as one batch of int64 tensors [B, S]."""
        return collate(items, self._pad_id)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All packed rows in order, `size` at a time."""
        for start in range(0, len(self.tokens), size):
            stop = min(start + size, len(self.tokens))
            yield self.collate([self.rows[index] for index in range(start, stop)])


def replay_rows(
    fraction: float, tokens: int, general: GeneralText | None
) -> tuple[list[Encoded], float]:
    """General text that makes `fraction` of all tokens beside `tokens` others, loss on every token.

    Also how often the text had to be gone through (above 1: it is repeated). Raises UsageError when
    there is no general text that is not measured.
    """
    left = wanted = round(fraction / (1 - fraction) * tokens)
    count = 64
    passages = general.replay(count) if general else []
    while general and sum(map(len, passages)) < wanted:
        more = general.replay(count := count * 4)
        if len(more) == len(passages):
            break
        passages = more
    if not passages:
        raise UsageError(
            "replay: no general text is left beside the passages measured; "
            "give more of it with general, or lower general_rows"
        )
    rows: list[Encoded] = []
    for ids in itertools.cycle(passages):
        if left < len(ids) / 2:
            break
        left -= len(ids)
        rows.append(Encoded(ids, [-100, *ids[1:]], line=0))
    return rows, wanted / sum(map(len, passages))
