"""What the launchers of the attention kernels share: their arguments and their configurations."""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from pyft.kernels import configs

Dropout = tuple[int, int, float]  # seed, threshold, keep
# scale, left, right, shift, softcap, dropout
Rule = tuple[float, int | None, int | None, int, float | None, Dropout | None]

LOG2E = 1.4426950408889634
FARTHEST = 2**29  # positions and bounds stay within 32 bits
L2_SHARE = 0.5  # of the cache, for the keys and values of the heads at work


def numbers_of(
    rule: Rule, dtype: torch.dtype
) -> tuple[float, float, int, int, int, int, int, float]:
    """scale, cap, left, right, shift, seed, threshold and keep, as kernels take them: q·k times
    scale is in the scores' units, or with a softcap the argument of the tanh, and cap its factor.
    """
    scale, left, right, shift, softcap, dropout = rule
    near, far, moved = (max(-FARTHEST, min(FARTHEST, n or 0)) for n in (left, right, shift))
    unit = 1.0 if dtype == torch.float32 else LOG2E
    factors = (scale * unit, 0.0) if softcap is None else (scale / softcap, softcap * unit)
    return (*factors, near, far, moved, *(dropout or (0, 0, 1.0)))


def features_of(
    rule: Rule, dtype: torch.dtype, bias: Tensor | None, slopes: Tensor | None
) -> dict[str, bool]:
    """The flags of a launch. Largest scores are found before they are scaled where nothing else is
    done to them and the scale is positive.
    """
    scale, left, right, _, softcap, dropout = rule
    added = bias is not None or slopes is not None
    return {
        "LEFT": left is not None,
        "RIGHT": right is not None,
        "SOFTCAP": softcap is not None,
        "SCALED": softcap is not None or added or not scale > 0,
        "DROPOUT": dropout is not None,
        "PRECISE": dtype == torch.float32,
    }


def strides_of(*tensors: Tensor | None) -> list[int]:
    """Of batch, heads and rows."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def tiles_of(length: int, cu: Tensor | None, block: int) -> int:
    """Blocks of one head: of packed sequences as many as they may need in all."""
    return triton.cdiv(length, block) if cu is None else length // block + len(cu) - 1


def padded(d: int) -> int:
    """A head dim as tiles have it."""
    return max(16, 1 << (d - 1).bit_length())


def heads_at_once(k: Tensor, v: Tensor, group: int) -> int:
    """Query heads at work at a time, so that what they share stays in the L2 cache; all at most."""
    everyone = k.shape[0] * k.shape[1] * group
    if not k.is_cuda:
        return everyone
    size = max(1, k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size())
    cache = torch.cuda.get_device_properties(k.device).L2_cache_size * L2_SHARE
    return min(everyone, group * max(1, int(cache / size)))


def default_config(x: Tensor, d: int, rule: Rule, *added: Tensor | None) -> configs.Attention:
    """Where x's dtype and GPU start from, at head dim d."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    busy = any(more is not None for more in (*added, *rule[4:]))
    return config_for(x.dtype, capability, x.is_cuda and bool(torch.version.hip), d, busy)


def config_for(
    dtype: torch.dtype, capability: tuple[int, int], amd: bool, d: int, busy: bool
) -> configs.Attention:
    """The entry of ``configs.ATTENTION`` for a dtype and GPU, of the first head dim that is not
    smaller, or the last. Where ``busy``, as a softcap, dropout, a bias or slopes need registers
    too, programs take half as much at a time; where tiles are padded, all but those of dq do.
    """
    if dtype == torch.float32:
        gpu = "no_matrix_units"
    elif amd:
        gpu = "amd"
    else:
        begun = [c for c in configs.ATTENTION_CLASSES if c <= capability]
        gpu = configs.ATTENTION_CLASSES[max(begun)]
    table = configs.ATTENTION[gpu]
    config = table[min((dim for dim in table if dim >= d), default=max(table))]
    forward, keys, queries = config.forward, config.keys, config.queries
    if busy or d != padded(d):
        forward = replace(forward, block_n=max(16, forward.block_n // 2))
        keys = replace(keys, block_m=max(16, keys.block_m // 2))
    if busy:
        queries = replace(queries, block_n=max(16, queries.block_n // 2))
    return replace(config, forward=forward, keys=keys, queries=queries)
