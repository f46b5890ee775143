"""A matmul with a low-rank product, each way, on the problems of pyft.bench."""


def test_lora_matmul(run, case, variant):
    run(case, variant)
