"""States in host memory: the cutting into pages, and the waits between queues. What the queues of
a GPU may do is tried here in random orders that only the declared events restrict.
"""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from pyft.ops.optim import BLOCK, Tables, Work, adamw_rule, lion_rule, update
from pyft.optim import AdamW8bit
from pyft.optim.paging import Event, Pager, Part, pages

SIZES = (4096, 10 * BLOCK + 5, 4097, 30 * BLOCK)
LIMIT = 7
RULE = adamw_rule(3, 1e-2, (0.9, 0.999), 1e-8, 0.1, False)


@given(sizes=st.lists(st.integers(0, 50), max_size=12), limit=st.integers(1, 20))
def test_pages_hold_every_block_once_and_in_order(sizes: list[int], limit: int) -> None:
    cut = pages(sizes, limit)
    blocks = [
        (part.work, block)
        for page in cut
        for part in page
        for block in range(part.first, part.first + part.blocks)
    ]
    assert blocks == [(work, block) for work, size in enumerate(sizes) for block in range(size)]
    lengths = [sum(part.blocks for part in page) for page in cut]
    assert all(length == limit for length in lengths[:-1])
    assert all(1 <= length <= limit for length in lengths[-1:])


def test_pages_of_an_example() -> None:
    assert pages([3, 5], 4) == [[Part(0, 0, 3), Part(1, 0, 1)], [Part(1, 1, 4)]]


class LazyQueues:
    """Runs nothing until drained, then in a random order that queues and events allow.

    With ``forget`` it ignores the waits for events of that name.
    """

    def __init__(self, seed: int, forget: str = "") -> None:
        self.random = random.Random(seed)
        self.forget = forget
        self.actions: list[tuple[str, list[int], Callable[[], None]]] = []
        self.announced: dict[Event, int] = {}
        self.shared: list[tuple[int, int]] = []  # actions not yet run, tensors

    def run(
        self, queue: str, after: Sequence[Event], action: Callable[[], None], done: Event
    ) -> None:
        waits = [
            self.announced[event]
            for event in after
            if event in self.announced and event[0] != self.forget
        ]
        self.announced[done] = len(self.actions)
        self.actions.append((queue, waits, action))

    def share(self, tensors: Sequence[Tensor]) -> None:
        self.shared.append((len(self.actions), len(tensors)))

    def drain(self) -> None:
        left = dict(enumerate(self.actions))
        while left:
            heads: dict[str, int] = {}
            for number, (queue, _, _) in left.items():
                heads.setdefault(queue, number)
            free = [n for n in heads.values() if not any(wait in left for wait in left[n][1])]
            left.pop(self.random.choice(free))[2]()
        self.actions, self.announced = [], {}


