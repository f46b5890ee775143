"""Attention over chunks of keys, on the problems of pyft.bench."""


def test_chunked_attention(run, case, variant):
    run(case, variant)
