"""lora_linear against the reference in float64; what it keeps and how often it multiplies."""

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from error_rule import check_error
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import SCALE, SEED, check_close, check_rule, grads, linear, saved_by
from lora_cases import given as projection_of
from norm_input_cases import NORM_INPUT, too_little_room_is_refused
from shapes import LINEAR_DTYPES, LINEAR_SHAPES, QUANTIZED_DTYPES, RANKS, dtype_name
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import pyft
from pyft.errors import UsageError
from pyft.ops.lora_linear import _lora_linear
from pyft.ops.qlinear import FUSED_ROWS
from pyft.quantized import QuantizedTensor
from pyft.reference import lora_linear as reference


class Problem:
    """Inputs of one linear: x [.., K], weight [N, K], a [R, K], b [N, R], bias [N], dy [.., N]."""

    def __init__(
        self,
        m: int | tuple[int, ...],
        n: int,
        k: int,
        r: int,
        dtype: torch.dtype = torch.float32,
        quantized: bool = False,
        bias: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        lead = m if isinstance(m, tuple) else (m,)
        self.dtype, adapter = dtype, adapter_dtype or dtype
        self.x = torch.randn(*lead, k).to(dtype).requires_grad_()
        dense = (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype)
        store = dense.float() if dtype == torch.float64 else dense
        self.weight: Tensor = pyft.quantize(store) if quantized else dense.requires_grad_()
        self.a = (torch.randn(r, k) / max(k, 1) ** 0.5).to(adapter).requires_grad_()
        self.b = torch.randn(n, r).to(adapter).requires_grad_()
        self.bias = torch.randn(n).to(dtype).requires_grad_() if bias else None
        self.dy = torch.randn(*lead, n).to(dtype)

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "a": self.a, "b": self.b, "bias": self.bias}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def run(self, p: float = 0.0) -> dict[str, Tensor]:
        """The op's output and gradients."""
        y = pyft.lora_linear(self.x, self.weight, self.a, self.b, SCALE, self.bias, p, SEED)
        leaves = self.leaves()
        return {"y": y.detach(), **grads(y, leaves, self.dy)}

    def expected(self, dtype: torch.dtype, p: float = 0.0) -> dict[str, Tensor]:
        """The reference's, its inputs those the kernel sees, computed in ``dtype``."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            decoded = tensor.to(self.dtype)
            if isinstance(decoded, QuantizedTensor):
                decoded = decoded.dequantize()
            return decoded.detach().to(dtype).requires_grad_(tensor.requires_grad)

        x, weight, a, b, bias = map(cast, (self.x, self.weight, self.a, self.b, self.bias))
        assert x is not None
        assert weight is not None
        y = reference.lora_linear(x, weight, a, b, SCALE, bias, p, SEED)
        named = {"x": x, "weight": weight, "a": a, "b": b, "bias": bias}
        leaves = {name: t for name, t in named.items() if t is not None and t.requires_grad}
        return {"y": y.detach(), **grads(y, leaves, self.dy.to(dtype))}

    def magnitude(self, p: float = 0.0) -> dict[str, Tensor]:
        """What each quantity would be with nothing cancelling: the scale of its rounding."""
        other = Problem.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("x", "weight", "a", "b", "bias", "dy"):
            tensor = getattr(self, name)
            if isinstance(tensor, QuantizedTensor):
                tensor = tensor.dequantize()
            if tensor is not None:
                setattr(other, name, tensor.detach().abs().requires_grad_(tensor.requires_grad))
        return other.expected(torch.float64, p)


QUANTIZED = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
DTYPE = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)


@QUANTIZED
@DTYPE
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_error_rule(shape: tuple[int, int, int, int], dtype: torch.dtype, quantized: bool) -> None:
    for bias, p in ((False, 0.0), (True, 0.3)):
        options = {"dtype": dtype, "quantized": quantized, "bias": bias}
        if dtype == torch.float64:  # there is no truer truth to measure the reference against
            check_close(Problem(*shape, **options), p)
        else:
            check_rule(lambda options=options: Problem(*shape, **options), p)


@pytest.mark.parametrize("rank", RANKS)
@DTYPE
def test_ranks(rank: int, dtype: torch.dtype) -> None:
    check_close(Problem(8, 48, 96, rank, dtype, quantized=True), 0.1)


@QUANTIZED
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...], quantized: bool) -> None:
    problem = Problem(lead, 33, 96, 3, quantized=quantized)
    check_close(problem, 0.2)
    assert problem.run()["y"].shape == (*lead, 33)


@QUANTIZED
def test_empty_batch_gives_zero_gradients(quantized: bool) -> None:
    found = Problem(0, 32, 64, 4, quantized=quantized).run(0.5)
    assert found.pop("y").shape == (0, 32)
    assert found.pop("x").shape == (0, 64)
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize(("n", "k"), [(0, 64), (8, 0), (1, 1)])
def test_degenerate_sizes(n: int, k: int) -> None:
    check_close(Problem(3, n, k, 2))


@QUANTIZED
def test_strides_do_not_matter(quantized: bool) -> None:
    problem = Problem(6, 40, 96, 8, quantized=quantized)
    expected = problem.run(0.3)
    transposed = problem.x.detach().t().contiguous().t().requires_grad_()
    strided = torch.zeros(6, 192)
    strided[:, ::2] = problem.x.detach()
    contiguous_dy = problem.dy
    for x in (transposed, strided[:, ::2].requires_grad_()):
        assert not x.is_contiguous()
        problem.x, problem.dy = x, contiguous_dy.t().contiguous().t()
        for name, value in problem.run(0.3).items():
            torch.testing.assert_close(value, expected[name], msg=name)


def test_strided_weight_and_adapters() -> None:
    problem = Problem(6, 40, 96, 8)
    for name in ("weight", "a", "b"):
        tensor = getattr(problem, name).detach()
        setattr(problem, name, tensor.t().contiguous().t().requires_grad_())
    check_close(problem)


def test_expanded_output_gradient() -> None:
    problem = Problem(6, 40, 96, 8)
    y = pyft.lora_linear(problem.x, problem.weight, problem.a, problem.b)
    dx, da = torch.autograd.grad(y.sum(), [problem.x, problem.a])
    assert dx.shape == problem.x.shape
    ones = torch.ones(6, 40)
    torch.testing.assert_close(da, (ones @ problem.b).t() @ problem.x)


@pytest.mark.parametrize("adapter", QUANTIZED_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=dtype_name)
def test_adapters_of_another_dtype(dtype: torch.dtype, adapter: torch.dtype) -> None:
    """Cast to x's dtype for the product; gradients come back in the adapters' own."""
    problem = Problem(8, 48, 96, 4, dtype, quantized=True, adapter_dtype=adapter)
    found = problem.run()
    assert found["y"].dtype == dtype
    assert found["a"].dtype == found["b"].dtype == adapter
    truth = problem.expected(torch.float64)
    scale = max(torch.finfo(dtype).eps, torch.finfo(adapter).eps)
    for name, value in found.items():
        error = (value.double() - truth[name]).abs().max() / truth[name].abs().max()
        assert error < 8 * scale, name


@QUANTIZED
def test_bare_linear(quantized: bool) -> None:
    problem = Problem(5, 32, 100, 2, quantized=quantized)
    weight = (
        problem.weight.dequantize()
        if isinstance(problem.weight, QuantizedTensor)
        else problem.weight
    )
    y = pyft.lora_linear(problem.x, problem.weight, None, None, bias=problem.bias, dropout_p=0.5)
    expected = nn.functional.linear(problem.x, weight, problem.bias)
    torch.testing.assert_close(y, expected)
    inputs = list({name: t for name, t in problem.leaves().items() if name not in "ab"}.values())
    found = torch.autograd.grad(y, inputs, problem.dy)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, problem.dy))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_quantized_weight_decodes_to_the_dtype_of_x(name: str) -> None:
    """Never by way of the weight's own dtype: each element is rounded once."""
    q = pyft.quantize(torch.randn(32, 64))
    x = torch.eye(64)
    with pyft.backend(name):
        y = pyft.lora_linear(x, q.to(torch.bfloat16), None, None)
    assert torch.equal(y.t(), q.dequantize())


