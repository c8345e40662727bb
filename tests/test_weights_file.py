"""The .bin beside an IR, the IR over it, and the weights in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from golden_cases import V1, V2, each_small
from golden_sets import Golden
from hypothesis import given
from hypothesis import strategies as st
from stored_formats import stored_format

from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import load_config
from chatglm_ov.lowering.stock import StockLowering
from chatglm_ov.models import architecture
from chatglm_ov.models.chatglm2 import EMBEDDING, LM_HEAD, qkv_rows
from chatglm_ov.weight_formats import FORMATS
from chatglm_ov.weights import paged_file
from chatglm_ov.weights.file import ALIGNMENT, WeightsFile
from chatglm_ov.weights.ir import write_ir
from chatglm_ov.weights.paged_file import PAGE_BYTES
from chatglm_ov.weights.store import WeightStore

QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
formats = pytest.mark.parametrize("weight_format", FORMATS)


class Spy:
    """A file whose `write` is another one."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)


@dataclass
class Built:
    """A model whose weights are in a file that is still open, and what was reported of its progress."""

    model: ov.Model
    file: WeightsFile
    store: WeightStore
    progress: list[tuple[str, int]]


@contextmanager
def built(golden: Golden, weight_format: str, bin_path: Path) -> Iterator[Built]:
    config, progress = load_config(golden.checkpoint), []
    with Checkpoint.open(golden.checkpoint) as checkpoint, WeightsFile(bin_path) as file:
        store = WeightStore(checkpoint, file, weight_format, lambda name, nbytes: progress.append((name, nbytes)))
        model = architecture(config).build(config, StockLowering(store))
        file.flush()
        yield Built(model, file, store, progress)


def converted_ir(golden: Golden, weight_format: str, folder: Path) -> Path:
    xml = folder / "openvino_model.xml"
    with built(golden, weight_format, xml.with_suffix(".bin")) as parts:
        write_ir(parts.model, parts.file, xml)
    return xml


def layers(xml: Path, kind: str) -> list[ElementTree.Element]:
    return [layer for layer in ElementTree.parse(xml).iter("layer") if layer.get("type") == kind]


# The file


@given(
    constants=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 200), min_size=1, max_size=4)), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_file_holds_what_was_written(constants, seed, tmp_path_factory: pytest.TempPathFactory):
    """Written in one go or reserved and filled in pieces, of any sizes: at a multiple of 64, in full, nothing lost."""
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("file") / "w.bin"
    written = {}
    with WeightsFile(path) as file:
        for i, (in_pieces, sizes) in enumerate(constants):
            blocks = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
            if in_pieces:
                entry, position = file.reserve(str(i), sum(sizes)), 0
                for block in blocks:
                    position = file.write_at(entry, position, block)
                assert position == entry.nbytes
            else:
                entry = file.write(str(i), np.concatenate(blocks))
            written[str(i)] = entry, np.concatenate(blocks)
        assert file.entries == {name: entry for name, (entry, _) in written.items()}
    contents, end = path.read_bytes(), 0
    for entry, data in written.values():
        assert entry.offset % ALIGNMENT == 0
        assert entry.offset >= end
        assert contents[entry.offset : (end := entry.offset + entry.nbytes)] == data.tobytes()


@given(
    pieces=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200), st.booleans()), max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_pages_hold_what_was_written(pieces, seed, tmp_path_factory: pytest.TempPathFactory):
    """In any order, over ends of pages, more pages than are open at once, twice, with a flush between."""
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("file") / "w.bin"
    wanted, size = np.zeros(600, np.uint8), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_file, "PAGE_BYTES", 64)
        patch.setattr(paged_file, "OPEN_PAGES", 2)
        file = paged_file.PagedFile(path)
        for offset, length, flush in pieces:
            data = rng.integers(0, 256, length, dtype=np.uint8)
            file.write_at(offset, data)
            wanted[offset : offset + length] = data
            size = max(size, offset + length)
            assert path.stat().st_size == size
            if flush:
                file.flush()
                assert path.read_bytes() == wanted[:size].tobytes()
        file.flush()
        file.close()
    assert path.read_bytes() == wanted[:size].tobytes()


