"""Compilations of the attention kernels for the compile table, as their launchers make them: their
tiles depend on the class of GPU, which ends their names.
"""

from typing import Any

import torch
from compile_gate import Variant

from pyft.kernels import attention, attention_backward, configs
from pyft.kernels.attention_launch import config_for, features_of, padded

CAUSAL = (0.1, None, 0, 0, None, None)
PACKED = (0.1, 512, 0, 0, 30.0, None)  # with a window and a softcap
DROPPED = (0.1, None, 0, 0, None, (1, 2**30, 1.25))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = ("scale", "cap", "keep", "factor")
FP32 = ("lse_ptr", "sinks_ptr")
INTEGERS = ("cu_q_ptr", "cu_k_ptr")

# class -> a compute capability of it; AMD has none
CAPABILITIES = {gpu: capability for capability, gpu in configs.ATTENTION_CLASSES.items()} | {
    "amd": (0, 0)
}


def attention_variant(part: str, gpu: str, d: int, dtype: str, rule: Any) -> Variant | None:
    """Head dim d; PACKED is of packed sequences and has sinks, the others neither. None where the
    backward's second pass has no launch of its own.
    """
    packed = rule is PACKED
    busy = rule is not CAUSAL
    config = config_for(DTYPES[dtype], CAPABILITIES[gpu], gpu == "amd", d, busy)
    absent = ["bias_ptr", "slopes_ptr"]
    absent += [] if packed else ["cu_q_ptr", "cu_k_ptr", "sinks_ptr"]
    constants: dict[str, Any] = {"D": d, "DV": d, "BLOCK_D": padded(d), "BLOCK_DV": padded(d)}
    constants |= features_of(rule, DTYPES[dtype], None, None)
    kernel: Any = attention_backward.attention_backward_kernel
    keys, queries = config.keys, config.queries
    constants |= {"KEYS_M": keys.block_m, "KEYS_N": keys.block_n}
    constants |= {"QUERIES_M": queries.block_m, "QUERIES_N": queries.block_n}
    if part == "attention":
        kernel, tile = attention.attention_kernel, config.forward
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    elif part == "attention_backward":
        tile = keys
        absent += [] if config.fused else ["dq_ptr"]
    elif config.fused:
        return None
    else:
        tile = queries
        absent += ["dk_ptr", "dv_ptr"]
    constants |= dict.fromkeys(absent)
    names = [param.name for param in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    types = {}
    for name in names:
        if name in FLOATS:
            types[name] = "fp32"
        elif name in ("seed", "threshold"):
            types[name] = "i64"
        elif name in INTEGERS:
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name in (*FP32, "delta_ptr") else f"*{dtype}"
        else:
            types[name] = "i32"
    types = {name: kind for name, kind in types.items() if name not in constants}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Variant(kernel, types, constants, options)


def attention_variants() -> dict[str, Variant]:
    """By name: pass, dtype, head dim, what else, class of GPU."""
    found = {}
    for gpu in configs.ATTENTION:
        half = "fp16" if gpu == "no_matrix_units" else "bf16"
        cases = [
            (128, half, "causal", CAUSAL),
            (256, half, "causal", CAUSAL),
            (512, half, "causal", CAUSAL),
            (96, half, "packed", PACKED),
            (64, half, "dropout", DROPPED),
        ]
        names = {case: f"{case[1]}/{case[0]}/{case[2]}/{gpu}" for case in cases}
        if gpu == "no_matrix_units":  # which is what all are in fp32
            names[(64, "fp32", "causal", CAUSAL)] = "fp32/64/causal"
        for (d, dtype, _, rule), name in names.items():
            for part in ("attention", "attention_backward", "attention_backward_queries"):
                variant = attention_variant(part, gpu, d, dtype, rule)
                if variant is not None:
                    found[f"{part}/{name}"] = variant
    return found