@QUANTIZED
def test_only_what_requires_grad_is_computed(quantized: bool) -> None:
    names = ["x", "a", "b", "bias"] + ([] if quantized else ["weight"])
    full = Problem(6, 32, 64, 4, quantized=quantized)
    expected = full.run(0.2)
    for wanted in names:
        for name in names:
            getattr(full, name).requires_grad_(name == wanted)
        y = pyft.lora_linear(full.x, full.weight, full.a, full.b, SCALE, full.bias, 0.2, SEED)
        with Matmuls() as products:
            (gradient,) = torch.autograd.grad(y, getattr(full, wanted), full.dy)
        torch.testing.assert_close(gradient, expected[wanted])
        count = {"x": 3, "a": 2, "b": 1, "bias": 0, "weight": 1}[wanted]
        assert products.total() == count, wanted
    for name in names:
        getattr(full, name).requires_grad_(False)
    assert not pyft.lora_linear(full.x, full.weight, full.a, full.b).requires_grad


class Matmuls:
    """Counts matrix products by their (M, K, N), wherever they are called from."""

    FIRST: ClassVar = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1}

    def __enter__(self) -> "Matmuls":
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        )
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        self.shapes: Counter[tuple[int, int, int]] = Counter()
        for event in self.profile.events():
            if event.name in self.FIRST:
                a, b = event.input_shapes[self.FIRST[event.name] :][:2]
                self.shapes[(a[-2], a[-1], b[-1])] += 1

    def total(self) -> int:
        return self.shapes.total()


