"""Every kernel on small shapes, those included whose edges are hard; for compute-sanitizer.

The native kernels run in every format, dtype and way of reading; the linear's is called directly,
for the op takes it for few rows only. Triton, which compiles each variant first, runs the ops of a
training step. Attention, norms, rotary embeddings, activations and the loss run on each backend
that has them.
"""

from typing import Any

import torch
from torch import Tensor

import pyft
from pyft.backend import PREFERENCE, chosen, implementation, obstacle
from pyft.formats import FORMATS
from pyft.ops.glu import ACTIVATIONS
from pyft.ops.quantize import DTYPES, decode_tables, dequantize_slab
from pyft.optim import AdamW8bit, Lion8bit, SGD8bit
from pyft.quantized import QuantizedTensor, named_parts

# Of the linear: one row, few, and more than the largest tile; K of whole 16-byte pieces of codes,
# of whole chunks of 8 elements, and of neither.
ROWS = (1, 3, 8, 17, 64)
COLUMNS = (256, 104, 100)
LINEARS = ("nf4", "int8", "int4_zp")
N = 33

SHAPES = ((64, 256), (33, 100))  # whole tiles, and neither rows nor columns in whole ones
LONG = (3, 5000)  # rows longer than one chunk of each thread; not in whole blocks of 4096
OPTIMIZERS = (AdamW8bit, Lion8bit, SGD8bit)
SIZES = (4097, 100)  # coded states with a last block of one element, and fp32 states
HEADS = (2, 3, 5, 20)  # batch, query heads, tokens, size of a head
TURNED = 12  # of it
NOT_IN_CUDA = {"alibi_slopes", "bias"}  # what its attention leaves to others
LABELS = (96, 5003)  # less than one tile of a row's logits, and several with a rest
ATTENDED = (64, 40)  # sizes of a head: a whole tile, and not


