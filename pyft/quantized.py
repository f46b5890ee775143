"""QuantizedTensor: a weight in a format of ``pyft.formats``, usable wherever a frozen weight is.

It is a tensor subclass that shows the weight's logical shape and dtype and holds the packed data,
so a module keeps it in the parameter named ``weight`` and everything that walks parameters keeps
working. ``F.linear`` over it runs pyft's linear; moving it moves the packed data; ``.to(dtype)``
changes the dtype it decodes to and no stored bit. Any other read-only use decodes it first; writing
to it raises.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyft.errors import UsageError
from pyft.formats import FORMATS, Format

_INNER = ("packed", "scales", "zeros", "nested", "offset", "columns")
_LABELS = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
)  # dtypes a quantized weight can stand for
aten = torch.ops.aten


class QuantizedTensor(Tensor):
    """A quantized weight [N, K] (or any shape; rows are the first dimension).

    Attributes:
        packed: uint8 [ceil(n * bits / 8)].
        scales: fp32 [blocks]; uint8 [blocks] in e8m0 formats and with double quantization.
        zeros: uint8 [blocks] in formats with zero points, else None.
        nested, offset: fp32 [ceil(blocks/256)] and fp32 [], or None without double quantization.
        format: the ``pyft.formats.Format``.
        block_size: elements per scale; the length of a row where each row has one.
        columns: int32 [K] or None: column j as stored is column columns[j] of the weight (GPTQ with
            activation order groups columns that are not neighbours).
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    nested: Tensor | None
    offset: Tensor | None
    columns: Tensor | None
    format: Format
    block_size: int

    @staticmethod
    def __new__(
        cls: type["QuantizedTensor"],
        parts: Sequence[Tensor],
        format: str,
        block_size: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> "QuantizedTensor":
        """Wrap stored tensors, in the order of ``parts()``, as a weight of this shape and dtype;
        nothing is copied.
        """
        self: QuantizedTensor = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=parts[0].device
        )
        self.format, self.block_size = FORMATS[format], block_size
        stored = (*named_parts(parts, self.format), columns_of(parts))
        for name, part in zip(_INNER, stored, strict=True):
            setattr(self, name, part)
        return self

    @property
    def double_quant(self) -> bool:
        """Whether scales are themselves stored in 8 bits."""
        return self.nested is not None

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything stored: codes, scales, zero points, nested scales, offset."""
        return sum(tensor.nbytes for tensor in self.parts())

    def parts(self) -> list[Tensor]:
        """The stored tensors, in the order packed, scales, zeros, nested, offset, columns, without
        what is None.
        """
        parts = (getattr(self, name) for name in _INNER)
        return [part for part in parts if part is not None]

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The weight as a plain tensor of this tensor's dtype."""
        from pyft.ops.quantize import dequantize

        if self.dtype == torch.float64:
            return dequantize(self, torch.float32).double()
        return dequantize(self)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"QuantizedTensor({self.format.name}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device='{self.device}', block_size={self.block_size}, "
            f"double_quant={self.double_quant})"
        )

    def _replace(
        self, transform: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> "QuantizedTensor":
        """The same weight with every stored tensor transformed."""
        parts = [transform(part) for part in self.parts()]
        return QuantizedTensor(parts, self.format.name, self.block_size, self.shape, dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, int]]:
        names = [name for name in _INNER if getattr(self, name) is not None]
        return names, (self.format.name, self.block_size, self.dtype)  # type: ignore[return-value]

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor],
        context: tuple[str, int, torch.dtype],
        size: Sequence[int],
        stride: Sequence[int],
    ) -> "QuantizedTensor":
        format, block_size, dtype = context
        parts = [inner[name] for name in _INNER if name in inner]
        return QuantizedTensor(parts, format, block_size, size, dtype)

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.nn.functional.linear and isinstance(
            _argument(args, kwargs, 1, "weight"), cls
        ):
            from pyft.ops.lora_linear import lora_linear

            x, weight, bias = (
                _argument(args, kwargs, i, name)
                for i, name in enumerate(("input", "weight", "bias"))
            )
            return lora_linear(x, weight, None, None, bias=bias)
        if function is Tensor.__setitem__ and isinstance(args[0], cls):
            raise UsageError(
                _written("item assignment")
            )  # its select would decode, and the write would be lost
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args else None
        if isinstance(weight, cls):
            if function in (aten.detach.default, aten.alias.default):
                return weight._replace(lambda part: part, weight.dtype)
            if function is aten.clone.default:
                return weight._replace(torch.clone, weight.dtype)
            if (
                function is aten._to_copy.default
                and (kwargs.get("dtype") or weight.dtype) in _LABELS
            ):
                device, dtype = kwargs.get("device"), kwargs.get("dtype") or weight.dtype
                if device is None and dtype != weight.dtype:
                    return weight._replace(lambda part: part, dtype)  # only the label changes
                move = torch.clone if device is None else (lambda part: part.to(device, copy=True))
                return weight._replace(move, dtype)
        if function._schema.is_mutable and any(
            isinstance(leaf, cls) for leaf in _outputs(function, args, kwargs)
        ):
            raise UsageError(_written(function._schema.name))
        decode = pytree.tree_map_only(cls, lambda quantized: quantized.dequantize(), (args, kwargs))
        return function(*decode[0], **decode[1])


def named_parts(
    parts: Sequence[Tensor], fmt: Format
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """packed, scales, zeros, nested and offset from the stored tensors of a weight in ``fmt``."""
    packed, scales, *rest = parts if columns_of(parts) is None else parts[:-1]
    zeros = rest.pop(0) if fmt.zero_points else None
    nested, offset = rest or (None, None)
    return packed, scales, zeros, nested, offset


def columns_of(parts: Sequence[Tensor]) -> Tensor | None:
    """The order of a weight's columns among its stored tensors, None where they are in order."""
    return parts[-1] if parts[-1].dtype == torch.int32 else None


def _outputs(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What ``function`` writes to, by its schema."""
    written = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(_argument(args, kwargs, position, argument.name))
    return pytree.tree_leaves(written)


def _written(function: str) -> str:
    return (
        f"{function} writes to a quantized weight; dequantize it first (w = weight.dequantize()), "
        "or, to merge an adapter, load the base in 16 bits and merge there"
    )


def _argument(
    args: tuple[Any, ...], kwargs: dict[str, Any] | None, position: int, name: str
) -> Any:
    return args[position] if len(args) > position else (kwargs or {}).get(name)
