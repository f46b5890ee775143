"""What `make gpu` runs under compute-sanitizer: every kernel, on shapes with hard edges."""

from inspect import signature
from itertools import product
from typing import Any

import torch
from benchmark_files import load

from pyft import native
from pyft.formats import FORMATS, SCALE_FORMAT

# The argument by whose dtype a launcher chooses, where it is not x.
ON = {
    "optim": "on",
    "dequantize": "out",
    "norm_backward": "dy",
    "rope": "q",
    "glu": "gate",
    "glu_backward": "gate",
    "attention": "q",
    "attention_delta": "o",
    "attention_backward": "q",
    "attention_bias_backward": "q",
    "logit_statistics": "tile",
    "logit_gradient": "tile",
}


def test_every_native_kernel_is_run(monkeypatch):
    """The same calls as on a GPU, counted at the functions that launch kernels."""
    seen: dict[str, list[dict[str, Any]]] = {}

    def spy(name: str) -> None:
        function = getattr(native, name)
        parameters = signature(function)

        def counted(*arguments: Any) -> None:
            bound = parameters.bind(*arguments).arguments
            on = bound[ON.get(name, "x")]
            on = on[0] if isinstance(on, tuple) else on
            seen.setdefault(name, []).append(bound | {"dtype": on.dtype})
            function(*arguments)

        monkeypatch.setattr(native, name, counted)

    layers = ("norm", "norm_backward", "rope", "glu", "glu_backward")
    layers += tuple(name for name in ON if name.startswith(("attention", "logit")))
    for name in ("quantize", "dequantize", "qlinear", "dropout", "optim", *layers):
        spy(name)
    ran = load("gpu_kernels").kernels(torch.device("cpu"))
    launches = {name: len(calls) for name, calls in seen.items()}
    # and at least 3 chunks of a trained head's columns, as many as a filter leaves
    assert launches.pop("logit_gradient") >= 3 * 2 * 4 * 4 + 3 * 2 * 3 * 3
    weights = 3 * (7 * 2 + 6 * 2)  # dtypes, formats, shapes and, but for mxfp4, block sizes
    linears = 3 * 3 * 3  # dtypes, formats, K
    nested = sum(call["zero_code"] == SCALE_FORMAT.zero_code for call in seen["quantize"])
    assert launches == {
        "quantize": weights + linears + nested,
        "dequantize": 2 * weights,
        "qlinear": 5 * linears,
        "optim": 3 * 3,
        "dropout": 3,
        # dtypes, shapes, and norms or activations; of rope the ways below, and their inverses
        "norm": 3 * 2 * 4,
        "norm_backward": 3 * 2 * 4,
        "rope": 2 * 3 * 8,
        "glu": 3 * 2 * 4,
        "glu_backward": 3 * 2 * 4,
        # dtypes, sizes of a head, and ways, of which one has a bias
        "attention": 3 * 2 * 5,
        "attention_delta": 3 * 2 * 5,
        "attention_backward": 3 * 2 * 5,
        "attention_bias_backward": 3 * 2,
        # dtypes, sizes, losses, of which one has a teacher, and chunks of the 29 rows that count
        "logit_statistics": 3 * 2 * (4 + 1) * 4,
    }
    assert nested == 3 * (2 * 4 + 3)  # nf4 and fp4, and nf4 in linears
    assert ran == {"cpu": 3 * weights + 5 * linears + 9 + 3 * (2 * (4 + 4) + 8 + 2 * 5 + 2 * 4)}

    def found(name: str, *keys: str) -> set[tuple[Any, ...]]:
        return {tuple(call[key] for key in keys) for call in seen[name]}

    dtypes, bits = (torch.float32, torch.bfloat16, torch.float16), (4, 8)
    for name in ("quantize", "dequantize", "qlinear"):
        assert found(name, "dtype", "bits") == set(product(dtypes, bits))
    codings = {(fmt.bits, fmt.zero_code, fmt.top) for fmt in FORMATS.values()}
    assert len(codings) == len(FORMATS)
    quantized = found("quantize", "dtype", "bits", "zero_code", "top")
    assert quantized >= {(dtype, *coding) for dtype in dtypes for coding in codings}
    for size in (4096, 5000):  # the largest block, and a row
        sized = set(product(dtypes, bits, (size,)))
        assert found("quantize", "dtype", "bits", "block_size") >= sized
    shapes = {(c["dtype"], c["bits"], c["x"].shape[0], c["shape"][1]) for c in seen["qlinear"]}
    assert shapes == set(product(dtypes, bits, (1, 3, 8, 17, 64), (256, 104, 100)))
    assert any(c["nested"] is not None and c["bits"] == 4 for c in seen["qlinear"])
    assert any(c["zeros"] is not None for c in seen["qlinear"])
    odd = [c for c in seen["dequantize"] if c["out"].stride(0) > c["out"].shape[1]]
    assert {(c["dtype"], c["bits"]) for c in odd} == set(product(dtypes, bits))
    assert all(c["slab"][0] % 2 and c["slab"][2] % 2 for c in odd)
    assert {(c["dtype"], c["rule"][0]) for c in seen["optim"]} == set(product(dtypes, range(3)))
    assert all(c["table"][:, 6].tolist() == [4097, 100] for c in seen["optim"])
    norms = {
        (c["dtype"], c["centered"], c["weight"] is None, c["bias"] is None, c["residual"] is None)
        for c in seen["norm"]
    }
    some = ((False, True, True, True), (False, False, True, False), (True, False, False, True))
    assert norms == {(d, *which) for d in dtypes for which in (*some, (True, False, True, False))}
    turns = {
        (c["dtype"], c["cos"].dtype, c["positions"] is None, c["interleaved"], c["inverse"])
        for c in seen["rope"]
    }
    tables = {(dtype, table) for dtype in dtypes for table in (dtype, torch.float32)}
    assert turns == {(*pair, *ways) for pair in tables for ways in product((True, False), repeat=3)}
    activations = set(product(dtypes, ("silu", "gelu", "gelu_tanh", "relu2")))
    assert found("glu", "dtype", "activation") == activations
    assert found("glu_backward", "dtype", "activation") == activations
    given = ("kept", "g_smooth", "g_mean", "g_cross")
    ways = {(c["dtype"], *(c[key] is not None for key in given)) for c in seen["logit_gradient"]}
    some = ((False,) * 4, (True, False, False, False), (False, True, False, False))
    assert ways == {(d, *which) for d in dtypes for which in (*some, (False, False, True, True))}
