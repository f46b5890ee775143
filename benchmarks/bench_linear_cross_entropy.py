"""The loss without logits, on the problems of pyft.bench."""


def test_linear_cross_entropy(run, case, variant):
    run(case, variant)
