"""The scratch weights are decoded into: one, reused, freed, within its limit, never handed out."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import linear_with
from scratch_tools import ROWS, buffer, counting, fresh_scratch, weight  # noqa: F401
from shapes import LINEAR_DTYPES, dtype_name
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyft
from pyft import scratch
from pyft.errors import UsageError
from pyft.ops import qlinear
from pyft.scratch import decoded, limit_scratch, slabs

MIB = 1 << 20


def addresses(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> list[int]:
    """Where each layer's weight was decoded to, forward and backward."""
    found: list[int] = []
    decode = qlinear.dequantize_slab

    def noting(*arguments: object) -> None:
        out = arguments[5]
        assert isinstance(out, Tensor)
        found.append(out.data_ptr())
        decode(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(qlinear, "dequantize_slab", noting)
        model(x).sum().backward()
    return found


def test_one_buffer_for_all_layers_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Module:
        layers = [linear_with(weight(128, 128, name)) for name in ("nf4", "int8", "mxfp4", "int4")]
        return nn.Sequential(*layers)

    first, second, x = model(), model(), torch.randn(ROWS, 128, requires_grad=True)
    found = addresses(monkeypatch, first, x) + addresses(monkeypatch, second, x)
    assert len(found) == 2 * (4 + 3)  # the last layer's weight is still there for its backward
    assert len(set(found)) == 1
    assert buffer().memory is not None
    assert buffer().memory.nbytes == 128 * 128 * 4


def test_it_grows_to_the_largest_weight_and_no_further() -> None:
    small, large = weight(32, 64), weight(128, 64)
    x = torch.randn(ROWS, 64)
    for q, expected in ((small, 32), (large, 128), (small, 128)):
        F.linear(x, q)
        assert buffer().memory is not None
        assert buffer().memory.nbytes == expected * 64 * 4


def test_few_rows_use_none() -> None:
    F.linear(torch.randn(2, 128), weight())
    assert buffer().memory is None


def test_two_uses_in_a_row_decode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = weight(), torch.randn(ROWS, 128, requires_grad=True)
    with counting(monkeypatch) as decodes:
        y = F.linear(x, q)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        F.linear(x, q)
    assert decodes == [(0, 48, 0, 128)]


def test_freed_with_the_model() -> None:
    model = nn.Sequential(linear_with(weight(128, 128)), linear_with(weight(64, 128)))
    x = torch.randn(ROWS, 128, requires_grad=True)
    model(x).sum().backward()
    held = buffer()
    assert held.memory is not None
    other = copy.deepcopy(model)
    del model
    gc.collect()
    assert held.memory is None
    other(x).sum().backward()
    assert held.memory is not None
    del other
    gc.collect()
    assert (held.memory, held.holds, held.owner) == (None, None, None)


def test_stays_while_another_models_weight_is_in_it() -> None:
    first, second, x = weight(), weight(), torch.randn(ROWS, 128)
    expected = F.linear(x, second)
    F.linear(x, first)
    F.linear(x, second)
    del first
    gc.collect()
    assert buffer().memory is not None
    assert torch.equal(F.linear(x, second), expected)


def test_each_thread_has_its_own() -> None:
    """Threads that decode different weights at the same time never see one another's."""
    start = threading.Barrier(4)
    wrong: list[Tensor] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(96, 128, generator=generator)
        q, x = pyft.quantize(w, "int8"), torch.randn(ROWS, 128, generator=generator)
        expected = x @ q.dequantize().t()
        start.wait()
        errors = [(F.linear(x, q) - expected).abs().max() for _ in range(30)]
        wrong.extend(error for error in errors if error > 1e-3)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert buffer().memory is None


def test_freed_with_its_thread() -> None:
    q, x = weight(), torch.randn(ROWS, 128)
    held: list[weakref.ref[scratch._Buffer]] = []

    def work() -> None:
        F.linear(x, q)
        held.append(weakref.ref(buffer()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert held[0]() is None


def test_one_weight_in_several_threads() -> None:
    q, x = weight(96, 128), torch.randn(ROWS, 128)
    expected, wrong = F.linear(x, q), list[int]()

    def work() -> None:
        wrong.extend(i for i in range(30) if not torch.equal(F.linear(x, q), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Block(nn.Module):
    """Two linears, as one layer that is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear_with(weight(96, 64)), linear_with(weight(64, 96))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("how", ["whole", "reentrant", "hooks"])
def test_decodes_under_activation_checkpointing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of two linears. Without: each twice, but the last of all once, as it is still
    there for its backward. With: a recomputation more, but the last linear of each block is still
    there from it.
    """
    blocks = nn.ModuleList(Block() for _ in range(3))
    x = torch.randn(ROWS, 64, requires_grad=True)

    def run(how: str) -> tuple[Tensor, Tensor]:
        y = x
        for block in blocks:
            if how == "whole":
                y = block(y)
            else:
                y = checkpoint(block, y, use_reentrant=how == "reentrant")
        x.grad = None
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    expected = run("whole")
    scratch._of_thread.buffer = scratch._Buffer()
    with counting(monkeypatch) as decodes:
        found = run(how)
    assert all(map(torch.equal, found, expected))
    # whole: 6 forward, 6 backward less 1; checkpointed: 6 forward, each block 2 again and 1 more
    assert len(decodes) == {"whole": 11, "reentrant": 6 + 3 * 3, "hooks": 6 + 3 * 3}[how]


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
def test_nothing_a_user_gets_aliases_it(dtype: torch.dtype) -> None:
    q = weight()
    x = torch.randn(ROWS, 128, dtype=dtype, requires_grad=True)
    y = F.linear(x, q)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    kept = y.detach().clone(), dx.clone()
    memory = buffer().memory
    assert memory is not None
    first, last = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    dense = (q.dequantize(), q.to(dtype) + 0, pyft.dequantize(q), q.t(), q[0])
    for tensor in (y, dx, *dense):
        assert not first <= tensor.data_ptr() < last
    memory.fill_(255)
    F.linear(torch.randn(ROWS, 128, dtype=dtype), weight())
    assert torch.equal(y, kept[0])
    assert torch.equal(dx, kept[1])


def test_limit() -> None:
    default = limit_scratch(2 * MIB)
    assert default == 256 * MIB
    assert limit_scratch(None) == 2 * MIB
    assert limit_scratch(MIB) == default
    for few in (0, -1, 1000, MIB - 1):
        with pytest.raises(UsageError, match=f"limit_scratch: {few} bytes are too few.*1048576"):
            limit_scratch(few)
    assert limit_scratch(None) == MIB


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
def test_no_more_than_the_limit_is_taken(dtype: torch.dtype) -> None:
    limit_scratch(MIB)
    q, x = weight(1031, 1100), torch.randn(ROWS, 1100, dtype=dtype, requires_grad=True)
    F.linear(x, q).sum().backward()
    memory = buffer().memory
    assert memory is not None
    assert MIB // 2 < memory.nbytes <= MIB


def test_a_lower_limit_lets_go_of_a_larger_buffer() -> None:
    q, x = weight(1031, 1100), torch.randn(ROWS, 1100)
    expected = F.linear(x, q)
    limit_scratch(MIB)
    torch.testing.assert_close(F.linear(x, q), expected)
    memory = buffer().memory
    assert memory is not None
    assert memory.nbytes <= MIB


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("length", [1, 63, 64, 4096, 14336, 262144])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 4096, 50257])
def test_slabs(count: int, length: int, dtype: torch.dtype) -> None:
    """They cover [0, count) in order, fit the limit, and are about as large as one another."""
    for limit in (MIB, 5 * MIB + 13, 256 * MIB):
        limit_scratch(limit)
        found = slabs(count, length, dtype)
        row = length * dtype.itemsize
        assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
        assert found[-1][1] == count
        steps = [end - begin for begin, end in found]
        assert all(step * row <= max(limit, row) for step in steps)
        assert len(set(steps[:-1])) <= 1
        assert 0 < steps[-1] <= steps[0]
        if len(found) > 1 and limit // row >= 64:
            assert steps[0] % 64 == 0
        if limit // row >= count:
            assert len(found) == 1


def test_slabs_of_nothing() -> None:
    assert slabs(0, 64, torch.float32) == [(0, 0)]
    assert slabs(64, 0, torch.float32) == [(0, 64)]


def test_slabs_are_remembered_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_scratch(MIB)
    q, x = weight(1000, 1000), torch.randn(ROWS, 1000)
    expected = slabs(1000, 1000, torch.float32)
    with counting(monkeypatch) as decodes:
        F.linear(x, q)
        F.linear(x, q)
    assert decodes == [(begin, end, 0, 1000) for begin, end in expected] * 2


def test_what_is_borrowed_is_filled_by_decode() -> None:
    parts = [torch.arange(4.0)]
    coding = ("nf4", 64, (0, 2, 0, 2))
    with decoded(parts, coding, torch.float32, lambda out: out.copy_(parts[0].view(2, 2))) as w:
        assert w.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_nothing_is_remembered_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use decodes anew, into memory of its own: graphs are replayed in any order."""
    monkeypatch.setattr("pyft.scratch._capturing", lambda device: True)
    parts, decodes = [torch.arange(4.0)], []

    def decode(out: torch.Tensor) -> None:
        decodes.append(out.data_ptr())
        out.copy_(parts[0].view(2, 2))

    coding = ("nf4", 64, (0, 2, 0, 2))
    both = [decoded(parts, coding, torch.float32, decode) for _ in range(2)]
    with both[0] as first, both[1] as second:
        assert first.data_ptr() != second.data_ptr()
        assert torch.equal(first, second)
    assert len(decodes) == 2
