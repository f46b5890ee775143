"""The linear over a quantized weight, on the problems of pyft.bench."""


def test_qlinear(run, case, variant):
    run(case, variant)
