"""Every kernel on small shapes, those included whose edges are hard; for compute-sanitizer.

The native kernels run in every format, dtype and way of reading; the linear's is called directly,
for the op takes it for few rows only. Triton, which compiles each variant first, runs the ops of a
training step.
"""

import torch
from torch import Tensor

import pyft
from pyft.backend import PREFERENCE, chosen, implementation, obstacle
from pyft.formats import FORMATS
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
                x = _random((m, shape[1]), torch.bfloat16, device).requires_grad_()
                a = _random((3, shape[1]), torch.bfloat16, device).requires_grad_()
                b = _random((shape[0], 3), torch.bfloat16, device).requires_grad_()
                pyft.lora_linear(x, q, a, b).sum().backward()
                ran += 1
    return ran + _optimizers(torch.bfloat16, device)


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


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
