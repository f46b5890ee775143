"""The passes over a tile of logits, on the problems of pyft.bench."""


def test_logits(run, case, variant):
    run(case, variant)
