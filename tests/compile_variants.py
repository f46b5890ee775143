"""Compilations of the fused kernels for the compile table, as their launchers make them."""

from dataclasses import replace
from typing import Any

from compile_attention import attention_variants
from compile_gate import Variant
from compile_logits import logit_variants
from triton.runtime.jit import JITFunction

from pyft.kernels import configs, dropout, glu, lora_matmul, norm, rope, skinny

SCALARS = ("eps", "offset", "scale", "keep_scale", "sign")  # fp32; other numbers are integers
SUMS = ("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr")  # fp32 whatever the dtype
WORDS = ("threshold", "seed")


def fused(
    kernel: JITFunction[Any], dtype: str, constants: dict[str, Any], options: dict[str, int]
) -> Variant:
    """All of a kernel's arguments that are not constants, by their names."""
    types = {}
    for name in (param.name for param in kernel.params if param.name not in constants):
        if name in SUMS:
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype}"
        elif name in WORDS:
            types[name] = "i64"
        else:
            types[name] = "fp32" if name in SCALARS else "i32"
    return Variant(kernel, types, constants, options)


def normed(kernel: JITFunction[Any], d: int, absent: tuple[str, ...]) -> Variant:
    """rms_norm of rows of d elements."""
    forward = kernel is norm.norm_kernel
    elements = configs.NORM.elements if forward else configs.NORM.elements_backward
    rows, block_d, long, num_warps = norm.tile_of(d, configs.NORM, elements)
    constants: dict[str, Any] = {"ROWS": rows, "BLOCK_D": block_d} | dict.fromkeys(absent)
    constants |= {"LONG": long} if forward else {}
    return fused(kernel, "bf16", constants, {"num_warps": num_warps})


def rotated() -> Variant:
    """Heads of 128 dimensions."""
    constants = {"HALF": 64, "BLOCK_HALF": 64, "REST": 0, "BLOCK_REST": 1, "INTERLEAVED": False}
    constants |= {"BLOCK_H": configs.ROPE.tile // 128, "positions_ptr": None}
    return fused(rope.rope_kernel, "bf16", constants, {"num_warps": configs.ROPE.num_warps})


def activated(kernel: JITFunction[Any], activation: str) -> Variant:
    constants = {"ACTIVATION": activation, "TILE": configs.GLU.tile}
    return fused(kernel, "bf16", constants, {"num_warps": configs.GLU.num_warps})


def adapted(dtype: str, config: configs.LoraMatmul, backward: bool = False) -> Variant:
    """Rank 16; ``backward``: over W itself, with dropout."""
    constants: dict[str, Any] = {"RANK": 16, "BLOCK_R": 16, "DROPOUT": backward, "GROUPED": True}
    constants |= {"EVEN_K": True, "TMA": config.tma, "ALONG_K": not backward}
    constants |= {"PERSISTENT": config.persistent, "BLOCK_M": config.block_m}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m}
    adjacent = ("stride_wn", "stride_bn") if backward else ("stride_wk", "stride_br")
    constants |= dict.fromkeys(adjacent, 1)
    x = w = f"*{dtype}"
    if config.tma:
        blocks = (config.block_k, config.block_n) if backward else (config.block_n, config.block_k)
        x = f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>"
        w = f"tensordesc<{dtype}[{blocks[0]}, {blocks[1]}]>"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    variant = fused(lora_matmul.lora_matmul_kernel, dtype, constants, options)
    return replace(variant, types=variant.types | {"x": x, "w": w})


def thin(kernel: JITFunction[Any], config: configs.Skinny, dropout: bool) -> Variant:
    """Rank 16, sums in parts."""
    constants: dict[str, Any] = {"RANK": 16, "BLOCK_R": 16, "DROPOUT": dropout, "GROUPED": True}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    constants["stride_ak" if kernel is skinny.project_kernel else "stride_ok"] = 1
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    variant = fused(kernel, "bf16", constants, options)
    return replace(variant, types=variant.types | {"out_ptr": "*fp32"})


def fused_variants() -> dict[str, Variant]:
    """By name: op, dtype, what else; the ends of names are those of ``test_compile_table``."""
    old = configs.LORA_MATMUL_NO_MATRIX_UNITS
    persistent_tma = configs.LORA_MATMUL_PERSISTENT_TMA
    return {
        "norm/bf16/4096": normed(norm.norm_kernel, 4096, ("bias_ptr", "mean_ptr")),
        "norm_backward/bf16/4096": normed(
            norm.norm_backward_kernel, 4096, ("mean_ptr", "dbias_ptr")
        ),
        "rope/bf16/128": rotated(),
        "dropout/bf16": fused(
            dropout.dropout_kernel,
            "bf16",
            {"TILE": configs.DROPOUT.tile},
            {"num_warps": configs.DROPOUT.num_warps},
        ),
        "glu/bf16/gelu": activated(glu.glu_kernel, "gelu"),
        "glu_backward/bf16/silu": activated(glu.glu_backward_kernel, "silu"),
        "lora_matmul/bf16/matrix": adapted("bf16", configs.LORA_MATMUL),
        "lora_matmul/bf16/backward/matrix": adapted("bf16", configs.LORA_MATMUL, backward=True),
        "lora_matmul/bf16/persistent/matrix": adapted("bf16", configs.LORA_MATMUL_PERSISTENT),
        "lora_matmul/fp16": adapted("fp16", old),
        "lora_matmul/bf16/persistent/tma": adapted("bf16", persistent_tma),
        "lora_matmul/bf16/backward/wide": adapted("bf16", configs.LORA_MATMUL_TMA, backward=True),
        "project/bf16/matrix": thin(skinny.project_kernel, configs.PROJECT, dropout=False),
        "reduce/bf16/dropout/matrix": thin(skinny.reduce_kernel, configs.REDUCE, dropout=True),
        **attention_variants(),
        **logit_variants(),
    }
