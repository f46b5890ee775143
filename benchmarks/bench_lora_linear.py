"""The LoRA linear, on the problems of pyft.bench."""


def test_lora_linear(run, case, variant):
    run(case, variant)
