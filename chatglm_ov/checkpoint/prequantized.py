"""Checkpoints whose linear weights are stored quantized, as the same weights with their own names.

- The originals chatglm-6b-int4, chatglm-6b-int8, chatglm2-6b-int4 (`quantization_bit` in config.json): symmetric, one
  float16 scale a row; model-family section 2.4.
- GPTQ and AWQ (`quantization_config`): 4 bits with a float16 scale and a zero point for each group of columns.

The codes are taken over, not only the values: what a model computes with is what the authors stored, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ov.checkpoint.files import FLOATS
from chatglm_ov.checkpoint.quantized import Parts, QuantizedTensor
from chatglm_ov.checkpoint.reader import Checkpoint, Rows, Tensor, checked
from chatglm_ov.config import ArchitectureConfig, parse_config
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.json_files import read_json_object
from chatglm_ov.models import architecture
from chatglm_ov.weight_formats import FORMATS, GROUP_SIZE, GROUP_SIZES, WeightFormat, int4_format

CONFIG_FIELDS = ("quantization_bit", "quantization_config")
"""Fields of config.json that a converted model has no use for."""

_GROUP_KINDS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors that stand for one weight in GPTQ; in AWQ the last one is missing."""

_PER_WORD = 8
"""4-bit numbers in 32 bits."""
_AWQ_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where the number of each of 8 neighbours is in a word of AWQ; in GPTQ they are in order."""

Numbers = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, int]


@dataclass(frozen=True)
class _Described:
    """What GPTQ or AWQ tell about themselves. prefix: of these fields in the file."""

    file: Path
    prefix: str
    fields: dict[str, Any]

    def name(self, *names: str) -> str:
        """The one of a field's names, which differ from tool to tool, that is there, else the first."""
        return next((name for name in names if name in self.fields), names[0])

    def require(self, name: str, known: tuple[Any, ...]) -> None:
        if self.fields.get(name) not in known:
            raise self.error(name, " or ".join(str(value) for value in known if value is not None))

    def error(self, name: str, wanted: str) -> ChatGLMError:
        seen = repr(self.fields[name])[:40] if name in self.fields else "missing"
        return ChatGLMError(self.file, f"{self.prefix}{name}", seen, wanted)


def open_checkpoint(folder: Path, fields: Mapping[str, Any]) -> Checkpoint:
    """The weights of a folder whose config.json has `fields`. Raises ChatGLMError, as `Checkpoint.open` does and for a
    quantization that cannot be taken over as it is."""
    described, path = _quantization_config(folder, fields), folder / "config.json"
    weights = Checkpoint.open(folder)
    try:
        if described is not None:
            return _in_groups(weights, parse_config(dict(fields), path), described)
        if fields.get("quantization_bit"):
            return _in_rows(weights, parse_config(dict(fields), path), path)
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


def _quantization_config(folder: Path, fields: Mapping[str, Any]) -> _Described | None:
    """What config.json tells, or a file of its own, which older tools wrote; None where there is neither."""
    path, found = folder / "config.json", fields.get("quantization_config")
    if found is not None:
        if not isinstance(found, dict):
            raise ChatGLMError(path, "quantization_config", repr(found)[:40], "an object")
        return _Described(path, "quantization_config.", found)
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).is_file():
            return _Described(folder / name, "", {"quant_method": method, **read_json_object(folder / name)})
    return None


def _linear_shapes(config: ArchitectureConfig, names: Iterable[str]) -> dict[str, Shape]:
    """Shapes of those of `names` that are linear weights of the model; others are told by `Checkpoint.verify`."""
    model = architecture(config)
    known = {name: shape for name, shape in model.weight_shapes(config).items() if len(shape) == 2}
    # A tied head may be stored all the same.
    known.setdefault(model.LM_HEAD, known[model.EMBEDDING])
    return {name: known[name] for name in dict.fromkeys(names) if name in known}


def _in_rows(weights: Checkpoint, config: ArchitectureConfig, path: Path) -> Checkpoint:
    scales = [name for name in weights.names if name.endswith(".weight_scale")]
    bits = config.quantization_bit
    if not scales:
        raise ChatGLMError(path, "quantization_bit", bits, "a checkpoint that has .weight_scale tensors, or 0")
    bare = (name for name in weights.names if weights.dtype(name) == "int8")
    shapes = _linear_shapes(config, [*(name.removesuffix("_scale") for name in scales), *bare])
    added = [_row_tensor(weights, name, shape, 4 if bits == 4 else 8) for name, shape in shapes.items()]
    return weights.replaced({name + kind for name in shapes for kind in ("", "_scale")}, added)


