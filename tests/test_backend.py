"""Choosing an implementation: by itself, by name, per thread."""

import sys
import threading
from types import ModuleType

import pytest
import torch

import pyft
from pyft.backend import (
    BACKENDS,
    IMPLEMENTATIONS,
    PREFERENCE,
    chosen,
    implementation,
    obstacle,
    select,
)
from pyft.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    obstacle.cache_clear()


def test_auto_takes_the_extension_on_a_cpu() -> None:
    assert chosen() == "auto"
    assert {select(op, CPU) for op in IMPLEMENTATIONS} == {"cpu"}


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_by_name_it_runs_or_it_raises(op: str) -> None:
    for name in BACKENDS:
        with pyft.backend(name):
            if name in ("reference", "cpu"):
                assert select(op, CPU) == name
                assert isinstance(implementation(op, name), ModuleType)
            else:
                with pytest.raises(
                    UsageError, match=f"backend '{name}' cannot run {op} on device cpu"
                ):
                    select(op, CPU)


def test_blocks_nest_and_end_on_an_error() -> None:
    with pyft.backend("reference"):
        with pyft.backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with pytest.raises(ZeroDivisionError), pyft.backend("auto"):
            1 / 0  # noqa: B018
        assert chosen() == "reference"
    assert chosen() == "auto"


def test_a_block_is_of_one_thread() -> None:
    seen = []
    with pyft.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "numpy"])
def test_unknown_name(name: str) -> None:
    message = f"backend: {name!r} is not one of auto, reference, cpu, triton, cuda"
    with pytest.raises(UsageError, match=message), pyft.backend(name):
        pass
    assert chosen() == "auto"


def test_availability_answers_for_every_op_and_backend() -> None:
    table = pyft.availability()
    assert table.keys() == IMPLEMENTATIONS.keys()
    for op, row in table.items():
        assert tuple(row) == BACKENDS
        assert row["reference"] == row["cpu"] == "yes"
        for name in ("triton", "cuda"):
            assert row[name] == "yes" or len(row[name]) > 10
            assert name in IMPLEMENTATIONS[op] or row[name] == f"{op} has no {name} implementation"


def test_without_the_extension_auto_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyft._cpu", None)
    assert select("quantize", CPU) == "reference"
    assert "pyft._cpu does not load" in pyft.availability()["quantize"]["cpu"]
    with (
        pyft.backend("cpu"),
        pytest.raises(UsageError, match="install pyft with a C\\+\\+ compiler"),
    ):
        pyft.quantize(torch.ones(64))
    q = pyft.quantize(torch.randn(3, 100))
    y = pyft.lora_linear(
        torch.randn(2, 100), q, torch.randn(2, 100), torch.randn(3, 2), 1.0, None, 0.5, 3
    )
    obstacle.cache_clear()
    assert y.shape == (2, 3)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in pyft.availability()["quantize"]["triton"]


def test_a_device_no_backend_knows_runs_the_reference() -> None:
    assert select("quantize", torch.device("meta")) == "reference"
    assert pyft.quantize(torch.empty(3, 100, device="meta")).packed.shape == (150,)


def test_every_preference_is_a_backend() -> None:
    for names in PREFERENCE.values():
        assert names[-1] == "reference"
        assert set(names) <= set(BACKENDS)
    for implementations in IMPLEMENTATIONS.values():
        assert "reference" in implementations
        assert set(implementations) <= set(BACKENDS)


def test_lazy_names_are_the_public_ones() -> None:
    for name in pyft.__all__:
        assert getattr(pyft, name) is not None
        assert name in dir(pyft)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyft.nothing  # noqa: B018
    assert callable(pyft.backend)
