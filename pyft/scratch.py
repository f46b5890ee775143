"""Where quantized weights are decoded for a matmul: one buffer for each device and stream (for each
thread on a CPU), reused by every layer of every model.

It holds one weight, or a slab of one that is larger than ``limit_scratch`` allows. What it holds is
remembered, so that a weight used twice in a row (by a checkpoint's recomputation and then by its
backward) is decoded once; writing to its stored tensors is noticed, unless through ``.data`` or
numpy. No view of it leaves the block that borrows it, and it is freed with the last weight decoded
into it.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod

import torch
from torch import Tensor

from pyft.backend import large_empty
from pyft.errors import UsageError

Slab = tuple[int, int, int, int]  # rows and columns, begin and end
Coding = tuple[str, int, Slab]  # format, block size, and what of the weight
Decode = Callable[[Tensor], None]
_DEFAULT_LIMIT = 256 << 20
_SMALLEST_LIMIT = 1 << 20
_limit = _DEFAULT_LIMIT


def limit_scratch(nbytes: int | None) -> int:
    """Let the scratch of each device take at most ``nbytes``; larger weights are decoded and
    multiplied slab by slab.

    Args:
        nbytes: at least 1 MiB (2**20); None for the default, 256 MiB.

    Returns:
        The limit there was before.

    Raises:
        UsageError: a limit below 1 MiB.
    """
    global _limit
    if nbytes is not None and nbytes < _SMALLEST_LIMIT:
        raise UsageError(
            f"limit_scratch: {nbytes} bytes are too few; give at least 1 MiB (1048576)"
        )
    before, _limit = _limit, _DEFAULT_LIMIT if nbytes is None else nbytes
    for buffer in list(_all):
        buffer.shrink(_limit)
    return before


def slabs(count: int, length: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """[0, count) in the fewest ranges of about equal size whose ``length`` elements each fit the
    limit; all but the last are a multiple of 64 where that much fits.
    """
    fitting = max(1, _limit // max(1, length * dtype.itemsize))
    if count <= fitting:
        return [(0, count)]
    step = -(-count // -(-count // fitting))
    step = min(-(-step // 64) * 64, fitting // 64 * 64) or step
    return [(begin, min(begin + step, count)) for begin in range(0, count, step)]


_all: "weakref.WeakSet[_Buffer]" = weakref.WeakSet()


class _Buffer:
    """Memory of one device and stream, and which stored tensors it holds the decoded form of."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memory: Tensor | None = None
        self.owner: weakref.ref[Tensor] | None = None
        self.holds: _Held | None = None
        self.tail = 0
        _all.add(self)

    def shrink(self, nbytes: int) -> None:
        """Let go of memory larger than this; a block that uses it keeps it until it ends."""
        with self.lock:
            if self.memory is not None and self.memory.nbytes > nbytes:
                self.memory = self.owner = self.holds = None

    @contextmanager
    def borrow(
        self, parts: Sequence[Tensor], coding: Coding, dtype: torch.dtype, decode: Decode, tail: int
    ) -> Iterator[Tensor]:
        _, _, (top, bottom, left, right) = coding
        rows, cols = bottom - top, right - left
        with self.lock:
            held = self.holds is not None and self.holds.is_of(parts, coding, dtype)
            if held and tail in (0, self.tail):
                view = self._view((rows, cols + self.tail), dtype, parts[0].device)
            else:
                # The former owner may die while this is written, and would take the memory along.
                self.owner = self.holds = None
                self.tail = tail
                view = self._view((rows, cols + tail), dtype, parts[0].device)
                decode(view[:, :cols])
                self.owner = weakref.ref(parts[0], self._free)
                self.holds = _Held(parts, coding, dtype)
            yield view[:, : cols + tail]

    def _view(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        memory = self.memory
        if memory is None or memory.nbytes < nbytes:
            self.memory = self.holds = memory = None  # the old goes before the new comes
            memory = self.memory = large_empty((nbytes,), torch.uint8, device)
        return memory[:nbytes].view(dtype).view(shape)

    def _free(self, owner: "weakref.ref[Tensor]") -> None:
        if self.owner is owner:
            self.memory = self.owner = self.holds = None


class _Held:
    """Which slab of which stored tensors, as they were, read how."""

    def __init__(self, parts: Sequence[Tensor], coding: Coding, dtype: torch.dtype) -> None:
        self.coding, self.dtype = coding, dtype
        self.parts = [(weakref.ref(part), _version(part)) for part in parts]

    def is_of(self, parts: Sequence[Tensor], coding: Coding, dtype: torch.dtype) -> bool:
        same = (self.coding, self.dtype, len(self.parts)) == (coding, dtype, len(parts))
        return same and all(
            held() is part and version is not None and version == _version(part)
            for (held, version), part in zip(self.parts, parts, strict=True)
        )


def _version(part: Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count."""
    return None if part.is_inference() else part._version


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.buffer = _Buffer()


_of_thread = _OfThread()
_of_streams: defaultdict[tuple[torch.device, int], _Buffer] = defaultdict(_Buffer)


def decoded(
    parts: Sequence[Tensor], coding: Coding, dtype: torch.dtype, decode: Decode, tail: int = 0
) -> AbstractContextManager[Tensor]:
    """A context in which a slab of the weight stored in ``parts`` is at hand as a plain tensor,
    with ``tail`` more columns of nothing in particular; ``decode`` fills one where the buffer holds
    something else.

    While a CUDA graph is captured nothing is reused and nothing remembered: what is captured may be
    replayed in any order.
    """
    device = parts[0].device
    if _capturing(device):
        return _Buffer().borrow(parts, coding, dtype, decode, tail)
    if device.type == "cpu":
        return _of_thread.buffer.borrow(parts, coding, dtype, decode, tail)
    stream = torch.accelerator.current_stream(device).stream_id
    return _of_streams[device, stream].borrow(parts, coding, dtype, decode, tail)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
