"""The C++ kernels for logits against the reference, on every instruction set and any number of
threads.
"""

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
from logits_cases import CASES, Logits, check, problem
from quantize_truth import ISAS
from stored_weights import CPU, DTYPES
from torch import Tensor

from pyft import native
from pyft.native import LogitTile
from pyft.reference import logits as reference

EPS = torch.finfo(torch.float32).eps
INF, NAN = torch.inf, torch.nan
SUMS = 6  # lse, target, smooth, mean, cross, top
# Two whole segments of threads' work and a tail, in blocks, vectors and single columns
LONG = 2 * 32768 + 2048 + 40 + 1


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv("PYFT_CPU_ISA", name)
    return name


def tile_of(z: Tensor, labels: Tensor | None = None, weights: Tensor | None = None) -> LogitTile:
    """z with no scale, cap or teacher."""
    labels = torch.full((len(z),), -1) if labels is None else labels
    return (z, labels, weights, 1.0, None, None, None, 1.0, None)


def taught(z: Tensor) -> LogitTile:
    """z with everything a tile can have."""
    labels, weights = torch.arange(len(z)), torch.rand(z.shape[1])
    teacher = torch.randn(z.shape).to(z.dtype)
    lse = reference.capped(teacher, 0.5, 3.0).logsumexp(1)
    return (z, labels, weights, 0.7, 6.0, teacher, lse, 0.5, 3.0)


def statistics(tile: LogitTile) -> list[Tensor]:
    """All of them, but for cross where there is no teacher."""
    rows = len(tile[0])
    sums = [torch.empty(rows) for _ in range(SUMS)]
    argmax = torch.empty(rows, dtype=torch.int64)
    given: list[Tensor | None] = list(sums)
    if tile[5] is None:
        given[4] = None
        sums[4].zero_()
    native.logit_statistics(tile, *given, argmax)  # type: ignore[arg-type]
    return [*sums, argmax]


def gradient(tile: LogitTile, lse: Tensor, *g: Tensor | None) -> Tensor:
    """dz, and z stays; g: of lse, target and so on."""
    z = tile[0].clone()
    numbers = [*g, *[None] * (5 - len(g))]
    mean = None if numbers[3] is None else torch.zeros(len(z))
    native.logit_gradient((z, *tile[1:]), lse, mean, *numbers, 0.0, None)  # type: ignore[arg-type]
    return z


@pytest.mark.parametrize("name", CASES)
def test_error_rule(name: str, isa: str) -> None:
    assert check(CASES[name], native, CPU) == ""


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule_of_long_rows(dtype: str, softcap: float | None, isa: str) -> None:
    case = Logits(LONG, dtype, rows=2, gap=3, shift=1, softcap=softcap, top=True, argmax=True)
    assert check(case, native, CPU) == ""
    more = replace(case, weights=True, smooth=True, mean=True, teacher=(0.7, 4.0), threshold=1e-4)
    assert check(more, native, CPU) == ""


