"""transformers' attention masks as what ``pyft.attention`` takes: bounds and boundaries, no matrix.

transformers makes a mask once a step, by a function (batch, head, query, key) -> bool that it puts
together from its own: causal, sliding window, chunks, packed sequences. ``make_mask`` takes that
function apart again. What it knows becomes a ``Mask``; what it does not know (blocks of an image,
prefixes, functions of a user) becomes the whole matrix, as a bias.

Padding is a sequence of its own: real tokens are blind to it and its own rows are finite.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query sees.

    Attributes:
        left, right: how far before and after itself; None: without an end.
        shift: of a query's place, as in ``pyft.attention``.
        cu_seqlens: int32 [n + 1], boundaries among the tokens of all rows, one row after another;
            None: each row is a sequence.
    """

    left: int | None = None
    right: int | None = None
    shift: int = 0
    cu_seqlens: Tensor | None = None

    def to(self, device: Any, *arguments: Any, **options: Any) -> "Mask":
        """On another device: how accelerate moves what a module is called with."""
        cu = self.cu_seqlens
        return replace(
            self, cu_seqlens=None if cu is None else cu.to(device, *arguments, **options)
        )

    def contiguous(self) -> "Mask":
        """Itself: transformers' generation asks this of each mask."""
        return self

    def as_bias(self, q: Tensor, k: Tensor) -> Tensor:
        """The whole matrix [B or 1, 1, Sq, Sk] of 0 and -infinity, in q's dtype."""
        sq, sk = q.shape[2], k.shape[2]
        place = torch.arange(sq, device=q.device)[:, None] + sk - sq + self.shift
        distance = place - torch.arange(sk, device=q.device)
        seen = torch.ones_like(distance, dtype=torch.bool)[None]
        if self.left is not None:
            seen = seen & (distance <= self.left)
        if self.right is not None:
            seen = seen & (-distance <= self.right)
        if self.cu_seqlens is not None:
            tokens = torch.arange(q.shape[0] * sq, device=q.device)
            sequence = torch.searchsorted(self.cu_seqlens.long(), tokens, right=True).view(-1, sq)
            seen = seen & (sequence[:, :, None] == sequence[:, None, :])
        return as_bias(seen[:, None], q.dtype)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True, -infinity elsewhere."""
    return torch.zeros((), dtype=dtype, device=seen.device).where(seen, -torch.inf)


@dataclass(frozen=True)
class _Pattern:
    """What a mask function says: bounds, and groups [B or 1, S], each blind to the others."""

    left: int | None = None
    right: int | None = None
    groups: tuple[Tensor, ...] = ()

    def and_also(self, other: "_Pattern") -> "_Pattern":
        left = min((b for b in (self.left, other.left) if b is not None), default=None)
        right = min((b for b in (self.right, other.right) if b is not None), default=None)
        return _Pattern(left, right, (*self.groups, *other.groups))


def _read(function: Callable[..., Any], positions: Tensor | None) -> _Pattern | None:
    """The pattern of a mask function of transformers' own; None for another."""
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    cells = inspect.getclosurevars(function).nonlocals
    maker = function.__qualname__.split(".")[0]
    if maker == "causal_mask_function":
        return _Pattern(right=0)
    if maker == "bidirectional_mask_function":
        return _Pattern()
    if maker == "sliding_window_overlay":
        return _Pattern(left=cells["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return _Pattern(left=cells["sliding_window"], right=cells["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return _Pattern(groups=(cells["packed_sequence_mask"],))
    if maker == "remap_positions_for_packed_sequence":  # distances in a sequence stay the same
        return _read(cells["mask_function"], cells["position_ids"])
    if maker == "chunked_overlay" and positions is not None:
        padding = cells["left_padding"].to(positions.device).view(-1, 1)
        return _Pattern(groups=((positions - padding) // cells["chunk_size"],))
    if maker == "and_masks":
        whole = _Pattern()
        for part in cells["mask_functions"]:
            pattern = _read(part, positions)
            if pattern is None:
                return None
            whole = whole.and_also(pattern)
        return whole
    return None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Mask | Tensor:
    """The mask of a step: transformers calls it where attn_implementation is "pyft".

    Returns:
        A ``Mask``, or where that cannot say it a bias [B, 1, Sq, Sk] of 0 and -infinity.
    """
    whole = q_length == kv_length and kv_offset == 0 and _is_zero(q_offset)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if not is_tracing(padding) and bool(padding.all()):
            padding = None
    if torch.compiler.is_compiling():
        if whole and padding is None:
            found = _traced(batch_size, q_length, mask_function, device, options)
            if found is not None:
                return found
    elif not is_tracing(q_offset):
        positions = torch.arange(q_length, device=device)[None] if whole else None
        pattern = _read(mask_function, positions)
        if pattern is not None:
            shift = int(q_offset) - kv_offset - kv_length + q_length
            groups = [*pattern.groups, *(() if padding is None else (padding,))]
            if not groups:
                return Mask(pattern.left, pattern.right, shift)
            if whole and (padding is None or _is_one_piece(padding)):
                cu = _boundaries(_starts(groups, batch_size, q_length))
                return Mask(pattern.left, pattern.right, shift, cu)
    options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    seen = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        device=device, **options,
    )  # fmt: skip
    return as_bias(seen, dtype)


def _traced(
    batch: int,
    seq: int,
    function: Callable[..., Any],
    device: torch.device | str,
    options: dict[str, Any],
) -> Mask | None:
    """The causal mask of a compiled step, which cannot look into functions: what transformers says
    of it beside the function, and a sequence begins at each token that is blind to the one before.
    """
    known = function.__qualname__.startswith(("and_masks", "causal_mask_function"))
    both_ways = "allow_is_bidirectional_skip" in options
    if not known or both_ways or options.get("use_vmap"):  # vmap: with a function of the user
        return None
    size = options.get("local_size")
    left = None if size is None else size - 1
    if function is masking_utils.causal_mask_function:
        return Mask(left, 0)
    row, place = torch.arange(batch, device=device)[:, None], torch.arange(1, seq, device=device)
    joined = function(row, torch.zeros_like(row), place[None], place[None] - 1)
    starts = torch.ones(batch, seq, dtype=torch.bool, device=device)
    starts[:, 1:] = ~joined
    return Mask(left, 0, 0, _boundaries(starts))


def _is_zero(offset: int | Tensor) -> bool:
    return not is_tracing(offset) and int(offset) == 0


def _is_one_piece(padding: Tensor) -> bool:
    """Whether the tokens of each row that are no padding follow one another."""
    if is_tracing(padding):
        return False
    starts = padding[:, 1:] & ~padding[:, :-1]
    return bool((starts.sum(dim=1) + padding[:, 0] <= 1).all())


def _starts(groups: list[Tensor], batch: int, seq: int) -> Tensor:
    """[B, S], True where a token's group is not that of the token before in its row."""
    starts = torch.zeros(batch, seq, dtype=torch.bool, device=groups[0].device)
    starts[:, :1] = True
    for group in groups:
        starts[:, 1:] |= group[:, 1:] != group[:, :-1]
    return starts


def _boundaries(starts: Tensor) -> Tensor | None:
    """int32 [n + 1]: where sequences start [B, S], and B S; None where only rows do."""
    flat, total = starts.flatten(), starts.numel()
    if is_tracing(flat):  # as many as there are tokens: how many there will be is not known
        tokens = torch.arange(total, device=flat.device)
        found = tokens.where(flat, total).sort().values
    else:
        found = flat.nonzero().flatten()
        if found.numel() == starts.shape[0]:
            return None
    return torch.nn.functional.pad(found, (0, 1), value=total).to(torch.int32)


def of_padding(padding: Tensor, causal: bool) -> Mask | Tensor:
    """The mask of a padding mask [B, S], 0 where there is padding."""
    function = masking_utils.causal_mask_function
    if not causal:
        function = masking_utils.bidirectional_mask_function
    size = padding.shape[1]
    return make_mask(
        padding.shape[0], size, size, mask_function=function, attention_mask=padding.bool(),
        device=padding.device,
    )  # fmt: skip


def of_positions(position_ids: Tensor, batch: int) -> Tensor | None:
    """Boundaries where positions begin anew; None where each row is one sequence."""
    ids = masking_utils.find_packed_sequence_indices(position_ids.expand(batch, -1))
    return None if ids is None else _boundaries(_starts([ids], batch, ids.shape[1]))
