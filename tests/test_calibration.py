"""int4 weights chosen by a text: the model is run as it is, scales are folded without changing it, errors shrink."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run, run  # noqa: F401
from conversions import listing
from golden_cases import V1, Opener, each_small, open_compiled, stored_weights, write_checkpoint  # noqa: F401
from golden_sets import each_ops
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.calibration import run as calibration_run
from chatglm_ov.calibration.eager import EagerLowering
from chatglm_ov.calibration.moments import STRIPE, InputMoments
from chatglm_ov.calibration.needs import calibrated_weights
from chatglm_ov.calibration.rounding import LAZY_COLUMNS, ROWS, Compensation, Grid, clipped, grouped
from chatglm_ov.calibration.run import calibrate
from chatglm_ov.calibration.scaling import column_scales
from chatglm_ov.calibration.text import POEMS, Calibration
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.cli.demo import CHECKPOINT as DEMO
from chatglm_ov.config import load_config
from chatglm_ov.documents import Source
from chatglm_ov.evaluation.run import Windows, evaluate
from chatglm_ov.models import architecture
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.tokenizer import load_tokenizer
from chatglm_ov.weights.choices import FormatChoices

SMALL = Calibration(tokens=2048)


def random_case(seed: int, rows: int = 24, columns: int = 256, tokens: int = 512) -> tuple[torch.Tensor, InputMoments]:
    """A weight, and the moments of inputs that depend on each other, as those of a model do."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns)) / columns**0.5
    x = mixed * np.exp(rng.standard_normal(columns)) + 0.3 * rng.standard_normal(columns)
    return torch.from_numpy(rng.standard_normal((rows, columns), np.float32)), InputMoments.of(x.astype(np.float32))


def plain(weight: torch.Tensor, group: int) -> torch.Tensor:
    return Grid.over(grouped(weight, group)).rounded(grouped(weight, group)).reshape_as(weight)


# The model is run as it is


@each_small
def test_eager_model_is_the_stock_model(golden, open_compiled: Opener):
    """What comes to the LM head, times the LM head: the logits of the f32 model, over two sequences of unequal size."""
    model = open_compiled(golden.checkpoint, "f32", "f32")
    ids = _sequences(model)
    seen: dict[str, np.ndarray] = {}
    with Checkpoint.open(golden.checkpoint) as weights:
        eager = EagerLowering(weights, model.config, ids, lambda name, x: seen.__setitem__(name, x))
        assert model.architecture.build(model.config, eager) is None
        name = model.architecture.LM_HEAD if model.architecture.LM_HEAD in seen else model.architecture.EMBEDDING
        logits = seen[name] @ weights[name].read().T
    start = 0
    for sequence in ids:
        wanted = _logits(model, sequence)
        np.testing.assert_allclose(logits[start : start + len(sequence)], wanted, rtol=0, atol=1e-4)
        start += len(sequence)


