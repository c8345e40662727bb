"""Checkpoints whose linear weights are stored quantized, as the same weights with their own names.

- The originals chatglm-6b-int4, chatglm-6b-int8, chatglm2-6b-int4 (`quantization_bit` in config.json): symmetric, one
  float16 scale a row; model-family section 2.4.
- GPTQ and AWQ (`quantization_config`): 4 bits with a float16 scale and a zero point for each group of columns.

The codes are taken over, not only the values: what a model computes with is what the authors stored, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ov.checkpoint import Checkpoint, Rows, Tensor
from chatglm_ov.config import read_json_object
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.weights.formats import FORMATS, GROUP_SIZE, GROUP_SIZES, WeightFormat, int4_format
from chatglm_ov.weights.quantized import Parts, QuantizedTensor

CONFIG_FIELDS = ("quantization_bit", "quantization_config")
"""Fields of config.json that a converted model has no use for."""

_PER_WORD = 8
"""4-bit numbers in 32 bits."""
_AWQ_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where the number of each of 8 neighbours is in a word of AWQ; in GPTQ they are in order."""

Numbers = Callable[[np.ndarray], np.ndarray]


def open_checkpoint(folder: Path, fields: Mapping[str, Any]) -> Checkpoint:
    """The weights of a folder whose config.json has `fields`. Raises ChatGLMError, as `Checkpoint.open` does and for a
    quantization that cannot be taken over as it is."""
    described = _quantization_config(folder, fields)
    weights = Checkpoint.open(folder)
    try:
        if described is not None:
            return _in_groups(weights, *described)
        if fields.get("quantization_bit"):
            return _in_rows(weights, fields["quantization_bit"], folder / "config.json")
    except BaseException:
        weights.close()
        raise
    return weights


def quantized_format(folder: Path, fields: Mapping[str, Any]) -> str | None:
    """The weight format that keeps a checkpoint's own quantization; None if it has none."""
    if _quantization_config(folder, fields) is not None:
        return "int4"
    bits = fields.get("quantization_bit")
    return f"int{bits}" if bits else None


