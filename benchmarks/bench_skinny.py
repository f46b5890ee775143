"""The adapter's products, on the problems of pyft.bench."""


def test_skinny(run, case, variant):
    run(case, variant)
