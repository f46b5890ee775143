"""One step of the 8-bit optimizer, on the problems of pyft.bench."""


def test_adamw8bit(run, case, variant):
    run(case, variant)
