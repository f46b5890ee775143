"""Optimizer states that live in pinned host memory and pass through the GPU a page at a time.

A page is a run of blocks of 256 elements; the GPU holds two, in slots used in turn. A slot has
room for the largest page it has held, 260 bytes a block and state: for n blocks in the largest
launch the slots take 260 min(n, 2 PAGE_BLOCKS) bytes for Lion and SGD and twice that for AdamW, at
most 32.5 and 65 MiB whatever the model's size. Three queues work at once:

    fetch     page 0 | page 1 | page 2 | ...              host -> slot
    update             page 0 | page 1 | page 2 | ...     the current stream
    evict                       page 0 | page 1 | ...     slot -> host

    fetch k waits for evict k - 2 (its slot), update k for fetch k, evict k for update k, and the
    first fetch of a step for the last evictions of the step before.

Over the bus go 2 bytes an element each way for AdamW, 1 for Lion and SGD.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyft.ops.optim import BLOCK, Rule, Tables, Work, update

PAGE_BLOCKS = 1 << 16  # 16.8 million elements
SLOTS = 2

Event = tuple[str, int]  # what has been done, in which slot
Pair = tuple[Tensor, Tensor]  # copy the first to the second


class Part(NamedTuple):
    """Blocks [first, first + blocks) of tensor number ``work``."""

    work: int
    first: int
    blocks: int


def pages(sizes: Sequence[int], limit: int) -> list[list[Part]]:
    """Cut tensors of ``sizes`` blocks, in order, into pages of ``limit`` blocks."""
    made: list[list[Part]] = []
    room = 0
    for work, size in enumerate(sizes):
        first = 0
        while first < size:
            if room == 0:
                made.append([])
                room = limit
            blocks = min(size - first, room)
            made[-1].append(Part(work, first, blocks))
            first, room = first + blocks, room - blocks
    return made


class Queues(Protocol):
    """Runs actions: in order within a queue, across queues only as events say."""

    def run(
        self, queue: str, after: Sequence[Event], action: Callable[[], None], done: Event
    ) -> None:
        """Add an action that starts when the last actions to announce the events ``after`` have
        ended, and announces ``done`` at its own end.
        """

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Let actions of every queue use memory that was allocated just now."""

    def drain(self) -> None:
        """Wait until everything added is done."""