def _quantization_config(folder: Path, fields: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The file with what GPTQ or AWQ tell about themselves, and that; older tools wrote a file of its own."""
    path = folder / "config.json"
    found = fields.get("quantization_config")
    if found is None:
        for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            path = folder / name
            if path.is_file():
                found = {"quant_method": method, **read_json_object(path)}
                break
        else:
            return None
    if not isinstance(found, dict):
        raise ChatGLMError(path, "quantization_config", repr(found)[:40], "an object")
    return path, found


def _in_rows(weights: Checkpoint, bits: Any, config: Path) -> Checkpoint:
    if bits not in (4, 8):
        raise ChatGLMError(config, "quantization_bit", repr(bits), "4 or 8")
    scales = [name for name in weights.names if name.endswith(".weight_scale")]
    if not scales:
        raise ChatGLMError(config, "quantization_bit", bits, "a checkpoint that has .weight_scale tensors, or 0")
    bases = [name.removesuffix("_scale") for name in scales]
    added = [_row_tensor(weights, base, bits) for base in bases]
    return weights.replaced({*scales, *bases}, added)


def _row_tensor(weights: Checkpoint, name: str, bits: int) -> QuantizedTensor:
    """weight int8 [N, K] or, two columns a byte, [N, K / 2]; weight_scale float16 [N]; value = code * scale."""
    stored = _expect(weights, name, "int8", 2)
    scales = _expect(weights, f"{name}_scale", "float16", 1)
    rows, columns = stored.shape[0], stored.shape[1] * 8 // bits
    if scales.shape != (rows,):
        raise ChatGLMError(scales.file, f"shape of {scales.name}", list(scales.shape), [rows])
    as_int4 = bits == 4 and FORMATS["int4"].fits(columns)
    fmt = FORMATS["int4" if as_int4 else "int8"]

    def parts(index: Rows) -> Parts:
        codes, scale = stored.rows(index), scales.rows(index)[:, None]
        if bits == 4:
            codes = _signed_nibbles(codes)
        if not as_int4:
            return codes, scale
        groups = (len(codes), columns // fmt.group_size(columns), 1)
        grouped = (codes + 8).astype(np.uint8).reshape(*groups[:2], -1)
        return grouped, np.full(groups, 8, np.uint8), np.broadcast_to(scale[..., None], groups).copy()

    return _tensor(weights, name, (rows, columns), fmt, parts, stored, scales)


def _signed_nibbles(packed: np.ndarray) -> np.ndarray:
    """int8 [n, K] of int8 [n, K / 2]: the even column is in the high nibble, each in two's complement."""
    return np.stack([packed >> 4, (packed << 4) >> 4], axis=-1).reshape(len(packed), -1)


def _in_groups(weights: Checkpoint, path: Path, described: dict[str, Any]) -> Checkpoint:
    method = described.get("quant_method")
    _require(path, described, "quant_method", ("gptq", "awq"))
    _require(path, described, "bits" if "bits" in described else "w_bit", (4,))
    if method == "gptq":
        _require(path, described, "checkpoint_format", (None, "gptq", "gptq_v2"))
    else:
        _require(path, described, "version", (None, "gemm", "GEMM"))
    group_size = described.get("group_size", described.get("q_group_size", -1))
    bases = [name.removesuffix(".qweight") for name in weights.names if name.endswith(".qweight")]
    if not bases:
        raise ChatGLMError(path, "quant_method", repr(method), "a checkpoint that has .qweight tensors")
    read = _gptq_tensor if method == "gptq" else _awq_tensor
    # Of what GPTQ stores, zero points are too small by one; its second version mended that.
    offset = int(method == "gptq" and described.get("checkpoint_format") != "gptq_v2")
    added = [read(weights, base, group_size, offset, path) for base in bases]
    kinds = ("qweight", "qzeros", "scales", "g_idx")
    return weights.replaced({f"{base}.{kind}" for base in bases for kind in kinds}, added)


def _require(path: Path, described: dict[str, Any], field: str, known: tuple[Any, ...]) -> None:
    if described.get(field) not in known:
        wanted = " or ".join(str(value) for value in known if value is not None)
        raise ChatGLMError(path, f"quantization_config.{field}", repr(described.get(field)), wanted)


def _gptq_tensor(weights: Checkpoint, base: str, group_size: Any, offset: int, path: Path) -> QuantizedTensor:
    """qweight int32 [K / 8, N], 8 columns a word; g_idx [K], the group of each column."""
    qweight = _expect(weights, f"{base}.qweight", "int32", 2)
    columns, rows = qweight.shape[0] * _PER_WORD, qweight.shape[1]

    def codes(index: np.ndarray) -> np.ndarray:
        shifts = 4 * np.arange(_PER_WORD, dtype=np.int32)[None, :, None]
        numbers = (qweight.read()[:, None, index] >> shifts) & 15
        return numbers.reshape(columns, len(index)).T

    group = _group_size(path, group_size, columns)
    if f"{base}.g_idx" in weights:
        indices = _expect(weights, f"{base}.g_idx", "int32", 1)
        if not np.array_equal(indices.read(), np.arange(columns) // group):
            wanted = f"groups of {group} neighbours: act-order (desc_act) is not supported"
            raise ChatGLMError(indices.file, indices.name, "groups of scattered columns", wanted)
    return _grouped_tensor(weights, base, (rows, columns), group, codes, np.arange(_PER_WORD), offset, qweight)


def _awq_tensor(weights: Checkpoint, base: str, group_size: Any, offset: int, path: Path) -> QuantizedTensor:
    """qweight int32 [K, N / 8], 8 rows of the weight a word."""
    qweight = _expect(weights, f"{base}.qweight", "int32", 2)
    columns, rows = qweight.shape[0], qweight.shape[1] * _PER_WORD

    def codes(index: np.ndarray) -> np.ndarray:
        return _of_rows(qweight.read(), index, _AWQ_NIBBLE).T

    group = _group_size(path, group_size, columns)
    return _grouped_tensor(weights, base, (rows, columns), group, codes, _AWQ_NIBBLE, offset, qweight)


def _grouped_tensor(
    weights: Checkpoint,
    base: str,
    shape: tuple[int, int],
    group: int,
    codes: Numbers,
    nibble: np.ndarray,
    offset: int,
    qweight: Tensor,
) -> QuantizedTensor:
    """qzeros int32 [groups, N / 8] and scales float16 [groups, N]; value = (code - zero) * scale."""
    rows, columns = shape
    qzeros = _expect(weights, f"{base}.qzeros", "int32", 2)
    scales = _expect(weights, f"{base}.scales", "float16", 2)
    groups = columns // group
    for tensor, wanted in ((qzeros, (groups, -(-rows // _PER_WORD))), (scales, (groups, rows))):
        if tensor.shape != wanted:
            raise ChatGLMError(tensor.file, f"shape of {tensor.name}", list(tensor.shape), list(wanted))

    def zeros(index: np.ndarray) -> np.ndarray:
        return _of_rows(qzeros.read(), index, nibble).T + offset

    # Our own groups are of at most 128 columns: a wider one is several with the same scale.
    own = gcd(group, GROUP_SIZE)
    fmt = int4_format(own, zero_point_bits=4 if zeros(np.arange(rows)).max() <= 15 else 8)

    def parts(index: Rows) -> Parts:
        numbers = np.arange(rows)[index]
        scale = scales.read()[:, numbers].T
        repeated = (np.repeat(part[..., None], group // own, axis=1) for part in (zeros(numbers), scale))
        zero_point, scale = repeated
        found = codes(numbers).astype(np.uint8).reshape(len(numbers), -1, own)
        return found, zero_point.astype(np.uint8), np.ascontiguousarray(scale)

    return _tensor(weights, f"{base}.weight", shape, fmt, parts, qweight, qzeros, scales)


def _of_rows(words: np.ndarray, index: np.ndarray, nibble: np.ndarray) -> np.ndarray:
    """Numbers [n, rows of index] of words int32 [n, N / 8]."""
    return (words[:, index // _PER_WORD] >> (4 * nibble[index % _PER_WORD]).astype(np.int32)) & 15


def _group_size(path: Path, group_size: Any, columns: int) -> int:
    """Columns of a group; -1 stands for all of them."""
    group = columns if group_size == -1 else group_size
    fits = isinstance(group, int) and group > 0 and columns % group == 0 and gcd(group, GROUP_SIZE) in GROUP_SIZES
    if not fits:
        wanted = f"a multiple of 32 that divides {columns}, or -1"
        raise ChatGLMError(path, "quantization_config.group_size", group_size, wanted)
    return group


def _expect(weights: Checkpoint, name: str, dtype: str, rank: int) -> Tensor:
    """A tensor of a quantized weight. Raises ChatGLMError if it is missing, or not what it should be."""
    if name not in weights:
        raise ChatGLMError(weights.folder, name, "missing", f"a tensor of {dtype}, as the weight is quantized")
    tensor = weights[name]
    if tensor.dtype != dtype:
        raise ChatGLMError(tensor.file, f"dtype of {name}", tensor.dtype, dtype)
    if len(tensor.shape) != rank:
        raise ChatGLMError(tensor.file, f"shape of {name}", list(tensor.shape), f"{rank} axes")
    return tensor


def _tensor(
    weights: Checkpoint,
    name: str,
    shape: tuple[int, int],
    fmt: WeightFormat,
    parts: Callable[[Rows], Parts],
    *stored: Tensor,
) -> QuantizedTensor:
    nbytes = sum(tensor.nbytes for tensor in stored)
    return QuantizedTensor(name, stored[0].file, shape, fmt.name, nbytes, fmt, parts)