def _sequences(model: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    end = [2001, 2004] if model.config.architecture == "chatglm" else []
    return [np.array([*rng.integers(4, 1000, n), *end, *rng.integers(4, 1000, 9)]) for n in (30, 17)]


def _logits(model: Any, ids: np.ndarray) -> np.ndarray:
    batch, mask = ids[None], np.ones((1, len(ids)), np.int64)
    positions = model.architecture.position_ids(model.config, batch, mask)
    prefix = model.architecture.prefix_length(model.config, batch, mask)
    return model.create_request().infer(batch, mask, positions, np.zeros(1, np.int32), 0, prefix)[0]


@pytest.mark.parametrize("features", [3, STRIPE, STRIPE + 7])
def test_moments(features):
    x = np.random.default_rng(0).standard_normal((20, features), np.float32)
    moments = InputMoments.of(x)
    exact = x.astype(np.float64)
    # A sum of 20 products in float32.
    bound = 21 * 2.0**-24 * (np.abs(exact).T @ np.abs(exact)) / 20 + 1e-30
    assert (np.abs(moments.second.numpy() - exact.T @ exact / 20) <= bound).all()
    np.testing.assert_allclose(moments.magnitude, np.abs(exact).mean(0), rtol=1e-5)
    error = torch.randn(4, features)
    wanted = ((error.double().numpy() @ exact.T) ** 2).sum() / 20
    assert moments.error(error).item() == pytest.approx(wanted, rel=1e-3)


# Scales are folded without changing the model


@each_small
def test_folded_scales_change_nothing(golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_compiled: Opener):
    """Random factors on every column that has a maker, and no rounding: the logits of the original model."""
    module, config = architecture(load_config(golden.checkpoint)), load_config(golden.checkpoint)
    original = open_compiled(golden.checkpoint, "f32", "f32")

    def any_scales(weight, moments, group, makers):
        factors = torch.exp(torch.randn(int(makers.max()) + 1, generator=torch.Generator().manual_seed(len(weight))))
        return factors[makers]

    monkeypatch.setattr(calibration_run, "column_scales", any_scales)
    monkeypatch.setattr(calibration_run, "_Chosen", _NotRounded)
    choices = FormatChoices(lm_head_format="f32", group_size=32)
    formats = calibrated_weights(config, choices, ("int4",), ("awq",))
    assert set(module.input_folds(config)) <= set(module.weight_shapes(config))
    with Checkpoint.open(golden.checkpoint) as weights:
        chosen = calibrate(config, weights, formats, _sequences(original), ("awq",), tmp_path, lambda name: None)
        scaled = chosen["int4"]
        eager: dict[str, np.ndarray] = {}
        ids = _sequences(original)
        module.build(config, EagerLowering(scaled, config, ids, lambda name, x: eager.__setitem__(name, x)))
        pairs = [(scaled[name].read(), weights[name].read()) for name in module.weight_shapes(config)]
        logits = eager[module.LM_HEAD] @ weights[module.LM_HEAD].read().T
    assert sum(not np.array_equal(*pair) for pair in pairs) >= 2 * config.num_layers
    wanted = np.concatenate([_logits(original, sequence) for sequence in ids])
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


class _NotRounded(calibration_run._Chosen):
    """Takes the scaled weights in the place of their codes."""

    def add(self, name: str, choice: Any) -> None:
        self._files[name] = choice.format, self._folder
        self._divisors.update(choice.divisors)
        self._scales = {**getattr(self, "_scales", {}), name: self._scale_of(name, choice)}

    def _scale_of(self, name: str, choice: Any) -> np.ndarray:
        """From the divisors of the maker back to columns."""
        fold = architecture(self._config).input_folds(self._config).get(name)
        if fold is None:
            return np.ones(1, np.float32)
        rows = np.arange(self._weights.shape(name)[1]) if fold.rows is None else fold.rows
        return choice.divisors[fold.into[0]][rows]

    @property
    def _config(self) -> Any:
        return load_config(self._weights.folder)

    def _quantized(self, name: str, fmt: Any, file: Path) -> Any:
        values = self._weights[name].read() * self._scales[name]
        if name in self._divisors:
            values = calibration_run._divided(values, slice(None), self._divisors[name])
        return SimpleNamespace(name=name, shape=values.shape, read=lambda: values, rows=lambda rows: values[rows])


# Errors shrink


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 128]))
def test_clipped_errors_are_never_larger(seed, group):
    """By the measure that is minimized, squares of rounding errors times mean squares of the inputs."""
    weight, moments = random_case(seed, tokens=64)
    importance = moments.second.diagonal()
    grid = clipped(weight, importance, group)
    errors = [
        ((rounded - weight) ** 2 * importance).reshape(len(weight), -1, group).sum(-1)
        for rounded in (grid.rounded(grouped(weight, group)).reshape_as(weight), plain(weight, group))
    ]
    assert (errors[0] <= errors[1]).all()
    assert (grid.scale.half().float() == grid.scale).all() and (grid.zero_point % 1 == 0).all()
    assert grid.zero_point.min() >= 0 and grid.zero_point.max() <= 15


