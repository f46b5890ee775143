"""Which implementation runs: ``reference``, ``cpu``, ``triton`` or ``cuda``, by name or ``auto``.

The choice is data: ``IMPLEMENTATIONS`` says which module implements an op on a backend,
``PREFERENCE`` in which order a device tries them. ``auto`` takes the first that is available and
ends at the reference; a backend asked for by name runs or it raises.
"""

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from pyft.errors import UsageError

if TYPE_CHECKING:
    import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

# op -> backend -> module. The lora ops are made of vendor matmuls and their backend's kernels,
# chunked attention of attention's, the losses of those for logits.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "quantize": {
        "reference": "pyft.reference.quantize",
        "cpu": "pyft.native",
        "triton": "pyft.kernels.quantize",
        "cuda": "pyft.native",
    },
    "qlinear": {
        "reference": "pyft.reference.qlinear",
        "cpu": "pyft.native",
        "triton": "pyft.kernels.qlinear",
        "cuda": "pyft.native",
    },
    "dropout": {
        "reference": "pyft.reference.dropout",
        "cpu": "pyft.native",
        "triton": "pyft.kernels.dropout",
    },
    "optim": {
        "reference": "pyft.reference.optim",
        "cpu": "pyft.native",
        "triton": "pyft.kernels.optim",
        "cuda": "pyft.native",
    },
    **{
        op: {
            "reference": f"pyft.reference.{op}",
            "cpu": "pyft.native",
            "triton": f"pyft.kernels.{op}",
        }
        for op in ("norm", "rope", "glu", "logits")
    },
    "attention": {
        "reference": "pyft.reference.attention",
        "cpu": "pyft.native",
        "triton": "pyft.kernels.attention",
        "cuda": "pyft.native",
    },
    # Parts of the three below: the vendor's matmul where the choice is not Triton.
    **{
        op: {
            "reference": f"pyft.reference.{op}",
            "cpu": f"pyft.ops.{op}",
            "triton": f"pyft.kernels.{op}",
            "cuda": f"pyft.ops.{op}",
        }
        for op in ("lora_matmul", "skinny")
    },
    **{
        op: {
            "reference": f"pyft.reference.{op}",
            "cpu": f"pyft.ops.{op}",
            "triton": f"pyft.ops.{op}",
            "cuda": f"pyft.ops.{op}",
        }
        for op in (
            "lora_linear",
            "lora_qkv",
            "lora_mlp",
            "chunked_attention",
            "linear_logprobs",
            "linear_cross_entropy",
        )
    },
}

# device type -> backends that can run there, best first
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "xpu": ("triton", "reference"),
}
# op -> the compute capability from which its Triton kernels come before the CUDA ones
TRITON_FIRST = {"attention": (8, 0), "chunked_attention": (8, 0)}


class _Choice(threading.local):
    """The backend chosen in this thread."""

    name = "auto"


_choice = _Choice()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every pyft op inside the block on the named backend.

    ``name`` is one of "auto", "reference", "cpu", "triton", "cuda". A backward pass uses what its
    forward used. Raises UsageError for another name, and, when an op is called, where the named
    backend cannot run it.
    """
    if name not in ("auto", *BACKENDS):
        raise UsageError(f"backend: {name!r} is not one of auto, {', '.join(BACKENDS)}")
    before, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = before


def chosen() -> str:
    """The name given to the innermost ``backend`` block of this thread, or "auto"."""
    return _choice.name


def preference(op: str, device: "torch.device") -> tuple[str, ...]:
    """The backends that can run an op on a device, best first."""
    usable = PREFERENCE.get(device.type, ("reference",))
    if device.type == "cuda" and op in TRITON_FIRST and obstacle(op, "triton") is None:
        import torch

        if torch.cuda.get_device_capability(device) >= TRITON_FIRST[op]:
            return tuple(sorted(usable, key=lambda name: name != "triton"))
    return usable


def select(op: str, device: "torch.device", name: str | None = None) -> str:
    """The backend that runs ``op`` on ``device``: ``name``'s, or the one chosen now."""
    name = _choice.name if name is None else name
    usable = preference(op, device)
    if name == "auto":
        return next(option for option in usable if obstacle(op, option) is None)
    if name not in usable:
        raise UsageError(
            f"backend {name!r} cannot run {op} on device {device}: use one of {', '.join(usable)}"
        )
    reason = obstacle(op, name)
    if reason is not None:
        raise UsageError(f"backend {name!r} cannot run {op}: {reason}")
    return name


