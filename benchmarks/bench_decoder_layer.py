"""One decoder layer, on the problems of pyft.bench."""


def test_decoder_layer(run, case, variant):
    run(case, variant)
