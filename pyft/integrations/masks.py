"""transformers' attention masks as what ``pyft.attention`` takes: bounds and boundaries, no matrix.

transformers makes a mask once a step, by a function (batch, head, query, key) -> bool that it puts
together from its own: causal, sliding window, chunks, packed sequences. ``make_mask`` takes that
function apart again. What it knows becomes a ``Mask``; what it does not know (blocks of an image,
prefixes, functions of a user) becomes the whole matrix, as a bias.

Padding keys are in a sequence of their own, without queries where all see all. Where attention is
causal, padding on the right needs nothing: real tokens do not see what comes later.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from pyft.errors import UsageError


class NotAMatrix(UsageError, AttributeError):
    """A model does something else with a mask than to hand it to its attention."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"this model asks its attention mask for {what}, as of a matrix, which it is not with "
            "attn_implementation='pyft'; use model.set_attn_implementation('sdpa') or 'eager'"
        )


class Mask(BlockMask):
    """Which keys a query sees. A BlockMask, as transformers takes no other masks but matrices.

    Attributes:
        sizes: (B, 1, Sq, Sk), as a matrix would have.
        left, right: how far before and after itself; None: without an end.
        shift: of a query's place, as in ``pyft.attention``.
        cu_q, cu_k: int32 [n + 1], boundaries among the queries and keys of all rows, one row after
            another; None: each row is a sequence.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        left: int | None = None,
        right: int | None = None,
        shift: int = 0,
        cu_q: Tensor | None = None,
        cu_k: Tensor | None = None,
    ) -> None:
        self.sizes, self.left, self.right, self.shift = sizes, left, right, shift
        self.cu_q, self.cu_k = cu_q, cu_k

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, Sq, Sk)."""
        return self.sizes

    @property
    def ndim(self) -> int:
        """Of a matrix for each row of the batch."""
        return 4

    def __repr__(self) -> str:
        packed = "" if self.cu_q is None else f", {self.cu_q.numel() - 1} sequences"
        return f"Mask({self.sizes}, left={self.left}, right={self.right}{packed})"

    def __getattr__(self, name: str) -> Any:
        raise NotAMatrix(repr(name))

    def __getitem__(self, index: Any) -> Any:
        raise NotAMatrix("a part")

    @classmethod
    def __torch_function__(cls, function: Any, *arguments: Any, **options: Any) -> Any:
        raise NotAMatrix(f"torch's {getattr(function, '__name__', 'functions')}")

    def to(self, *arguments: Any, **options: Any) -> "Mask":
        """On another device: how accelerate moves what a module is called with."""
        cu = (None if c is None else c.to(*arguments, **options) for c in (self.cu_q, self.cu_k))
        return Mask(self.sizes, self.left, self.right, self.shift, *cu)

    def contiguous(self) -> "Mask":
        """Itself: transformers' generation asks this of each mask."""
        return self

    def packed(self, cu: Tensor | None) -> "Mask":
        """With these boundaries of queries and keys."""
        return Mask(self.sizes, self.left, self.right, self.shift, cu, cu)

    def as_bias(self, q: Tensor, k: Tensor) -> Tensor:
        """The whole matrix [B or 1, 1, Sq, Sk] of 0 and -infinity, in q's dtype."""
        batch, sq, sk = q.shape[0], q.shape[2], k.shape[2]
        place = torch.arange(sq, device=q.device)[:, None] + sk - sq + self.shift
        key = torch.arange(sk, device=q.device)
        seen = torch.ones(1, sq, sk, dtype=torch.bool, device=q.device)
        if self.cu_q is not None and self.cu_k is not None:
            of_query, place = _sequence_of(self.cu_q, batch, sq)
            of_key, key = _sequence_of(self.cu_k, batch, sk)
            behind = (self.cu_k.diff() - self.cu_q.diff()).long()
            place = (place + behind[of_query] + self.shift)[:, :, None]
            key = key[:, None]
            seen = of_query[:, :, None] == of_key[:, None]
        if self.left is not None:
            seen = seen & (place - key <= self.left)
        if self.right is not None:
            seen = seen & (key - place <= self.right)
        return as_bias(seen[:, None], q.dtype)


