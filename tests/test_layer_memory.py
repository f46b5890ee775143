"""What a fused layer keeps for its backward, traced on fake tensors: the ideal and no more."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from layer_memory import configuration, ideal, kept_by_a_layer

TOKENS = 256


@pytest.mark.parametrize("recompute", [False, True])
def test_a_fused_layer_keeps_the_ideal(recompute: bool) -> None:
    way = "pyft, gate and up again" if recompute else "pyft"
    found = kept_by_a_layer(way, TOKENS)
    assert abs(found - ideal(configuration(1), recompute)) <= 8


def test_peft_keeps_twice_as_much() -> None:
    assert kept_by_a_layer("peft", TOKENS) > 2 * kept_by_a_layer("pyft", TOKENS)
