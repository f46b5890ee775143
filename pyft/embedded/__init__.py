"""The embedded default: a small model, the general text kept aside from it, and how both were made.

`corpus`, `tokenizer` and `pretrain` build the model and the text from the sources of Python's
documentation; `docstrings` builds fine-tuning rows from the standard library of the Python that
runs. README.md has the numbers, NOTICE the source.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The checkpoint directory: config, bf16 safetensors, tokenizer."""

GENERAL_TEXT: Path = Path(__file__).parent / "general.jsonl"
"""Passages of prose from documents the model never saw, one `{"text": ...}` a line."""
