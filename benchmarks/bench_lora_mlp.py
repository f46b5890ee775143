"""The gated MLP with LoRA adapters, on the problems of pyft.bench."""


def test_lora_mlp(run, case, variant):
    run(case, variant)
