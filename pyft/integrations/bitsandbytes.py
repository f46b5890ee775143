"""bitsandbytes NF4 weights seen as QuantizedTensors: the same layout, so nothing is copied."""

from typing import Any

import torch
from torch import Tensor

from pyft.formats import BLOCK_SIZES, NESTED_BLOCK
from pyft.quantized import QuantizedTensor


def obstacle(weight: Any) -> str | None:
    """Why a ``Params4bit`` cannot be read as a QuantizedTensor, or None when it can."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "its 4-bit weight is not quantized yet; move the model to its device first"
    if state.quant_type != "nf4":
        return f"its 4-bit format is {state.quant_type}, not nf4"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "its 4-bit weight was repacked by bitsandbytes for its own CPU kernel; "
            "call pyft.apply before model.eval()"
        )
    if state.blocksize not in BLOCK_SIZES:
        return f"its block size {state.blocksize} is not one of {', '.join(map(str, BLOCK_SIZES))}"
    if state.nested and state.state2.blocksize != NESTED_BLOCK:
        return f"its nested block size {state.state2.blocksize} is not {NESTED_BLOCK}"
    return None


def as_quantized(weight: Any) -> QuantizedTensor:
    """The weight's storage as a QuantizedTensor of the quantization state's shape and dtype."""
    state = weight.quant_state
    nested: Tensor | None = None
    offset: Tensor | None = None
    if state.nested:
        nested, offset = (
            state.state2.absmax,
            torch.as_tensor(state.offset, device=weight.device).float(),
        )
    packed = weight.data.view(torch.uint8).view(-1)  # stored as another dtype for FSDP
    return QuantizedTensor(
        packed, state.absmax, nested, offset, "nf4", state.blocksize, state.shape, state.dtype
    )
