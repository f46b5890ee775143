"""What config.json says of a quantized model: pyft's own entry, and those of other libraries."""

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyft.errors import UsageError
from pyft.formats import FORMATS, ROW
from pyft.integrations import bitsandbytes_layout, gptq, layout
from pyft.integrations.stored import AGAIN, Layout, short
from pyft.ops.quantize import check_format

READ = ("pyft", "bitsandbytes", "gptq", "awq")  # quant_method of checkpoints prepare reads
_KEPT = ("quant_method", "format", "block_size", "double_quant", "modules_to_not_convert")
_LAYOUTS = ("pyft", "bitsandbytes")


@register_quantization_config("pyft")
class PyftConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes: every linear but the output head or the modules named.

    Args:
        format: a name in ``pyft.formats.FORMATS``.
        block_size: elements per scale, or "row"; None takes the format's own.
        double_quant: store the scales in 8 bits; None takes the format's own.
        modules_to_not_convert: names of modules to leave; None leaves the head and what is tied to
            it.
        layout: how ``save_pretrained`` stores the weights: "pyft", or "bitsandbytes" (nf4 and fp4
            in blocks, int8 by rows), which transformers reads with bitsandbytes. It can be changed
            on a loaded model: ``model.config.quantization_config.layout = "bitsandbytes"``.
        source: the quantization_config of the checkpoint being read, where another library wrote
            it; set by ``pyft.prepare``.

    Raises:
        UsageError: what no format or layout has.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int | str | None = None,
        double_quant: bool | None = None,
        modules_to_not_convert: list[str] | None = None,
        layout: str = "pyft",
        source: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = "pyft"
        if not isinstance(format, str):
            raise UsageError(f"quantization_config: format is {format!r}, not a name")
        fmt, size, nest = check_format("quantization_config", format, block_size, double_quant)
        if layout not in _LAYOUTS:
            raise UsageError(
                f"quantization_config: layout {layout!r} is unknown; use {' or '.join(_LAYOUTS)}"
            )
        left = modules_to_not_convert
        if left is not None and not (
            isinstance(left, list) and all(isinstance(name, str) for name in left)
        ):
            raise UsageError(
                f"quantization_config: modules_to_not_convert is {left!r}, not a list of names"
            )
        self.format, self.modules_to_not_convert = fmt.name, left
        self.block_size: int | str = "row" if size == ROW else size
        self.double_quant, self.layout, self.source = bool(nest), layout, source
        self._entry: dict[str, Any] | None = None  # bitsandbytes' own, when saved in its layout

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: another library's own entry where the weights are in its
        layout.
        """
        if self.layout == "bitsandbytes" and self._entry is not None:
            return dict(self._entry)
        return {key: getattr(self, key) for key in _KEPT}


def config_of_source(source: dict[str, Any], where: str) -> PyftConfig:
    """The configuration for reading a checkpoint whose config.json has this quantization_config."""
    method = source.get("quant_method")
    if method == "pyft":
        return PyftConfig(**{key: source[key] for key in _KEPT if key in source})
    if method in ("gptq", "awq"):
        found = gptq.layout_of(source, where)
        return PyftConfig("int4_zp", found.group_size or "row", source=source)
    storage = source.get("bnb_4bit_quant_storage", "uint8")
    if storage not in map(short, bitsandbytes_layout.STORAGE):
        names = ", ".join(map(short, bitsandbytes_layout.STORAGE))
        raise UsageError(f"{where}: bnb_4bit_quant_storage is {storage!r}; it can be {names}")
    kept: dict[str, Any] = {
        "layout": "bitsandbytes",
        "source": source,
        "modules_to_not_convert": source.get("llm_int8_skip_modules"),
    }
    if source.get("load_in_8bit"):
        return PyftConfig("int8", **kept)
    format = source.get("bnb_4bit_quant_type", "fp4")
    if not source.get("load_in_4bit") or format not in ("nf4", "fp4"):
        raise UsageError(
            f"{where}: a bitsandbytes quantization_config says load_in_8bit, or load_in_4bit and "
            f"bnb_4bit_quant_type nf4 or fp4; {AGAIN}"
        )
    nest = bool(source.get("bnb_4bit_use_double_quant"))
    return PyftConfig(format, double_quant=nest, **kept)


def bitsandbytes_source(config: PyftConfig) -> dict[str, Any] | None:
    """bitsandbytes' own entry of config.json, where the model was read from its layout."""
    source = config.source or {}
    return source if source.get("quant_method") == "bitsandbytes" else None


def layout_of(config: PyftConfig) -> Layout:
    """How the checkpoint this configuration was read from stores its weights."""
    method = (config.source or {}).get("quant_method", "pyft")
    if method == "bitsandbytes":
        return bitsandbytes_layout.Layout()
    if method in ("gptq", "awq"):
        return gptq.layout_of(config.source or {}, "quantization_config")
    size = ROW if config.block_size == "row" else int(config.block_size)
    return layout.Layout(FORMATS[config.format], size, config.double_quant)
