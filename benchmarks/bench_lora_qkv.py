"""Queries, keys and values with LoRA adapters, on the problems of pyft.bench."""


def test_lora_qkv(run, case, variant):
    run(case, variant)
