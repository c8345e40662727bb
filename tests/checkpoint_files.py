"""Small checkpoints in every layout, for the tests of the reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatglm_ov.errors import ChatGLMError

KINDS = [("model", ".safetensors"), ("pytorch_model", ".bin")]
both_kinds = pytest.mark.parametrize(("stem", "extension"), KINDS, ids=["safetensors", "bin"])

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1980385902\n"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(48, 16, generator=generator).half(),
        "a.weight": torch.randn(20, 16, generator=generator).bfloat16(),
        "a.norm": torch.randn(16, generator=generator),
        "b.weight": torch.randint(-128, 128, (9, 8), generator=generator).to(torch.int8),
        "b.packed": torch.randint(-(2**31), 2**31 - 1, (3, 4), generator=generator).to(torch.int32),
    }


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors().items()}


def save(file: Path, state: dict[str, torch.Tensor]) -> Path:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def save_sharded(folder: Path, stem: str, extension: str, index: bool) -> list[Path]:
    """Two shards, `embed` and `a.weight` in the first."""
    state = tensors()
    files = [folder / f"{stem}-{i:05d}-of-00002{extension}" for i in (1, 2)]
    parts = [["embed", "a.weight"], ["a.norm", "b.weight", "b.packed"]]
    for file, names in zip(files, parts, strict=True):
        save(file, {name: state[name] for name in names})
    if index:
        weight_map = {name: file.name for file, names in zip(files, parts, strict=True) for name in names}
        write_index(folder, stem, extension, {"metadata": {}, "weight_map": weight_map})
    return files


def write_index(folder: Path, stem: str, extension: str, contents: object) -> Path:
    path = folder / f"{stem}{extension}.index.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")
    return path


def assert_told(error: ChatGLMError, *words: str) -> None:
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert word in message, message
