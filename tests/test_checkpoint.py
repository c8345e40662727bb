"""The checkpoint reader: every folder layout, what it keeps in memory, verification, and bad folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import LFS_POINTER, assert_told, both_kinds, save, save_sharded, shapes, tensors, write_index
from safetensors.torch import load_file

from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.errors import ChatGLMError

MB = 1 << 20


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(ChatGLMError) as caught:
        Checkpoint.open(folder)
    assert_told(caught.value, *words)


def assert_is_all(checkpoint: Checkpoint) -> None:
    state = tensors()
    assert set(checkpoint.names) == set(state)
    for name, tensor in state.items():
        stored = checkpoint[name]
        assert checkpoint.shape(name) == stored.shape == tuple(tensor.shape)
        assert checkpoint.dtype(name) == stored.dtype == str(tensor.dtype).removeprefix("torch.")
        assert checkpoint.nbytes(name) == stored.nbytes == tensor.numel() * tensor.element_size()
        wanted = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        some = np.array([2, 0])
        for read, rows in [
            (stored.read(), wanted),
            (stored.rows(slice(1, 3)), wanted[1:3]),
            (stored.rows(some), wanted[some]),
            (stored.rows([1]), wanted[1:2]),
        ]:
            assert read.dtype == wanted.dtype
            np.testing.assert_array_equal(read, rows)


# Layouts


@both_kinds
def test_single_file(tmp_path: Path, stem: str, extension: str) -> None:
    save(tmp_path / f"{stem}{extension}", tensors())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_is_all(checkpoint)


@both_kinds
@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_shards(tmp_path: Path, stem: str, extension: str, index: bool) -> None:
    first, second = save_sharded(tmp_path, stem, extension, index)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_is_all(checkpoint)
        assert checkpoint["a.weight"].file == first
        assert checkpoint["a.norm"].file == second


def test_index_decides_what_is_read(tmp_path: Path) -> None:
    save(tmp_path / "one.bin", tensors())
    write_index(tmp_path, "pytorch_model", ".bin", {"weight_map": {"embed": "one.bin"}})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names == ["embed"]
        assert "embed" in checkpoint
        assert "a.norm" not in checkpoint


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    save_sharded(tmp_path, "pytorch_model", ".bin", index=True)
    save_sharded(tmp_path, "model", ".safetensors", index=True)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert {checkpoint[name].file.suffix for name in checkpoint.names} == {".safetensors"}


def test_index_alone_does_not_hide_the_other_kind(tmp_path: Path) -> None:
    save_sharded(tmp_path, "pytorch_model", ".bin", index=True)
    for file in save_sharded(tmp_path, "model", ".safetensors", index=True):
        file.unlink()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_is_all(checkpoint)
        assert checkpoint["embed"].file.suffix == ".bin"


def test_every_golden_checkpoint(shared: Path) -> None:
    """Values against the libraries' own readers."""
    folders = sorted(shared.glob("golden/*/*/checkpoint"))
    assert len(folders) >= 7
    for folder in folders:
        with Checkpoint.open(folder) as checkpoint:
            count = 0
            for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
                state = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
                for name, tensor in state.items():
                    np.testing.assert_array_equal(checkpoint[name].read(), tensor.float().numpy())
                count += len(state)
            assert count == len(checkpoint.names)


# Open files and memory


def test_arrays_outlive_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", tensors())
    with Checkpoint.open(tmp_path) as checkpoint:
        tensor = checkpoint["embed"]
        rows, packed = tensor.rows(slice(0, 4)), checkpoint["b.packed"].read()
    np.testing.assert_array_equal(rows, tensors()["embed"][:4].float())
    np.testing.assert_array_equal(packed, tensors()["b.packed"])
    with pytest.raises(ValueError, match="closed"):
        tensor.read()


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


def mapped_files(folder: Path) -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if str(folder) in line}


@linux
@both_kinds
def test_few_files_are_open_at_a_time(tmp_path: Path, stem: str, extension: str) -> None:
    names = [f"{stem}-{i:05d}-of-00005{extension}" for i in range(1, 6)]
    for i, name in enumerate(names):
        save(tmp_path / name, {f"t{i}": torch.ones(4, 4)})
    with Checkpoint.open(tmp_path) as checkpoint:
        for i in (0, 1, 0, 1, 4, 3, 2):
            assert checkpoint[f"t{i}"].read().sum() == 16
        assert mapped_files(tmp_path) == {names[2], names[3]}
    assert not mapped_files(tmp_path)