def reference_codes(weight: np.ndarray, second: np.ndarray, grid: Grid, group: int) -> np.ndarray:
    """GPTQ as in its paper, by the inverse of the second moments, in double precision and one column after another."""
    second = second.astype(np.float64) + 0.01 * second.diagonal().mean() * np.eye(len(second))
    order = np.argsort(-second.diagonal(), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(second[np.ix_(order, order)])).T
    left, codes = weight[:, order].astype(np.float64), np.empty(weight.shape)
    zero_point, scale = (part.numpy().astype(np.float64)[..., 0] for part in (grid.zero_point, grid.scale))
    for i, column in enumerate(order):
        zero, step = zero_point[:, column // group], scale[:, column // group]
        codes[:, column] = np.clip(np.rint(left[:, i] / step) + zero, 0, 15)
        error = (left[:, i] - (codes[:, column] - zero) * step) / factor[i, i]
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return codes


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("columns", [32, LAZY_COLUMNS, 3 * LAZY_COLUMNS])
def test_compensation_is_that_of_the_paper(rows, columns):
    weight, moments = random_case(7, rows, columns, 2 * columns)
    grid = clipped(weight, moments.second.diagonal(), 32)
    codes = Compensation(moments).codes(weight, grid, 32).numpy()
    wanted = reference_codes(weight.numpy(), moments.second.numpy(), grid, 32)
    # A float32 sum decides a near tie otherwise now and then; what follows in its row may then differ.
    assert (codes == wanted).mean() > 0.97
    errors = [moments.error(grid.values(grouped(torch.from_numpy(c).float(), 32)).reshape_as(weight) - weight).item()
              for c in (codes.astype(np.float32), wanted.astype(np.float32))]  # fmt: skip
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_rows_are_compensated_by_themselves():
    """More rows than are rounded at once; the same alone."""
    weight, moments = random_case(3, ROWS + 5, 64)
    grid = clipped(weight, moments.second.diagonal(), 32)
    codes = Compensation(moments).codes(weight, grid, 32)
    last = Compensation(moments).codes(weight[-1:], Grid(grid.zero_point[-1:], grid.scale[-1:]), 32)
    assert (codes[-1:] == last).float().mean() > 0.95


@pytest.mark.parametrize("seed", range(4))
def test_every_method_beats_the_one_before(seed):
    weight, moments = random_case(seed)
    grid = clipped(weight, moments.second.diagonal(), 64)
    alone = grid.rounded(grouped(weight, 64)).reshape_as(weight)
    codes = Compensation(moments).codes(weight, grid, 64)
    together = grid.values(grouped(codes.float(), 64)).reshape_as(weight)
    errors = [moments.error(rounded - weight).item() for rounded in (plain(weight, 64), alone, together)]
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0]


def test_inputs_that_are_always_zero_or_equal():
    """Second moments without an inverse are damped until they have one."""
    weight, _ = random_case(0, 8, 64)
    for x in (np.zeros((5, 64)), np.ones((5, 64)), np.outer(np.arange(5), np.arange(64) % 2) * 1e18):
        moments = InputMoments.of(x.astype(np.float32))
        scale = column_scales(weight, moments, 32, None)
        assert torch.isfinite(scale).all() and (scale > 0).all()
        grid = clipped(weight, moments.second.diagonal(), 32)
        assert Compensation(moments).codes(weight, grid, 32).max() <= 15


def test_outlier_channels():
    """A few weight columns and a few other activations 300 times the rest: scaling beats plain rounding by 3 and more;
    activations alone, by 3 as well."""
    rng = np.random.default_rng(0)
    for outlier_columns in ([5, 200], []):
        weight, x = torch.from_numpy(rng.standard_normal((256, 512), np.float32)), rng.standard_normal((2048, 512))
        weight[:, outlier_columns] *= 300
        x[:, [3, 100, 300]] *= 300
        moments = InputMoments.of(x.astype(np.float32))
        scale = column_scales(weight, moments, 128, None)
        scaled, moved = weight * scale, moments.second.diagonal() / scale**2
        rounded = clipped(scaled, moved, 128).rounded(grouped(scaled, 128)).reshape_as(weight) / scale
        errors = [moments.error(each - weight).item() ** 0.5 for each in (plain(weight, 128), rounded)]
        assert errors[0] > 3 * errors[1]


def test_columns_of_one_maker_share_a_factor():
    weight, moments = random_case(1, columns=128)
    makers = torch.arange(128) % 32
    scale = column_scales(weight, moments, 32, makers)
    assert (scale.reshape(4, 32) == scale[:32]).all()
    assert len(scale.unique()) > 1


# From one end to the other


@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@each_ops
def test_calibrated_demo_is_nearer_to_the_original(ops, weight_format, two_layers: Path, tmp_path: Path):
    """KL divergence from f32 over poems that neither training nor calibration used; agreement with f32."""
    for name, options in (("plain", {}), ("chosen", {"calibration": Calibration(tokens=8192)})):
        convert(two_layers, tmp_path / name, (weight_format,), ops, progress=False, **options)
    convert(two_layers, tmp_path / "f32", ("f32",), "stock", progress=False)
    texts = tmp_path / "poems.jsonl"
    texts.write_text(
        "\n".join(json.dumps({"author": "太宗皇帝", "title": "帝京篇十首", "text": text}) for text in VERSE)
    )
    documents = Source(texts, prompt=POEMS.prompt).documents(load_tokenizer(two_layers))
    reference = load_model(tmp_path / "f32", "f32", "f32")
    scores = [
        evaluate(load_model(tmp_path / name, None, "f32"), reference, Windows(documents, 128, 64), lambda count: None)
        for name in ("plain", "chosen")
    ]
    assert scores[1].divergence < 0.6 * scores[0].divergence