class CudaQueues:
    """Streams of one device: ``fetch`` and ``evict`` have their own, ``update`` is the current."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = {name: torch.cuda.Stream(device) for name in ("fetch", "evict")}
        self.events: dict[Event, torch.cuda.Event] = {}

    def run(
        self, queue: str, after: Sequence[Event], action: Callable[[], None], done: Event
    ) -> None:
        """See ``Queues.run``."""
        stream = self.streams.get(queue) or torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            for event in after:
                if event in self.events:
                    stream.wait_event(self.events[event])
            action()
            self.events.setdefault(done, torch.cuda.Event()).record(stream)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """See ``Queues.share``: what the current stream last did there comes first."""
        for stream in self.streams.values():
            stream.wait_stream(torch.cuda.current_stream(self.device))
            for tensor in tensors:
                tensor.record_stream(stream)

    def drain(self) -> None:
        """See ``Queues.drain``: the host may read the states."""
        self.streams["evict"].synchronize()


class Pager:
    """Streams 8-bit states of one device's parameters around their update.

    Args:
        device: where the parameters are and the slots go.
        limit: the blocks of a page; PAGE_BLOCKS if None.
        queues: what runs the copies and updates; streams of ``device`` if None.
    """

    def __init__(
        self, device: torch.device, limit: int | None = None, queues: Queues | None = None
    ) -> None:
        self.device = device
        self.limit = PAGE_BLOCKS if limit is None else limit
        self.tables = Tables()
        self.slots: list[list[Pair]] = [[] for _ in range(SLOTS)]  # codes and absmax of each state
        self.queues = CudaQueues(device) if queues is None else queues

    def update(self, works: Sequence[Work], rule: Rule, key: object = None) -> None:
        """``pyft.ops.optim.update`` of parameters whose states, all 8-bit, are in host memory.

        Raises:
            ValueError: a state that is not coded; nothing has been updated then.
        """
        states = max(len(_states(work)) for work in works)
        flat = [work._replace(param=_flat(work.param), grad=_flat(work.grad)) for work in works]
        cut = pages([-(-work.param.numel() // BLOCK) for work in flat], self.limit)
        for slot in range(SLOTS):
            sizes = (sum(part.blocks for part in page) for page in cut[slot::SLOTS])
            self._reserve(slot, max(sizes, default=0), states)
        stages = [self._stage(flat, page, number % SLOTS) for number, page in enumerate(cut)]
        evicted = [("evicted", slot) for slot in range(SLOTS)]
        for number, (here, copies) in enumerate(stages):
            slot = number % SLOTS
            if number == 0:
                self._copy("fetch", evicted, copies, ("fetched", 0))
            if number + 1 < len(stages):
                after = (number + 1) % SLOTS
                self._copy("fetch", [evicted[after]], stages[number + 1][1], ("fetched", after))
            step = partial(update, here, rule, self.tables, (key, number))
            self.queues.run("update", [("fetched", slot)], step, ("updated", slot))
            back = [(target, source) for source, target in copies]
            self._copy("evict", [("updated", slot)], back, evicted[slot])

    def _copy(self, queue: str, after: list[Event], pairs: list[Pair], done: Event) -> None:
        def copy() -> None:
            for source, target in pairs:
                target.copy_(source, non_blocking=True)

        self.queues.run(queue, after, copy, done)

    def _reserve(self, slot: int, blocks: int, states: int) -> None:
        """Make room for ``blocks`` blocks of ``states`` states, if the slot has less."""
        held = self.slots[slot]
        had = (len(held[0][1]), len(held)) if held else (0, 0)
        room, count = max(blocks, had[0]), max(states, had[1])
        if blocks == 0 or (room, count) == had:
            return
        if held:
            self.queues.drain()  # copies and updates may still be using them
        held.clear()
        for _ in range(count):
            codes = torch.empty(room * BLOCK, dtype=torch.uint8, device=self.device)
            held.append((codes, torch.empty(room, dtype=torch.float32, device=self.device)))
        self.queues.share([tensor for pair in held for tensor in pair])

    def _stage(
        self, works: Sequence[Work], page: list[Part], slot: int
    ) -> tuple[list[Work], list[Pair]]:
        """A page's parts with states in the slot, and the pairs (host, slot) of those states."""
        staged, copies, used = [], [], 0
        for part in page:
            work = works[part.work]
            begin = part.first * BLOCK
            end = min(begin + part.blocks * BLOCK, work.param.numel())
            blocks = slice(part.first, part.first + part.blocks)
            rooms: list[Pair] = []
            for (codes, absmax), (codes_room, absmax_room) in zip(
                _states(work), self.slots[slot], strict=False
            ):
                start = used * BLOCK
                room = codes_room[start : start + end - begin]
                room_absmax = absmax_room[used : used + part.blocks]
                copies += [(codes[begin:end], room), (absmax[blocks], room_absmax)]
                rooms.append((room, room_absmax))
            (first, first_absmax), second = rooms[0], (*rooms[1:], (None, None))[0]
            coded = (first, second[0], first_absmax, second[1])
            staged.append(Work(work.param[begin:end], work.grad[begin:end], *coded))
            used += part.blocks
        return staged, copies


def _states(work: Work) -> list[Pair]:
    """The codes and absmax of each state."""
    pairs = [(work.first, work.first_absmax), (work.second, work.second_absmax)]
    made = []
    for codes, absmax in pairs[: 1 if work.second is None else 2]:
        if codes is None or absmax is None or codes.dtype != torch.uint8:
            raise ValueError("a state that is not 8-bit cannot be paged: its cuts would be wrong")
        made.append((codes, absmax))
    return made


def _flat(x: Tensor) -> Tensor:
    return x.detach().view(-1)