@QUANTIZED
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_each_product_is_taken_once(quantized: bool, p: float) -> None:
    """dY B above all: dX and dA share it."""
    m, n, k, r = FUSED_ROWS["cpu"][torch.float32] + 8, 32, 64, 4
    problem = Problem(m, n, k, r, quantized=quantized)
    problem.weight.requires_grad_(False)
    with Matmuls() as forward:
        y = pyft.lora_linear(problem.x, problem.weight, problem.a, problem.b, SCALE, None, p, SEED)
    assert forward.shapes == {(m, k, n): 1, (m, k, r): 1, (m, r, n): 1}
    wanted = [problem.x, problem.a, problem.b]
    with Matmuls() as backward:
        torch.autograd.grad(y, wanted, problem.dy)
    dx, ds, from_ds, da, db = (m, n, k), (m, n, r), (m, r, k), (r, m, k), (n, m, r)
    assert backward.shapes == {dx: 1, ds: 1, from_ds: 1, da: 1, db: 1}


@QUANTIZED
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_saves_x_and_s_only(quantized: bool, p: float) -> None:
    problem = Problem(50, 128, 256, 4, quantized=quantized)
    weight = problem.weight
    own = [problem.x, problem.a, problem.b, problem.bias]
    own += weight.parts() if isinstance(weight, QuantizedTensor) else [weight]
    extra = saved_by(lambda: problem_y(problem, p), [t for t in own if t is not None])
    assert sum(tensor.numel() for tensor in extra) <= 50 * 4 + 1  # S and a seed


def problem_y(problem: Problem, p: float) -> Tensor:
    args = (problem.x, problem.weight, problem.a, problem.b, SCALE, problem.bias, p, SEED)
    return pyft.lora_linear(*args)


def test_a_frozen_linear_does_not_keep_its_input() -> None:
    """As torch's own: dX needs the weight alone."""
    q = pyft.quantize(torch.randn(32, 64))
    for adapter in ((None, None), (torch.randn(4, 64), torch.randn(32, 4))):
        x = torch.randn(100, 64, requires_grad=True) * 1
        saved = saved_by(lambda x=x, adapter=adapter: pyft.lora_linear(x, q, *adapter), [])
        assert all(tensor.data_ptr() != x.data_ptr() for tensor in saved)
        assert all(tensor.shape[0] != 100 for tensor in saved if tensor.dim())


