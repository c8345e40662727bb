"""One weight file: values, types and layouts that writers use, and files that must be refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint_files import LFS_POINTER, assert_told, both_kinds, save, tensors

from chatglm_ov.checkpoint.files import open_weight_file
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.errors import ChatGLMError


def refuses(file: Path, *words: str) -> None:
    with pytest.raises(ChatGLMError) as caught:
        open_weight_file(file)
    assert_told(caught.value, file.name, *words)


def assert_holds(file: Path, state: dict[str, torch.Tensor]) -> None:
    stored = open_weight_file(file)
    assert set(stored) == set(state)
    for name, tensor in state.items():
        assert stored[name].shape == tuple(tensor.shape)
        assert stored[name].dtype == str(tensor.dtype).removeprefix("torch.") == stored[name].view().dtype.name
        assert stored[name].nbytes == stored[name].view().nbytes
        np.testing.assert_array_equal(stored[name].view().astype(np.float64), tensor.double())


@both_kinds
def test_types_and_values(tmp_path: Path, stem: str, extension: str) -> None:
    assert_holds(save(tmp_path / f"{stem}{extension}", tensors()), tensors())


def test_bin_of_before_torch_1_6(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert_holds(tmp_path / "x.bin", tensors())


@pytest.mark.parametrize("wrapper", ["state_dict", "module"])
def test_bin_with_a_wrapper(tmp_path: Path, wrapper: str) -> None:
    torch.save({"epoch": 3, wrapper: {**tensors(), "steps": 7}}, tmp_path / "x.bin")
    assert_holds(tmp_path / "x.bin", tensors())


def test_bin_with_shared_and_strided_storage(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    parameter = torch.nn.Parameter(base)
    state = {"x": parameter, "tied": parameter, "t": base.T, "part": base[1:3]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.nbytes("part") == 48
        np.testing.assert_array_equal(checkpoint["tied"].read(), base)
        np.testing.assert_array_equal(checkpoint["part"].read(), base[1:3])
        transposed = checkpoint["t"].rows(slice(0, 5))
        assert transposed.flags.c_contiguous
        np.testing.assert_array_equal(transposed, base.T[:5])


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_safetensors_of_another_writer(tmp_path: Path, shift: int) -> None:
    """The format promises no alignment of the data."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    entry = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": entry}).encode()
    header += b" " * (-len(header) % 8 + shift)
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    stored = open_weight_file(file)
    assert list(stored) == ["x"]
    np.testing.assert_array_equal(stored["x"].view(), values)
    np.testing.assert_array_equal(stored["x"].view()[[1]].astype(np.float32), [[3, 4, 5]])


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtype(tmp_path: Path, stem: str, extension: str, dtype: torch.dtype) -> None:
    """Harmless in a tensor that is ignored, an error in one that is needed."""
    save(tmp_path / f"{stem}{extension}", {"x": torch.ones(2, 2).to(dtype), "y": torch.ones(2)})
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.verify({"y": (2,)}, ignored=lambda name: name == "x")
        with pytest.raises(ChatGLMError) as caught:
            checkpoint.verify({"x": (2, 2), "y": (2,)})
        assert_told(caught.value, f"{stem}{extension}", "dtype of x", "float16, bfloat16, float32")
        with pytest.raises(ChatGLMError):
            checkpoint["x"].rows(slice(0, 1))


def test_sparse_tensor_has_no_rows(tmp_path: Path) -> None:
    torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "pytorch_model.bin")
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(ChatGLMError) as caught:
        checkpoint["x"].read()
    assert_told(caught.value, "sparse_coo")


# Bad files


@both_kinds
def test_placeholders(tmp_path: Path, stem: str, extension: str) -> None:
    file = tmp_path / f"{stem}{extension}"
    refuses(file, "unreadable")
    file.write_text(LFS_POINTER)
    refuses(file, "a Git LFS pointer", "the real file (git lfs pull)")
    file.write_bytes(b"")
    refuses(file, "0 bytes")


def assert_refused_at_every_length(file: Path, *words: str) -> None:
    whole = file.read_bytes()
    for length in [1, 2, 7, 8, 9, 100, *range(200, len(whole), len(whole) // 40), len(whole) - 1]:
        file.write_bytes(whole[:length])
        refuses(file, *words)


@both_kinds
def test_truncated_file(tmp_path: Path, stem: str, extension: str) -> None:
    assert_refused_at_every_length(save(tmp_path / f"{stem}{extension}", tensors()), "damaged")


def test_truncated_bin_of_before_torch_1_6(tmp_path: Path) -> None:
    """No word asked: a class name that is cut off reads as the name of an unknown class."""
    torch.save(tensors(), tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert_refused_at_every_length(tmp_path / "x.bin")


@both_kinds
def test_not_a_weight_file(tmp_path: Path, stem: str, extension: str) -> None:
    file = tmp_path / f"{stem}{extension}"
    file.write_bytes(np.random.default_rng(0).bytes(4096))
    refuses(file, "damaged")


def test_bin_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "x.bin")
    refuses(tmp_path / "x.bin", "a list", "a state dict")


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    victim, file = tmp_path / "victim", tmp_path / "x.bin"
    contents = {"embed": torch.ones(2, 2), "extra": Malice(victim)}
    torch.save(contents, file, _use_new_zipfile_serialization=zipped)
    refuses(file, "mkdir", "refused")
    assert not victim.exists()
    torch.load(file, weights_only=False)
    assert victim.exists(), "the file was harmless: the test proves nothing"
