"""What conversion and loading cost in anonymous memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from golden_cases import OPS, V2

from chatglm_ov import OVChatGLMForCausalLM, convert
from chatglm_ov.calibration.moments import InputMoments
from chatglm_ov.calibration.rounding import Compensation
from chatglm_ov.config import parse_config
from chatglm_ov.models import architecture
from chatglm_ov.presets import config_json
from chatglm_ov.system.memory import give_back, growth, memory
from chatglm_ov.weights.store import BLOCK_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mapped files are told apart on Linux")

FORMATS = ("bf16", "int8", "int4")
SIZES = {"hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 6144, "padded_vocab_size": 32768}


def write_sparse_checkpoint(folder: Path) -> int:
    """A 363 MB checkpoint of zeros that takes no room on disk. Returns the bytes of its largest tensor as float32."""
    fields = config_json("chatglm3-6b", num_layers=1, seq_length=512, **SIZES)
    config, header, end = parse_config(fields), {}, 0
    for name, shape in architecture(config).weight_shapes(config).items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 4 * max(prod(entry["shape"]) for entry in header.values())


@pytest.fixture(scope="module", params=OPS)
def ops(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def measured(ops: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    tmp = tmp_path_factory.mktemp("memory")
    # Encoded in one piece it would take four times this, far above the bound below.
    assert write_sparse_checkpoint(tmp / "checkpoint") >= 4 * BLOCK_BYTES
    script = Path(__file__).parent / "memory_growth.py"
    command = [sys.executable, script, tmp / "checkpoint", V2.checkpoint, tmp, ops, *FORMATS]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", FORMATS)
def test_conversion_holds_a_few_blocks(name, measured):
    """Three as arrays: the block in float32, its levels, and, for a moment, their sizes or the levels as bytes. The
    rest is what the allocator keeps, and pieces on their way to the file."""
    assert measured[name]["convert"] < 5 * BLOCK_BYTES


@pytest.mark.parametrize("precision", ["f32", None])
@pytest.mark.parametrize("name", FORMATS)
def test_loaded_weights_stay_compressed(name, precision, ops, measured):
    """The plugin packs each linear weight once, at its stored size; the embedding stays in the mapped file. Had it
    expanded them, they would take 2 to 8 times as much, and the table too. Fused operations copy no weight."""
    bound = measured[name]["bin"] / (10 if ops == "fused" else 1)
    assert measured[name][f"load {precision}"] < bound


def test_memory_grows_with_what_is_allocated() -> None:
    before = memory()
    block = bytearray(b"x" * (64 << 20))
    after = memory()
    assert len(block) == 64 << 20
    assert all(60 << 20 < late - early < 140 << 20 for early, late in zip(before, after, strict=True))


def test_growth_is_the_most_that_was_there() -> None:
    with growth() as grown:
        block = bytearray(b"x" * (64 << 20))
        time.sleep(0.05)
        del block
    assert 60 << 20 < grown.nbytes < 140 << 20


@pytest.mark.parametrize("ops", OPS)
def test_a_released_cache_is_the_systems_again(ops: str, tmp_path: Path) -> None:
    convert(V2.checkpoint, tmp_path, ("int8",), ops, progress=False)
    model = OVChatGLMForCausalLM.from_pretrained(tmp_path)
    ids = torch.ones((1, 4), dtype=torch.int64)
    logits = model(ids).logits
    small = memory()[1]
    _enlarge_cache(model)
    assert memory()[1] - small > 60 << 20
    model.release_cache()
    assert memory()[1] - small < 10 << 20
    assert torch.equal(model(ids).logits, logits)


def _enlarge_cache(model: OVChatGLMForCausalLM) -> None:
    """8192 rows in each of its parts."""
    for state in model.session.request.infer_request.query_state():
        if state.state.size:
            state.state = ov.Tensor(np.zeros((8192, *state.state.shape[1:]), state.state.data.dtype))


def test_memory_taken_after_some_was_freed_is_seen() -> None:
    freed = [np.ones(100_000, np.uint8) for _ in range(400)]
    del freed
    give_back()
    before = memory()[1]
    taken = [np.ones(100_000, np.uint8) for _ in range(400)]
    assert memory()[1] - before > 0.9 * 40e6, len(taken)


def test_compensation_takes_the_memory_of_one_matrix() -> None:
    """Columns by columns, as large as the second moments: with 16384 of them, in ChatGLM-6B, a gigabyte each."""
    columns = 2048
    moments = InputMoments.of(np.random.default_rng(0).standard_normal((256, columns), np.float32))
    Compensation(InputMoments(moments.second[:8, :8], moments.magnitude[:8]))
    with growth() as grown:
        Compensation(moments)
    assert grown.nbytes < 1.25 * 4 * columns**2
