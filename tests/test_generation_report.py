"""tools/generation_report.py on the demo model: what it counts is right, what it times is a number."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest

from chatglm_ov import OVChatGLMForCausalLM, convert
from chatglm_ov.cli.demo import CHECKPOINT
from chatglm_ov.generation import inputs


@pytest.fixture
def report(import_tool):
    return import_tool("generation_report")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OVChatGLMForCausalLM:
    folder = convert(CHECKPOINT, tmp_path_factory.mktemp("demo") / "out", ("int8",), progress=False)
    return OVChatGLMForCausalLM.from_pretrained(folder)


def test_guesses(report, model):
    header, *rows = report.guesses(model, Namespace(answer="", rounds=1, num_tokens=10))
    assert len(header) == 4
    right = {name: tuple(map(int, re.findall(r"\d+", count))) for name, _, count, _ in rows}
    assert [tokens for _, tokens, _, _ in rows][:2] == ["256", "256"]
    copied, others = right["a poem, a line changed"], right["other poems"]
    assert copied[0] > 128 and copied[0] > 0.6 * copied[1]
    assert others[0] < 0.2 * others[1] < 40
    assert all(float(spread.split()[0]) > 0 for _, _, _, spread in rows)
    _, *one = report.guesses(model, Namespace(answer="program", rounds=1, num_tokens=2))
    assert [row[0] for row in one] == ["a program, a name changed"]


def test_reuse(report, model):
    _, row = report.reuse(model, Namespace(history=256, rounds=1))
    assert row[:2] == ["256", "32"]
    assert model.reused_tokens == 256
    assert re.match(r"\d+\.\d%", row[2])


def test_beams(report, model):
    _, *rows = report.beams(model, Namespace(tokens=64, rounds=1))
    assert [row[:2] for row in rows] == [["4", "64 to 96"], ["4", "96 to 128"]]
    assert all(float(row[2].split()[0]) > 0 for row in rows)


def test_long_prompt(report, model, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE_TOKENS", 128)
    _, row = report.long_prompt(model, Namespace(tokens=1024))
    assert row[0] == "1024"
    assert model.session.request.past_length == 1024
    assert float(row[3]) > 0


def test_sampling(report, model):
    _, *rows = report.sampling(model, Namespace(tokens=4, rounds=1))
    assert [row[1] for row in rows] == ["1", "1", "1", "8", "8", "8"]
    assert all(float(time.split()[0]) > 0 for row in rows for time in row[2:])
    assert "infer" not in vars(model.session.request)
