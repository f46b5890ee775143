"""Dropout from a seed, on the problems of pyft.bench."""


def test_dropout(run, case, variant):
    run(case, variant)