@cache
def implementation(op: str, name: str) -> ModuleType:
    """The module that implements ``op`` on backend ``name``."""
    return importlib.import_module(IMPLEMENTATIONS[op][name])


def availability() -> dict[str, dict[str, str]]:
    """For each op and backend: "yes", or the reason why not and what to do about it."""
    return {op: {name: obstacle(op, name) or "yes" for name in BACKENDS} for op in IMPLEMENTATIONS}


def prefers_triton(
    op: str,
    tensor: "torch.Tensor",
    measured: "Mapping[str, tuple[torch.dtype, ...]]",
    anyway: bool = False,
) -> bool:
    """Whether a part of an op is to be Triton's instead of the vendor's: where "triton" was asked
    for by name, or with "auto" where it was ``measured`` (device type -> dtypes) to be the faster,
    or ``anyway``.
    """
    if tensor.device.type == "cpu" or tensor.dtype.itemsize > 4:
        return False
    faster = anyway or tensor.dtype in measured.get(tensor.device.type, ())
    wanted = _choice.name == "triton" or (_choice.name == "auto" and faster)
    return wanted and obstacle(op, "triton") is None


def device_guard(tensor: "torch.Tensor") -> AbstractContextManager[object]:
    """Makes the tensor's device the current one: a kernel is launched on the current device."""
    import torch

    if tensor.device.type not in ("cuda", "xpu"):
        return nullcontext()
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    guard: AbstractContextManager[object] = torch.xpu.device(tensor.device)
    return guard


def large_empty(
    shape: tuple[int, ...], dtype: "torch.dtype", device: "torch.device"
) -> "torch.Tensor":
    """``torch.empty`` for what may be large: on a CPU in large pages, where there are some."""
    import torch

    fresh = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and obstacle("quantize", "cpu") is None:
        importlib.import_module("pyft.native").use_huge_pages(fresh)
    return fresh


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels run in now; None when they are not built."""
    if obstacle("quantize", "cpu") is not None:
        return None
    native = importlib.import_module("pyft.native")
    return str(next(name for name, level in native.ISAS.items() if level == native.isa()))


@cache
def obstacle(op: str, name: str) -> str | None:
    """Why ``op`` cannot run on backend ``name`` in this process, or None when it can."""
    if name not in IMPLEMENTATIONS[op]:
        return f"{op} has no {name} implementation"
    return {"reference": lambda: None, "cpu": _no_cpu, "triton": _no_triton, "cuda": _no_cuda}[
        name
    ]()


def _no_cpu() -> str | None:
    try:
        importlib.import_module("pyft._cpu")
    except ImportError as error:
        return (
            f"the extension pyft._cpu does not load ({error}); "
            "install pyft with a C++ compiler present"
        )
    return None


def _no_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    import torch

    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "no GPU is visible to torch"
    return None


def _no_cuda() -> str | None:
    try:
        extension = importlib.import_module("pyft._cuda")
    except ImportError as error:
        return (
            f"the extension pyft._cuda does not load ({error}); install pyft with nvcc on the PATH"
        )
    if extension.device_count() == 0:
        return "no CUDA device is visible"
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    return None


def launcher(
    op: str,
    tensor: "torch.Tensor",
    name: str,
    refusal: Callable[[str], str | None] = lambda name: None,
) -> ModuleType | None:
    """The module whose functions run ``op`` on the tensor: backend ``name``'s, or the best for
    "auto".

    None where the reference has to: no kernel here, or none for the tensor's dtype. ``refusal``
    says of a backend why it cannot run this very call.
    """
    import torch

    best = select(op, tensor.device, name)
    if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
        usable = preference(op, tensor.device)[:-1] if name == "auto" else (best,)
        for option in usable:
            if option != "reference" and obstacle(op, option) is None and refusal(option) is None:
                return implementation(op, option)
    if name not in ("auto", "reference"):
        reason = refusal(name)
        why = f" in {tensor.dtype}" if reason is None else f": {reason}"
        raise UsageError(f"backend {name!r} cannot run {op}{why}; use reference or auto")
    return None
