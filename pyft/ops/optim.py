"""One step of AdamW, Lion or SGD with momentum over many tensors; states in 8 bits or fp32.

The equations, their order of operations and the coding of states are in ``pyft.reference.optim``;
every backend writes the same bits. Bytes moved for each element of an 8-bit AdamW step: the
parameter twice, the gradient once, four for the states: 16 in fp32, 10 in bf16.

All tensors of a call are of one device and dtype and make one launch: their addresses are a table
on the device, uploaded without waiting and kept while the addresses stay the same.
"""

from collections.abc import Sequence
from ctypes import c_float
from functools import cache
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pyft.backend import device_guard, implementation, select
from pyft.formats import dynamic_map

BLOCK = 256
ADAMW, LION, SGD = range(3)

# An encoder's first look-up: a magnitude falls in a bucket by the exponent and the first
# MANTISSA_BITS bits of its fp32 form, from 2**-23 up to 1, so fine that none has two midpoints.
MANTISSA_BITS = 7
BUCKETS = (23 << MANTISSA_BITS) + 4  # the last three are padding


class Work(NamedTuple):
    """One parameter's contiguous tensors; states are flat (``pyft.reference.optim.update``)."""

    param: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor | None = None
    first_absmax: Tensor | None = None
    second_absmax: Tensor | None = None


class Rule(NamedTuple):
    """The scalars of a step, each an fp32 number; what they mean is in ``pyft.reference.optim``."""

    algorithm: int
    nesterov: bool
    sign: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    keep: float
    decay: float
    step: float
    eps: float


def adamw_rule(
    step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, maximize: bool
) -> Rule:
    """AdamW's scalars at step 1, 2, ...: the bias corrections are folded into step and eps."""
    root = sqrt(1 - betas[1] ** step)
    return _rounded(
        ADAMW, maximize, beta1=betas[0], rest1=1 - betas[0], beta2=betas[1], rest2=1 - betas[1],
        keep=1 - lr * decay, step=lr * root / (1 - betas[0] ** step), eps=eps * root,
    )  # fmt: skip


def lion_rule(lr: float, betas: tuple[float, float], decay: float, maximize: bool) -> Rule:
    """Lion's scalars."""
    return _rounded(
        LION, maximize, beta1=betas[0], rest1=1 - betas[0], beta2=betas[1], rest2=1 - betas[1],
        keep=1 - lr * decay, step=lr,
    )  # fmt: skip


def sgd_rule(
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    decay: float,
    nesterov: bool,
    maximize: bool,
) -> Rule:
    """The scalars of SGD with momentum; the first gradient is not dampened."""
    rest = 1 - dampening if step > 1 else 1.0
    return _rounded(
        SGD, maximize, nesterov, beta1=momentum, rest1=rest, keep=1.0, decay=decay, step=lr
    )


def _rounded(algorithm: int, maximize: bool, nesterov: bool = False, **scalars: float) -> Rule:
    names = Rule._fields[3:]
    rounded = (c_float(scalars.get(name, 0.0)).value for name in names)
    return Rule(algorithm, nesterov, -1.0 if maximize else 1.0, *rounded)


class Tables:
    """The address tables of an optimizer's launches, each kept until an address changes."""

    def __init__(self) -> None:
        self._kept: dict[object, tuple[object, Tensor, int, bool]] = {}

    def get(self, key: object, works: Sequence[Work], align: int) -> tuple[Tensor, int, bool]:
        """int64 [len(works), 8] on the works' device, the fields of pyft_optim_tensor; the blocks
        of all of them; whether every address is a multiple of 16.

        A tensor's blocks are counted up to a multiple of ``align``. The table of one ``key`` is
        made again when an address differs from the last call's, or the stream does.
        """
        device = works[0].param.device
        addresses = tuple(
            0 if tensor is None else tensor.data_ptr() for work in works for tensor in work
        )
        sizes = tuple(work.param.numel() for work in works)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        content = (addresses, sizes, stream)
        kept = self._kept.get((key, align))
        if kept is not None and kept[0] == content:
            return kept[1:]
        n = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        blocks = (n + BLOCK * align - 1) // (BLOCK * align) * align
        rows = torch.tensor(addresses, dtype=torch.int64, device="cpu").view(len(works), 6)
        rows = torch.cat([rows, n[:, None], (blocks.cumsum(0) - blocks)[:, None]], dim=1)
        if device.type == "cuda":
            rows = rows.pin_memory()
        table = rows.to(device, non_blocking=True)
        made = (table, int(blocks.sum()), all(address % 16 == 0 for address in addresses))
        self._kept[key, align] = (content, *made)
        return made


def backend_of(param: Tensor) -> str | None:
    """The backend that ``update`` takes for parameters like ``param``; None for a fake tensor.

    Raises:
        UsageError: the backend asked for by name cannot run there.
    """
    return None if isinstance(param, FakeTensor) else select("optim", param.device)


@torch.no_grad()
def update(works: Sequence[Work], rule: Rule, tables: Tables, key: object = None) -> None:
    """Apply one step to tensors of one device and dtype, in place and in one launch.

    Args:
        works: parameters of at least one element, with gradients and states, unchecked. Fake
            tensors are left alone: an update allocates nothing.
        rule: the step's scalars.
        tables: where the table of addresses is kept between calls.
        key: which of the optimizer's launches this is.
    """
    param = works[0].param
    name = backend_of(param)
    if name is None:
        return
    kernels = implementation("optim", name)
    if name == "reference":
        for work in works:
            flat = (work.param.detach().view(-1), work.grad.reshape(-1))
            kernels.update(*flat, *work[2:], *rule)
        return
    codes, starts = code_tables(param.device), start_table(param.device)
    with device_guard(param):
        table, blocks, aligned = tables.get(key, works, kernels.OPTIM_ALIGN)
        kernels.optim(table, blocks, aligned, param, codes, starts, *rule)
    torch.autograd.graph.increment_version([work.param for work in works])


@cache
def code_tables(device: torch.device) -> Tensor:
    """fp32 [4, 256]: the signed map, its midpoints and +inf, the unsigned map, its midpoints and
    +inf.
    """
    rows = []
    for signed in (True, False):
        codes = torch.tensor(dynamic_map(signed), dtype=torch.float32, device="cpu")
        middle = (codes[:-1] + codes[1:]) / 2
        rows += [codes, torch.nn.functional.pad(middle, (0, 1), value=torch.inf)]
    return torch.stack(rows).to(device)


@cache
def start_table(device: torch.device) -> Tensor:
    """uint8 [3, BUCKETS]: the least code of each bucket of magnitudes, in the signed map for x >= 0
    and for x < 0 and in the unsigned one; the code of x is that, or one more where x is above that
    code's midpoint.
    """
    bits = torch.arange(BUCKETS, dtype=torch.int32, device="cpu") + (104 << MANTISSA_BITS)
    low = (bits << (23 - MANTISSA_BITS)).view(torch.float32)
    high = (bits + 1 << (23 - MANTISSA_BITS)).view(torch.float32)
    low[0] = 0.0  # and all that is smaller
    tables = code_tables(torch.device("cpu"))
    positive, unsigned = (torch.searchsorted(tables[row, :255], low) for row in (1, 3))
    negative = torch.searchsorted(tables[1, :255], -high, right=True)
    return torch.stack([positive, negative, unsigned]).to(torch.uint8).to(device)