@QUANTIZED
def test_second_backward_is_the_same(quantized: bool) -> None:
    problem = Problem(7, 40, 100, 4, torch.bfloat16, quantized)
    y = problem_y(problem, 0.3)
    leaves = list(problem.leaves().values())
    first = torch.autograd.grad(y, leaves, problem.dy, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(y, leaves, problem.dy)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, kept))


@QUANTIZED
def test_inputs_are_only_read(quantized: bool) -> None:
    problem = Problem(7, 40, 100, 4, quantized=quantized)
    weight = problem.weight
    stored = weight.parts() if isinstance(weight, QuantizedTensor) else [weight]
    inputs = [problem.x, problem.a, problem.b, problem.bias, problem.dy, *stored]
    inputs = [tensor for tensor in inputs if tensor is not None]
    before = [(tensor.detach().clone(), tensor._version) for tensor in inputs]
    problem.run(0.3)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@QUANTIZED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast(dtype: torch.dtype, quantized: bool) -> None:
    """As if everything had been cast first; gradients come back in fp32."""
    problem = Problem(9, 48, 96, 4, quantized=quantized)
    with torch.autocast("cpu", dtype):
        y = problem_y(problem, 0.2)
    assert y.dtype == dtype
    leaves = problem.leaves()
    found = grads(y, leaves, problem.dy.to(dtype))
    problem.dtype = dtype
    problem.dy = problem.dy.to(dtype)
    in_dtype, truth = problem.expected(dtype, 0.2), problem.expected(torch.float64, 0.2)
    check_error("y", y.detach(), in_dtype["y"], truth["y"])
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        check_error(name, gradient.to(dtype), in_dtype[name], truth[name])


def test_autocast_leaves_float64_alone() -> None:
    problem = Problem(5, 16, 32, 2, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = problem_y(problem, 0.0)
    torch.testing.assert_close(y.detach(), problem.expected(torch.float64)["y"])


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_gradcheck(name: str) -> None:
    problem = Problem((2, 2), 5, 6, 2, torch.float64)

    def function(*leaves: Tensor) -> Tensor:
        with pyft.backend(name):
            return pyft.lora_linear(*leaves[:4], SCALE, leaves[4], 0.3, SEED)

    assert torch.autograd.gradcheck(function, tuple(problem.leaves().values()))


def test_backends_draw_the_same_mask() -> None:
    problem = Problem(9, 32, 96, 4)
    found = {}
    for name in ("reference", "cpu"):
        with pyft.backend(name):
            found[name] = problem.run(0.5)
    for quantity, value in found["cpu"].items():
        torch.testing.assert_close(value, found["reference"][quantity], rtol=1e-4, atol=1e-4)


def test_dropout_without_a_seed_follows_torch() -> None:
    problem = Problem(9, 32, 96, 4)
    args = (problem.x, problem.weight, problem.a, problem.b, SCALE, None, 0.5)
    torch.manual_seed(1)
    first, second = pyft.lora_linear(*args), pyft.lora_linear(*args)
    torch.manual_seed(1)
    assert torch.equal(pyft.lora_linear(*args), first)
    assert not torch.equal(first, second)


@QUANTIZED
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, quantized: bool) -> None:
    """The recomputation draws the same seed."""
    problem = Problem(9, 32, 96, 4, quantized=quantized)
    args = (problem.weight, problem.a, problem.b, SCALE, problem.bias, 0.5)
    leaves = problem.leaves()

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(7)
        for leaf in leaves.values():
            leaf.grad = None
        if recompute:
            y = checkpoint(
                lambda x: pyft.lora_linear(x, *args), problem.x, use_reentrant=use_reentrant
            )
        else:
            y = pyft.lora_linear(problem.x, *args)
        y.backward(problem.dy)
        return [leaf.grad for leaf in leaves.values()]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def fields_of(problem: Problem) -> tuple[Any, ...]:
    """The fields of its projection."""
    weight = problem.weight
    stored: tuple[Any, ...] = (weight, [])
    static: tuple[Any, ...] = ("", 0)
    if isinstance(weight, QuantizedTensor):
        stored, static = (None, weight.parts()), ("nf4", 64)
    n = problem.weight.shape[0]
    return (*stored, problem.a, problem.b, problem.bias, *static, n, SCALE)


