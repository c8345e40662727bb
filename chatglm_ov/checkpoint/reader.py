"""Weights of a checkpoint folder, read a block of rows at a time.

    with Checkpoint.open(folder) as checkpoint:
        checkpoint.verify(shapes, ignored=lambda name: name.endswith("inv_freq"))
        block = checkpoint["lm_head.weight"].rows(slice(0, 1024))

A block costs its own size in anonymous memory, whatever the size of the tensor and of the file. The exception
are `.bin` files in PyTorch's format of before 1.6: such a shard is loaded whole, at most OPEN_SHARDS at once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from chatglm_ov.checkpoint.files import FLOATS, READABLE, StoredTensor, open_weight_file, refuse_placeholder
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.json_files import read_json_object

# In order of preference: stem and extension of the file names.
KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))

# A layer may straddle two shards.
OPEN_SHARDS = 2

Rows = slice | Sequence[int] | np.ndarray
Files = dict[Path, Sequence[str] | None]


@dataclass(frozen=True)
class Tensor(ABC):
    """A tensor of a checkpoint; nothing of it is read before `rows` or `read`.

    `dtype` is the stored type: one of READABLE, or the file's own word for a type that cannot be read; of a quantized
    weight the format of its elements. nbytes: in the file.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @abstractmethod
    def rows(self, rows: Rows) -> np.ndarray:
        """These rows (first axis), [n, ...], as a new array: float32 for float types, integers as stored."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """The whole tensor as a new array: float32 for float types, integers as stored."""

    def check_readable(self) -> None:
        """ChatGLMError if the stored type is none that can be read."""
        return


def checked(tensor: Tensor, values: np.ndarray, largest: float = float("inf")) -> np.ndarray:
    """`values` themselves. One NaN or infinity would spoil the scale of its row, and every sum it enters."""
    fit = np.isfinite(values) if largest == float("inf") else np.abs(values) <= largest
    if not fit.all():
        wanted = "a finite number" if largest == float("inf") else f"at most {largest:g}, what its format can hold"
        raise ChatGLMError(tensor.file, f"a value of {tensor.name}", values[~fit][0], wanted)
    return values


@dataclass(frozen=True)
class FileTensor(Tensor):
    """A tensor as a file holds it."""

    _checkpoint: Checkpoint = field(repr=False, compare=False)

    def rows(self, rows: Rows) -> np.ndarray:
        return self._copy(self._checkpoint._view(self)[rows])

    def read(self) -> np.ndarray:
        return self._copy(self._checkpoint._view(self))

    def check_readable(self) -> None:
        if self.dtype not in READABLE:
            wanted = f"one of {', '.join(READABLE)}"
            raise ChatGLMError(self.file, f"dtype of {self.name}", self.dtype, wanted)

    def _copy(self, view: np.ndarray) -> np.ndarray:
        return np.array(view, dtype=np.float32 if self.dtype in FLOATS else None, order="C")


class _Shards:
    """Open files; for one more, the one whose last use is longest ago is closed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[Path, dict[str, StoredTensor]] = {}
        self._closed = False

    def close(self) -> None:
        self._open.clear()
        self._closed = True

    def __getitem__(self, file: Path) -> dict[str, StoredTensor]:
        if self._closed:
            raise ValueError(f"checkpoint {self._folder} is closed")
        shard = self._open.pop(file, None)
        if shard is None:
            while len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            shard = open_weight_file(file)
        self._open[file] = shard
        return shard


