"""Every test: its own seed, uninitialised memory full of NaN, no network, one thread."""

import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from hypothesis import settings

THREADS = 1  # tiny tensors: a second thread costs more than it brings
TOKENIZER = Path(__file__).parents[1] / "pyft" / "embedded" / "model"

settings.register_profile("pyft", deadline=None, max_examples=40, database=None)
settings.load_profile("pyft")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "unfilled: torch.empty stays as it is; for tests of huge tensors nobody reads"
    )
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """A seed of the test's own name, and NaN (255 for bytes) wherever torch.empty gives memory."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries under test draw from the global generator
    torch.manual_seed(seed)
    filled = request.node.get_closest_marker("unfilled") is None
    torch.use_deterministic_algorithms(filled, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(THREADS)


@dataclass(frozen=True)
class Architecture:
    """A tiny model: its configuration class in transformers, and what differs from COMMON."""

    config: str
    options: dict[str, Any]
    linears: int  # per layer, those "all-linear" targets
    norms: int = 2  # per layer
    activation: str = "silu"
    qkv: bool = True  # q, k and v apart


COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", {}, 7),
    "qwen2": Architecture("Qwen2Config", {}, 7),
    "qwen3": Architecture("Qwen3Config", {"tie_word_embeddings": True}, 7, norms=4),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16},
        7,
        norms=6,
        activation="gelu_tanh",
    ),
    "mistral": Architecture("MistralConfig", {"sliding_window": None}, 7),
    "phi3": Architecture("Phi3Config", {}, 4, qkv=False),
}


def build_model(name: str, **options: Any) -> Any:
    """A model of this architecture with random weights, biases included; the same at every call."""
    import transformers

    if name == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=4096, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
            eos_token_id=2, **options,
        )  # fmt: skip
    else:
        architecture = ARCHITECTURES[name]
        keys = COMMON | architecture.options | options
        config = getattr(transformers, architecture.config)(**keys)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(name, dtype=float32, sharded=False): a directory with weights and tokenizer."""
    made: dict[tuple[str, torch.dtype, bool], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, sharded: bool = False) -> Path:
        key = (name, dtype, sharded)
        if key not in made:
            path = tmp_path_factory.mktemp(name)
            model = build_model(name).to(dtype)
            model.save_pretrained(path, max_shard_size="300KB" if sharded else "1GB")
            for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
                shutil.copy(TOKENIZER / file, path)
            assert len(list(path.glob("*.safetensors"))) > 1 or not sharded
            made[key] = path
        return made[key]

    return get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: no core is left waiting for one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