def resident(kind: str) -> int:
    """Resident bytes of this process: RssAnon, or RssFile (mapped files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


@linux
@both_kinds
def test_memory_stays_small(tmp_path: Path, stem: str, extension: str) -> None:
    """300 MB in two shards: reading all of it in blocks of rows stays under 100 MB of anonymous memory, and a
    few rows touch a few pages. A whole tensor, for comparison, shows up in full."""
    block = np.random.default_rng(0).standard_normal((732, 4096), dtype=np.float32).astype(np.float16)
    for i in (1, 2):
        save(tmp_path / f"{stem}-{i:05d}-of-00002{extension}", {f"t{i}": torch.from_numpy(np.tile(block, (25, 1)))})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert sum(checkpoint.nbytes(name) for name in checkpoint.names) == pytest.approx(300e6, rel=0.01)
        start, mapped = resident("RssAnon"), resident("RssFile")
        few = checkpoint["t1"].rows(slice(0, 1024))
        assert few.nbytes == 16 * MB
        assert resident("RssAnon") - start < 24 * MB
        assert resident("RssFile") - mapped < 24 * MB

        most = 0
        for name in checkpoint.names:
            tensor = checkpoint[name]
            for begin in range(0, tensor.shape[0], 1024):
                values = tensor.rows(slice(begin, begin + 1024))
                most = max(most, resident("RssAnon") - start)
                assert values[0, 0] == block[begin % 732, 0]
        assert most < 100 * MB

        whole = checkpoint["t2"].read()
        assert resident("RssAnon") - start > 0.9 * whole.nbytes


# verify


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_sharded(tmp_path, "model", ".safetensors", index=True)
    return Checkpoint.open(tmp_path)


def test_verify_accepts(checkpoint: Checkpoint) -> None:
    checkpoint.verify(shapes())
    checkpoint.verify({"embed": (48, 16)}, ignored=lambda name: name != "embed")


def test_verify_tells_a_wrong_shape(checkpoint: Checkpoint) -> None:
    with pytest.raises(ChatGLMError) as caught:
        checkpoint.verify({**shapes(), "a.weight": (20, 17)})
    assert_told(caught.value, "model-00001-of-00002.safetensors", "a.weight", "[20, 16]", "[20, 17]")


def test_verify_tells_a_missing_tensor(checkpoint: Checkpoint) -> None:
    with pytest.raises(ChatGLMError) as caught:
        checkpoint.verify({**shapes(), "c.weight": (5, 6), "d.weight": (7,)})
    assert_told(caught.value, str(checkpoint.folder), "c.weight", "missing (and 1 more)", "[5, 6]")


def test_verify_tells_an_unknown_tensor(checkpoint: Checkpoint) -> None:
    expected = shapes()
    del expected["b.packed"]
    with pytest.raises(ChatGLMError) as caught:
        checkpoint.verify(expected)
    assert_told(caught.value, "model-00002-of-00002.safetensors", "b.packed", "[3, 4]")


# Bad folders


def test_folder_is_not_there(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere", "missing")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "is a file", "a folder")


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    refuses(tmp_path, "model.safetensors", "a link to a file that is not there")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refuses(tmp_path, "model.safetensors", "a folder")


def test_no_weights(tmp_path: Path) -> None:
    refuses(tmp_path, "weights is missing", "empty")
    for name in ("config.json", "modeling_chatglm.py"):
        (tmp_path / name).write_text("{}")
    refuses(tmp_path, "weights is missing", "modeling_chatglm.py", "model*.safetensors or pytorch_model*.bin")


@both_kinds
@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_missing_shard(tmp_path: Path, stem: str, extension: str, index: bool) -> None:
    save_sharded(tmp_path, stem, extension, index)[0].unlink()
    refuses(tmp_path, f"{stem}-00001-of-00002{extension}", "missing", "2 files")


def test_damaged_shard(tmp_path: Path) -> None:
    _, file = save_sharded(tmp_path, "model", ".safetensors", index=True)
    file.write_bytes(file.read_bytes()[:-1])
    refuses(tmp_path, file.name, "damaged")


def test_shards_of_two_sets(tmp_path: Path) -> None:
    save_sharded(tmp_path, "model", ".safetensors", index=False)
    save(tmp_path / "model-00001-of-00003.safetensors", tensors())
    refuses(tmp_path, "model-00001-of-00002.safetensors", "-of-00003")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    files = save_sharded(tmp_path, "model", ".safetensors", index=False)
    save(files[1], {"embed": torch.ones(2)})
    refuses(tmp_path, files[1].name, "embed", f"also in {files[0].name}")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("<html>", ["not JSON"]),
        ("", ["0 bytes"]),
        (LFS_POINTER, ["Git LFS pointer"]),
        ("[1]", ["weight_map", "list"]),
        ("[" * 100_000, ["not JSON", "recursion"]),
        ({"metadata": {}}, ["weight_map", "missing"]),
        ({"weight_map": {}}, ["weight_map", "{}"]),
        ({"weight_map": {"embed": 3}}, ["embed", "3"]),
        ({"weight_map": {"embed": "../other/model.safetensors"}}, ["embed", "../other/model.safetensors"]),
    ],
    ids=["html", "empty", "lfs", "list", "nested", "no map", "empty map", "number", "path"],
)
def test_bad_index(tmp_path: Path, contents: object, words: list[str]) -> None:
    write_index(tmp_path, "model", ".safetensors", contents)
    refuses(tmp_path, "model.safetensors.index.json", *words)


@both_kinds
def test_tensor_that_only_the_index_has(tmp_path: Path, stem: str, extension: str) -> None:
    files = save_sharded(tmp_path, stem, extension, index=True)
    save(files[1], {"b.weight": torch.ones(9, 8)})
    with Checkpoint.open(tmp_path) as checkpoint:
        wanted = {name: checkpoint.shape(name) for name in checkpoint.names}
        with pytest.raises(ChatGLMError) as caught:
            checkpoint.verify(wanted)
        assert_told(caught.value, files[1].name, "a.norm", "missing", "index")
        # Of what nobody wants it does not matter where it is.
        checkpoint.verify(wanted, ignored=lambda name: name not in wanted)


def test_index_as_other_programs_write_it(tmp_path: Path) -> None:
    save_sharded(tmp_path, "model", ".safetensors", index=True)
    index = tmp_path / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    contents["weight_map"] = {name: f"./{file}" for name, file in contents["weight_map"].items()}
    index.write_text("\ufeff" + json.dumps(contents), encoding="utf-8")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_is_all(checkpoint)