@QUANTIZED
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(p: float, quantized: bool) -> None:
    problem = Problem(5, 32, 96, 4, quantized=quantized)
    seed = torch.tensor(SEED) if p else None
    origin = (None, None, 0.0, 0.0, None)
    arguments = (problem.x, *fields_of(problem), *origin, seed, p, "auto")
    torch.library.opcheck(_lora_linear.op.library, arguments)


@pytest.mark.parametrize(
    "needs", [[True] * 5, [False] * 5, [True, False, True, True, False]], ids=str
)
@pytest.mark.parametrize("rebuild", [False, True])
@QUANTIZED
def test_opcheck_of_the_backward(quantized: bool, rebuild: bool, needs: list[bool]) -> None:
    problem = Problem(5, 32, 96, 4, quantized=quantized)
    fields = [t.detach() if isinstance(t, Tensor) else t for t in fields_of(problem)]
    x, s, seed = problem.x.detach(), torch.randn(5, 4), torch.tensor(3)
    needs = [need and not (quantized and i == 1) for i, need in enumerate(needs)]
    origin = (torch.randn(96), rebuild, 1e-5, 0.0)
    arguments = ([problem.dy], x, s, *origin, *fields, seed, 0.5, "auto", 96, needs)
    torch.library.opcheck(_lora_linear.gradients.library, arguments)


@QUANTIZED
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiles_whole(p: float, quantized: bool) -> None:
    problem = Problem((2, 3), 32, 96, 4, quantized=quantized)
    leaves = problem.leaves()
    compiled = torch.compile(problem_y, backend="aot_eager", fullgraph=True)
    y, expected = compiled(problem, p), problem_y(problem, p)
    torch.testing.assert_close(y, expected)
    for (name, found), wanted in zip(
        grads(y, leaves, problem.dy).items(),
        grads(expected, leaves, problem.dy).values(),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, msg=name)


@QUANTIZED
def test_on_fake_tensors(quantized: bool) -> None:
    """A step is traced without computing: shapes and dtypes of everything are right."""
    with FakeTensorMode() as mode:
        problem = Problem.__new__(Problem)
        problem.dtype = torch.bfloat16
        problem.x = torch.randn(2, 7, 96, dtype=torch.bfloat16, requires_grad=True)
        problem.a = torch.randn(4, 96, dtype=torch.float32, requires_grad=True)
        problem.b = torch.randn(32, 4, dtype=torch.float32, requires_grad=True)
        problem.bias = torch.randn(32, dtype=torch.bfloat16, requires_grad=True)
        problem.weight = torch.randn(32, 96, dtype=torch.bfloat16)
        problem.dy = torch.randn(2, 7, 32, dtype=torch.bfloat16)
    if quantized:
        q = pyft.quantize(torch.randn(32, 96, dtype=torch.bfloat16))
        problem.weight = mode.from_tensor(q)
        assert isinstance(problem.weight, QuantizedTensor)
    with mode:
        found = problem.run(0.5)
    assert found["y"].shape == (2, 7, 32)
    for name, leaf in problem.leaves().items():
        assert (found[name].shape, found[name].dtype) == (leaf.shape, leaf.dtype)


def test_runs_in_c_plus_plus_and_by_reference_by_name() -> None:
    problem = Problem(3, 16, 64, 2, quantized=True)
    for name in ("auto", "reference", "cpu"):
        with pyft.backend(name):
            check_close(problem)
    for name in ("triton", "cuda"):
        with (
            pyft.backend(name),
            pytest.raises(UsageError, match=f"backend '{name}' cannot run lora_linear"),
        ):
            problem.run()


