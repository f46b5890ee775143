"""One decoder layer of a Llama as transformers has it, with LoRA adapters on its seven linears.

    h = x + o(attention(rope(q(n)), rope(k(n)), v(n)))      n = rms_norm(x)
    y = h + down(silu(gate(m)) up(m))                       m = rms_norm(h)

    x, y [1, M, K], intermediate size N, H query heads and Hkv key heads of size D, causal

Ours is the layer over quantized weights as PEFT makes it, after ``pyft.apply``. Beside it: the same
by PEFT over bitsandbytes' linears, by PEFT over the decoded weights in the op's dtype, and, as the
floor, the layer over those without adapters (dX only). The truth is the layer in float64 over the
decoded weights, adapters by plain torch. Of models that are no Llamas the sizes are taken.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import pyft
from pyft.bench import peers
from pyft.bench.backends import VARIANTS, gradients, on_backends
from pyft.bench.problem import Call, Candidate, Case, Op, Problem, Request, Work, close
from pyft.bench.problems.linear import SCALE
from pyft.bench.problems.lora import adapters_of, group_work, lora, packed_apart
from pyft.bench.problems.quantize import BNB_FORMATS
from pyft.bench.problems.truths import truths
from pyft.bench.problems.weights import Weight, random, weights
from pyft.bench.shapes import Layer, models_of
from pyft.errors import UsageError

TOKENS = {"cpu": (128, 512, 2048), "gpu8": (512,), "gpu24": (512, 2048)}
BOTH = VARIANTS[2]
PLACES = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def attention_flops(m: int, heads: int, head_dim: int) -> int:
    """Of causal attention, forward and backward: two products over half of M by M, then four."""
    return (2 + 4) * m * m * heads * head_dim


def _cases(request: Request) -> list[Case]:
    return [
        Case(
            "decoder_layer",
            dtype,
            Layer(model.intermediate, model.hidden, f"{model.name} gate" * bool(model.name)),
            {
                "M": m,
                "N": model.intermediate,
                "K": model.hidden,
                "H": model.queries // model.head_dim,
                "Hkv": model.keys // model.head_dim,
                "D": model.head_dim,
                "R": request.rank,
            },
            format,
        )
        for model in models_of(request.layers, request.machine)
        for dtype in request.dtypes or ("bf16",)
        for format in request.formats
        for m in request.tokens or TOKENS[request.machine]
    ]


def _shapes(case: Case) -> dict[str, tuple[int, int]]:
    n, k, h, hkv, d = (case.sizes[name] for name in ("N", "K", "H", "Hkv", "D"))
    return {
        "q": (h * d, k), "k": (hkv * d, k), "v": (hkv * d, k), "o": (k, h * d),
        "gate": (n, k), "up": (n, k), "down": (k, n),
    }  # fmt: skip


class _Plain(nn.Module):
    """A linear by plain torch in the dtype of its input, with an adapter or without."""

    def __init__(self, w: Tensor, adapter: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.w, self.adapter = w, adapter

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self.adapter is None:
            return linear(x, self.w.to(x.dtype))
        return lora(self.w, *self.adapter, x)


class _Llama:
    """Layers of one case over different linears; norms, rotary tables and positions are shared."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.modeling = peers.load("transformers.models.llama.modeling_llama")
        sizes = case.sizes
        self.config = peers.load("transformers").LlamaConfig(
            hidden_size=sizes["K"], intermediate_size=sizes["N"], num_hidden_layers=1,
            num_attention_heads=sizes["H"], num_key_value_heads=sizes["Hkv"],
            head_dim=sizes["D"], attn_implementation="sdpa",
        )  # fmt: skip
        norms = (random((sizes["K"],), case, device, name) for name in NORMS)
        self.norms = [1 + 0.1 * values for values in norms]
        positions = torch.arange(sizes["M"], device=device)[None]
        rotary = self.modeling.LlamaRotaryEmbedding(self.config).to(device)
        self.tables = rotary(self.norms[0], positions)

    def layer(self, base: Callable[[str], nn.Module], dtype: torch.dtype) -> nn.Module:
        """transformers' decoder layer over the linears that ``base`` makes for each name."""
        with torch.device("meta"):
            layer: nn.Module = self.modeling.LlamaDecoderLayer(self.config, 0)
        for name, place in PLACES.items():
            parent, _, child = place.rpartition(".")
            setattr(layer.get_submodule(parent), child, base(name))
        for name, values in zip(NORMS, self.norms, strict=True):
            weight = nn.Parameter(values.to(dtype), requires_grad=False)
            layer.get_submodule(name).weight = weight
        return layer.train()

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        """y [1, M, K], causal."""
        tables = tuple(table.to(x.dtype) for table in self.tables)
        y: Tensor = layer(x, position_embeddings=tables)
        return y

    def truth(self, decoded: Mapping[str, Tensor], x: Tensor, *adapters: Tensor) -> Tensor:
        """y by plain torch in x's dtype; without adapters the frozen layer's."""
        pairs = dict(zip(PLACES, zip(adapters[::2], adapters[1::2], strict=True), strict=False))
        return self.run(self.layer(lambda name: _Plain(decoded[name], pairs.get(name)), x.dtype), x)