def _sequence_of(cu: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """Of each token [B, S] which sequence it is in, and its place there."""
    tokens = torch.arange(batch * seq, device=cu.device)
    sequence = torch.searchsorted(cu.long(), tokens, right=True) - 1
    return sequence.view(-1, seq), (tokens - cu.long()[sequence]).view(-1, seq)


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
    sizes = (batch_size, 1, q_length, kv_length)
    whole = q_length == kv_length and kv_offset == 0 and _is_zero(q_offset)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if not is_tracing(padding) and bool(padding.all()):
            padding = None
    found = None
    if torch.compiler.is_compiling():
        if whole and padding is None:
            found = _traced(sizes, mask_function, device, options)
    elif not is_tracing(q_offset):
        positions = torch.arange(q_length, device=device)[None] if whole else None
        pattern = _read(mask_function, positions)
        if pattern is not None:
            shift = int(q_offset) - kv_offset - kv_length + q_length
            found = _mask_of(pattern, sizes, shift, whole, padding)
    if found is not None and not _makes_scores(options.get("config")):
        return found
    options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    seen = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        device=device, **options,
    )  # fmt: skip
    return as_bias(seen, dtype)


def _makes_scores(config: Any) -> bool:
    """Whether a model's own code asks for FlexAttention's masks, as Doge's: it takes them for
    something that it need not put into the scores it makes.
    """
    package = type(config).__module__.rpartition(".")[0]
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{package}.modeling")]
    return config is not None and any(hasattr(module, "BlockMask") for module in modules)


def _mask_of(
    pattern: _Pattern,
    sizes: tuple[int, int, int, int],
    shift: int,
    whole: bool,
    padding: Tensor | None,
) -> Mask | None:
    """What a pattern and padding [B, Sk] come to; None where it takes a matrix."""
    batch, _, q_length, kv_length = sizes
    bounds = (pattern.left, pattern.right)
    groups = list(pattern.groups)
    if padding is not None:
        if not groups and bounds == (None, None) and _is_one_piece(padding):
            return Mask(sizes, None, None, 0, *_around(padding, q_length))
        ends = (
            whole and not is_tracing(padding) and not bool((padding[:, 1:] > padding[:, :-1]).any())
        )
        if not (ends and pattern.right == 0):
            groups.append(padding)
    if not groups:
        return Mask(sizes, *bounds, shift)
    if not whole or (padding is not None and not _is_one_piece(padding)):
        return None
    return Mask(sizes, *bounds, shift).packed(_boundaries(_starts(groups, batch, kv_length)))


def _around(padding: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Boundaries of queries and keys where every query sees the real keys of its row: three
    sequences a row, padding, what is real with all queries, and padding.
    """
    batch, keys = padding.shape
    row = torch.arange(batch, device=padding.device)
    real = padding.sum(dim=1)
    before = torch.where(real > 0, padding.long().argmax(dim=1), 0)
    lengths_k = torch.stack([before, real, keys - before - real], dim=1)
    lengths_q = torch.zeros_like(lengths_k)
    lengths_q[row, 1] = queries
    q, k = (
        torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0)).to(torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    return q, k


def _traced(
    sizes: tuple[int, int, int, int],
    function: Callable[..., Any],
    device: torch.device | str,
    options: dict[str, Any],
) -> Mask | None:
    """The causal mask of a compiled step, which cannot look into functions: what transformers says
    of it beside the function, and a sequence begins at each token that is blind to the one before.
    """
    batch, _, seq, _ = sizes
    known = function.__qualname__.startswith(("and_masks", "causal_mask_function"))
    both_ways = "allow_is_bidirectional_skip" in options
    if not known or both_ways or options.get("use_vmap"):  # vmap: with a function of the user
        return None
    size = options.get("local_size")
    left = None if size is None else size - 1
    if function is masking_utils.causal_mask_function:
        return Mask(sizes, left, 0)
    row, place = torch.arange(batch, device=device)[:, None], torch.arange(1, seq, device=device)
    joined = function(row, torch.zeros_like(row), place[None], place[None] - 1)
    starts = torch.ones(batch, seq, dtype=torch.bool, device=device)
    starts[:, 1:] = ~joined
    return Mask(sizes, left, 0).packed(_boundaries(starts))


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


def of_padding(padding: Tensor, q_length: int, causal: bool) -> Mask | Tensor:
    """The mask of a padding mask [B, Sk], 0 where there is padding."""
    function = masking_utils.causal_mask_function
    if not causal:
        function = masking_utils.bidirectional_mask_function
    batch, keys = padding.shape
    offset = keys - q_length if causal else 0
    return make_mask(
        batch, q_length, keys, offset, mask_function=function, attention_mask=padding.bool(),
        device=padding.device,
    )  # fmt: skip


def of_positions(position_ids: Tensor, batch: int) -> Tensor | None:
    """Boundaries where positions fall back to the least of their row; None where none do. A step
    forward, however long, and positions that are all the same begin nothing.
    """
    positions = position_ids.expand(batch, -1)
    least = positions.amin(dim=1, keepdim=True)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = (positions[:, 1:] == least) & (positions.amax(dim=1, keepdim=True) > least)
    return _boundaries(starts)
