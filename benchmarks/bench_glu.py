"""Gated activations, on the problems of pyft.bench."""


def test_swiglu(run, case, variant):
    run(case, variant)


def test_geglu(run, case, variant):
    run(case, variant)