def _problems(case: Case, request: Request) -> Iterator[Problem]:
    if case.sizes["D"] % 2 or case.sizes["H"] % case.sizes["Hkv"]:
        raise UsageError(f"{case.op}: {case.shape}: no Llama has such heads; give a model's name")
    shapes, device = _shapes(case), request.device
    named = weights(shapes, case, device)
    decoded = {name: w.decoded for name, w in named.items()}
    pairs = adapters_of(shapes, case.sizes["R"], case, device)
    m, n, k = (case.sizes[name] for name in "MNK")
    x, dy = (random((1, m, k), case, device, name) for name in ("x", "dy"))
    llama = _Llama(case, device)
    plain = partial(llama.truth, decoded)
    references, wide = truths(plain, [x, *(part for pair in pairs.values() for part in pair)], [dy])
    floor_references, floor = truths(plain, [x], [dy])
    x.requires_grad_()

    def call(layer: nn.Module, *adapters: Tensor) -> Call:
        return gradients(lambda x, *_: llama.run(layer, x), [x, *adapters], dy)[BOTH]()

    def peft(base: Callable[[str], nn.Module], fused: bool = False) -> Call:
        layer = llama.layer(base, x.dtype)
        targets = {PLACES[name]: pair for name, pair in pairs.items()}
        adapters = peers.add_peft_lora(layer, targets, SCALE)
        if fused:
            _apply(layer)
        return call(layer, *adapters)

    def over_decoded(name: str) -> nn.Module:
        return peers.torch_linear(decoded[name])

    ours = partial(peft, lambda name: peers.torch_linear(named[name].used), fused=True)
    check = close(references, wide)
    others = [
        Candidate(
            "torch frozen layer", lambda: call(llama.layer(over_decoded, x.dtype)),
            close(floor_references, floor), "torch",
        ),
        Candidate(f"peft over {case.dtype}", partial(peft, over_decoded), check, "peft"),
    ]  # fmt: skip
    if case.format in BNB_FORMATS:
        over_bnb = partial(peft, lambda name: named[name].linear)
        apart = packed_apart(references, wide)
        others.insert(1, Candidate("peft+bitsandbytes", over_bnb, apart, "peft"))
    yield Problem(
        case,
        BOTH,
        _work(case, shapes, named, x.element_size()),
        on_backends(request, "lora_linear", ours, check),
        others,
        matmul=lambda: torch.mm(x[0].detach(), decoded["gate"].t()),
        matmul_flops=2 * m * n * k,
    )


def _apply(layer: nn.Module) -> None:
    report = pyft.apply(layer)
    if report.fused != len(PLACES):
        raise RuntimeError(f"pyft.apply fused {report.fused} of {len(PLACES)} linears: {report}")


def _work(
    case: Case, shapes: Mapping[str, tuple[int, int]], named: Mapping[str, Weight], itemsize: int
) -> Work:
    m, k, h, d, r = (case.sizes[name] for name in "MKHDR")
    stored = sum(w.stored_bytes for w in named.values())
    linears = group_work(m, shapes, itemsize, stored, r, (k, k))[BOTH]
    return Work(linears.bytes, linears.flops + attention_flops(m, h, d), linears.copied)


DECODER_LAYER = Op(
    "decoder_layer",
    "one Llama decoder layer with LoRA adapters over quantized weights, with all gradients",
    (BOTH,),
    "lora_linear",
    _cases,
    _problems,
)
