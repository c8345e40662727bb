"""LoRA adapters merged at conversion: against PyTorch, and what is refused."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import LFS_POINTER
from command_line import Run, checkpoint, run  # noqa: F401
from golden_cases import V1, V2, each_small, own_prompt, stored_weights, write_checkpoint
from golden_sets import Golden, each_ops
from lora_files import PREFIX, low_rank, write_lora
from torch.nn.functional import embedding, linear

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.checkpoint.lora import with_lora
from chatglm_ov.checkpoint.reader import Checkpoint, Rows, Tensor
from chatglm_ov.config import load_config
from chatglm_ov.runtime.loading import load_model

Tensors = dict[str, torch.Tensor]

LAYERS = {V1: "transformer.layers", V2: "transformer.encoder.layers"}
ATTENTION = {V1: "attention", V2: "self_attention"}
HEAD = {V1: "lm_head", V2: "transformer.output_layer"}
EMBEDDING = {V1: "transformer.word_embeddings", V2: "transformer.embedding.word_embeddings"}
QKV = "transformer.encoder.layers.0.self_attention.query_key_value"


def modules(golden: Golden) -> list[str]:
    """Linear layers of all kinds, not all of them, and the head."""
    first, last = f"{LAYERS[golden]}.0", f"{LAYERS[golden]}.2"
    attention = f"{first}.{ATTENTION[golden]}"
    return [f"{attention}.query_key_value", f"{attention}.dense", f"{last}.mlp.dense_4h_to_h", HEAD[golden]]


def weights_of(golden: Golden) -> Tensors:
    return {name: torch.from_numpy(values) for name, values in stored_weights(golden.checkpoint).items()}


def adapter_of(golden: Golden, ranks: dict[str, int] | None = None) -> Tensors:
    weights, tensors = weights_of(golden), Tensors()
    for seed, module in enumerate(modules(golden)):
        rank = next((rank for end, rank in (ranks or {}).items() if module.endswith(end)), 4)
        tensors |= low_rank(module, tuple(weights[f"{module}.weight"].shape), rank, seed)
    return tensors


def read_merged(golden: Golden, folder: Path) -> Tensors:
    with (
        Checkpoint.open(golden.checkpoint) as weights,
        with_lora(weights, folder, load_config(golden.checkpoint)) as merged,
    ):
        return {name: torch.from_numpy(merged[name].read()) for name in merged.names}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# Against PyTorch


@dataclass(frozen=True)
class Kind:
    """How an adapter of rank 4 (other ranks by the end of a module's name) with lora_alpha 8 is written.

    factor(module): what its product is multiplied with.
    """

    fields: dict[str, object]
    factor: Callable[[str], float]
    ranks: dict[str, int] = field(default_factory=dict)
    written: Callable[[Tensors], Tensors] = dict
    file: str = "adapter_model.safetensors"


def by_default_name(tensors: Tensors) -> Tensors:
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


def in_bfloat16(tensors: Tensors) -> Tensors:
    """Numbers that bfloat16 holds, and A alone in it."""
    return {name: t.bfloat16() if "lora_A" in name else t for name, t in tensors.items()}


KINDS = {
    "plain": Kind({}, lambda module: 2.0),
    "alpha is no whole number": Kind({"lora_alpha": 2.5}, lambda module: 0.625),
    "rslora": Kind({"use_rslora": True}, lambda module: 8 / sqrt(4)),
    "fan_in_fan_out, which PEFT ignores here": Kind({"fan_in_fan_out": True}, lambda module: 2.0),
    "patterns": Kind(
        {
            "rank_pattern": {"query_key_value": 8, r"layers\.\d+\.mlp\..*": 2, "layers.0": 64},
            "alpha_pattern": {"^lm_head": 3, "transformer.output_layer": 3, "se": 64, ".*dense": 16},
        },
        lambda module: {"query_key_value": 1, "dense_4h_to_h": 4, "dense": 4}.get(module.rpartition(".")[2], 3 / 4),
        {"query_key_value": 8, "dense_4h_to_h": 2},
    ),
    "rslora with patterns": Kind(
        {"use_rslora": True, "rank_pattern": {"dense": 9}},
        lambda module: 8 / 3 if module.endswith(".dense") else 4,
        {".dense": 9},
    ),
    "the first of the patterns that fit": Kind(
        {"rank_pattern": {"query_key_value": 8, r"\w+\.\w+\.query_key_value": 2}},
        lambda module: 1 if module.endswith("query_key_value") else 2,
        {"query_key_value": 8},
    ),
    "names of a state dict": Kind({}, lambda module: 2.0, written=by_default_name),
    "bfloat16": Kind({}, lambda module: 2.0, written=in_bfloat16),
    ".bin": Kind({}, lambda module: 2.0, file="adapter_model.bin"),
}


@each_small
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_of_torch(golden, kind, tmp_path: Path):
    made, tensors = KINDS[kind], adapter_of(golden, KINDS[kind].ranks)
    tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    folder = write_lora(tmp_path / "lora", made.written(tensors), made.file, **made.fields)
    merged, weights = read_merged(golden, folder), weights_of(golden)
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module in modules(golden):
            a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
            added = made.factor(module) * (b @ a)
            assert added.abs().max() > 0.01
            torch.testing.assert_close(merged[name], weight + added, rtol=0, atol=1e-6)
        else:
            assert torch.equal(merged[name], weight), name


def test_merged_layer_does_what_the_two_branches_do(tmp_path: Path):
    """In float64, as an adapter runs that is not merged."""
    tensors = adapter_of(V2)
    merged, weights = read_merged(V2, write_lora(tmp_path / "lora", tensors)), weights_of(V2)
    x = random(5, 128).double()
    a, b = (tensors[f"{PREFIX}{QKV}.lora_{part}.weight"].double() for part in "AB")
    wanted = linear(x, weights[f"{QKV}.weight"].double()) + 8 / 4 * linear(linear(x, a), b)
    torch.testing.assert_close(linear(x, merged[f"{QKV}.weight"].double()), wanted, rtol=0, atol=1e-5)


def test_dora(tmp_path: Path):
    """The layer as PEFT runs it: what the weight makes, corrected by magnitudes over norms, in float64."""
    tensors, weights = adapter_of(V2), weights_of(V2)
    magnitudes = {m: 1 + random(len(weights[f"{m}.weight"])).abs() for m in modules(V2)}
    named = {f"{PREFIX}{module}.lora_magnitude_vector": values for module, values in magnitudes.items()}
    merged = read_merged(V2, write_lora(tmp_path / "lora", {**tensors, **named}, use_dora=True))
    for module in modules(V2):
        weight = weights[f"{module}.weight"].double()
        a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")
        x = random(5, weight.shape[1]).double()
        ratio = magnitudes[module].double() / torch.linalg.norm(weight + 2 * b @ a, dim=1)
        wanted = linear(x, weight) + (ratio - 1) * linear(x, weight) + ratio * 2 * linear(linear(x, a), b)
        torch.testing.assert_close(linear(x, merged[f"{module}.weight"].double()), wanted, rtol=1e-5, atol=1e-5)


@each_small
@pytest.mark.parametrize("end", ["", ".default"])
def test_embedding(golden, end, tmp_path: Path):
    """Its matrices are the other way round: A [r, rows], B [columns, r]."""
    name = f"{EMBEDDING[golden]}.weight"
    weight = weights_of(golden)[name]
    a, b = random(4, len(weight)), random(weight.shape[1], 4)
    inner = f"{PREFIX}{EMBEDDING[golden]}.lora_embedding_"
    tensors = {f"{inner}A{end}": a, f"{inner}B{end}": b}
    # PEFT saves an embedding that is a target as a whole, too.
    tensors[f"{PREFIX}{EMBEDDING[golden]}.base_layer.weight"] = weight + 1
    merged = read_merged(golden, write_lora(tmp_path / "lora", tensors))[name]
    ids = torch.tensor([0, 5, 2047])
    wanted = embedding(ids, weight + 1) + 2 * embedding(ids, a.T) @ b.T
    torch.testing.assert_close(merged[ids], wanted, rtol=0, atol=1e-5)


@each_small
@pytest.mark.parametrize("wrapper", ["", ".base_layer", ".modules_to_save", ".modules_to_save.default"])
def test_tensors_trained_as_a_whole(golden, wrapper, tmp_path: Path):
    """Biases (bias=all) and modules_to_save; a bias of a layer that has a LoRA as well."""
    weights, qkv = weights_of(golden), modules(golden)[0]
    norm = f"{LAYERS[golden]}.1.input_layernorm"
    whole = {name: weights[name] + 0.5 for name in (f"{qkv}.bias", f"{norm}.weight", f"{HEAD[golden]}.weight")}
    tensors = low_rank(qkv, tuple(weights[f"{qkv}.weight"].shape))
    for name, tensor in whole.items():
        module, _, kind = name.rpartition(".")
        tensors[f"{PREFIX}{module}{wrapper}.{kind}"] = tensor
    saved = HEAD[golden].rpartition(".")[2]
    merged = read_merged(golden, write_lora(tmp_path / "lora", tensors, bias="all", modules_to_save=[saved]))
    for name, tensor in whole.items():
        assert torch.equal(merged[name], tensor), name
    assert not torch.equal(merged[f"{qkv}.weight"], weights[f"{qkv}.weight"])
    assert torch.equal(merged[f"{norm.replace('.1.', '.2.')}.weight"], weights[f"{norm.replace('.1.', '.2.')}.weight"])


def test_saved_modules_are_told_by_whole_names(tmp_path: Path):
    """`layer` is not the end of `output_layer`, of which there is a LoRA only."""
    merged = read_merged(V2, write_lora(tmp_path / "lora", adapter_of(V2), modules_to_save=["layer"]))
    name = f"{HEAD[V2]}.weight"
    assert not torch.equal(merged[name], weights_of(V2)[name])


# Rows


@dataclass(frozen=True)
class Noted(Tensor):
    """A tensor that keeps what it was asked for."""

    original: Tensor
    asked: list[Rows]

    def rows(self, rows: Rows) -> np.ndarray:
        self.asked.append(rows)
        return self.original.rows(rows)

    def read(self) -> np.ndarray:
        raise AssertionError("read as a whole")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "rows", [slice(3, 9), slice(250, 256), np.array([7, 0, 7, 255]), [1, 2]], ids=["slice", "end", "array", "list"]
)
def test_rows_are_those_of_the_whole_and_no_others_are_read(rows, use_dora, tmp_path: Path):
    tensors, name = low_rank(QKV, (256, 128)), f"{QKV}.weight"
    if use_dora:
        tensors[f"{PREFIX}{QKV}.lora_magnitude_vector"] = random(256).abs()
    folder = write_lora(tmp_path / "lora", tensors, use_dora=use_dora)
    whole = read_merged(V2, folder)[name].numpy()
    asked: list[Rows] = []
    with Checkpoint.open(V2.checkpoint) as weights:
        plain = weights[name]
        noted = Noted(plain.name, plain.file, plain.shape, plain.dtype, plain.nbytes, plain, asked)
        with with_lora(weights.replaced((), [noted]), folder, load_config(V2.checkpoint)) as merged:
            found = merged[name].rows(rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole[rows], rtol=0, atol=1e-6)
    assert asked == [rows]


# Converted


def merged_by_torch(golden: Golden, tensors: Tensors, folder: Path) -> Path:
    weights = weights_of(golden)
    for module in modules(golden):
        a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        weights[f"{module}.weight"] += 8 / 4 * (b @ a)
    return write_checkpoint(folder, golden.checkpoint, {name: t.numpy() for name, t in weights.items()})


@each_ops
@each_small
def test_model_is_that_of_the_merged_checkpoint(golden, ops, tmp_path: Path):
    tensors = adapter_of(golden)
    lora = write_lora(tmp_path / "lora", tensors)
    merged = merged_by_torch(golden, tensors, tmp_path / "merged")
    sources = {"lora-ov": (golden.checkpoint, lora), "merged-ov": (merged, None), "ov": (golden.checkpoint, None)}
    for name, (source, given) in sources.items():
        convert(source, tmp_path / name, ("f32",), ops, lora=given, progress=False)
    prompt = next(key for key in golden.arrays.files if key.endswith("_input_ids"))
    logits = {}
    for name in sources:
        model = load_model(tmp_path / name, "f32", "f32")
        logits[name] = own_prompt(golden[prompt], model).feed(model.create_request())
    assert np.abs(logits["lora-ov"] - logits["merged-ov"]).max() < 1e-4
    assert np.abs(logits["lora-ov"] - logits["ov"]).max() > 0.1


def test_all_formats_are_made_of_the_merged_weights(tmp_path: Path):
    """A product whose sums are exact: then files are equal to the last bit."""
    weights = weights_of(V2)
    shape = tuple(weights[f"{QKV}.weight"].shape)
    exact = {name: (tensor * 16).round() / 4 for name, tensor in low_rank(QKV, shape, rank=4).items()}
    a, b = exact.values()
    weights[f"{QKV}.weight"] += 2 * (b @ a)
    merged = write_checkpoint(tmp_path / "merged", V2.checkpoint, {name: t.numpy() for name, t in weights.items()})
    lora = write_lora(tmp_path / "lora", exact)
    formats = ("bf16", "int8", "int4")
    convert(V2.checkpoint, tmp_path / "one", formats, lora=lora, progress=False)
    convert(merged, tmp_path / "two", formats, progress=False)
    for name in formats:
        one, two = (tmp_path / folder / name / "openvino_model.bin" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_command_and_what_is_told(checkpoint: Path, tmp_path: Path, run: Run):
    """Of the folder its name, not where it is."""
    module = "transformer.encoder.layers.1.mlp.dense_h_to_4h"
    lora = write_lora(tmp_path / "诗 <1>", low_rank(module, (344, 64)), "adapter_model.bin")
    done = run("convert", checkpoint, tmp_path / "out", "--lora", f"{lora}/.", "--weight-format", "int8", "bf16")
    assert done.code == 0, done.err
    assert "LoRA 诗 <1>: 1 merged and 0 replaced tensors." in done.out
    for name in ("int8", "bf16"):
        assert load_model(tmp_path / "out", name).model.get_rt_info(["chatglm_ov", "lora"]).astype(str) == "诗 <1>"
        assert str(tmp_path) not in (tmp_path / "out" / name / "openvino_model.xml").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert "诗 <1>, merged" in next(line for line in run("info", tmp_path / "out").out.splitlines() if "LoRA" in line)
    found = json.loads(run("info", tmp_path / "out", "--json").out)["folder"]["weight_formats"]
    assert [found[name]["lora"] for name in ("int8", "bf16")] == ["诗 <1>"] * 2
    assert run("convert", checkpoint, tmp_path / "plain", "--weight-format", "int8").code == 0
    assert "LoRA" not in run("info", tmp_path / "plain").out


# What is refused


def good() -> Tensors:
    return low_rank(QKV, (256, 128))


def without(end: str) -> Tensors:
    return {name: tensor for name, tensor in good().items() if not name.endswith(end)}


def other(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {name: change(tensor) if name.endswith(end) else tensor for name, tensor in good().items()}


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


def plus(inner: str, *shape: int) -> Tensors:
    return {**good(), f"{PREFIX}{inner}": random(*shape)}


EMBED = f"{EMBEDDING[V2]}.lora_embedding"
REFUSED = [
    (good(), {"peft_type": "LOHA"}, "adapter_config.json: peft_type is 'LOHA', expected 'LORA'"),
    (good(), {"r": 0}, "r is 0, expected greater than 0"),
    (good(), {"r": "4"}, "r is '4', expected a valid integer"),
    (good(), {"lora_alpha": None}, "lora_alpha is None, expected a valid number"),
    (good(), {"rank_pattern": {"[": 4}}, r"rank_pattern is '\[' \(.*\), expected regular expressions"),
    (good(), {"alpha_pattern": {"(?i)QUERY": 4}}, r"alpha_pattern is '\(\?i\)QUERY' \(.*\), expected regular"),
    (good(), {"alpha_pattern": {"a": "b"}}, "alpha_pattern is {'a': 'b'}, expected a valid number"),
    (good(), {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected True, False, 'gaussian'"),
    (good(), {"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    (good(), {"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication is \[\[0, 2\], \[1, 3\]\], expected unset"),
    (good(), {"enable_lora": [True, False, True]}, r"enable_lora is \[True, False, True\], expected unset"),
    (good(), {"lora_bias": True}, "lora_bias is True, expected unset"),
    (good(), {"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\], expected unset"),
    (good(), {"use_qalora": True}, "use_qalora is True, expected unset"),
    ({}, {}, "weights is without lora_A and lora_B, expected a LoRA"),
    (without("lora_A.weight"), {}, f"lora_A of {QKV} is missing, expected lora_A and lora_B"),
    (without("lora_B.weight"), {}, f"lora_B of {QKV} is missing, expected lora_A and lora_B"),
    (good(), {"use_dora": True}, f"lora_magnitude_vector of {QKV} is missing"),
    (plus(f"{QKV}.lora_magnitude_vector", 256), {}, "lora_magnitude_vector .* is there, expected only lora_A and"),
    (plus(f"{QKV}.lora_magnitude_vector", 128), {"use_dora": True}, r"vector is \[128\], expected \[256\], from"),
    (plus(f"{EMBED}_A", 4, 2048), {}, "lora_embedding_B of .*word_embeddings is missing"),
    ({f"{PREFIX}{EMBED}_A": random(4, 2048)}, {"use_dora": True}, "use_dora is for .*word_embeddings.weight, expected"),
    (plus(f"{QKV}.lora_B.bias", 256), {}, "tensor name is .*lora_B.bias, expected"),
    (plus(f"{QKV}.lora_A.other.weight", 4, 128), {}, "tensor name is .*lora_A.other.weight, expected"),
    (plus(f"{QKV}.lora_A.default.weight", 4, 128), {}, "is there as .*lora_A.* too, expected one adapter"),
    ({"lora_A.weight": random(4, 128)}, {}, "tensor name is lora_A.weight, expected one that begins with base_mod"),
    (good(), {"r": 8}, r"lora_A.weight is \[4, 128\], expected \[8, 128\], from r = 8 and"),
    (good(), {"rank_pattern": {"query_key_value": 2}}, r"lora_A.weight is \[4, 128\], expected \[2, 128\]"),
    (other("A.weight", lambda t: t[:, 8:]), {}, r"shape of .*lora_A.weight is \[4, 120\], expected \[4, 128\]"),
    (other("B.weight", lambda t: t[8:]), {}, r"shape of .*lora_B.weight is \[248, 4\], expected \[256, 4\]"),
    (other("B.weight", lambda t: t[:, :3]), {}, r"shape of .*lora_B.weight is \[256, 3\], expected \[256, 4\]"),
    (other("A.weight", with_value(float("nan"))), {}, "a value of .*lora_A.weight is nan, expected a finite number"),
    (other("B.weight", with_value(float("inf"))), {}, "a value of .*lora_B.weight is inf, expected a finite number"),
    (other("A.weight", lambda t: t.double()), {}, "dtype of .*lora_A.weight is F64, expected one of float16"),
    (other("A.weight", lambda t: t.to(torch.int8)), {}, "dtype of .*lora_A.weight is int8, expected one of float16"),
    (low_rank(QKV.replace(".0.", ".9."), (256, 128)), {}, r"is for .*layers.9.*weight, expected a tensor of the check"),
    (low_rank("transformer.encoder.final_layernorm", (128, 1)), {}, r"shape of .* is \[128\], expected two axes"),
    (plus("transformer.rotary_pos_emb.inv_freq", 8), {}, "is for .*inv_freq, expected a tensor that the model reads"),
    (plus("transformer.encoder.final_layernorm.weight", 64), {}, r"is \[64\], expected \[128\], from that of tra"),
    (plus(f"{EMBEDDING[V2]}.weight", 2049, 128), {}, r"shape of .* is \[2049, 128\], expected \[2048, 128\]"),
    ({f"{PREFIX}{HEAD[V2]}.weight": random(2048, 128)}, {}, "weights is without lora_A and lora_B"),
    (good(), {"modules_to_save": ["output_layer"]}, "output_layer.weight is missing, expected a tensor, as modules_to"),
]  # fmt: skip


def refused(checkpoint: Path, lora: Path, tmp_path: Path) -> str:
    with pytest.raises(ChatGLMError) as error:
        convert(checkpoint, tmp_path / "out", ("int8",), lora=lora, progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize(("tensors", "fields", "told"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_what_cannot_be_merged_is_refused(tensors, fields, told, tmp_path: Path):
    lora = write_lora(tmp_path / "lora", tensors, **fields)
    error = refused(V2.checkpoint, lora, tmp_path)
    assert re.search(told, error), error
    assert str(lora) in error or str(V2.checkpoint) in error


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def put(name: str, contents: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(contents)


def pickle_code(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({f"{PREFIX}{QKV}.lora_A.weight": Path.cwd}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, "lora: adapter_config.json is missing, as is the folder, expected a folder as PEFT saves"),
        (remove("adapter_config.json"), "lora: adapter_config.json is missing, expected a folder as PEFT saves"),
        (put("adapter_config.json", "{"), "adapter_config.json: contents is not JSON"),
        (put("adapter_config.json", "[]"), "adapter_config.json: contents is a JSON list"),
        (put("adapter_config.json", "{}"), "adapter_config.json: peft_type is missing"),
        (remove("adapter_model.safetensors"), "weights is missing, expected adapter_model.safetensors or"),
        (put("adapter_model.safetensors", LFS_POINTER), "contents is a Git LFS pointer"),
        (put("adapter_model.safetensors", "{" * 100), "contents is damaged"),
        (pickle_code, r"adapter_model.bin: contents is a pickle that calls .* \(refused\)"),
    ],
)
def test_damaged_folders(damage, told, tmp_path: Path):
    damage(write_lora(tmp_path / "lora", good()))
    error = refused(V2.checkpoint, tmp_path / "lora", tmp_path)
    assert re.search(told, error), error


@pytest.mark.parametrize("inner", [f"{HEAD[V1]}.lora_A.weight", f"{HEAD[V1]}.weight"])
def test_tied_head_is_not_read(inner, tmp_path: Path):
    tied = write_checkpoint(tmp_path / "tied", V1.checkpoint, stored_weights(V1.checkpoint), tie_word_embeddings=None)
    lora = write_lora(tmp_path / "lora", {f"{PREFIX}{inner}": random(4, 128)})
    assert f"{inner} is for {HEAD[V1]}.weight, expected a tensor that the model reads" in refused(tied, lora, tmp_path)


@pytest.mark.parametrize("inner", [f"{EMBEDDING[V1]}.lora_embedding_A", f"{EMBEDDING[V1]}.weight"])
def test_tied_embedding_is_refused(inner, tmp_path: Path):
    """An adapter would change what is looked up only."""
    tied = write_checkpoint(tmp_path / "tied", V1.checkpoint, stored_weights(V1.checkpoint), tie_word_embeddings=None)
    lora = write_lora(tmp_path / "lora", {f"{PREFIX}{inner}": random(4, 2048)})
    assert "expected no adapter of an embedding tied to the LM head" in refused(tied, lora, tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path):
    stored = stored_weights(V2.checkpoint)
    name = f"{QKV}.weight"
    stored[name] = np.rint(stored[name] * 20).astype(np.int8)
    stored[f"{name}_scale"] = np.full(256, 0.05, np.float16)
    quantized = write_checkpoint(tmp_path / "quantized", V2.checkpoint, stored, quantization_bit=8)
    error = refused(quantized, write_lora(tmp_path / "lora", good()), tmp_path)
    assert f"dtype of {name} is int8, expected one of float16, bfloat16, float32 to merge a LoRA" in error


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("use_dora", "value", "seen"), [(False, 3e38, "inf"), (True, 0, "nan")])
def test_merged_values_that_are_no_numbers_are_told(use_dora, value, seen, tmp_path: Path):
    """Sums that are too large; rows of zeros, which DoRA gives no direction."""
    stored = stored_weights(V2.checkpoint)
    stored[f"{QKV}.weight"][:] = 0
    zeros = write_checkpoint(tmp_path / "zeros", V2.checkpoint, stored)
    tensors = {name: torch.full_like(tensor, value) for name, tensor in good().items()}
    if use_dora:
        tensors[f"{PREFIX}{QKV}.lora_magnitude_vector"] = torch.ones(256)
    error = refused(zeros, write_lora(tmp_path / "lora", tensors, use_dora=use_dora), tmp_path)
    assert f"a value of {QKV}.weight is {seen}, expected a finite number" in error


@pytest.mark.parametrize(("output", "told"), [("lora", "the LoRA itself"), (".", "a folder that the LoRA is in")])
def test_the_adapter_is_not_overwritten(output, told, tmp_path: Path):
    lora = write_lora(tmp_path / "lora", good())
    with pytest.raises(ChatGLMError, match=f"output is {told}, expected another folder"):
        convert(V2.checkpoint, tmp_path / output, ("int8",), lora=lora, overwrite=True, progress=False)
    assert (lora / "adapter_config.json").exists()
