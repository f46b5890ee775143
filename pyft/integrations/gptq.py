"""GPTQ and AWQ checkpoints of 4 bits as QuantizedTensors of the format int4_zp, or int4.

    GPTQ    qweight  int32 [K/8, N]         eight codes along K a word, the first lowest
            qzeros   int32 [groups, N/8]    eight along N; one less than the zero point ("gptq"),
                                            or the zero point itself ("gptq_v2")
            scales   fp16 [groups, N]
            g_idx    int32 [K]              the group of each column; may be left out where groups
                                            are neighbours
    AWQ     qweight  int32 [K, N/8]         eight along N, in the order 0 2 4 6 1 3 5 7
            qzeros   int32 [groups, N/8]    likewise
            scales   fp16 [groups, N]

    W[n, k] = (code[k, n] - zero[group of k, n]) * scale[group of k, n]

pyft's blocks are the groups, row by row. With activation order (desc_act) a group's columns are
not neighbours: they are stored side by side, and ``columns`` says where each belongs. Where every
zero point of a checkpoint is 8 it is symmetric, and pyft's int4.

Sources: Frantar et al., GPTQ (2022); Lin et al., AWQ (2023).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.formats import BLOCK_SIZES, ROW
from pyft.integrations.stored import AGAIN, Build, Parts, Stored, need, sized
from pyft.quantized import QuantizedTensor

_SLAB = 512  # rows of the weight unpacked at a time
_PER_WORD = 8
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight neighbours is
_VERSIONS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}


@dataclass(frozen=True)
class Layout:
    """The layout as ``pyft.integrations.stored`` reads it."""

    method: str  # "gptq" or "awq"
    group_size: int  # ROW for one group
    zero_offset: int  # what is added to a stored zero point
    ordered: bool = False  # groups may be of columns that are not neighbours: g_idx must be there
    symmetric: bool = False
    names: tuple[str, ...] = (".qweight", ".qzeros", ".scales", ".g_idx")
    marks: tuple[str, ...] = (".qweight", ".qzeros")

    @property
    def format(self) -> str:
        """The format its weights have here."""
        return "int4" if self.symmetric else "int4_zp"

    def all_zeros_are_8(self, qzeros: Stored) -> bool:
        """Whether these zero points are those of a symmetric weight."""
        if qzeros.dtype != torch.int32:
            return False
        nibble = 8 - self.zero_offset
        word = int.from_bytes(bytes([nibble << 4 | nibble] * 4), "little", signed=True)
        return bool((qzeros.read() == word).all())

    def check(self, module: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Build:
        """What builds the weight, in the model's ``shape``."""
        rows, cols = shape
        group = self.group_size or cols
        if cols % group or cols % _PER_WORD or rows % _PER_WORD:
            raise UsageError(
                f"{next(iter(parts.values())).file}: {module} is [{rows}, {cols}]; pyft reads "
                f"{self.method} weights with both multiples of 8 and whole groups of {group}; "
                "quantize the 16-bit model with pyft.prepare(path) instead"
            )
        groups, int32 = cols // group, (torch.int32,)
        along_rows = (cols, rows // _PER_WORD)
        packed = along_rows if self.method == "awq" else (cols // _PER_WORD, rows)
        sized(need(parts, ".qweight", module, int32), packed)
        sized(need(parts, ".qzeros", module, int32), (groups, rows // _PER_WORD))
        scales = need(parts, ".scales", module, (torch.float16, torch.bfloat16, torch.float32))
        sized(scales, (groups, rows))
        columns = self._columns(module, parts, cols, group)

        def build(tensors: Mapping[str, Tensor]) -> QuantizedTensor:
            return self._build(tensors, columns, shape, group, dtype)

        return build

    def _columns(self, module: str, parts: Parts, cols: int, group: int) -> Tensor | None:
        """The order the columns are stored in, None for their own."""
        if self.method == "awq" or not (self.ordered or ".g_idx" in parts):
            return None
        part = sized(need(parts, ".g_idx", module, (torch.int32,)), (cols,))
        index = part.read().cpu().long()
        order = index.argsort(stable=True)
        columns = torch.arange(cols, device="cpu")
        if not torch.equal(index[order], columns // group):
            raise UsageError(
                f"{part.file}: {part.key} does not give each of {cols // group} groups {group} "
                f"columns; {AGAIN}"
            )
        return None if torch.equal(order, columns) else order.to(torch.int32)

    def _build(
        self,
        tensors: Mapping[str, Tensor],
        columns: Tensor | None,
        shape: tuple[int, ...],
        group: int,
        dtype: torch.dtype,
    ) -> QuantizedTensor:
        qweight, (rows, cols) = tensors[".qweight"], shape
        columns = None if columns is None else columns.to(qweight.device)
        packed = torch.empty(rows, cols // 2, dtype=torch.uint8, device=qweight.device)
        for start in range(0, rows, _SLAB):
            stop = min(start + _SLAB, rows)
            if self.method == "awq":
                words = qweight[:, start // _PER_WORD : stop // _PER_WORD]
                _repack_along_rows(words, packed[start:stop])
            else:
                _repack_along_columns(qweight[:, start:stop], columns, packed[start:stop])
        parts = [packed.view(-1), tensors[".scales"].t().float().contiguous().view(-1)]
        if not self.symmetric:
            places = _AWQ_PLACES if self.method == "awq" else range(_PER_WORD)
            zeros = _unpack(tensors[".qzeros"], places) + self.zero_offset
            parts.append(zeros.t().contiguous().view(-1))
        if columns is not None:
            parts.append(columns)
        return QuantizedTensor(parts, self.format, group, shape, dtype)


def _repack_along_columns(words: Tensor, columns: Tensor | None, out: Tensor) -> None:
    """GPTQ's int32 [K/8, N] into uint8 [N, K/2], the first of two codes in the high nibble."""
    if columns is None:
        low_first = words.t().contiguous().view(torch.uint8)
        torch.bitwise_or(low_first >> 4, low_first << 4, out=out)
        return
    shifts = range(0, 32, 4)
    codes = torch.stack([(words >> shift).to(torch.uint8) & 15 for shift in shifts], dim=1)
    codes = codes.view(-1, words.shape[1]).index_select(0, columns)
    out.copy_((codes[0::2] << 4 | codes[1::2]).t())


def _repack_along_rows(words: Tensor, out: Tensor) -> None:
    """AWQ's int32 [K, N/8] into uint8 [N, K/2], the first of two codes in the high nibble."""
    first, second = words[0::2].t().contiguous(), words[1::2].t().contiguous()
    for row, place in enumerate(_AWQ_PLACES):
        high, low = first >> 4 * place, second >> 4 * place
        out[row::_PER_WORD] = (high & 15) << 4 | low & 15


def _unpack(words: Tensor, places: Iterable[int]) -> Tensor:
    """int32 [A, B] as the uint8 codes [A, 8 B] in it; neighbour j of eight is at places[j]."""
    found = torch.stack([(words >> 4 * place).to(torch.uint8) & 15 for place in places], dim=2)
    return found.view(words.shape[0], -1)


def layout_of(config: Mapping[str, Any], where: str) -> Layout:
    """The layout a quantization_config describes; UsageError for one pyft does not read."""
    method = config["quant_method"]
    bits, size = config.get("bits", 4), config.get("group_size", 128)
    version = config.get("checkpoint_format") or config.get("version") or config.get("format")
    version = str(version or _VERSIONS[method][0]).lower()
    sizes = [-1, *BLOCK_SIZES]
    for key, value, known in (
        ("bits", bits, [4]),
        ("group_size", size, sizes),
        ("format", version, list(_VERSIONS[method])),
    ):
        if type(value) is not type(known[0]) or value not in known:
            raise UsageError(
                f"{where}: {method} {key} is {value!r}; pyft reads {', '.join(map(str, known))}; "
                "quantize the 16-bit model with pyft.prepare(path) instead"
            )
    ordered = method == "gptq" and bool(config.get("desc_act"))
    return Layout(method, ROW if size == -1 else size, int(version == "gptq"), ordered)
