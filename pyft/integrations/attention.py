"""transformers' attention under the name "pyft": models load with attn_implementation="pyft"."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pyft.errors import UsageError
from pyft.integrations.masks import Mask, as_bias, make_mask, of_padding, of_positions
from pyft.ops.attention import attention
from pyft.quantized import QuantizedTensor

NAME = "pyft"
_NOTE = "_pyft_attention"  # on a model: the implementation it had
_COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What some models pass on that changes which keys are seen or what they weigh.
_NOT_HONOURED = ("head_mask", "indices", "block_indices", "block_table", "cache")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention of a module of transformers: query [B, Hq, S, D], key and value [B, Hkv, S, D]
    -> o [B, S, Hq, Dv].

    Raises:
        UsageError: asked for attention weights, or for something that would be left out silently.
    """
    _refuse(options)
    if s_aux is None:
        s_aux = options.get("sinks")
    query, key, value = _in_one_dtype(module, query, key, value)
    mask, bias = _mask_of(module, query, key, attention_mask, sliding_window, is_causal, options)
    if position_bias is not None:
        if mask.cu_q is not None:
            mask, bias = Mask(mask.sizes), mask.as_bias(query, key)
        bias = position_bias if bias is None else bias + position_bias
    b, _, s, _ = query.shape
    if mask.cu_q is not None:
        query, key, value = map(_one_row, (query, key, value))
    o: Tensor = attention(
        query, key, value, causal=False, scale=scaling, window=(mask.left, mask.right),
        softcap=softcap, sinks=s_aux, bias=bias, cu_seqlens_q=mask.cu_q, cu_seqlens_k=mask.cu_k,
        dropout_p=dropout, shift=mask.shift,
    )  # fmt: skip
    o = o.transpose(1, 2)
    return (o if mask.cu_q is None else o.reshape(b, s, *o.shape[2:])).contiguous(), None


def _refuse(options: dict[str, Any]) -> None:
    if options.get("output_attentions"):
        raise UsageError(
            "attention weights are never made with attn_implementation='pyft'; use 'eager' where "
            "output_attentions=True is needed"
        )
    for name in _NOT_HONOURED:
        if options.get(name) is not None:
            raise UsageError(
                f"attn_implementation='pyft' does not know what to do with {name}, which this "
                "model's attention passes; use 'eager' or 'sdpa'"
            )


def _in_one_dtype(module: nn.Module, *heads: Tensor) -> Iterator[Tensor]:
    """Norms and rotary embeddings in fp32 leave q and k in fp32: back to what the layer runs in."""
    dtype = heads[2].dtype
    if any(x.dtype == torch.float32 for x in heads):
        kind = heads[0].device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        elif dtype == torch.float32:
            linear = next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
            weight = heads[2] if linear is None else linear.weight
            dtype = weight.dtype
            if isinstance(weight, QuantizedTensor) or dtype not in _COMPUTED_IN:
                named = getattr(getattr(module, "config", None), "dtype", None) or torch.float32
                dtype = getattr(torch, named) if isinstance(named, str) else named
    return (x.to(dtype) for x in heads)


def _mask_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    given: Mask | Tensor | None,
    window: int | None,
    causal: bool | None,
    options: dict[str, Any],
) -> tuple[Mask, Tensor | None]:
    """Bounds and boundaries, and a bias where they do not say all."""
    if causal is None:
        causal = bool(getattr(module, "is_causal", False))
    sq, sk = query.shape[2], key.shape[2]
    sizes = (query.shape[0], 1, sq, sk)
    if isinstance(given, Tensor) and given.dim() == 2:
        given = of_padding(given, sq, causal)
        if isinstance(given, Mask) and window is not None:
            given.left = window - 1
    cu_q, cu_k = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    if isinstance(given, Tensor):
        if cu_q is not None:
            raise UsageError(
                "attn_implementation='pyft' is given cu_seq_lens and a mask that is a matrix; pass "
                "one of them"
            )
        given = given[..., :sk]
        return Mask(sizes), as_bias(given, query.dtype) if given.dtype == torch.bool else given
    if given is None:
        left = None if window is None else window - 1
        given = Mask(sizes, left, 0 if causal else left)
    if given.cu_q is not None:
        return given, None
    if cu_q is not None:
        return Mask(sizes, given.left, given.right, given.shift, cu_q, cu_k), None
    if given.right == 0 and sq == sk:
        return given.packed(_boundaries_of(options.get("position_ids"), query.shape[0])), None
    return given, None


# Whose boundaries were found last: a tensor of positions, as it was then, and for which batch.
_Found = tuple[Callable[[], Tensor | None], int, int, Tensor | None]
_latest: list[_Found] = [(lambda: None, 0, 0, None)]


def _boundaries_of(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Of models whose masks are made without positions, as gpt-oss's: found at the first layer of a
    step, known to the others.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    if torch.compiler.is_compiling() or position_ids.is_inference():
        return of_positions(position_ids, batch)
    of, version, rows, cu = _latest[0]
    if of() is not position_ids or (version, rows) != (position_ids._version, batch):
        cu = of_positions(position_ids, batch)
        _latest[0] = (weakref.ref(position_ids), position_ids._version, batch, cu)
    return cu


def _one_row(x: Tensor) -> Tensor:
    """[B, H, S, D] as [1, H, B S, D]: a view of what projections write."""
    b, h, s, d = x.shape
    return x.transpose(1, 2).reshape(1, b * s, h, d).transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)


def set_attention(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Let the attentions of a model and its submodels run pyft's: name, module, and why not."""
    seen = set()
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module.config) in seen:
            continue
        seen.add(id(module.config))
        if not module._can_set_attn_implementation():
            yield name, module, "it does not use transformers' attention interface"
            continue
        before = module.config._attn_implementation
        if before != NAME:
            module.__dict__[_NOTE] = before
            module.config._attn_implementation_internal = NAME
        yield name, module, ""


def reset_attention(model: nn.Module) -> None:
    """What ``set_attention`` changed, as it was."""
    for module in model.modules():
        if _NOTE not in module.__dict__:
            continue
        before = module.__dict__.pop(_NOTE)
        if module.config._attn_implementation == NAME:  # type: ignore[union-attr]
            module.config._attn_implementation_internal = before  # type: ignore[union-attr]
