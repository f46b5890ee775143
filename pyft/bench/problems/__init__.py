"""What `pyft bench` can measure, by name. A new op is one file here and one line in ``OPS``."""

from pyft.bench.problem import Op
from pyft.bench.problems import dropout, linear, optim, quantize

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        quantize.DEQUANTIZE,
        quantize.QUANTIZE,
        linear.QLINEAR,
        linear.LORA_LINEAR,
        dropout.DROPOUT,
        optim.ADAMW8BIT,
    )
}
