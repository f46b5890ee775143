"""What a report says about where and on what a run ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "pydantic",
]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run's numbers; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """{"cpu", "cores" this process may use, "memory_bytes", "gpu" or None}."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def model_facts(
    model: Any, path: Path, architecture: str, method: str, quant: str
) -> dict[str, Any]:
    """Size of a loaded model: logical parameters, trainable ones, bytes that the weights occupy."""
    parameters = list(model.parameters())
    return {
        "path": str(path),
        "architecture": architecture,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "method": method,
        "quant": quant if method == "qlora" else None,
        "weight_bytes": sum(getattr(p, "stored_bytes", p.nbytes) for p in parameters),
    }


def peak_host_bytes() -> int:
    """The most memory this process has held at once (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024)


def peak_device_bytes() -> int | None:
    """The most GPU memory that tensors have held at once; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
