"""The C++ activations against the reference, on every instruction set and any number of threads."""

import pytest
import torch
from glu_cases import CASES, check
from quantize_truth import ISAS
from stored_weights import CPU

from pyft import native
from pyft.reference import glu as reference


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_error_rule(monkeypatch: pytest.MonkeyPatch, name: str, isa: str) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    assert check(CASES[name], native, CPU) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("activation", "least"), [("silu", -85.0), ("gelu", -12.0), ("gelu_tanh", -9.0)]
)
def test_every_value_is_relatively_right(
    monkeypatch: pytest.MonkeyPatch, activation: str, least: float, isa: str
) -> None:
    """Down to the smallest values of the left tail, which the largest error would hide."""
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    gate = torch.linspace(least, 20, 200_001).view(3, -1)
    out = torch.empty_like(gate)
    native.glu(gate, None, activation, out)
    x = gate.double()
    tail = {
        "silu": lambda: x * torch.sigmoid(x),
        "gelu": lambda: x * torch.special.erfc(-x * 0.5**0.5) / 2,
        "gelu_tanh": lambda: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    }[activation]()
    # On top comes what the exponent loses to its own rounding: two or three half ulps of it.
    cubic = 1.6 * x.abs() + 0.072 * x.abs() ** 3
    lost = {"silu": 0 * x, "gelu": x.square() / 2, "gelu_tanh": 1.5 * cubic}
    allowed = (6 + lost[activation]) * torch.finfo(torch.float32).eps * tail.abs()
    assert ((out - tail).abs() <= allowed).all()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("threads", [2, 3])
def test_number_of_threads_changes_nothing(threads: int, activation: str) -> None:
    dy, gate, up = (torch.randn(700, 131).bfloat16() for _ in range(3))
    found = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        outputs = [torch.empty_like(dy) for _ in range(4)]
        with torch.inference_mode():
            native.glu(gate, up, activation, outputs[0])
        native.glu_backward(dy, gate, up, activation, *outputs[1:])
        found.append(outputs)
    assert torch.equal(found[0][0], found[0][3])
    for outputs in found[1:]:
        assert all(map(torch.equal, outputs, found[0]))


def test_rows_that_overlap_are_refused() -> None:
    gate, out = torch.randn(3, 8), torch.empty(30).as_strided((3, 8), (4, 1))
    with pytest.raises(ValueError, match="outside its documented range"):
        native.glu(gate, None, "silu", out)
    with pytest.raises(ValueError, match="outside its documented range"):
        native.glu_backward(gate, gate, None, "silu", out, None, None)
