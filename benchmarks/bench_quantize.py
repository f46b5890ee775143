"""Quantize and dequantize, on the problems of pyft.bench."""


def test_quantize(run, case, variant):
    run(case, variant)


def test_dequantize(run, case, variant):
    run(case, variant)