def test_whole_pages_are_written_in_one_piece(tmp_path: Path):
    """Two streams of small pieces: each page reaches the file once, whole, but the last."""
    file, written = paged_file.PagedFile(tmp_path / "w.bin"), []
    write = file._file.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "_file", Spy(file._file, lambda data: written.append(len(data)) or write(data)))
        half = 20 * PAGE_BYTES
        for start in range(0, half, PAGE_BYTES // 8):
            for offset in (start, half + start):
                file.write_at(offset, np.ones(PAGE_BYTES // 8, np.uint8))
        file.write_at(2 * half, np.ones(5, np.uint8))
        file.flush()
    file.close()
    assert written == [PAGE_BYTES] * 40 + [5]


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int64])
def test_constant_is_a_view_of_the_file(dtype, tmp_path: Path):
    values = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    with WeightsFile(tmp_path / "w.bin") as file:
        file.write("before", np.ones(3, np.uint8))
        file.write("a", np.asfortranarray(values))
        node = file.constant("a", ov.Type(dtype).get_type_name(), values.shape)
        file.flush()
        np.testing.assert_array_equal(node.data, values)
        assert node.get_friendly_name() == "a"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_weights_of_the_graph_are_in_the_mapped_file(tmp_path: Path):
    with built(V2, "f32", tmp_path / "w.bin") as parts:
        constants = [node for node in parts.model.get_ops() if node.get_friendly_name() in parts.file.entries]
        assert len(constants) == len(parts.file.entries)
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        ours = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1] == str(parts.file.path)]
        for node in constants:
            assert any(start <= node.data.ctypes.data < end for start, end in ours)


# The IR


@formats
@each_small
def test_constants_of_the_ir(golden, weight_format, tmp_path: Path):
    """Each lies at a multiple of 64, of the size that its type and shape call for, apart from the others."""
    xml = converted_ir(golden, weight_format, tmp_path)
    places = []
    for layer in layers(xml, "Const"):
        data = layer.find("data")
        places.append((int(data.get("offset")), int(data.get("size"))))
        shape = [int(n) for n in data.get("shape").split(",") if n.strip()]
        bits = getattr(ov.Type, data.get("element_type")).bitwidth
        assert places[-1][1] == (int(np.prod(shape)) * bits + 7) // 8
    places.sort()
    ends = [offset + size for offset, size in places]
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert all(end <= offset for end, (offset, _) in zip(ends, places[1:], strict=False))
    assert ends[-1] == xml.with_suffix(".bin").stat().st_size


