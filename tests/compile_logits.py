"""Compilations of the kernels for logits for the compile table, as their launchers make them."""

from typing import Any

import triton
from compile_gate import Variant

from pyft.kernels import configs, logits

VOCABULARY = 131072
FLOATS = ("scale", "factor", "cap", "teacher_factor", "teacher_cap", "threshold")
TILES = ("z_ptr", "teacher_ptr")  # other pointers are of fp32 unless named here
POINTERS = {"labels_ptr": "*i64", "argmax_ptr": "*i64", "kept_ptr": "*u8"}
# What is absent from a plain loss, statistics and gradient; nothing is from what has everything.
PLAIN = ("weights_ptr", "teacher_ptr", "teacher_lse_ptr", "smooth_ptr", "mean_ptr", "cross_ptr")
PLAIN += ("top_ptr", "argmax_ptr", "g_smooth_ptr", "g_mean_ptr", "g_cross_ptr", "kept_ptr")


def logit_variant(kernel: Any, dtype: str, absent: tuple[str, ...], columns: int) -> Variant:
    """Rows of so many columns, which begin where wide accesses can; a softcap where nothing is
    absent.
    """
    config = configs.LOGITS
    gradient = kernel is logits.gradient_kernel
    tile = config.gradient_tile if gradient else config.tile
    warps = config.gradient_warps if gradient else config.num_warps
    constants: dict[str, Any] = {
        "SOFTCAP": not absent,
        "TEACHER_SOFTCAP": not absent,
        "RAGGED": columns % logits.EVEN > 0,
    }
    constants |= {"TILE": tile, "PARTS": triton.next_power_of_2(triton.cdiv(columns, tile))}
    constants |= dict.fromkeys(absent) | ({"parts_ptr": None} if columns <= tile else {})
    names = [param.name for param in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    types = {}
    for name in names:
        if name in TILES:
            types[name] = f"*{dtype}"
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, "*fp32")
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    types = {name: kind for name, kind in types.items() if name not in constants}
    options = {"num_warps": 1 if kernel is logits.merge_kernel else warps}
    return Variant(kernel, types, constants, options, ("V",) if columns % logits.EVEN else ())


def logit_variants() -> dict[str, Variant]:
    """By name: kernel, dtype, what there is of it."""
    kernels = {
        "logit_statistics": logits.statistics_kernel,
        "logit_merge": logits.merge_kernel,
        "logit_gradient": logits.gradient_kernel,
    }
    found = {
        f"{name}/{dtype}/{what}": logit_variant(kernel, dtype, absent, VOCABULARY)
        for name, kernel in kernels.items()
        for dtype, what, absent in (("bf16", "plain", PLAIN), ("fp32", "all", ()))
    }
    for name in ("logit_statistics", "logit_gradient"):
        kernel = kernels[name]
        found[f"{name}/bf16/plain/ragged"] = logit_variant(kernel, "bf16", PLAIN, VOCABULARY + 1)
        found[f"{name}/fp16/all/short"] = logit_variant(kernel, "fp16", (), 1024)
    return found
