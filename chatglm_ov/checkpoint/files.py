"""One file of weights: what tensors are in it, and views of them.

safetensors and zip-format `.bin` files are memory-mapped: reading some rows costs their own size in anonymous
memory and does not touch the rest. `.bin` files in PyTorch's format of before 1.6 cannot be mapped and are
loaded whole. Pickled code is refused, never executed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from chatglm_ov.errors import ChatGLMError

FLOATS = MappingProxyType(
    {
        "float16": np.dtype(np.float16),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float32": np.dtype(np.float32),
    }
)
INTEGERS = MappingProxyType({"int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8), "int32": np.dtype(np.int32)})
READABLE = MappingProxyType({**FLOATS, **INTEGERS})

SAFETENSORS_NAMES = MappingProxyType(
    {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I8": "int8", "U8": "uint8", "I32": "int32"}
)

ZIP_SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True)
class StoredTensor:
    """`dtype` is one of READABLE, or the file's own word for a type that cannot be read. `view()` is the
    tensor in the open file, not a copy; a readable type only."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    view: Callable[[], np.ndarray]


def open_weight_file(file: Path) -> dict[str, StoredTensor]:
    """Tensors of a `.safetensors` or `.bin` file by name. The file stays open until the last one is dropped.

    Raises ChatGLMError for a missing, empty or damaged file, a Git LFS pointer, and pickled code.
    """
    try:
        refuse_placeholder(file)
        return dict(_safetensors(file) if file.suffix == ".safetensors" else _torch_file(file))
    except OSError as error:
        seen = f"unreadable ({error.strerror or error})"
        raise ChatGLMError(file, "contents", seen, "a weight file") from error


def save_safetensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Write `tensors` by name. Raises OSError for what the file system refuses: the library has an error of its own."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def refuse_placeholder(file: Path) -> None:
    """ChatGLMError for an empty file and for a Git LFS pointer that stands where the file should be."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        raise ChatGLMError(file, "size", "0 bytes", "the real file")
    if start.startswith(b"version https://git-lfs"):
        raise ChatGLMError(file, "contents", "a Git LFS pointer", "the real file (git lfs pull)")


def _safetensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The library checks header, offsets and size. It gives numpy copies, not views, so the data section is
    mapped here (layout of the file: u64 size of the header, header in JSON, data)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except SafetensorError as error:
        raise _damaged(file, error, "a whole safetensors file") from error
    mapped = np.memmap(file, np.uint8, mode="r").view(np.ndarray)
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), SAFETENSORS_NAMES.get(entry["dtype"], entry["dtype"])
        view = _mapped_view(mapped[start + begin : start + end], shape, dtype)
        yield name, StoredTensor(shape, dtype, end - begin, view)


def _mapped_view(data: np.ndarray, shape: tuple[int, ...], dtype: str) -> Callable[[], np.ndarray]:
    return lambda: data.view(READABLE[dtype]).reshape(shape)


def _torch_file(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    import torch

    with file.open("rb") as stream:
        can_map = stream.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE
    try:
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as error:  # torch has no common type for what damaged files raise
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            seen = f"a pickle that calls {code[1]} (refused)"
            raise ChatGLMError(file, "contents", seen, "tensors only") from error
        raise _damaged(file, error, "a whole PyTorch state dict file") from error
    for name, tensor in _state_dict(file, contents).items():
        if isinstance(tensor, torch.Tensor):
            # A sparse or otherwise packed tensor is told by its layout: it has no rows to view.
            dtype = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout)
            nbytes = tensor.numel() * tensor.element_size()
            view = _torch_view(tensor.detach())
            yield name, StoredTensor(tuple(tensor.shape), dtype.removeprefix("torch."), nbytes, view)


def _state_dict(file: Path, contents: Any) -> dict[str, Any]:
    """The tensors by name, taken out of the wrappers that training frameworks put around them."""
    for wrapper in ("state_dict", "module"):
        if isinstance(contents, dict) and isinstance(contents.get(wrapper), dict):
            contents = contents[wrapper]
    if not isinstance(contents, dict):
        raise ChatGLMError(file, "contents", f"a {type(contents).__name__}", "a state dict: tensors by name")
    return contents


def _torch_view(tensor: Any) -> Callable[[], np.ndarray]:
    """The bits of bfloat16, which numpy does not know, are handed over as int16."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return lambda: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy


def _damaged(file: Path, error: Exception, wanted: str) -> ChatGLMError:
    reason = str(error).partition("\n")[0].partition(". ")[0][:120] or type(error).__name__
    return ChatGLMError(file, "contents", f"damaged ({reason})", wanted)
