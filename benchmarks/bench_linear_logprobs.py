"""Log-probabilities without logits, on the problems of pyft.bench."""


def test_linear_logprobs(run, case, variant):
    run(case, variant)