VERSE = (
    "岩廊罢机务，崇文聊驻辇。玉匣启龙图，金绳披凤篆。韦编断仍续，缥帙舒还卷。对此乃淹留，欹案观坟典。",
    "移步出词林，停舆欣武宴。雕弓写明月，骏马疑流电。惊雁落虚弦，啼猿悲急箭。阅赏诚多美，于兹乃忘倦。",
    "鸣笳临乐馆，眺听欢芳节。急管韵朱弦，清歌凝白雪。彩凤肃来仪，玄鹤纷成列。去兹郑卫声，雅音方可悦。",
)


def demo_like(folder: Path, weights: dict[str, np.ndarray], **fields: Any) -> Path:
    """A checkpoint with the demo model's config.json and tokenizer."""
    write_checkpoint(folder, DEMO, weights, **fields)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model cut off behind its second layer: quicker to calibrate."""
    weights = {name: w for name, w in stored_weights(DEMO).items() if not re.search(r"\.layers\.[2-9]\.", name)}
    return demo_like(tmp_path_factory.mktemp("demo") / "two-layers", weights, num_layers=2)


def test_calibration_is_told_and_repeatable(two_layers: Path, tmp_path: Path):
    for name in ("first", "second"):
        convert(two_layers, tmp_path / name, ("int4", "int8"), calibration=_tiny(tmp_path), progress=False)
    files = [tmp_path / name / "int4" / "openvino_model.bin" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    model = load_model(tmp_path / "first", "int4").model
    assert model.get_rt_info(["chatglm_ov", "calibration"]).astype(str) == "awq+gptq"
    int8 = load_model(tmp_path / "first", "int8").model
    assert int8.get_rt_info(["chatglm_ov", "calibration"]).astype(str) == "gptq"
    assert listing(tmp_path / "first") == listing(tmp_path / "second")
    # Each format is what it is alone.
    convert(two_layers, tmp_path / "alone", ("int8",), calibration=_tiny(tmp_path), progress=False)
    files = [tmp_path / name / "int8" / "openvino_model.bin" for name in ("first", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_int8_is_chosen_by_gptq_alone(two_layers: Path, tmp_path: Path):
    scaled = Calibration(("awq",), source=_tiny(tmp_path).source, tokens=256, window=128)
    convert(two_layers, tmp_path / "awq", ("int4", "int8"), calibration=scaled, progress=False)
    convert(two_layers, tmp_path / "plain", ("int8",), progress=False)
    files = [tmp_path / name / "int8" / "openvino_model.bin" for name in ("awq", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not load_model(tmp_path / "awq", "int8").model.has_rt_info(["chatglm_ov", "calibration"])


def _tiny(folder: Path) -> Calibration:
    text = folder / "text.txt"
    text.write_text("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。" * 40)
    return Calibration(source=Source(text), tokens=256, window=128)


def test_methods_and_text_by_the_command(two_layers: Path, tmp_path: Path, run: Run):
    text = tmp_path / "poems.jsonl"
    text.write_text("\n".join(json.dumps({"verse": verse, "author": "太宗皇帝"}) for verse in VERSE * 8))
    chosen = ["--calibration", text, "--calibration-field", "verse", "--calibration-prompt", "{author}"]
    labels = {"awq": ["--awq"], "gptq": ["--gptq"], "awq+gptq": []}
    for label, options in labels.items():
        out = tmp_path / label
        done = run(
            "convert", two_layers, out, "--weight-format", "int4", *options, *chosen, "--calibration-tokens", 600
        )
        assert done.code == 0, done.err
        assert load_model(out).model.get_rt_info(["chatglm_ov", "calibration"]).astype(str) == label
    contents = {(tmp_path / label / "int4" / "openvino_model.bin").read_bytes() for label in labels}
    assert len(contents) == 3


# What is refused, and what is left


@pytest.mark.parametrize(
    ("name", "contents", "options", "message"),
    [
        ("t.txt", "", {}, "text is empty|file is empty"),
        ("t.txt", "短", {}, r"text is \d tokens?, expected at least a window of 512"),
        ("t.txt", b"\xff\xfe\x00", {}, "encoding is not UTF-8"),
        ("t.bin", "x", {}, "name is 't.bin', expected one that ends with"),
        ("t.jsonl", "[1]", {}, "JSON is of type list, expected an object"),
        ("t.jsonl", '{"text": 1}', {}, "text is of type int, expected text"),
        ("t.jsonl", '{"text": "x"}', {"prompt": "诗" * 600}, "prompt is 6.. tokens, expected less than a window"),
    ],
)  # fmt: skip
def test_bad_texts(name, contents, options, message, tmp_path: Path):
    text = tmp_path / name
    text.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(ChatGLMError, match=message) as error:
        calibration = Calibration(source=Source(text, **options))
        convert(DEMO, tmp_path / "out", ("int4",), calibration=calibration, progress=False)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("tokens", [32, 50, 64, 71, 97])
def test_last_sequence_has_all_that_is_given_or_is_not_there(tokens, tmp_path: Path):
    """Any number of tokens, in a vocabulary whose sequences must have `<sop>`."""
    text = tmp_path / "poems.jsonl"
    text.write_text("\n".join(json.dumps({"text": verse}) for verse in VERSE))
    config = load_config(V1.checkpoint)
    given = (5, 6, 7, 8, config.gmask_token_id, config.bos_token_id)
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens=True: list(given) if not text else list(text.encode())
    )
    calibration = Calibration(source=Source(text), tokens=tokens, window=32)
    sequences = calibration.sequences(tokenizer, config)
    assert tokens - len(given) <= sum(map(len, sequences)) <= tokens
    assert all(tuple(ids[: len(given)]) == given and len(ids) > len(given) for ids in sequences)
    said = [int(i) for ids in sequences for i in ids[len(given) :]]
    assert said == list("".join(VERSE).encode())[: len(said)]


def test_weights_that_are_no_numbers(tmp_path: Path):
    """An embedding row that the text meets: the error names the first layer's input, nothing hangs or stays."""
    weights = stored_weights(DEMO)
    weights["transformer.embedding.word_embeddings.weight"][:] = np.nan
    broken = demo_like(tmp_path / "broken", weights)
    with pytest.raises(ChatGLMError, match=r"input of .*query_key_value.weight is infinite or not a number"):
        convert(broken, tmp_path / "out", ("int4",), calibration=Calibration(tokens=512), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_plan_is_of_the_text_that_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    text = _tiny(tmp_path)
    with caplog.at_level(logging.INFO, logger="chatglm_ov"):
        for name, tokens in (("all", 10**12), ("some", 128)):
            calibration = replace(text, tokens=tokens, methods=("awq",))
            convert(DEMO, tmp_path / name, ("int4",), calibration=calibration, progress=False)
    planned = [float(found[1]) for found in re.finditer(r"needs about ([\d.]+) MB of memory", caplog.text)]
    assert len(planned) == 2 and planned[1] <= planned[0] < planned[1] + 50


def test_bad_arguments(tmp_path: Path, run: Run):
    with pytest.raises(ChatGLMError, match=r"calibration methods is \('magic',\), expected any of awq, gptq"):
        Calibration(("magic",))
    with pytest.raises(ChatGLMError, match="calibration tokens is 100, expected at least a window of 512"):
        Calibration(tokens=100)
    with pytest.raises(ChatGLMError, match=r"calibration is awq\+gptq, expected int4 or int8 among the weight"):
        convert(DEMO, tmp_path / "out", ("bf16",), calibration=SMALL, progress=False)
    with pytest.raises(ChatGLMError, match="calibration window is 4096, expected at most 2048"):
        convert(DEMO, tmp_path / "out", ("int4",), calibration=Calibration(tokens=4096, window=4096), progress=False)
    for options in (["--calibration-tokens", "600"], ["--awq", "--calibration-field", "text"]):
        done = run("convert", DEMO, tmp_path / "out", "--weight-format", "int4", *options)
        assert done.code == 2 and options[-2].removeprefix("--") in done.err
    assert not (tmp_path / "out").exists()


def test_killed_calibration_starts_again(two_layers: Path, tmp_path: Path):
    """Half-way through its weights; the next one clears up what is left and gives what an undisturbed one gives."""
    arguments = [
        "convert",
        two_layers,
        tmp_path / "out",
        "--weight-format",
        "int4",
        "--awq",
        "--calibration-tokens",
        1024,
    ]
    command = [sys.executable, "-c", "from chatglm_ov.cli.main import main; main()", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.rglob("*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    for name in ("out", "undisturbed"):
        convert(two_layers, tmp_path / name, ("int4",), calibration=Calibration(("awq",), tokens=1024), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]
    files = [tmp_path / name / "int4" / "openvino_model.bin" for name in ("out", "undisturbed")]
    assert files[0].read_bytes() == files[1].read_bytes()
