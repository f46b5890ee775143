"""The Triton attention kernels on a GPU if there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so kernels run in a process of their own:
``python tests/test_kernels_attention.py`` prints what is wrong with each case as JSON.
"""

import json
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import CASES, check, check_far
from triton_process import answers_of

from pyft.kernels.attention_tiles import sequence_at

MANY = 10**6  # programs wanted: every group is split


def launchers(config: Any) -> Any:
    """The launchers with their tiles."""
    from pyft.kernels import attention

    return SimpleNamespace(
        attention=partial(attention.attention, config=config),
        attention_delta=attention.attention_delta,
        attention_backward=partial(attention.attention_backward, config=config),
        attention_bias_backward=partial(attention.attention_bias_backward, config=config),
    )


def at_once(groups: int) -> None:
    """Let programs go through so many groups of heads before others, as a small cache asks."""
    from pyft.kernels import attention, attention_backward

    def some(k: torch.Tensor, v: torch.Tensor, group: int) -> int:
        return group * min(groups, k.shape[0] * k.shape[1])

    attention.heads_at_once = attention_backward.heads_at_once = some


@triton.jit
def places_kernel(cu_ptr, other_ptr, out_ptr, sequences, BLOCK: tl.constexpr, EVERY: tl.constexpr):
    """(place, begin, length, begin of the other side, its length) of each EVERY-th tile."""
    place, begin, length, other_begin, other_length = sequence_at(
        tl.program_id(0) * EVERY, cu_ptr, other_ptr, 0, 0, sequences, BLOCK
    )
    out_ptr += 5 * tl.program_id(0)
    tl.store(out_ptr, place)
    tl.store(out_ptr + 1, begin)
    tl.store(out_ptr + 2, length)
    tl.store(out_ptr + 3, other_begin)
    tl.store(out_ptr + 4, other_length)


def check_places(device: torch.device) -> str:
    """More packed sequences than are looked at together, with their tiles one after another."""
    generator = torch.Generator().manual_seed(0)
    count, block, every = 1500, 16, 19
    lengths = torch.randint(0, 40, (2, count), generator=generator)
    lengths[:, ::3] = 0
    cu = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int()
    first = (cu[0] // block + torch.arange(count + 1)).tolist()
    expected = [
        (place * block, int(cu[0, s]), int(lengths[0, s]), int(cu[1, s]), int(lengths[1, s]))
        for s in range(count)
        for place in range(first[s + 1] - first[s])
    ][::every]
    found = torch.full((len(expected), 5), -1, dtype=torch.int32, device=device)
    places_kernel[(len(expected),)](*cu.to(device), found, count, BLOCK=block, EVERY=every)
    return "" if [tuple(row) for row in found.tolist()] == expected else "tiles differ"


def prepare_once() -> None:
    """The interpreter prepares triton.language again at each call of one jit function by another,
    which takes most of its time; once for each module does.
    """
    from triton.runtime import interpreter

    prepared = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def run_cases(only: str = "") -> dict[str, str]:
    """What is wrong with each case, "" when nothing is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()
        prepare_once()
    from pyft.kernels.configs import Attention, Tile

    tiles = (
        Attention(Tile(16, 32), Tile(32, 16), Tile(16, 32), programs=1),
        Attention(Tile(32, 32), Tile(32, 32), Tile(32, 32), fused=True, programs=1),
        Attention(Tile(32, 16), Tile(16, 32), Tile(32, 16), fused=True, programs=MANY),
        Attention(Tile(32, 32), Tile(32, 32), Tile(32, 32), programs=MANY),
    )
    large = Attention(Tile(64, 64), Tile(64, 64), Tile(64, 64), programs=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for n, (name, case) in enumerate(CASES.items()):
        if only in name:
            config = large if max(case.sizes) > 128 else tiles[n % len(tiles)]
            if device.type == "cpu":
                at_once(n % 3 + 1)
            found[name] = check(case, launchers(config), device)
            if device.type == "cuda":  # those that it starts from, too
                found[name] += check(case, launchers(None), device)
    return found | {"far": check_far(launchers(large), device), "places": check_places(device)}


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    return answers_of(__file__)


@pytest.mark.parametrize("name", [*CASES, "far", "places"])
def test_triton(wrong: dict[str, str], name: str) -> None:
    assert wrong[name] == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(), indent=1))
