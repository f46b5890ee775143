"""Dropout from a seed: the mask is Philox4x32-10's, on every backend, again in the backward."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, dtype_name
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyft
from pyft.errors import UsageError
from pyft.ops.dropout import _dropout
from pyft.reference import dropout as reference

Words = NDArray[np.uint64]
SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 - 1)


def philox(counter: list[Words], key: list[int]) -> list[Words]:
    """Philox4x32-10 as in Salmon et al. (2011), section 4.3: words as uint64 below 2**32."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        high0, low0 = product0 >> np.uint64(32), product0 & low
        high1, low1 = product1 >> np.uint64(32), product1 & low
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def words(n: int, seed: int) -> Words:
    """Word i: output i % 4 of counter i // 4, with the seed as the 64-bit key."""
    index = np.arange((n + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(index)
    counter = [index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), zero, zero]
    found = philox(counter, [seed % 2**32, seed // 2**32 % 2**32])
    return np.stack(found, axis=1).reshape(-1)[:n]


def expected_dropout(x: Tensor, p: float, seed: int) -> Tensor:
    keep = torch.from_numpy(words(x.numel(), seed) >= np.uint64(int(p * 2**32))).view(x.shape)
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.tensor(1 / (1 - p), dtype=wide.dtype)
    return torch.where(keep, (wide * scale).to(x.dtype), 0)


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_known_answers_of_random123(counter: str, key: str, output: str) -> None:
    start = [np.array([int(word, 16)], dtype=np.uint64) for word in counter.split()]
    found = philox(start, [int(word, 16) for word in key.split()])
    assert [f"{int(word[0]):08x}" for word in found] == output.split()


def test_first_words_of_seed_zero_are_the_known_answer() -> None:
    found = reference.random_words(4, 0, torch.device("cpu")).tolist()
    assert [f"{word:08x}" for word in found] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_philox(seed: int) -> None:
    for n in (0, 1, 3, 4, 5, 1001):
        found = reference.random_words(n, seed, torch.device("cpu")).numpy().astype(np.uint64)
        assert np.array_equal(found, words(n, seed))


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_bits(name: str, dtype: torch.dtype) -> None:
    if name == "cpu" and dtype not in QUANTIZED_DTYPES:
        name = "auto"
    for shape in ((0,), (1,), (3, 5), (7, 64), (2, 3, 17)):
        x = torch.randn(shape).to(dtype)
        for p in (0.05, 0.5, 0.9):
            for seed in SEEDS[-2:]:
                with pyft.backend(name):
                    found = pyft.dropout(x, p, seed=seed)
                assert torch.equal(found, expected_dropout(x, p, seed))


def test_special_values() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-45, 3e38]).repeat(20)
    for name in ("reference", "cpu"):
        with pyft.backend(name):
            found = pyft.dropout(x, 0.5, seed=3)
        torch.testing.assert_close(
            found, expected_dropout(x, 0.5, 3), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_any_64_bit_seed(name: str, seed: int) -> None:
    x = torch.ones(100)
    with pyft.backend(name):
        assert torch.equal(pyft.dropout(x, 0.5, seed=seed), expected_dropout(x, 0.5, seed % 2**64))


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
def test_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(100_003).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(pyft.dropout(x, 0.3, seed=11), expected_dropout(x, 0.3, 11))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.99])
def test_rate(p: float) -> None:
    """Within 5 standard deviations of p; what is kept keeps the mean."""
    n = 200_000
    kept = pyft.dropout(torch.ones(n), p, seed=5)
    dropped = (kept == 0).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-6)


def test_seeds_give_unrelated_masks() -> None:
    masks = torch.stack(
        [pyft.dropout(torch.ones(20_000), 0.5, seed=s) > 0 for s in range(6)]
    ).double()
    correlation = torch.corrcoef(masks) - torch.eye(6)
    assert correlation.abs().max() < 5 / 20_000**0.5


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_backward_is_the_mask(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(9, 33, dtype=dtype, requires_grad=True)
    dy = torch.randn(9, 33, dtype=dtype)
    with pyft.backend(name):
        y = pyft.dropout(x, 0.4, seed=8)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert torch.equal(dx, expected_dropout(dy, 0.4, 8))
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dx)


def test_gradient_that_is_not_contiguous() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    dy = torch.randn(10, 6).t()
    (dx,) = torch.autograd.grad(pyft.dropout(x, 0.4, seed=8), x, dy)
    assert torch.equal(dx, expected_dropout(dy, 0.4, 8))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_mask_goes_by_logical_index(name: str) -> None:
    x = torch.randn(12, 20)
    with pyft.backend(name):
        for view in (x.t(), x[::2, 1::3], x[:1].expand(12, 20)):
            assert torch.equal(pyft.dropout(view, 0.5, seed=2), expected_dropout(view, 0.5, 2))


def test_the_input_is_only_read() -> None:
    x = torch.randn(50)
    before = x.clone()
    pyft.dropout(x, 0.5)
    assert torch.equal(x, before)


def test_drawn_seed_follows_torch() -> None:
    x = torch.ones(200)
    torch.manual_seed(4)
    first, second = pyft.dropout(x, 0.5), pyft.dropout(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(pyft.dropout(x, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_draws_the_same_mask(use_reentrant: bool) -> None:
    x = torch.randn(40, 8, requires_grad=True)
    masks = []

    def block(z: Tensor) -> Tensor:
        y = pyft.dropout(z, 0.5)
        masks.append(y != 0)
        return y.square()

    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(x.grad, 8 * x.detach() * masks[0])


def test_nothing_as_large_as_the_input_is_saved() -> None:
    saved: list[int] = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        pyft.dropout(x, 0.5, seed=1)
    assert sum(saved) <= 1


def test_zero_probability_is_the_identity() -> None:
    x = torch.randn(5)
    assert torch.equal(pyft.dropout(x, 0.0), x)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_refuses_a_probability(p: float) -> None:
    with pytest.raises(UsageError, match=rf"dropout probability {p} is outside \[0, 1\)"):
        pyft.dropout(torch.ones(3), p)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_refuses_what_is_not_floating_point(name: str, dtype: torch.dtype) -> None:
    with pyft.backend(name), pytest.raises(UsageError, match=str(dtype)):
        pyft.dropout(torch.ones(3, dtype=dtype), 0.5, seed=1)


def test_cpu_by_name_refuses_what_it_has_no_kernel_for() -> None:
    with pyft.backend("cpu"), pytest.raises(UsageError, match="float64"):
        pyft.dropout(torch.ones(3, dtype=torch.float64), 0.5, seed=1)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype).requires_grad_()
    torch.library.opcheck(_dropout.library, (x, 0.5, torch.tensor(3), "auto"))


def test_compiles_whole() -> None:
    x = torch.randn(5, 7, requires_grad=True)

    def twice(z: Tensor) -> Tensor:
        return pyft.dropout(z.sin(), 0.5, seed=6) * 2

    y = torch.compile(twice, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, twice(x))
    assert torch.equal(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(twice(x).sum(), x)[0]
    )
