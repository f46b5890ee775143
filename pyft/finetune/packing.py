"""Several sequences in one row of a batch, each blind to the others.

    input_ids     a a a a b b b c c - -     three sequences and a padding tail
    position_ids  0 1 2 3 0 1 2 0 1 0 1     restart at each sequence, the tail included
    labels        - a a a - b b - c - -     "-" is -100: no sequence predicts its neighbour's start

The model is called with these three and use_cache=False, and with no attention_mask: transformers
then reads the sequences off the restarts and masks every layer by them (a mask of ones, or a cache,
would turn this off without a word). The tail attends to itself, so no row of the softmax is empty.
Padding is told by position, never by id: where the padding id is also eos, eos stays supervised.

Not every architecture reads the restarts (OPT, BLOOM and Mamba do not): `isolates` tries it, and a
model that fails is given one sequence a row, whose padding on the right a causal model never sees.

Packing is best-fit decreasing: the longest sequence first, each into the fullest row that it fits.
Best fit uses at most 11/9 of the fewest rows possible, plus a constant (D. S. Johnson, 1973).
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch.utils.data import Dataset

from pyft.finetune.evaluate import evaluating, on_device
from pyft.finetune.template import IGNORE, Encoded

PROBE_TOKENS = 8  # length of each of the two sequences that `isolates` packs
LEAK = 1e-3  # change of a logit, in standard deviations of the logits, that is no rounding


class Item(TypedDict):
    """One packed row: three lists of one length, in tokens."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


def pack(lengths: Sequence[int], max_length: int, seed: int, pack: bool = True) -> list[list[int]]:
    """Rows of indices into `lengths`, every index once, no row longer than `max_length` tokens.

    The same for the same arguments; `seed` decides which of equally long sequences meet, the order
    of the rows and the order in them. With pack=False every row is one sequence. Raises ValueError
    for a length below 1 or above `max_length`.
    """
    wrong = next((length for length in lengths if not 1 <= length <= max_length), None)
    if wrong is not None:
        raise ValueError(f"a sequence of {wrong} tokens: pack needs lengths from 1 to {max_length}")
    order = random.Random(seed)
    indices = list(range(len(lengths)))
    order.shuffle(indices)
    if not pack:
        return [[index] for index in indices]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted; full rows left out
    for index in sorted(indices, key=lambda index: -lengths[index]):
        place = bisect_left(free, (lengths[index], 0))
        if place == len(free):
            left, row = max_length, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(index)
        if left > lengths[index]:
            insort(free, (left - lengths[index], row))
    for members in rows:
        order.shuffle(members)
    order.shuffle(rows)
    return rows


class PackedDataset(Dataset[Item]):
    """The rows of `pack` as items; see the module for what is in them."""

    def __init__(self, encoded: Sequence[Encoded], bins: list[list[int]], max_length: int) -> None:
        """Raises ValueError for a row of more than `max_length` tokens."""
        for row in bins:
            total = sum(len(encoded[index].input_ids) for index in row)
            if total > max_length:
                raise ValueError(f"a packed row of {total} tokens is over max_length {max_length}")
        self.encoded = encoded
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Item:
        item = Item(input_ids=[], labels=[], position_ids=[])
        for member in self.bins[index]:
            sequence = self.encoded[member]
            item["input_ids"] += sequence.input_ids
            item["labels"] += [IGNORE, *sequence.labels[1:]]
            item["position_ids"] += range(len(sequence.input_ids))
        return item


def collate(items: Sequence[Item], pad_id: int) -> dict[str, torch.Tensor]:
    """int64 tensors [B, S] of input_ids, labels and position_ids; S is the longest of the items.

    The padding tail of a row is a sequence of its own, of `pad_id`, without labels.
    """
    width = max(len(item["input_ids"]) for item in items)
    tails = [width - len(item["input_ids"]) for item in items]
    pairs = list(zip(items, tails, strict=True))
    rows = {
        "input_ids": [item["input_ids"] + [pad_id] * tail for item, tail in pairs],
        "labels": [item["labels"] + [IGNORE] * tail for item, tail in pairs],
        "position_ids": [item["position_ids"] + list(range(tail)) for item, tail in pairs],
    }
    return {name: torch.tensor(row, dtype=torch.long) for name, row in rows.items()}


def isolates(model: Any) -> bool:
    """Whether sequences packed in one row are blind to each other in this causal language model.

    Tries it: two random sequences in one row; another first one must not change the logits of the
    second. The model is left as it was, and no global random number is drawn.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, 1, PROBE_TOKENS), generator=draw)
    positions = torch.arange(PROBE_TOKENS).repeat(1, 2)

    def logits(before: torch.Tensor) -> torch.Tensor:
        row = {"input_ids": torch.cat([before, second], 1), "position_ids": positions}
        found: torch.Tensor = model(**on_device(model, row), use_cache=False).logits
        return found[0, PROBE_TOKENS:].float()

    with evaluating(model):
        expected, found = logits(first), logits(other)
    return bool((found - expected).abs().max() <= LEAK * expected.std())
