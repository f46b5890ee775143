"""What `pyft bench` can measure, by name. A new op is one file here and one line in ``OPS``."""

from pyft.bench.problem import Op
from pyft.bench.problems import (
    ablation,
    attention,
    decoder,
    dropout,
    layers,
    linear,
    lora,
    loss,
    optim,
    quantize,
)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        quantize.DEQUANTIZE,
        quantize.QUANTIZE,
        linear.QLINEAR,
        linear.LORA_LINEAR,
        lora.LORA_QKV,
        lora.LORA_MLP,
        decoder.DECODER_LAYER,
        attention.ATTENTION,
        attention.CHUNKED_ATTENTION,
        loss.LINEAR_CROSS_ENTROPY,
        loss.LINEAR_LOGPROBS,
        loss.LOGITS,
        layers.RMS_NORM,
        layers.LAYER_NORM,
        layers.ROPE,
        layers.SWIGLU,
        layers.GEGLU,
        ablation.LORA_MATMUL,
        ablation.SKINNY,
        dropout.DROPOUT,
        optim.ADAMW8BIT,
    )
}
