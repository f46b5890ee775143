"""Attention, on the problems of pyft.bench."""


def test_attention(run, case, variant):
    run(case, variant)