@formats
def test_weights_read_back_are_the_encoded_checkpoint(weight_format, tmp_path: Path):
    """Through OpenVINO's own reader, bytes of every part: the tables, and a weight whose rows are reordered."""
    xml, config = converted_ir(V2, weight_format, tmp_path), load_config(V2.checkpoint)
    contents, checked = xml.with_suffix(".bin").read_bytes(), 0
    places = {layer.get("name"): layer.find("data") for layer in layers(xml, "Const")}
    constants = {node.get_friendly_name(): node for node in ov.Core().read_model(xml).get_ops()}
    with Checkpoint.open(V2.checkpoint) as checkpoint:
        for name in (EMBEDDING, LM_HEAD, QKV):
            weight = checkpoint[name].read()
            fmt = stored_format(weight_format, weight.shape[1], table=name != QKV)
            if name == QKV:
                weight = weight[qkv_rows(config, config.head_dim // 2)]
            for part, wanted in zip(fmt.parts(weight.shape[1]), fmt.encode(weight), strict=True):
                key = name if part.name == "weight" else f"{name}.{part.name}"
                place = places[key]
                offset, size = int(place.get("offset")), int(place.get("size"))
                assert contents[offset : offset + size] == part.stored(wanted).tobytes()
                node = constants[key]
                assert list(node.get_output_shape(0)) == [len(weight), *part.shape]
                assert node.get_element_type().get_type_name() == part.element_type
                if part.element_type in ("f32", "i8"):
                    np.testing.assert_array_equal(node.data.ravel(), wanted.ravel())
                checked += 1
    assert checked == {"f32": 3, "bf16": 3, "int8": 6, "int4": 7}[weight_format]


@formats
@each_small
def test_converts_behind_bf16_weights_are_marked(golden, weight_format, tmp_path: Path):
    """Without the mark a plugin folds them into f32 constants when it compiles; with it, it expands integers."""
    xml = converted_ir(golden, weight_format, tmp_path)
    halves = {layer.get("id") for layer in layers(xml, "Const") if layer.find("data").get("element_type") == "bf16"}
    behind = {e.get("to-layer") for e in ElementTree.parse(xml).iter("edge") if e.get("from-layer") in halves}
    converts = layers(xml, "Convert")
    marked = {
        layer.get("id")
        for layer in converts
        if any(mark.get("name") == "decompression" for mark in layer.iterfind("rt_info/attribute"))
    }
    assert marked == {layer.get("id") for layer in converts} & behind
    linears = 4 * load_config(golden.checkpoint).num_layers + 1
    assert len(marked) == (linears if weight_format == "bf16" else 0)


@formats
@each_small
def test_ir_computes_what_the_graph_did(golden, weight_format, tmp_path: Path):
    xml, core = tmp_path / "openvino_model.xml", ov.Core()
    f32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    config = load_config(golden.checkpoint)
    ids = golden["p5_input_ids"]
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": golden["p5_position_ids"],
        "beam_idx": np.zeros(1, np.int32),
    }
    prefix = architecture(config).prefix_length(config, ids, None)
    inputs |= {} if prefix is None else {"prefix_length": prefix}
    with built(golden, weight_format, xml.with_suffix(".bin")) as parts:
        graph = core.compile_model(parts.model, "CPU", f32)(inputs)["logits"].copy()
        write_ir(parts.model, parts.file, xml)
    # The marks, which the graph has not, let the plugin choose another kernel: equal to rounding.
    assert np.abs(core.compile_model(xml, "CPU", f32)(inputs)["logits"] - graph).max() < 1e-4


def test_openvino_reads_weights_that_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It reads all of them when it writes the XML: of those that are not there yet holes, in small pages for good."""
    seen, values, serialize = [], np.arange(1000, dtype=np.float32), ov.serialize
    path = tmp_path / "openvino_model.bin"

    def spied(*arguments):
        seen.append(path.read_bytes())
        serialize(*arguments)

    monkeypatch.setattr("chatglm_ov.weights.ir.ov.serialize", spied)
    with WeightsFile(path) as file:
        file.write("values", values)
        model = ov.Model([ops.result(ops.negative(file.constant("values", "f32", values.shape)))], [])
        write_ir(model, file, path.with_suffix(".xml"))
    assert [contents[: values.nbytes] for contents in seen] == [values.tobytes()]


def test_unwritable_xml_is_an_os_error(tmp_path: Path):
    (tmp_path / "m.xml").mkdir()
    with built(V2, "int8", tmp_path / "w.bin") as parts, pytest.raises(OSError, match=r"m\.xml"):
        write_ir(parts.model, parts.file, tmp_path / "m.xml")


# The store


@formats
@each_small
def test_progress_adds_up_to_the_bytes_of_every_tensor(golden, weight_format, tmp_path: Path):
    config = load_config(golden.checkpoint)
    shapes = architecture(config).weight_shapes(config)
    with built(golden, weight_format, tmp_path / "w.bin") as parts:
        done = dict.fromkeys(shapes, 0)
        for name, nbytes in parts.progress:
            done[name] += nbytes
        assert done == {name: parts.store.checkpoint.nbytes(name) for name in shapes}


@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
def test_small_blocks_make_the_same_file(weight_format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = converted_ir(V1, weight_format, tmp_path).with_suffix(".bin").read_bytes()
    monkeypatch.setattr("chatglm_ov.weights.store.BLOCK_BYTES", 1)
    assert converted_ir(V1, weight_format, tmp_path).with_suffix(".bin").read_bytes() == whole