@pytest.mark.parametrize(
    "content", ["normal", "equal", "rising", "falling", "last", "late", "positive"]
)
def test_a_vocabulary_of_262144(content: str, isa: str) -> None:
    cols = 262144
    x = torch.linspace(0, 1, cols)
    z = {
        "normal": 2 * torch.randn(3, cols),
        "equal": torch.full((3, cols), 4.7),
        "rising": (-30 + 60 * x).repeat(3, 1),  # every block has a larger one
        "falling": (30 - 60 * x).repeat(3, 1),
        "last": torch.cat((-40 + torch.rand(3, cols - 1), torch.full((3, 1), 40.0)), 1),
        "late": torch.cat((torch.rand(3, cols - 1) - 17, 1 + torch.rand(3, 1)), 1),
        "positive": torch.rand(3, cols),
    }[content]
    weights = torch.rand(cols)
    lse, _, smooth, mean, _, top, argmax = statistics(tile_of(z, weights=weights))
    truth = reference.logit_statistics(z.double(), torch.full((3,), -1), weights.double())
    assert ((lse - truth.lse).abs() <= 1.5 * EPS * truth.lse.abs()).all()
    assert ((mean - truth.mean).abs() <= 6 * EPS * truth.mean.abs()).all()
    terms = (z.double() * weights).abs().sum(1)
    assert ((smooth - truth.smooth).abs() <= 3 * EPS * terms).all()
    assert torch.equal(top, z.max(1).values)
    assert torch.equal(argmax, z.max(1).indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_probability_is_relatively_right(dtype: str, isa: str) -> None:
    """Down to the smallest ones, which the largest error would hide."""
    z = torch.linspace(-80, 9, 3 * 5003).view(3, -1).to(DTYPES[dtype])
    lse = torch.tensor([0.0, 3.25, 9.5])
    p = (z.double() - lse[:, None]).exp()
    dz = gradient(tile_of(z), lse, torch.ones(3), torch.zeros(3)).double()
    info = torch.finfo(DTYPES[dtype])
    allowed = 0.501 * info.eps * p + info.smallest_normal * info.eps
    if dtype == "fp32":
        allowed = 2.5 * info.eps * p + EPS / 2 * (z - lse[:, None]).abs() * p
    assert ((dz - p).abs() <= allowed).all()


def test_every_exponential_of_the_sums_is_right(isa: str) -> None:
    """In a row of two a mean near 0 is relatively as right as the smaller exponential, off by its
    polynomial and the rounding of its exponent.
    """
    x = torch.linspace(0.1, 60, 40_001)
    mean = statistics(tile_of(torch.stack((torch.zeros_like(x), -x), 1)))[3]
    truth = -x.double() / (1 + x.double().exp())
    assert ((mean / truth - 1).abs() <= (2.2 + 0.62 * x) * EPS).all()


@pytest.mark.parametrize("make", [tile_of, taught])
@pytest.mark.parametrize("shape", [(1, LONG), (3, 40000), (300, 131)])
@pytest.mark.parametrize("threads", [2, 5])
def test_number_of_threads_changes_nothing(make, shape: tuple[int, int], threads: int) -> None:  # type: ignore[no-untyped-def]
    tile = make((3 * torch.randn(shape)).bfloat16())
    labels = torch.randint(-1, shape[1], shape[:1])
    tile = (tile[0], labels, *tile[2:])
    lse, g = torch.full(shape[:1], 12.0), torch.randn(5, shape[0])
    found = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        with torch.inference_mode():
            dz = gradient(tile, lse, *(g if make is taught else g[:2]))
        found.append([*statistics(tile), dz])
    for outputs in found[1:]:
        assert all(map(torch.equal, outputs, found[0]))


def test_a_row_is_the_same_alone(isa: str) -> None:
    tile = taught(2 * torch.randn(6, 3001))
    lse, g = torch.full((6,), 10.0), torch.randn(5, 6)
    together = [*statistics(tile), gradient(tile, lse, *g)]
    for r in range(6):
        one = [x[r : r + 1] if isinstance(x, Tensor) and x.dim() == 2 else x for x in tile]
        one[1], one[6] = tile[1][r : r + 1], tile[6][r : r + 1]  # type: ignore[index]
        alone = [*statistics(tuple(one)), gradient(tuple(one), lse[:1], *(x[r : r + 1] for x in g))]  # type: ignore[arg-type]
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[r : r + 1], part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tile_of, taught])
def test_nan_stays_in_its_row(make, dtype: str, isa: str) -> None:  # type: ignore[no-untyped-def]
    places = (0, 1, 15, 16, 2047, 2048, 4095, 4100)
    tile = make(torch.randn(len(places) + 2, 4101).to(DTYPES[dtype]))
    clean = statistics(tile)
    bad = tile[0].clone()
    bad[range(len(places)), places] = NAN
    bad[-1] = NAN
    found = statistics((bad, *tile[1:]))
    nan = bad.isnan().any(1)
    g = torch.randn(5 if make is taught else 2, len(bad))
    dz, clean_dz = gradient((bad, *tile[1:]), found[0], *g), gradient(tile, clean[0], *g)
    assert dz[nan].isnan().all()
    assert torch.equal(dz[~nan], clean_dz[~nan])
    lse, _, smooth, mean, cross, top, argmax = found
    for x in (lse, smooth, mean, top, *([cross] if make is taught else [])):
        assert x[nan].isnan().all()
    assert ((argmax >= 0) & (argmax < bad.shape[1])).all()
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[~nan], y[~nan])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masked_columns_are_not_there(dtype: str, isa: str) -> None:
    """Whole blocks of them, at either end, by -inf or the dtype's least number."""
    z = torch.randn(2, 9000).to(DTYPES[dtype])
    lse = z[:, 5000:5077].double().logsumexp(1)
    for mask in (-INF, torch.finfo(z.dtype).min):
        masked = torch.full_like(z, mask)
        masked[:, 5000:5077] = z[:, 5000:5077]
        found, *_, mean, _, _, argmax = statistics(tile_of(masked))
        assert ((found - lse).abs() <= 2 * EPS * lse.abs()).all()
        assert torch.equal(argmax, 5000 + z[:, 5000:5077].max(1).indices)
        assert mean.isfinite().all()
        ones = torch.ones(2)
        dz = gradient(tile_of(masked), found, ones, ones, None, ones)
        assert dz[:, 5000:5077].isfinite().all()
        assert torch.equal(dz.nonzero()[:, 1].unique(), torch.arange(5000, 5077))


