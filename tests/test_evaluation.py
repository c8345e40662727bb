"""Documents, windows, scores, and a model's scores beside torch's of the same logits."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import checkpoint  # noqa: F401
from golden_cases import V2, Opener, each_small, open_compiled, open_either, own_prompt  # noqa: F401
from golden_sets import Golden
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ov import load_tokenizer
from chatglm_ov.chat import chat_format_for
from chatglm_ov.config import ChatGLMConfig
from chatglm_ov.documents import Document, Source
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.evaluation import run
from chatglm_ov.evaluation.run import Windows, evaluate
from chatglm_ov.evaluation.scores import Scores, log_probabilities
from chatglm_ov.evaluation.windows import scored_tokens, windows
from chatglm_ov.runtime.loading import CompiledModel

# Documents


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    return load_tokenizer(checkpoint)


def written(path: Path, contents: str) -> Path:
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(contents.encode()))
    else:
        path.write_text(contents, encoding="utf-8")
    return path


def lines(*objects: object) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_text_is_one_document(suffix: str, tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path / f"a.txt{suffix}", "床前明月光\n疑是地上霜\n")
    (document,) = Source(path).documents(tokenizer)
    assert document.given == tuple(tokenizer.encode("")) and document.given
    assert tokenizer.decode(list(document.ids)) == "床前明月光\n疑是地上霜\n"
    # Some editors begin a file with a mark of its encoding, which is no part of the text.
    marked = written(tmp_path / f"marked.txt{suffix}", "\ufeff床前明月光\n疑是地上霜\n")
    assert Source(marked).documents(tokenizer) == [document]


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_an_object_a_line_is_a_document_each(suffix: str, tokenizer, tmp_path: Path) -> None:
    poems = [{"title": "一", "lines": ["春眠", "不觉晓"]}, {"title": "二", "lines": "白日依山尽"}, {"title": "三"}]
    path = written(tmp_path / f"a.jsonl{suffix}", lines(poems[0]) + "\n" + lines(poems[1], poems[2]))
    found = Source(path, "lines", limit=2).documents(tokenizer)
    assert [tokenizer.decode(list(each.ids)) for each in found] == ["春眠\n不觉晓", "白日依山尽"]
    with pytest.raises(ChatGLMError, match=r"a.jsonl.* line 4: lines is missing, expected one of title"):
        Source(path, "lines").documents(tokenizer)


def test_what_is_asked_before_a_text(tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines({"title": "静夜思", "author": "李白", "text": "床前明月光"}))
    (document,) = Source(path, prompt="背诵{author}的《{title}》{1+1}").documents(tokenizer)
    asked = chat_format_for(tokenizer).build_inputs(tokenizer, "背诵李白的《静夜思》{1+1}")
    assert document.given == tuple(asked)


def test_a_tokenizer_that_begins_texts_with_nothing(tmp_path: Path) -> None:
    class Bare:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(letter) for letter in text]

    (document,) = Source(written(tmp_path / "a.txt", "abc")).documents(Bare())
    assert document == Document((97,), (98, 99))
    with pytest.raises(ChatGLMError, match=r"file is of one token a document, expected text"):
        Source(written(tmp_path / "a.txt", "a")).documents(Bare())


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("a.csv", b"a", r"name is 'a.csv', expected one that ends with .txt, .jsonl, .txt.xz, .jsonl.xz$"),
        ("a.txt", b"", r"text is empty"),
        ("a.jsonl", b"\n\n", r"file is empty"),
        ("a.txt", b"\xff\xfe\x00", r"encoding is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"line 2: JSON is unreadable"),
        ("a.jsonl", b"[1]\n", r"line 1: JSON is of type list"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: text is of type int, expected text"),
        ("a.jsonl", b'{"text": ""}\n', r"line 1: text is empty"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"a.jsonl line 2: JSON is unreadable \(maximum recursion"),
        ("a.jsonl", b'{"text": ["a", "b", 5]}\n', r"line 1: text\[2\] is of type int, expected text$"),
        ("a.txt", b"a\nb\0", r"a.txt: text is with '\\x00' in line 2 of it, expected text"),
        ("a.jsonl", b'\n{"text": "a\\u0000"}\n', r"a.jsonl line 2: text is with '\\x00' in line 1 of it"),
        ("a.jsonl", b'{"text": ["a", "\\ud83d"]}\n', r"line 1: text\[1\] is with '\\ud83d' in line 1 of it"),
        ("a.txt.xz", b"no xz", r"file is unreadable"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-20], r"file is unreadable"),
    ],
)
def test_what_is_no_text_is_refused(name: str, contents: bytes, told: str, tokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ChatGLMError, match=told):
        Source(tmp_path / name).documents(tokenizer)


def test_a_file_that_is_not_there_and_a_prompt_without_fields(tmp_path: Path) -> None:
    with pytest.raises(ChatGLMError, match=r"file is missing"):
        Source(tmp_path / "a.txt").check()
    with pytest.raises(ChatGLMError, match=r"prompt: data is a.txt, expected a .jsonl"):
        Source(written(tmp_path / "a.txt", "a"), prompt="x").check()


def test_what_is_asked_is_text_and_a_field_has_a_name(tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "a", "title": "\\ud83d\\ude00", "author": "\\ude00"}\n')
    assert Source(path, prompt="{title}").documents(tokenizer)
    with pytest.raises(ChatGLMError, match=r"a.jsonl line 1: author is with '\\ude00' in line 1"):
        Source(path, prompt="{author}").documents(tokenizer)
    with pytest.raises(ChatGLMError, match=r"prompt: text is with '\\udcff' in line 1"):
        Source(path, prompt="\udcff").check()
    with pytest.raises(ChatGLMError, match=r"a.jsonl: field is empty, expected the name of a text"):
        Source(path, "").check()


# Windows


@given(
    given=st.integers(1, 5),
    count=st.integers(1, 60),
    stride=st.integers(1, 12),
    more=st.integers(1, 12),
)
def test_each_token_is_predicted_once_from_what_fits(given: int, count: int, stride: int, more: int) -> None:
    document = Document(tuple(range(-given, 0)), tuple(range(count)))
    length, seen = given + stride + more, []
    for window in windows(document, length, stride):
        body = list(window.ids[given:])
        assert tuple(window.ids[:given]) == document.given and len(window.ids) <= length
        assert body == list(range(body[0], body[-1] + 1))
        # All that fits, or all there is.
        assert len(window.ids) == length or body[0] == 0
        assert window.scored <= stride or not seen
        seen += body[-window.scored :]
    assert seen == list(document.ids)


def test_no_room_for_a_stride() -> None:
    with pytest.raises(ChatGLMError, match=r"eval: window is 8, expected more than 8"):
        next(windows(Document((1, 2), (3, 4)), 8, 6))


# Scores


def test_scores_are_torch_s() -> None:
    rng = np.random.default_rng(0)
    logits, other = (rng.normal(0, 8, (40, 300)).astype(np.float32) for _ in range(2))
    targets, scores = rng.integers(0, 300, 40), Scores()
    for part in (slice(0, 7), slice(7, 40)):
        scores.add(logits[part], targets[part], log_probabilities(other[part]))
    ours, theirs = (F.log_softmax(torch.tensor(each, dtype=torch.float64), -1) for each in (logits, other))
    assert scores.nll == pytest.approx(float(F.nll_loss(ours, torch.tensor(targets), reduction="sum")), rel=1e-12)
    wanted = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    assert scores.divergence == pytest.approx(float(wanted), rel=1e-12)
    assert scores.agreed == int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    assert scores.right == int((ours.argmax(-1).numpy() == targets).sum())
    assert scores.perplexity == pytest.approx(np.exp(scores.nll / 40))


def test_large_and_infinite_logits() -> None:
    scores = Scores()
    scores.add(np.array([[1e4, 0.0, -np.inf]], np.float32), np.array([0]))
    assert scores.nll == 0.0 and scores.perplexity == 1.0


# Models


def document_of(model: CompiledModel, count: int, seed: int = 0) -> Document:
    """Random ids, behind [gMASK] <sop> where the model must have them."""
    config, rng = model.config, np.random.default_rng(seed)
    given = (config.gmask_token_id, config.bos_token_id) if isinstance(config, ChatGLMConfig) else (1, 2)
    return Document(given, tuple(int(i) for i in rng.integers(5, 1000, count)))


@each_small
def test_scores_are_those_of_the_whole_window_in_one_call(
    golden: Golden,
    open_either: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of a few tokens, a first window and one behind it."""
    monkeypatch.setattr(run, "CHUNK", 5)
    model = open_either(golden.checkpoint)
    texts, reported = Windows([document_of(model, 30), document_of(model, 3, 1)], 24, 10), []
    found = evaluate(model, None, texts, reported.append)
    assert found.tokens == sum(reported) == scored_tokens(list(texts.documents)) == 33
    nll = 0.0
    for window in texts:
        logits = own_prompt(window.ids[None], model).feed(model.create_request())[0]
        ours = F.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)[:-1]
        right = torch.tensor(window.ids[1:])
        nll += float(F.nll_loss(ours[-window.scored :], right[-window.scored :], reduction="sum"))
    assert found.nll == pytest.approx(nll, rel=1e-5)


