"""The rotary embedding, on the problems of pyft.bench."""


def test_rope(run, case, variant):
    run(case, variant)