def test_rows_without_a_middle(isa: str) -> None:
    least, most = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    z = torch.tensor([-INF, least, most, INF])[:, None].repeat(1, 5000)
    lse, *_, top, argmax = statistics(tile_of(z))
    assert lse.tolist() == top.tolist() == [-INF, least, most, INF]
    assert argmax.tolist() == [0, 0, 0, 0]
    z = torch.randn(1, 5000)
    z[0, 4321] = INF
    lse, *_, argmax = statistics(tile_of(z))
    assert (lse.item(), argmax.item()) == (INF, 4321)


def test_a_certain_row_has_no_loss(isa: str) -> None:
    z = torch.randn(3, 5000)
    labels = torch.tensor([0, 2048, 4999])
    z[torch.arange(3), labels] = torch.tensor([40.0, 51.7, 3e4])
    lse, target, *_ = statistics(tile_of(z, labels))
    assert torch.equal(lse, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_argmax_is_the_first_of_the_largest(dtype: str, scale: float, isa: str) -> None:
    cols = LONG
    places = torch.tensor(
        [[0, 1], [1, 17], [15, 16], [7, 2055], [2047, 2048], [9, 32777], [32767, 32768],
         [cols - 2, cols - 1], [cols - 1, cols - 1]]
    )  # fmt: skip
    z = torch.randn(len(places), cols).clamp(-3, 3)
    z = z.scatter(1, places, 4.0).to(DTYPES[dtype])
    tile = (*tile_of(z)[:3], scale, *tile_of(z)[4:])
    *_, top, argmax = statistics(tile)
    assert argmax.tolist() == places[:, 0].tolist()
    assert torch.equal(top, torch.full_like(top, 4.0) * scale)


@pytest.mark.parametrize("label", [0, 6, 2047, 4098])
def test_the_label_is_in_one_column_alone(label: int, isa: str) -> None:
    z, lse = torch.randn(2, 4099), torch.full((2,), 9.0)
    g = torch.tensor([0.3, -2.0])
    without = gradient(tile_of(z), lse, torch.ones(2), g)
    dz = gradient(tile_of(z, torch.tensor([label, -100])), lse, torch.ones(2), g)
    assert (dz[0, label] - without[0, label] - 0.3).abs() < 1e-6
    dz[0, label] = without[0, label]
    assert torch.equal(dz, without)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tile_of, taught])
