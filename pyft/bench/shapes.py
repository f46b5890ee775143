"""Real layers of models from 1B to 70B parameters, as data.

N out features, K in features, M tokens. A layer's weight is [N, K], as in ``torch.nn.Linear``.
Source: the configurations published with each model.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pyft.errors import UsageError

TOKENS = (1, 16, 64, 512, 2048, 8192)


@dataclass(frozen=True)
class Model:
    """The sizes of a model's linears: ``queries`` and ``keys`` are heads times head dim."""

    name: str
    hidden: int
    intermediate: int
    queries: int
    keys: int
    layers: int
    head_dim: int = 128

    @property
    def size(self) -> str:
        """The end of the name in lower case: ``8b``."""
        return self.name.rsplit("-", 1)[1].lower()

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear of one layer."""
        up = (self.intermediate, self.hidden)
        return {
            "q": (self.queries, self.hidden),
            "k": (self.keys, self.hidden),
            "v": (self.keys, self.hidden),
            "o": (self.hidden, self.queries),
            "gate": up,
            "up": up,
            "down": (self.hidden, self.intermediate),
        }


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("Llama-3.2-1B", 2048, 8192, 2048, 512, 16, 64),
        Model("Gemma-2-2B", 2304, 9216, 2048, 1024, 26, 256),
        Model("Llama-3.2-3B", 3072, 8192, 3072, 1024, 28),
        Model("Llama-3.1-8B", 4096, 14336, 4096, 1024, 32),
        Model("Gemma-2-9B", 3584, 14336, 4096, 2048, 42, 256),
        Model("Qwen2.5-14B", 5120, 13824, 5120, 1024, 48),
        Model("Qwen2.5-32B", 5120, 27648, 5120, 1024, 64),
        Model("Llama-3.1-70B", 8192, 28672, 8192, 1024, 80),
    )
}
LINEARS = tuple(MODELS["Llama-3.1-8B"].linears())


@dataclass(frozen=True)
class Layer:
    """One weight shape and which linear it is; ``source`` is "" for a shape given by hand."""

    n: int
    k: int
    source: str = ""
    model: str = ""


# Named sets: (model, linear). What a machine measures by default is what its memory and about a
# minute allow.
SETS: dict[str, tuple[tuple[str, str], ...]] = {
    "small": (("Llama-3.2-1B", "q"), ("Llama-3.2-1B", "gate")),
    "cpu": (("Llama-3.2-1B", "q"), ("Llama-3.1-8B", "gate")),
    "gpu8": (("Llama-3.2-1B", "q"), ("Llama-3.1-8B", "q"), ("Llama-3.1-8B", "gate")),
    "gpu24": (
        ("Llama-3.2-1B", "q"),
        ("Llama-3.1-8B", "q"),
        ("Llama-3.1-70B", "down"),
        ("Llama-3.1-8B", "gate"),
    ),
    "all": tuple((model, linear) for model in MODELS for linear in LINEARS),
}
DEFAULT_TOKENS = {"cpu": (16, 512, 2048), "gpu8": (16, 2048), "gpu24": (16, 2048, 8192)}
DEFAULT_MODEL = {"cpu": "Llama-3.2-1B", "gpu8": "Llama-3.1-8B", "gpu24": "Llama-3.1-8B"}


def default_layers(machine: str) -> list[Layer]:
    """The layers measured when none are named, on a machine called as in ``SETS``."""
    return _layers(SETS[machine])


def default_tokens(machine: str) -> tuple[int, ...]:
    """The token counts measured when none are named."""
    return DEFAULT_TOKENS[machine]


def models_of(layers: Sequence[Layer], machine: str) -> list[Model]:
    """The models that layers are of, each once; the machine's default for no layers.

    A shape N x K given by hand is the gate and the queries of a model, whose keys are a quarter.
    """
    found = [MODELS[layer.model] if layer.model else _of_hand(layer) for layer in layers]
    return list(dict.fromkeys(found or [MODELS[DEFAULT_MODEL[machine]]]))


def _of_hand(layer: Layer) -> Model:
    keys = max(1, layer.n // 4)
    return Model("", layer.k, layer.n, layer.n, keys, 1, math.gcd(keys, 64))


def parse_layers(shapes: str | None, explicit: Sequence[str] = ()) -> list[Layer]:
    """The layers a user asked for.

    Args:
        shapes: names apart by commas: a set (small, cpu, gpu8, gpu24, all), a model
            (llama-3.1-8b), its size (8b), a linear (down), or a model and a linear (8b:down).
        explicit: shapes as NxK.

    Returns:
        One layer per shape; none when nothing is asked for.

    Raises:
        UsageError: a name or a shape that means nothing.
    """
    found = [_explicit(text) for text in explicit]
    for word in (shapes or "").split(","):
        if word.strip():
            found += _named(word.strip().lower())
    return _merged(found)


def _named(word: str) -> list[Layer]:
    if word in SETS:
        return _layers(SETS[word])
    model, _, linear = word.partition(":")
    if model in LINEARS and not linear:
        model, linear = "", model
    models = [
        known.name for known in MODELS.values() if model in ("", known.name.lower(), known.size)
    ]
    linears = [known for known in LINEARS if linear in ("", known)]
    if not models or not linears:
        sizes = ", ".join(known.size for known in MODELS.values())
        raise UsageError(
            f"--shapes: {word!r} is unknown; use a set ({', '.join(SETS)}), a size ({sizes}), "
            f"a model's name, a linear ({', '.join(LINEARS)}) or both as in 8b:down"
        )
    return _layers([(model, linear) for model in models for linear in linears])


def _explicit(text: str) -> Layer:
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise UsageError(f"--shape: {text!r} is not NxK, as in 14336x4096")
    return Layer(int(match[1]), int(match[2]))


def _layers(entries: Sequence[tuple[str, str]]) -> list[Layer]:
    return _merged(
        [
            Layer(*MODELS[model].linears()[linear], source=f"{model} {linear}", model=model)
            for model, linear in entries
        ]
    )


def _merged(layers: Sequence[Layer]) -> list[Layer]:
    """One layer per shape, the first; layers that share a shape are measured once."""
    first: dict[tuple[int, int], Layer] = {}
    for layer in layers:
        first.setdefault((layer.n, layer.k), layer)
    return list(first.values())