def works(coded_second: bool = True, sizes: Sequence[int] = SIZES) -> list[Work]:
    generator = torch.Generator().manual_seed(0)

    def codes(n: int) -> Tensor:
        return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator)

    made = []
    for n in sizes:
        absmax = [torch.rand(-(-n // BLOCK), generator=generator) for _ in range(2)]
        param, grad = (torch.randn(n, generator=generator) for _ in range(2))
        second = (codes(n), absmax[1]) if coded_second else (None, None)
        made.append(Work(param, grad, codes(n), second[0], absmax[0], second[1]))
    return made


def step_twice(queues: LazyQueues) -> list[Work]:
    paged = works()
    pager = Pager(torch.device("cpu"), LIMIT, queues)
    for _ in range(2):
        pager.update(paged, RULE)
    queues.drain()
    return paged


def expected() -> list[Work]:
    plain = works()
    for _ in range(2):
        update(plain, RULE, Tables())
    return plain


def equal(a: list[Work], b: list[Work]) -> bool:
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs if x is not None and y is not None)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_the_events_allow_gives_the_same_bits(seed: int) -> None:
    assert equal(step_twice(LazyQueues(seed)), expected())


@pytest.mark.parametrize("forget", ["fetched", "updated", "evicted"])
def test_every_wait_is_needed(forget: str) -> None:
    truth = expected()
    assert not all(equal(step_twice(LazyQueues(seed, forget)), truth) for seed in range(20))


def test_one_moment_is_paged_alone() -> None:
    rule = lion_rule(1e-2, (0.9, 0.99), 0.0, False)
    paged, plain = works(coded_second=False), works(coded_second=False)
    queues = LazyQueues(0)
    Pager(torch.device("cpu"), LIMIT, queues).update(paged, rule)
    queues.drain()
    update(plain, rule, Tables())
    assert equal(paged, plain)


def room(pager: Pager) -> int:
    return sum(t.nbytes for slot in pager.slots for pair in slot for t in pair)


@pytest.mark.parametrize(("second", "states"), [(True, 2), (False, 1)])
@pytest.mark.parametrize(("blocks", "most"), [(3, 3), (7, 7), (9, 9), (14, 14), (15, 14), (50, 14)])
def test_slots_are_as_large_as_what_there_is_to_page(
    second: bool, states: int, blocks: int, most: int
) -> None:
    pager = Pager(torch.device("cpu"), LIMIT, LazyQueues(0))
    assert room(pager) == 0
    rule = RULE if second else lion_rule(1e-2, (0.9, 0.99), 0.0, False)
    pager.update(works(second, [blocks * BLOCK - 3]), rule)
    assert room(pager) == 260 * most * states


@pytest.mark.parametrize("seed", range(5))
def test_slots_grow_when_nothing_uses_them_and_are_kept(seed: int) -> None:
    """A launch larger than those before it, then smaller ones again."""
    launches = [[2 * BLOCK], [5 * BLOCK, 300], [9 * BLOCK + 1], [40 * BLOCK], [BLOCK], [30 * BLOCK]]
    queues = LazyQueues(seed)
    pager = Pager(torch.device("cpu"), LIMIT, queues)
    paged = [works(sizes=sizes) for sizes in launches]
    for launch in paged:
        pager.update(launch, RULE)
    # slot 0 at 2 blocks, grown to 7 after a drain; slot 1 at 3 beside actions, grown to 7
    assert [tensors for _, tensors in queues.shared] == [4, 4, 4, 4]
    assert [pending > 0 for pending, _ in queues.shared] == [False, False, True, False]
    assert room(pager) == 260 * 2 * LIMIT * 2
    queues.drain()
    for launch, sizes in zip(paged, launches, strict=True):
        plain = works(sizes=sizes)
        update(plain, RULE, Tables())
        assert equal(launch, plain)


@pytest.mark.parametrize("moment", ["first", "second"])
def test_states_that_are_not_coded_are_not_paged(moment: str) -> None:
    queues = LazyQueues(0)
    pager = Pager(torch.device("cpu"), LIMIT, queues)
    good, bad = works()[:2]
    n = bad.param.numel()
    plain = bad._replace(**{moment: torch.zeros(n), f"{moment}_absmax": None})
    with pytest.raises(ValueError, match="not 8-bit cannot be paged"):
        pager.update([good, plain], RULE)
    assert not queues.actions


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_paged_optimizer_steps_as_another(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyft.optim.paging.PAGE_BLOCKS", LIMIT)
    found = []
    for paged in (False, True):
        generator = torch.Generator().manual_seed(1)
        params = [Parameter(torch.randn(n, generator=generator).to(device)) for n in (*SIZES, 9)]
        optimizer = AdamW8bit(params, paged=paged)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(device)
            optimizer.step()
        if paged and device == "cuda":
            assert optimizer.state[params[0]]["exp_avg"].is_pinned()
        twin = AdamW8bit([Parameter(param.detach().clone()) for param in params], paged=paged)
        twin.load_state_dict(optimizer.state_dict())
        assert twin.param_groups[0]["paged"] == paged
        found.append([param.detach().cpu() for param in params])
        found.append([s["exp_avg_sq"].cpu() for s in twin.state_dict()["state"].values()])
    for plain, same in zip((*found[0], *found[1]), (*found[2], *found[3]), strict=True):
        assert torch.equal(plain, same)
