"""Peak memory of one call, as a difference: bytes live at the highest point over those before it.

What the call returns counts; what it frees and takes again counts once. On CUDA the caching
allocator says it. On a CPU the allocator's own events are followed, so that what an op or a vendor
library takes inside through torch's allocator is seen too. Memory taken past torch is not seen.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig

_profiler: Any = torch.autograd  # the events of its profiler, read here one by one


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of torch's allocations on ``device`` during one call, over those live before it."""
    collects = gc.isenabled()
    gc.disable()  # garbage of before, freed in between, would be counted against the peak
    try:
        return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)
    finally:
        if collects:
            gc.enable()


def _cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return int(torch.cuda.max_memory_allocated(device)) - before


def _cpu_peak(call: Callable[[], Any]) -> int:
    # state, input shapes, memory, stack, flops, modules, experimental
    state, nothing = _profiler.ProfilerState.CPU, _ExperimentalConfig()
    config = _profiler.ProfilerConfig(state, False, True, False, False, False, nothing)
    _profiler._enable_profiler_legacy(config)
    try:
        result = call()
    finally:
        threads: list[list[Any]] = _profiler._disable_profiler_legacy()
    del result
    starts = [event for thread in threads for event in thread if event.name() == "__start_profile"]
    changes = [
        (starts[0].cpu_elapsed_us(event) if starts else 0.0, event.cpu_memory_usage())
        for thread in threads
        for event in thread
        if event.kind() == "memory_alloc"
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak
