"""Optimizer states that live in pinned host memory and pass through the GPU a page at a time.

A page is a run of blocks of 256 elements; the GPU holds two, in slots used in turn, so its memory
for states is bounded whatever the model's size. Three queues work at once:

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

PAGE_BLOCKS = 1 << 16  # 16.8 million elements: two pages of AdamW states are 65 MiB
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

    def drain(self) -> None:
        """Wait until everything added is done."""


class CudaQueues:
    """Streams of one device: ``fetch`` and ``evict`` have their own, ``update`` is the current."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = {name: torch.cuda.Stream(device) for name in ("fetch", "evict")}
        self.events: dict[Event, torch.cuda.Event] = {}
        for stream in self.streams.values():
            stream.wait_stream(torch.cuda.current_stream(device))

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

    def drain(self) -> None:
        """See ``Queues.drain``: the host may read the states."""
        self.streams["evict"].synchronize()


class Pager:
    """Streams 8-bit states of one device's parameters around their update."""

    def __init__(
        self, device: torch.device, limit: int = PAGE_BLOCKS, queues: Queues | None = None
    ) -> None:
        self.limit = limit
        self.tables = Tables()
        self.slots = [
            [torch.empty(limit * BLOCK, dtype=torch.uint8, device=device) for _ in range(2)]
            + [torch.empty(limit, dtype=torch.float32, device=device) for _ in range(2)]
            for _ in range(SLOTS)
        ]
        self.queues = CudaQueues(device) if queues is None else queues
        if isinstance(self.queues, CudaQueues):
            for tensor in (tensor for slot in self.slots for tensor in slot):
                for stream in self.queues.streams.values():
                    tensor.record_stream(stream)

    def update(self, works: Sequence[Work], rule: Rule, key: object = None) -> None:
        """``pyft.ops.optim.update`` of parameters whose states, all 8-bit, are in host memory."""
        flat = [work._replace(param=_flat(work.param), grad=_flat(work.grad)) for work in works]
        sizes = [-(-work.param.numel() // BLOCK) for work in flat]
        stages = [
            self._stage(flat, page, number % SLOTS)
            for number, page in enumerate(pages(sizes, self.limit))
        ]
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

    def _stage(
        self, works: Sequence[Work], page: list[Part], slot: int
    ) -> tuple[list[Work], list[Pair]]:
        """A page's parts with states in the slot, and the pairs (host, slot) of those states."""
        staged, copies, used = [], [], 0
        for part in page:
            work = works[part.work]
            begin = part.first * BLOCK
            end = min(begin + part.blocks * BLOCK, work.param.numel())
            rooms: list[Tensor | None] = []
            for host, room in zip(work[2:], self.slots[slot], strict=True):
                if host is None:
                    rooms.append(None)
                    continue
                coded = host.dtype == torch.uint8
                source = host[begin:end] if coded else host[part.first : part.first + part.blocks]
                start = used * BLOCK if coded else used
                target = room[start : start + len(source)]
                rooms.append(target)
                copies.append((source, target))
            first, *others = rooms
            assert first is not None
            staged.append(Work(work.param[begin:end], work.grad[begin:end], first, *others))
            used += part.blocks
        return staged, copies


def _flat(x: Tensor) -> Tensor:
    return x.detach().view(-1)
