"""Compilations of the attention kernels for the compile table, as their launchers make them: their
tiles depend on the class of GPU, which ends their names.
"""

from typing import Any

import torch
from compile_gate import Variant

from pyft.kernels import attention, attention_backward, attention_bias, configs
from pyft.kernels.attention_launch import config_for, features_of, padded

CAUSAL = (0.1, None, 0, 0, None, None)
PACKED = (0.1, 512, 0, 0, 30.0, None)  # with a window and a softcap
DROPPED = (0.1, None, 0, 0, None, (1, 2**30, 1.25))
BIASED = (0.1, None, None, 0, None, None)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = ("scale", "cap", "keep", "factor")
FP32 = ("lse_ptr", "delta_ptr", "sinks_ptr", "slopes_ptr")
ALL_FEATURES = ("ampere", "hopper")  # classes whose rarer launches are compiled too
INTEGERS = ("cu_q_ptr", "cu_k_ptr")

# class -> a compute capability of it; AMD has none
CAPABILITIES = {gpu: capability for capability, gpu in configs.ATTENTION_CLASSES.items()} | {
    "amd": (0, 0)
}


def attention_variant(part: str, gpu: str, d: int, dtype: str, rule: Any) -> Variant | None:
    """Head dim d; PACKED is of packed sequences and has sinks, BIASED has a bias and slopes. None
    where the backward's second pass has no launch of its own.
    """
    packed = rule is PACKED
    busy = rule is not CAUSAL
    config = config_for(DTYPES[dtype], CAPABILITIES[gpu], gpu == "amd", d, busy)
    absent = [] if rule is BIASED else ["bias_ptr", "slopes_ptr"]
    absent += [] if packed else ["cu_q_ptr", "cu_k_ptr", "sinks_ptr"]
    constants: dict[str, Any] = {"D": d, "DV": d, "BLOCK_D": padded(d), "BLOCK_DV": padded(d)}
    added = torch.empty(0) if rule is BIASED else None
    constants |= features_of(rule, DTYPES[dtype], added, added)
    kernel: Any = attention_backward.attention_backward_kernel
    keys, queries = config.keys, config.queries
    constants |= {"KEYS_M": keys.block_m, "KEYS_N": keys.block_n}
    constants |= {"QUERIES_M": queries.block_m, "QUERIES_N": queries.block_n}
    if part == "attention":
        kernel, tile = attention.attention_kernel, config.forward
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    elif part == "attention_bias_backward":
        kernel, tile = attention_bias.attention_bias_backward_kernel, queries
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        constants |= {"ALL_QUERIES": False, "ALL_KEYS": False}
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
            types[name] = "*fp32" if name in FP32 else f"*{dtype}"
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
        cases = [(d, half, "causal", CAUSAL) for d in (96, 128, 256, 512)]
        cases.append((64, half, "dropout", DROPPED))
        if gpu in ALL_FEATURES:
            cases += [(96, half, "packed", PACKED), (128, half, "bias", BIASED)]
        names = {case: f"{case[1]}/{case[0]}/{case[2]}/{gpu}" for case in cases}
        if gpu == "no_matrix_units":  # which is what all are in fp32
            names[(64, "fp32", "causal", CAUSAL)] = "fp32/64/causal"
        for (d, dtype, _, rule), name in names.items():
            parts = ["attention", "attention_backward", "attention_backward_queries"]
            parts += ["attention_bias_backward"] if rule is BIASED else []
            for part in parts:
                variant = attention_variant(part, gpu, d, dtype, rule)
                if variant is not None:
                    found[f"{part}/{name}"] = variant
    return found | {
        "attention_delta/bf16/128": small_variant(attention.delta_kernel, "DV", "BLOCK_M"),
        "attention_sum_parts/bf16/128": small_variant(
            attention_backward.sum_parts_kernel, "D", "BLOCK"
        ),
    }


def small_variant(kernel: Any, dim: str, block: str) -> Variant:
    """What runs over rows of 128: of delta, of the parts of a gradient."""
    config = configs.ATTENTION_DELTA
    constants = {dim: 128, f"BLOCK_{dim}": 128, block: config.tile // 128}
    fp32 = ("delta_ptr", "dlse_ptr", "parts_ptr")
    types = {}
    for name in (param.name for param in kernel.params if param.name not in constants):
        pointer = "*fp32" if name in fp32 else "*bf16"
        types[name] = pointer if name.endswith("_ptr") else "i32"
    return Variant(kernel, types, constants, {"num_warps": config.num_warps})
