"""RMSNorm and LayerNorm, on the problems of pyft.bench."""


def test_rms_norm(run, case, variant):
    run(case, variant)


def test_layer_norm(run, case, variant):
    run(case, variant)
