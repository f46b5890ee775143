"""The C++ rotary embedding against the reference, on every instruction set and any number of
threads.
"""

import pytest
import torch
from quantize_truth import ISAS
from rope_cases import CASES, check
from stored_weights import CPU
from torch import Tensor

from pyft import native


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_error_rule(monkeypatch: pytest.MonkeyPatch, name: str, isa: str) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    assert check(CASES[name], native, CPU) == ""  # type: ignore[arg-type]


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(*shape) * 6.3
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_layouts_agree_whatever_the_threads(
    monkeypatch: pytest.MonkeyPatch, isa: str, interleaved: bool
) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    q, k = torch.randn(3, 4, 301, 48).bfloat16(), torch.randn(3, 1, 301, 48).bfloat16()
    cos, sin = angles(3, 301, 20)
    found = []
    for threads, order in (
        (1, (0, 1, 2, 3)),
        (2, (0, 1, 2, 3)),
        (2, (0, 2, 1, 3)),
        (3, (2, 0, 1, 3)),
    ):
        torch.set_num_threads(threads)
        moved = [
            x.permute(order).clone(memory_format=torch.contiguous_format) for x in (q, k, q, k)
        ]
        back = [order.index(i) for i in range(4)]
        q_in, k_in, q_out, k_out = (x.permute(back) for x in moved)
        q_out.fill_(float("nan"))
        k_out.fill_(float("nan"))
        with torch.inference_mode():
            native.rope(q_in, k_in, cos, sin, None, interleaved, False, q_out, k_out)
        found.append((q_out, k_out))
    for outputs in found[1:]:
        assert all(map(torch.equal, outputs, found[0]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_inverse_turns_back(interleaved: bool) -> None:
    q = torch.randn(2, 3, 9, 40)
    cos, sin = angles(2, 9, 16)
    turned, back = torch.empty_like(q), torch.empty_like(q)
    native.rope(q, None, cos, sin, None, interleaved, False, turned, None)
    native.rope(turned, None, cos, sin, None, interleaved, True, back, None)
    torch.testing.assert_close(back, q, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(turned, q, atol=0.1)


def test_one_row_of_a_table_for_every_token() -> None:
    """Tables whose strides are 0."""
    q = torch.randn(2, 3, 5, 8)
    cos, sin = angles(1, 1, 4)
    found = []
    for tables in (
        (cos.expand(2, 5, 4), sin.expand(2, 5, 4)),
        (cos.repeat(2, 5, 1), sin.repeat(2, 5, 1)),
    ):
        out = torch.empty_like(q)
        native.rope(q, None, *tables, None, False, False, out, None)
        found.append(out)
    assert torch.equal(*found)


def test_more_pairs_than_dimensions_are_refused() -> None:
    q = torch.randn(1, 1, 2, 6)
    cos, sin = angles(1, 2, 4)
    with pytest.raises(ValueError, match="outside its documented range"):
        native.rope(q, None, cos, sin, None, False, False, torch.empty_like(q), None)