def _row_tensor(weights: Checkpoint, name: str, shape: Shape, bits: int) -> QuantizedTensor:
    """weight int8 [N, K] or, two columns a byte, [N, K / 2]; weight_scale float16 [N]; value = code * scale."""
    rows, columns = shape
    stored = _expect(weights, name, ("int8",), (rows, columns * bits // 8))
    scales = _expect(weights, f"{name}_scale", ("float16",), (rows,))
    as_int4 = bits == 4 and FORMATS["int4"].fits(columns)
    fmt = FORMATS["int4" if as_int4 else "int8"]

    def parts(index: Rows) -> Parts:
        codes, scale = stored.rows(index), checked(scales, scales.rows(index))[:, None]
        if bits == 4:
            codes = _signed_nibbles(codes)
        if not as_int4:
            return codes, scale
        groups = (len(codes), columns // fmt.group_size(columns), 1)
        grouped = (codes + 8).astype(np.uint8).reshape(*groups[:2], -1)
        return grouped, np.full(groups, 8, np.uint8), np.broadcast_to(scale[..., None], groups).copy()

    return _tensor(weights, name, shape, fmt, parts, stored, scales)


def _signed_nibbles(packed: np.ndarray) -> np.ndarray:
    """int8 [n, K] of int8 [n, K / 2]: the even column is in the high nibble, each in two's complement."""
    return np.stack([packed >> 4, (packed << 4) >> 4], axis=-1).reshape(len(packed), -1)


def _in_groups(weights: Checkpoint, config: ArchitectureConfig, described: _Described) -> Checkpoint:
    method = described.fields.get("quant_method")
    described.require("quant_method", ("gptq", "awq"))
    described.require(described.name("bits", "w_bit"), (4,))
    if method == "gptq":
        described.require("checkpoint_format", (None, "gptq", "gptq_v2"))
    else:
        described.require("version", (None, "gemm", "GEMM"))
    parts = [name for name in weights.names if name.rpartition(".")[2] in _GROUP_KINDS]
    if not parts:
        raise described.error("quant_method", "a checkpoint that has .qweight tensors")
    shapes = _linear_shapes(config, (f"{name.rpartition('.')[0]}.weight" for name in parts))
    bases = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    read = _gptq_tensor if method == "gptq" else _awq_tensor
    added = [read(weights, base, shape, described) for base, shape in bases.items()]
    return weights.replaced({f"{base}.{kind}" for base in bases for kind in _GROUP_KINDS}, added)


def _gptq_tensor(weights: Checkpoint, base: str, shape: Shape, described: _Described) -> QuantizedTensor:
    """qweight int32 [K / 8, N], 8 columns a word; g_idx [K], the group of each column."""
    rows, columns = shape
    qweight = _expect(weights, f"{base}.qweight", ("int32",), (-(-columns // _PER_WORD), rows))

    def codes(index: np.ndarray) -> np.ndarray:
        shifts = 4 * np.arange(_PER_WORD, dtype=np.int32)[None, :, None]
        numbers = (qweight.read()[:, None, index] >> shifts) & 15
        return numbers.reshape(columns, len(index)).T

    group = _group_size(described, columns)
    # Of what GPTQ stores, zero points are too small by one; its second version mended that.
    offset = int(described.fields.get("checkpoint_format") != "gptq_v2")
    made = _grouped_tensor(weights, base, shape, group, codes, np.arange(_PER_WORD), offset, qweight)
    _check_neighbours(weights, f"{base}.g_idx", columns, group, described)
    return made


def _check_neighbours(weights: Checkpoint, name: str, columns: int, group: int, described: _Described) -> None:
    """Raises ChatGLMError unless the groups of g_idx are of columns side by side."""
    if name not in weights:
        if described.fields.get("desc_act"):
            raise ChatGLMError(weights.folder, name, "missing", "the group of each column, as desc_act is set")
        return
    indices, groups = _expect(weights, name, ("int32",), (columns,)), columns // group
    found = indices.read()
    outside = (found < 0) | (found >= groups)
    if outside.any():
        raise ChatGLMError(indices.file, f"a value of {name}", found[outside][0], f"a group: 0 to {groups - 1}")
    if not np.array_equal(found, np.arange(columns) // group):
        wanted = f"groups of {group} neighbours: act-order (desc_act) is not supported"
        raise ChatGLMError(indices.file, name, "groups of scattered columns", wanted)


def _awq_tensor(weights: Checkpoint, base: str, shape: Shape, described: _Described) -> QuantizedTensor:
    """qweight int32 [K, N / 8], 8 rows of the weight a word."""
    rows, columns = shape
    qweight = _expect(weights, f"{base}.qweight", ("int32",), (columns, -(-rows // _PER_WORD)))

    def codes(index: np.ndarray) -> np.ndarray:
        return _of_rows(qweight.read(), index, _AWQ_NIBBLE).T

    return _grouped_tensor(weights, base, shape, _group_size(described, columns), codes, _AWQ_NIBBLE, 0, qweight)


def _grouped_tensor(
    weights: Checkpoint,
    base: str,
    shape: Shape,
    group: int,
    codes: Numbers,
    nibble: np.ndarray,
    offset: int,
    qweight: Tensor,
) -> QuantizedTensor:
    """qzeros int32 [groups, N / 8] and scales [groups, N], float16 numbers in any float type; value =
    (code - zero) * scale."""
    if f"{base}.weight" in weights:
        raise ChatGLMError(weights[f"{base}.weight"].file, f"{base}.weight", "stored beside its qweight", "one of them")
    rows, columns = shape
    groups = columns // group
    qzeros = _expect(weights, f"{base}.qzeros", ("int32",), (groups, -(-rows // _PER_WORD)))
    scales = _expect(weights, f"{base}.scales", tuple(FLOATS), (groups, rows))

    def zeros(index: np.ndarray) -> np.ndarray:
        return _of_rows(qzeros.read(), index, nibble).T + offset

    # Our own groups are of at most 128 columns: a wider one is several with the same scale.
    own = gcd(group, GROUP_SIZE)
    fmt = int4_format(own, zero_point_bits=4 if zeros(np.arange(rows)).max() <= 15 else 8)

    def parts(index: Rows) -> Parts:
        numbers = np.arange(rows)[index]
        scale = _float16_numbers(scales, scales.read()[:, numbers].T)
        repeated = (np.repeat(part[..., None], group // own, axis=1) for part in (zeros(numbers), scale))
        zero_point, scale = repeated
        found = codes(numbers).astype(np.uint8).reshape(len(numbers), -1, own)
        return found, zero_point.astype(np.uint8), np.ascontiguousarray(scale)

    return _tensor(weights, f"{base}.weight", shape, fmt, parts, qweight, qzeros, scales)


@np.errstate(over="ignore")
def _float16_numbers(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """`values` themselves. Raises ChatGLMError for one that float16, which int4 has its scales in, does not have."""
    others = checked(tensor, values) != values.astype(np.float16)
    if others.any():
        raise ChatGLMError(tensor.file, f"a value of {tensor.name}", values[others][0], "numbers that float16 has")
    return values


def _of_rows(words: np.ndarray, index: np.ndarray, nibble: np.ndarray) -> np.ndarray:
    """Numbers [n, rows of index] of words int32 [n, N / 8]."""
    return (words[:, index // _PER_WORD] >> (4 * nibble[index % _PER_WORD]).astype(np.int32)) & 15


def _group_size(described: _Described, columns: int) -> int:
    """Columns of a group; -1 stands for all of them."""
    name = described.name("group_size", "q_group_size")
    found = described.fields.get(name)
    group = columns if found == -1 else found
    if isinstance(group, int) and group > 0 and columns % group == 0 and gcd(group, GROUP_SIZE) in GROUP_SIZES:
        return group
    whole = ", or -1" if gcd(columns, GROUP_SIZE) in GROUP_SIZES else ""
    raise described.error(name, f"a multiple of 32 that divides {columns}{whole}")


def _expect(weights: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """A tensor of a quantized weight. Raises ChatGLMError if it is missing, or not what it should be."""
    wanted = " or ".join(dtypes)
    if name not in weights:
        raise ChatGLMError(weights.folder, name, "missing", f"a tensor of {wanted}, as the weight is quantized")
    tensor = weights[name]
    if tensor.dtype not in dtypes:
        raise ChatGLMError(tensor.file, f"dtype of {name}", tensor.dtype, wanted)
    if tensor.shape != shape:
        raise ChatGLMError(tensor.file, f"shape of {name}", list(tensor.shape), list(shape))
    return tensor


def _tensor(
    weights: Checkpoint,
    name: str,
    shape: Shape,
    fmt: WeightFormat,
    parts: Callable[[Rows], Parts],
    *stored: Tensor,
) -> QuantizedTensor:
    nbytes = sum(tensor.nbytes for tensor in stored)
    return QuantizedTensor(name, stored[0].file, shape, fmt.name, nbytes, fmt, parts)