@each_small
def test_beside_itself_and_beside_another_format(golden: Golden, open_either: Opener) -> None:
    model = open_either(golden.checkpoint)
    texts = Windows([document_of(model, 40)], 32, 16)
    same = evaluate(model, open_either(golden.checkpoint), texts, lambda count: None)
    assert same.agreed == same.tokens == 40 and same.divergence == pytest.approx(0, abs=1e-9)
    int4 = open_either(golden.checkpoint, "int4", None)
    other = evaluate(int4, model, texts, lambda count: None)
    assert other.divergence > 1e-4 and other.nll != same.nll


def test_what_does_not_fit_a_model(open_compiled: Opener) -> None:
    model = open_compiled(V2.checkpoint)
    documents = [document_of(model, 5)]
    long, seen = Document(tuple(range(1, 30)), (5, 6)), []
    with pytest.raises(ChatGLMError, match=r"eval: window is 20, expected more than 34"):
        evaluate(model, None, Windows([*documents, long], 20, 5), seen.append)
    assert not seen
    other = replace(model, config=model.config.model_copy(update={"padded_vocab_size": 77}))
    with pytest.raises(ChatGLMError, match=r"eval: reference is a model of \d+ and 77 tokens"):
        evaluate(model, other, Windows(documents, 20, 5), lambda count: None)
    with pytest.raises(ChatGLMError, match=r"eval: window is 1000000, expected at most"):
        evaluate(model, None, Windows(documents, 1_000_000, 5), lambda count: None)