def test_backward_uses_the_backend_of_its_forward() -> None:
    problem = Problem(3, 16, 64, 2, quantized=True)
    with pyft.backend("cpu"):
        y = problem_y(problem, 0.3)
    with pyft.backend("cuda"):
        found = grads(y, problem.leaves(), problem.dy)
    for name, value in grads(problem_y(problem, 0.3), problem.leaves(), problem.dy).items():
        assert torch.equal(value, found[name])


@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    n=st.integers(0, 40),
    k=st.integers(0, 130),
    r=st.integers(1, 9),
    dtype=st.sampled_from(LINEAR_DTYPES),
    quantized=st.booleans(),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.4]),
)
def test_any_shape(
    lead: list[int],
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    quantized: bool,
    bias: bool,
    p: float,
) -> None:
    check_close(Problem(tuple(lead), n, k, r, dtype, quantized, bias), p)


def of_norm(t: dict[str, Any], x: Tensor, norm_input: pyft.NormInput | None) -> list[Tensor]:
    """The op as ``norm_input_cases`` calls it."""
    weight, bias, a, b, scale = projection_of(t, "q")
    return [pyft.lora_linear(x, weight, a, b, scale, bias, 0.3, SEED, norm_input)]


def inputs_of_norm(
    kind: str, frozen: str = "", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    x = torch.randn(2, 40, 96).to(dtype)
    return {"x": x, **linear("q", 48, 96, 5, dtype, kind, frozen=frozen)}


@NORM_INPUT
@pytest.mark.parametrize("frozen", ["", "a weight"])
@pytest.mark.parametrize("kind", ["dense", "nf4", "columns"])
def test_norm_input(kind: str, frozen: str, check: Any) -> None:
    check(lambda **options: inputs_of_norm(kind, frozen, **options), of_norm)


def test_too_little_room() -> None:
    too_little_room_is_refused(lambda **options: inputs_of_norm("nf4", **options), of_norm)


def test_norm_input_of_no_columns() -> None:
    problem = Problem(3, 8, 0, 2)
    told = pyft.NormInput(problem.x, None, 1e-6)
    y = pyft.lora_linear(problem.x, problem.weight, problem.a, problem.b, norm_input=told)
    assert (y == 0).all()


X, W, A, B = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8), torch.ones(4, 3)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "x": ((torch.ones(2, 9), W, A, B), {}, r"x \(2, 9\) and weight \(4, 8\) do not fit"),
    "x of no dimension": ((torch.ones(()), W, A, B), {}, r"x \(\) and weight \(4, 8\)"),
    "weight": ((X, torch.ones(4, 8, 1), A, B), {}, r"weight \(4, 8, 1\) do not fit"),
    "a": ((X, W, torch.ones(3, 7), B), {}, r"lora_a \(3, 7\) and lora_b \(4, 3\)"),
    "b": ((X, W, A, torch.ones(4, 2)), {}, r"lora_a \(3, 8\) and lora_b \(4, 2\)"),
    "a of one dimension": ((X, W, torch.ones(8), B), {}, r"lora_a \(8,\)"),
    "only a": ((X, W, A, None), {}, "pass both or neither"),
    "only b": ((X, W, None, B), {}, "pass both or neither"),
    "bias": ((X, W, A, B), {"bias": torch.ones(8)}, r"bias \(8,\) does not fit weight \(4, 8\)"),
    "dtypes": ((X.half(), W, A, B), {}, "x is torch.float16 and weight is torch.float32"),
    "integers": ((X.long(), W.long(), A, B), {}, "x is torch.int64"),
    "integers over nf4": ((X.long(), pyft.quantize(W), A, B), {}, "x is torch.int64"),
    "p": ((X, W, A, B), {"dropout_p": 1.0}, r"dropout probability 1.0 is outside \[0, 1\)"),
}


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str, name: str) -> None:
    args, kwargs, message = BAD[what]
    with pyft.backend(name), pytest.raises(UsageError, match=message) as caught:
        pyft.lora_linear(*args, **kwargs)
    assert "\n" not in str(caught.value)