def test_no_row_is_read_past_its_end(make, dtype: str, isa: str) -> None:  # type: ignore[no-untyped-def]
    """Nor written: memory ends there."""
    for cols in (*range(1, 36), 2047, 2049, 4099):
        tile = make((2 * torch.randn(1, cols)).to(DTYPES[dtype]))
        lse, g = tile[0].float().logsumexp(1), torch.randn(5 if make is taught else 2, 1)
        guarded = tuple(at_the_end(x) if isinstance(x, Tensor) else x for x in tile)
        found, expected = statistics(guarded), statistics(tile)
        assert all(map(torch.equal, found, expected))
        kept = at_the_end(torch.zeros(cols, dtype=torch.uint8))
        numbers = [*g, *[None] * (5 - len(g))]
        mean = None if numbers[3] is None else torch.zeros(1)
        native.logit_gradient(guarded, lse, mean, *numbers, 0.1, kept)  # type: ignore[arg-type]
        assert torch.equal(guarded[0], gradient(tile, lse, *g))


def at_the_end(x: Tensor) -> Tensor:
    """The same values where the last is followed by memory nobody may touch."""
    count = x.numel() * x.element_size()
    start = -count % mmap.PAGESIZE
    page = mmap.mmap(-1, start + count + mmap.PAGESIZE)
    copy = torch.frombuffer(page, dtype=torch.uint8)[start : start + count].view(x.dtype)
    copy.copy_(x.flatten())
    end = ctypes.c_void_p(copy.data_ptr() + count)
    assert ctypes.CDLL(None).mprotect(end, mmap.PAGESIZE, 0) == 0
    return copy.view(x.shape)


def test_kept_marks_add_up_over_rows(isa: str) -> None:
    """Those of any row, on any thread; none is taken back."""
    case = Logits(2 * 4099, "bf16", rows=64, threshold=0.01)
    given = problem(case)
    p = given.z.double().softmax(1)
    kept = torch.zeros(case.cols, dtype=torch.uint8)
    lse, g = given.z.float().logsumexp(1), torch.zeros(64)
    torch.set_num_threads(3)
    native.logit_gradient(
        tile_of(given.z.clone(), given.labels), lse, None, g, g, None, None, None, 0.01, kept
    )
    named = given.labels[(given.labels >= 0) & (given.labels < case.cols)]
    wanted = (p >= 0.01).any(0)
    wanted[named] = True
    assert 64 < wanted.sum() < case.cols
    assert torch.equal(kept.bool(), wanted)
    assert kept.max() == 1


def test_no_rows() -> None:
    z = torch.empty(0, 70)
    assert all(len(x) == 0 for x in statistics(tile_of(z)))
    assert gradient(tile_of(z), torch.empty(0), *torch.empty(2, 0)).shape == (0, 70)


def test_what_cannot_be_is_refused() -> None:
    z, one = torch.randn(30).as_strided((3, 8), (4, 1)), torch.ones(3)
    match = "outside its documented range"
    with pytest.raises(ValueError, match=match):  # rows that overlap
        native.logit_gradient(tile_of(z), one, None, one, one, None, None, None, 0.0, None)
    z = torch.randn(3, 8)
    with pytest.raises(ValueError, match=match):  # no mean
        native.logit_gradient(tile_of(z), one, None, one, one, None, one, None, 0.0, None)
    with pytest.raises(ValueError, match=match):  # no teacher
        native.logit_gradient(tile_of(z), one, None, one, one, None, None, one, 0.0, None)
    with pytest.raises(ValueError, match=match):
        native.logit_statistics(tile_of(z), one, None, None, None, one, None, None)