class Checkpoint:
    """All tensors of a folder, whichever files they are in. Use as a context manager, or `close()`."""

    def __init__(self, folder: Path, files: Files):
        """`files`: the tensors to take from each file, None for all that it holds."""
        self.folder = folder
        self._shards = _Shards(folder)
        self._tensors: dict[str, Tensor] = {}
        self._absent: dict[str, Path] = {}
        for file, names in files.items():
            self._add(file, names)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Find the weight files of `folder` and read their tables of contents.

        Safetensors are preferred where both kinds are there, and a single file to numbered shards. Raises
        ChatGLMError for a folder without weights, a missing, damaged or empty file, a Git LFS pointer, a bad
        index, and for a `.bin` file with pickled code.
        """
        folder = Path(folder)
        return cls(folder, _find_files(folder))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all mapped files back. Arrays that were read stay valid; nothing more can be read."""
        self._shards.close()

    def replaced(self, removed: Collection[str], added: Iterable[Tensor]) -> Checkpoint:
        """This checkpoint, over the same open files, with other tensors in place of some; both are closed together."""
        other = copy(self)
        other._tensors = {name: tensor for name, tensor in self._tensors.items() if name not in removed}
        other._tensors.update((tensor.name, tensor) for tensor in added)
        return other

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        return self._tensors[name].dtype

    def nbytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def verify(
        self,
        expected: Mapping[str, tuple[int, ...]],
        ignored: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Check names, shapes and types against what a model needs; no weight is read.

        Raises ChatGLMError for a wrong shape or an unreadable type, for a missing tensor of `expected`, and
        for another one unless `ignored(name)`.
        """
        for name, file in self._absent.items():
            if not ignored(name):
                raise ChatGLMError(file, name, "missing", "a tensor, as the index says")
        for name, tensor in self._tensors.items():
            if name in expected:
                if tensor.shape != tuple(expected[name]):
                    wanted_shape = list(expected[name])
                    raise ChatGLMError(tensor.file, f"shape of {name}", list(tensor.shape), wanted_shape)
                tensor.check_readable()
        if missing := [name for name in expected if name not in self._tensors]:
            wanted = f"a tensor of shape {list(expected[missing[0]])}"
            raise ChatGLMError(self.folder, missing[0], f"missing{_and_more(missing)}", wanted)
        if unknown := [name for name in self._tensors if name not in expected and not ignored(name)]:
            tensor = self._tensors[unknown[0]]
            seen = f"a tensor of shape {list(tensor.shape)}{_and_more(unknown)}"
            raise ChatGLMError(tensor.file, tensor.name, seen, "only tensors that the config calls for")

    def _add(self, file: Path, names: Sequence[str] | None) -> None:
        shard = self._shards[file]
        for name in shard if names is None else names:
            if name not in shard:
                self._absent[name] = file
                continue
            if name in self._tensors:
                seen = f"also in {self._tensors[name].file.name}"
                raise ChatGLMError(file, name, seen, "a tensor of one file only")
            stored = shard[name]
            self._tensors[name] = FileTensor(name, file, stored.shape, stored.dtype, stored.nbytes, self)

    def _view(self, tensor: FileTensor) -> np.ndarray:
        tensor.check_readable()
        return self._shards[tensor.file][tensor.name].view()


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _find_files(folder: Path) -> Files:
    """The weight files of a folder, each with the names to take from it (None: all)."""
    if not folder.is_dir():
        seen = "a file" if folder.exists() else "missing"
        raise ChatGLMError(folder, "checkpoint", seen, "a folder with config.json and weights")
    kinds = [files for stem, extension in KINDS if (files := _files_of_kind(folder, stem, extension))]
    if not kinds:
        for path in sorted(folder.iterdir()):
            if any(path.match(f"{stem}*{extension}") for stem, extension in KINDS) and not path.is_file():
                seen = "a folder" if path.is_dir() else "a link to a file that is not there"
                raise ChatGLMError(path, "weight file", seen, "a file of weights")
        wanted = " or ".join(f"{stem}*{extension}" for stem, extension in KINDS)
        raise ChatGLMError(folder, "weights", f"missing ({_listing(folder)})", wanted)
    # A download that leaves out the large files of one kind may still have brought the small index of it.
    files = next((files for files in kinds if any(file.is_file() for file in files)), kinds[0])
    for file in files:
        if not file.is_file():
            wanted = f"one of the {len(files)} files of the checkpoint"
            raise ChatGLMError(file, "weight file", "missing", wanted)
    return files


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if len(names) > 5:
        names[5:] = ["..."]
    return f"the folder has {', '.join(names)}" if names else "the folder is empty"


def _files_of_kind(folder: Path, stem: str, extension: str) -> Files:
    """A single file, else the files of the index, else numbered shards without index."""
    single, index = folder / f"{stem}{extension}", folder / f"{stem}{extension}.index.json"
    if single.is_file():
        return {single: None}
    if index.is_file():
        return _files_of_index(index)
    pattern = re.compile(rf"{stem}-(\d+)-of-(\d+){re.escape(extension)}")
    found = {path.name: match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    total = max((int(match[2]) for match in found.values()), default=0)
    names = [f"{stem}-{i:05d}-of-{total:05d}{extension}" for i in range(1, total + 1)]
    if surplus := sorted(found.keys() - set(names)):
        raise ChatGLMError(folder, "weight file", surplus[0], f"a name like {names[0]}")
    return dict.fromkeys(folder / name for name in names)


def _files_of_index(index: Path) -> Files:
    refuse_placeholder(index)
    weight_map = read_json_object(index, "a JSON object with weight_map").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        seen = "missing" if weight_map is None else repr(weight_map)[:40]
        raise ChatGLMError(index, "weight_map", seen, "an object of tensor name: file name")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or str(Path(file)) != Path(file).name:
            wanted = "the name of a file beside the index"
            raise ChatGLMError(index, f"weight_map of {name}", repr(file), wanted)
        files.setdefault(index.parent / file, []).append(name)
    return {file: files[file] for file in sorted(files)}