def kernels(device: torch.device, few: bool = False) -> dict[str, int]:
    """Run what the backends of ``device`` have: how many ops each ran.

    With ``few`` the native kernels run in bf16 only and Triton's in two formats.
    """
    ran: dict[str, int] = {}
    for name in PREFERENCE[device.type]:
        if name == "reference" or obstacle("quantize", name) is not None:
            continue
        formats = list(FORMATS)[: 2 if few else None]
        with pyft.backend(name):
            ran[name] = _triton(device, formats) if name == "triton" else _native(device, few)
            if obstacle("norm", name) is None:
                dtypes = (torch.bfloat16,) if few else DTYPES
                ran[name] += sum(_layers(dtype, device) for dtype in dtypes)
                ran[name] += sum(_losses(dtype, device) for dtype in dtypes)
            ran[name] += sum(_attention(t, device) for t in ((torch.float16,) if few else DTYPES))
    for dtype in DTYPES:
        pyft.dropout(torch.randn(1001, dtype=dtype, device=device), 0.1, seed=1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    if not ran:
        raise SystemExit("gpu_kernels: no backend but the reference runs here; see pyft doctor")
    return ran


def _native(device: torch.device, few: bool) -> int:
    ran = 0
    for dtype in (torch.bfloat16,) if few else DTYPES:
        for format, fmt in FORMATS.items():
            for shape in SHAPES:
                ran += _decode(pyft.quantize(_random(shape, dtype, device), format))
            if not fmt.e8m0:
                for block_size in ("row", 4096):
                    w = _random(LONG, dtype, device)
                    ran += _decode(pyft.quantize(w, format, block_size))
        for format in LINEARS:
            for k in COLUMNS:
                q = pyft.quantize(_random((N, k), dtype, device), format)
                for m in ROWS:
                    _linear(_random((m, k), dtype, device), q)
                    ran += 1
        ran += _optimizers(dtype, device)
    return ran


def _triton(device: torch.device, formats: list[str]) -> int:
    ran = 0
    for format in formats:
        for shape in SHAPES:
            q = pyft.quantize(_random(shape, torch.bfloat16, device), format)
            ran += _decode(q)
            for m in (1, 17):
                for p in (0.0, 0.1):  # of dropout
                    _linears(m, q, p)
                    ran += 3
    return ran + _optimizers(torch.bfloat16, device)


def _linears(m: int, q: QuantizedTensor, p: float) -> None:
    """The three LoRA ops of rank 3, forward and backward."""
    n, k = q.shape

    def projection(weight: Tensor) -> tuple[Any, ...]:
        rows, cols = weight.shape
        adapter = (_leaf((3, cols), q.dtype, q.device), _leaf((rows, 3), q.dtype, q.device))
        return (weight, _random((rows,), q.dtype, q.device), *adapter, 0.5)

    x = _leaf((m, k), q.dtype, q.device)
    weight, bias, a, b, scale = projection(q)
    pyft.lora_linear(x, weight, a, b, scale, bias, p).sum().backward()
    sum(y.sum() for y in pyft.lora_qkv(x, *(projection(q) for _ in range(3)), p)).backward()
    down = projection(_random((k, n), q.dtype, q.device))
    pyft.lora_mlp(x, projection(q), projection(q), down, dropout_p=p).sum().backward()


def _layers(dtype: torch.dtype, device: torch.device) -> int:
    """What lies between the linears, forward and backward: how many ops."""
    ran = 0
    for m, d in (SHAPES[1], LONG):
        x, residual = _leaf((m, d), dtype, device), _leaf((m, d), dtype, device)
        weight, bias = _leaf((d,), dtype, device), _leaf((d,), dtype, device)
        pyft.rms_norm(x, None, 1e-6).sum().backward()
        sum(y.sum() for y in pyft.rms_norm(x, weight, 1e-6, residual, 1.0)).backward()
        pyft.layer_norm(x, weight, bias, 1e-6).sum().backward()
        sum(y.sum() for y in pyft.layer_norm(x, weight, None, 1e-6, residual)).backward()
        for activation in ACTIVATIONS:
            gate, up = _leaf((m, 2 * d), dtype, device).chunk(2, -1)
            _activated(activation, gate, up).sum().backward()
        ran += 4 + len(ACTIVATIONS)
    batch, heads, tokens, size = HEADS
    angles = torch.randn(batch, tokens, TURNED // 2, device=device)
    positions = torch.arange(tokens, device=device).flip(0).expand(batch, -1)
    for interleaved in (False, True):
        for tables in (angles.to(dtype), angles):
            for table, where in ((tables, None), (tables[0], positions)):
                q = _leaf((batch, tokens, heads, size), dtype, device).transpose(1, 2)
                k = _leaf((batch, tokens, 1, size), dtype, device).transpose(1, 2)
                turned = pyft.rope(q, k, table.cos(), table.sin(), where, interleaved)
                sum(y.sum() for y in turned).backward()
                ran += 1
    return ran


def not_in_cuda(dtype: torch.dtype) -> bool:
    """fp32, and bf16 where a GPU has none."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not has_bf16)


def _attention(dtype: torch.dtype, device: torch.device) -> int:
    """Of one backend what it has: windows, sinks, packed rows, and all that changes scores."""
    batch, heads, tokens = 2, 4, 150
    cu = torch.tensor([0, 3, 3, 140, 150], dtype=torch.int32, device=device)
    ways: tuple[dict[str, Any], ...] = (
        {"causal": False},
        {"window": 9, "softcap": 5.0, "sinks": _leaf((heads,), torch.float32, device)},
        {"cu_seqlens_q": cu},
        {"alibi_slopes": torch.rand(heads, device=device), "dropout_p": 0.1, "seed": 1},
        {"bias": _leaf((1, heads, tokens, tokens), dtype, device)},
    )
    ran = 0
    for size in ATTENDED:
        for way in ways:
            rows = 1 if "cu_seqlens_q" in way else batch
            q, k, v = (
                _leaf((rows, tokens, h, size), dtype, device).transpose(1, 2) for h in (heads, 2, 2)
            )
            if chosen() == "cuda" and (not_in_cuda(dtype) or way.keys() & NOT_IN_CUDA):
                continue
            pyft.attention(q, k, v, **way).sum().backward()
            ran += 1
    return ran


def _losses(dtype: torch.dtype, device: torch.device) -> int:
    """All that a loss takes of logits, and little of it."""
    rows, d = 37, 24
    for v in LABELS:
        hidden, weight = _leaf((rows, d), dtype, device), _leaf((v, d), dtype, device)
        labels = torch.randint(v, (rows,), device=device)
        labels[::5] = -100
        classes = torch.rand(v, device=device)
        budget = 10 * v * dtype.itemsize / 2**20
        way: dict[str, Any] = {"softcap": 5.0, "label_smoothing": 0.1, "class_weights": classes}
        for options in ({}, {"gradient_filter": True}, way | {"metrics": True}):
            found = pyft.linear_cross_entropy(hidden, weight, labels, budget=budget, **options)
            (found if isinstance(found, Tensor) else found[0]).backward()
        teacher = pyft.Teacher(_random((rows, d), dtype, device), weight.detach())
        of_tokens = pyft.linear_logprobs(
            hidden, weight, labels, entropy=True, teacher=teacher, budget=2 * budget
        )
        assert of_tokens.entropy is not None
        assert of_tokens.kl is not None
        (of_tokens.logprob + of_tokens.entropy + of_tokens.kl).sum().backward()
    return 4 * len(LABELS)


def _activated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    if activation == "silu":
        return pyft.swiglu(gate, up)
    if activation == "relu2":
        return pyft.relu2(gate)
    return pyft.geglu(gate, up, "tanh" if activation == "gelu_tanh" else "none")


def _decode(q: QuantizedTensor) -> int:
    """All of a weight, and an odd part of it between the columns of a wider tensor."""
    rows, cols = q.shape
    pyft.dequantize(q)
    slab = (1, rows - 1, 3, cols - 2)
    wider = torch.empty(rows - 2, cols + 9, dtype=q.dtype, device=q.device)
    out = wider[:, 5 : 5 + slab[3] - slab[2]]
    dequantize_slab(q.parts(), q.format, q.block_size, (rows, cols), slab, out)
    return 3  # quantized, and decoded twice


def _linear(x: Tensor, q: QuantizedTensor) -> None:
    """The kernel that decodes on the fly, for any number of rows."""
    rows, cols = q.shape
    stored = named_parts(q.parts(), q.format)
    tables = decode_tables(q.format, stored[3] is not None, x.device)
    shape, bits, bias = (rows, cols), q.format.bits, _random((rows,), x.dtype, x.device)
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    native = implementation("qlinear", chosen())
    native.qlinear(x, *stored, *tables, bits, shape, q.block_size, bias, y)


def _optimizers(dtype: torch.dtype, device: torch.device) -> int:
    for optimizer in OPTIMIZERS:
        parameters = [torch.nn.Parameter(_random((size,), dtype, device)) for size in SIZES]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer(parameters).step()
    return len(OPTIMIZERS)


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _random(shape, dtype, device).requires_grad_()


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
