"""Random weights at once, what a step reads and computes, and figures made of given times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatglm_ov import ChatGLMError
from chatglm_ov.bench.limits import Limits, disturbed_rounds
from chatglm_ov.bench.measure import (
    Case,
    CaseRun,
    Record,
    Times,
    Tokens,
    Variant,
    run_steps,
)
from chatglm_ov.bench.report import format_report, peak_of
from chatglm_ov.bench.tables import remarks, tables
from chatglm_ov.bench.weights import RandomWeights
from chatglm_ov.bench.work import cache_bytes, prompt_operations
from chatglm_ov.config import ArchitectureConfig, parse_config
from chatglm_ov.models import architecture
from chatglm_ov.presets import config_json

V1 = config_json("chatglm-6b", num_layers=2, hidden_size=64, num_attention_heads=4, inner_hidden_size=256)
V3 = config_json(
    "chatglm3-6b", num_layers=2, hidden_size=64, num_attention_heads=4, kv_channels=16, ffn_hidden_size=172
)
both = pytest.mark.parametrize("fields", [V1, V3], ids=["chatglm-6b", "chatglm3-6b"])


# Random weights


@both
def test_random_weights_are_the_tensors_of_the_model(fields: dict[str, Any]) -> None:
    config = parse_config(fields)
    module = architecture(config)
    with RandomWeights(fields) as weights:
        weights.verify(module.weight_shapes(config), ignored=lambda name: module.is_ignored(config, name))
        for name, shape in module.weight_shapes(config).items():
            values = weights[name].read()
            assert values.shape == shape and values.dtype == np.float32 and np.isfinite(values).all()
            if len(shape) == 2:
                assert values.std() == pytest.approx(shape[1] ** -0.5, rel=0.1)
                assert len(np.unique(values, axis=0)) == len(values)


def test_random_weights_are_told_apart_by_name_and_seed() -> None:
    first, second = (f"transformer.encoder.layers.{i}.self_attention.dense.weight" for i in range(2))
    with RandomWeights(V3) as weights, RandomWeights(V3) as again, RandomWeights(V3, seed=1) as other:
        values = weights[first].read()
        np.testing.assert_array_equal(values, again[first].read())
        np.testing.assert_array_equal(values[3:7], weights[first].rows(slice(3, 7)))
        np.testing.assert_array_equal(values[[5, 0]], weights[first].rows([5, 0]))
        for different in (weights[second].read(), other[first].read()):
            assert abs(np.corrcoef(values.ravel(), different.ravel())[0, 1]) < 0.1
        norm = weights["transformer.encoder.final_layernorm.weight"].read()
        assert norm.mean() == pytest.approx(1, abs=0.05) and norm.std() == pytest.approx(0.05, rel=0.5)


def test_random_weights_of_the_largest_model_are_views() -> None:
    """Rows of the end are there without those before them."""
    with RandomWeights(config_json("glm-4-9b-chat-1m")) as weights:
        tensor = weights["transformer.output_layer.weight"]
        assert tensor.shape == (151552, 4096)
        last = tensor.rows(slice(151550, 151552))
        assert not np.array_equal(last[0], last[1])


def test_a_tied_head_is_the_embedding() -> None:
    with RandomWeights({**V3, "tie_word_embeddings": True}) as weights:
        embedding, head = "transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"
        np.testing.assert_array_equal(weights[embedding].rows([0, 9]), weights[head].rows([0, 9]))


def test_tables_too_large_for_the_pool_are_refused() -> None:
    with RandomWeights({**V3, "padded_vocab_size": 1 << 24}) as weights, pytest.raises(ChatGLMError, match="shape is"):
        weights["transformer.output_layer.weight"].rows([0])


# Work


def test_operations_of_a_prompt_in_full() -> None:
    """ChatGLM3-6B and 512 tokens, by hand."""
    config = parse_config(config_json("chatglm3-6b"))
    linear = 28 * (4608 * 4096 + 4096 * 4096 + 27392 * 4096 + 4096 * 13696)
    scores_and_context = 28 * 32 * 2 * (2 * 128) * (512 * 512 // 2)
    whole = 2 * linear * 512 + 2 * 65024 * 4096 + scores_and_context
    assert prompt_operations(config, 512, 1, "stock") == whole
    # Behind the last attention one token of 512 is left.
    left_out = 2 * 511 * (4096 * 4096 + 27392 * 4096 + 4096 * 13696)
    assert prompt_operations(config, 512, 1, "fused") == whole - left_out
    assert prompt_operations(config, 512, 3, "fused") == 3 * (whole - left_out)


def test_tokens_of_the_first_generation_see_the_whole_prompt() -> None:
    config = parse_config(config_json("chatglm-6b"))
    linear = 28 * (3 * 4096 * 4096 + 4096 * 4096 + 2 * 16384 * 4096)
    # The head is the embedding.
    assert prompt_operations(config, 8, 1, "stock") == 2 * linear * 8 + 2 * 130528 * 4096 + 28 * 32 * 2 * 2 * 128 * 64


def test_bytes_of_the_cache() -> None:
    config = parse_config(config_json("chatglm3-6b"))
    assert cache_bytes(config, "bf16", 1, 1) == 28 * 2 * 2 * 128 * 2
    assert cache_bytes(config, "int8", 10, 2) == 28 * 2 * 2 * (128 + 4) * 20
    assert cache_bytes(config, "f32", 0.5, 1) == 28 * 2 * 2 * 128 * 4 / 2


@pytest.mark.parametrize(
    ("variant", "peak"),
    [
        (Variant("bf16", "fused"), ("bf16", "bf16", 1.0)),
        (Variant("int8", "fused", 16), ("int8 / 2", "int8", 0.5)),
        (Variant("int4", "fused", 8), ("int8", "int8", 1.0)),
        (Variant("int8", "stock", hint="bf16"), ("bf16", "bf16", 1.0)),
        (Variant("int8", "stock", hint="f32"), None),
        (Variant("f32", "fused"), None),
    ],
    ids=lambda value: value.label if isinstance(value, Variant) else "",
)
def test_peaks(variant: Variant, peak: object) -> None:
    assert peak_of(variant) == peak_of(variant, "avx512") == peak


@pytest.mark.parametrize("bits", [16, 8])
def test_words_take_one_pass_at_the_level_without_vnni(bits: int) -> None:
    assert peak_of(Variant("int8", "fused", bits), "avx2") == ("int16", "int8", 1.0)
    assert peak_of(Variant("bf16", "fused"), "avx2") == ("bf16", "bf16", 1.0)


# Cases


def test_calls_of_a_case() -> None:
    assert Case(1200, 1).calls(16) == [1200]
    assert Case(1200, 1, filled=True).calls(16) == [512, 512, 158]
    assert sum(Case(8192, 4, filled=True).calls(16)) + 2 + 16 == 8192


@pytest.mark.parametrize("calls", [[6], [6, 6, 3]], ids=str)
@both
def test_tokens(fields: dict[str, Any], calls: list[int]) -> None:
    config = parse_config(fields)
    tokens = Tokens(config, 2, calls, 4)
    assert tokens.ids.shape == (2, sum(calls) + 4) and tokens.positions.shape[-1] == sum(calls) + 4
    assert tokens.ids.min() >= 0 and tokens.ids.max() < config.vocab_rows
    if config.architecture == "chatglm":
        # One [gMASK] and one <sop>, the last two of the first call.
        assert [list(row[4:6]) for row in tokens.ids] == [[130001, 130004]] * 2
        assert np.count_nonzero(np.isin(tokens.ids, [130000, 130001, 130004])) == 4
        assert list(tokens.prefix) == [5, 5]
    else:
        assert tokens.prefix is None


# Figures


def small_config() -> ArchitectureConfig:
    return parse_config(V3)


def record(
    variant: Variant, prompt: list[float], steps: list[list[float]], read: list[list[float]] | None = None
) -> Record:
    times = {Case(10, 2): Times(prompt, steps, read or [])}
    return Record(variant, times, 1000, [1.0] * len(prompt), [0] * len(prompt), [0] * len(prompt))


def limits_of(read: list[float]) -> Limits:
    return Limits(2, {"read": read, "int8": [4e12] * len(read), "bf16": [1e12] * len(read)})


def test_medians_of_the_rounds_and_shares_of_the_limits() -> None:
    steps = [[1.0, 3.0, 2.0], [5.0, 5.0, 4.0], [9.0, 9.0, 9.0]]
    read = [[400.0, 400.0, 400.0], [250.0, 250.0, 200.0], [100.0, 100.0, 100.0]]
    rounds = record(Variant("int8", "fused", 16), [0.2, 0.1, 0.9], steps, read)
    found = format_report(small_config(), [rounds], 3, limits_of([100.0, 500.0, 300.0, 200.0]), [])
    (case,) = found["models"][0]["cases"]
    assert case["prompt"]["seconds"]["median"] == 0.2 and case["decode"]["seconds"]["median"] == 5.0
    assert case["prompt"]["peak_operations_per_second"] == 2e12
    # 13 to 15 tokens in the cache of 2 rows: 2 layers of 2 heads of 16 in bf16, keys and values.
    assert case["decode"]["bytes"] == 1000 + 2 * 2 * 2 * 16 * 2 * 14 * 2
    assert case["decode"]["limit_bytes_per_second"] == 250.0
    # Steps times what was read beside them: 400, 1200, 800; 1250, 1250, 800; 900 three times. The middle one is 900.
    assert case["decode"]["share"] == case["decode"]["bytes"] / 900.0
    assert case["decode"]["tokens_per_second"] == 0.4


def test_the_better_of_each_figure_of_stock_is_taken() -> None:
    records = [
        record(Variant("int8", "fused", 16), [1.0], [[1.0]]),
        record(Variant("int8", "fused", 8), [0.5], [[1.0]]),
        record(Variant("int8", "stock", hint="bf16"), [3.0], [[2.5]]),
        record(Variant("int8", "stock", hint="f32"), [4.0], [[2.0]]),
    ]
    found = format_report(small_config(), records, 1, limits_of([1.0, 1.0]), [])
    rows = [(row["label"], row["prompt"], row["decode"]) for row in found["against_stock"]]
    assert rows == [("int8", 3.0, 2.0), ("int8, 8-bit activations", 6.0, 2.0)]


def test_without_limits_there_are_no_shares() -> None:
    found = format_report(small_config(), [record(Variant("int8", "stock"), [1.0], [[1.0]])], 1, Limits(2), ["why"])
    (case,) = found["models"][0]["cases"]
    assert found["limits"] is None and case["prompt"]["share"] is None and case["decode"]["share"] is None
    titles = [title for title, _, _ in tables({"weight_formats": [found]})]
    assert titles == ["Loading", "Prompt", "Next tokens"]
    assert list(remarks({"weight_formats": [found]})) == ["int8: why"]


def test_rounds_that_were_disturbed_are_told() -> None:
    steady = [10.0] * 5
    assert disturbed_rounds({"read": steady, "int8": [10, 9.5, 10.5, 9.1, 10]}) == []
    # The third sample lies between the second round and the third one.
    assert disturbed_rounds({"read": [10, 10, 5, 10, 10], "int8": steady}) == [1, 2]
    assert disturbed_rounds({"read": steady, "int8": [8, 10, 10, 10, 10]}) == [0]
    found = {"weight_format": "int8", "disturbed_rounds": [1, 2], "small_page_share": None, "left_out": []}
    (told,) = remarks({"weight_formats": [found]})
    assert told.startswith("int8: a limit fell by more than a tenth around round 2, 3")


@pytest.mark.parametrize(("shares", "told"), [([0.02, 0.131], ["13 %"]), ([0.02], []), ([], [])])
def test_many_small_pages_are_told(shares: list[float], told: list[str]) -> None:
    records = [record(Variant("int8", "fused", 16), [1.0], [[0.01]]), record(Variant("int8", "stock"), [1.0], [[1.0]])]
    records[0].small_pages += shares
    found = format_report(small_config(), records, 1, limits_of([1e9, 1e9]), [])
    seen = [remark for remark in remarks({"weight_formats": [found]}) if "small pages" in remark]
    assert [remark.split(" of the mapped")[0] for remark in seen] == [f"int8: {share}" for share in told]


def test_tables_have_a_cell_for_every_column(tmp_path: Path) -> None:
    records = [
        record(Variant("int8", "fused", 16), [1.0], [[0.01]]),
        record(Variant("int8", "stock", hint="f32"), [2.0], [[1.0]]),
    ]
    found = format_report(small_config(), records, 1, limits_of([1e9, 1e9]), [])
    made = {title: (header, rows) for title, header, rows in tables({"weight_formats": [found]})}
    assert len(made) == 5
    for header, rows in made.values():
        assert {len(row) for row in rows} == {len(header)}
    assert made["Times as fast as stock"][1] == [("int8", "10", "2", "2.00", "100.00")]
    assert made["Next tokens"][1][0][3:5] == ("10.0 ms", "200.0")


# Steps in turns


class Told(CaseRun):
    """Tells of each step instead of running one, and takes as many seconds as there were before it."""

    def __init__(self, name: str, told: list[str]):
        self.name, self.told, self.times = name, told, Times()

    def step(self) -> float:
        self.told.append(self.name)
        return float(len(self.told) - 1)


def test_models_take_a_few_steps_in_turns_with_the_bandwidth_between_them() -> None:
    told: list[str] = []

    def read() -> float:
        told.append("|")
        return float(len(told) - 1)

    first, second = Told("a", told), Told("b", told)
    run_steps([first, second], 5, read)
    assert "".join(told) == "aabb|aa|bb|aa|bb|a|b|"
    assert first.times.steps == [[5, 6, 11, 12, 17]] and second.times.steps == [[8, 9, 14, 15, 19]]
    assert first.times.read == [[5.5, 5.5, 11.5, 11.5, 17]] and second.times.read == [[8.5, 8.5, 14.5, 14.5, 19]]


def test_without_the_native_library_there_are_steps_only() -> None:
    told: list[str] = []
    run = Told("a", told)
    run_steps([run], 3, None)
    assert len(told) == 5 and run.times.steps == [[2, 3, 4]] and run.times.read == []
