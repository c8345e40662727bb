"""chat() and stream_chat() against what the original models answered."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_sets import here
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, pipeline

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM, convert, load_tokenizer
from chatglm_ov.chat import chat_format_for
from chatglm_ov.cli.demo import CHECKPOINT
from chatglm_ov.generation.cache import StateCache
from chatglm_ov.generation.chat import _of_config, _settings
from chatglm_ov.generation.stream import stream_tokens
from chatglm_ov.generation.timing import Stopwatch

pytestmark = pytest.mark.transformers_matrix

DATA = Path(__file__).parent / "data"
SETS = [
    pytest.param((golden.folder.parent.name, golden.folder), id=f"{golden.root}-{golden.folder.parent.name}")
    for golden in here("chat.json")
]


@pytest.fixture(scope="module", params=SETS)
def case(request, tmp_path_factory):
    """Model, tokenizer and conversations of one set."""
    name, folder = request.param
    converted = tmp_path_factory.mktemp("chat") / name
    convert(folder / "checkpoint", converted, weight_formats=("f32",), ops="stock", progress=False)
    model = OVChatGLMForCausalLM.from_pretrained(converted, inference_precision="f32")
    entries = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
    return SimpleNamespace(model=model, tokenizer=load_tokenizer(DATA / f"tokenizer_{name}"), entries=entries)


def question(entry: dict) -> dict:
    """query, history and role of an entry that is given either so or as messages."""
    if "messages" in entry:
        *history, last = entry["messages"]
        return {"query": last["content"], "history": history, "role": last["role"]}
    return {"query": entry["query"], "history": entry["history"]}


def greedy(entry: dict) -> dict:
    return {**question(entry), "do_sample": False, "max_length": entry["max_length"]}


def as_messages(history: list) -> list:
    """Pairs as JSON has them."""
    return [list(item) if isinstance(item, tuple) else item for item in history]


def test_answers_are_the_originals(case):
    for entry in case.entries:
        answer, history = case.model.chat(case.tokenizer, **greedy(entry))
        chat = chat_format_for(case.tokenizer)
        assert (answer, history) == chat.answer(case.tokenizer, entry["generated_ids"], **question(entry))
        if max(entry["generated_ids"]) >= len(case.tokenizer) or "chat_response" not in entry:
            continue  # a padding row's id, after which the original writes text twice; or no chat() was run
        streamed = list(case.model.stream_chat(case.tokenizer, **greedy(entry)))
        assert streamed[-1] == (answer, history)
        # GLM-4's chat() takes off the last token, here a real one; its stream ends the same way.
        told = [response for response, _ in streamed]
        assert entry["chat_response"] in told[-2:]
        assert all(response in told for response in entry["stream_chat_responses"])
        if entry["chat_response"] == answer:
            assert as_messages(history) == entry["chat_history"]


def test_stream_grows_and_ends_as_the_whole(case):
    entry = case.entries[0]
    streamed = list(case.model.stream_chat(case.tokenizer, **greedy(entry)))
    texts = [chat_text(history) for _, history in streamed]
    assert len(texts) > 5
    assert all(len(a) < len(b) for a, b in pairwise(texts))
    assert streamed[-1] == case.model.chat(case.tokenizer, **greedy(entry))


def chat_text(history: list) -> str:
    """What the model said last, metadata included."""
    last = history[-1]
    return last[1] if isinstance(last, tuple) else last["metadata"] + last["content"]


def test_history_argument_is_not_changed_and_can_be_fed_back(case):
    history: list = []
    _, first = case.model.chat(case.tokenizer, "你好", history=history, do_sample=False, max_new_tokens=4)
    assert history == []
    rounds = len(first)
    _, second = case.model.chat(case.tokenizer, "Hello", history=first, do_sample=False, max_new_tokens=4)
    assert len(first) == rounds
    assert second[:rounds] == first


class ForceAt(LogitsProcessor):
    """The given token as the n-th new one."""

    def __init__(self, token: int, length: int):
        self.token, self.length = token, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.token] = 0
        return scores


def test_stop_token_ends_the_answer_and_is_not_in_it(case):
    entry = case.entries[0]
    chat, kept = chat_format_for(case.tokenizer), entry["generated_ids"][:3]
    for stop in chat.stop_token_ids(case.tokenizer):
        force = ForceAt(stop, len(entry["prompt_ids"]) + 3)
        options = {**greedy(entry), "logits_processor": LogitsProcessorList([force])}
        wanted = chat.answer(case.tokenizer, kept, **question(entry))
        assert case.model.chat(case.tokenizer, **options) == wanted
        assert list(case.model.stream_chat(case.tokenizer, **options))[-1] == wanted


def test_stop_strings_end_the_answer_and_are_not_in_it(case):
    """Whole and streamed; no item of the stream has the beginning of one, and no more tokens are made than it takes."""
    cut = []
    for entry in case.entries:
        asked, whole_watch = {**greedy(entry), "eos_token_id": -1}, Stopwatch()
        whole = case.model.chat(case.tokenizer, **asked, stopping_criteria=[whole_watch])[0]
        if not isinstance(whole, str) or len(whole) < 6:
            continue
        stop = whole[len(whole) // 2 :][:2]
        kept = whole[: whole.index(stop)]
        for stops in (stop, ["absent", stop]):
            watch = Stopwatch()
            answer, _ = case.model.chat(case.tokenizer, **asked, stop_strings=stops, stopping_criteria=[watch])
            assert answer.strip() == kept.strip() and watch.length < whole_watch.length
            told = [told for told, _ in case.model.stream_chat(case.tokenizer, **asked, stop_strings=stops)]
            assert told[-1] == answer and all(answer.startswith(part.strip()) for part in told)
            cut.append(answer)
    assert cut
    with pytest.raises(ChatGLMError, match="stop_strings: value is ''"):
        case.model.chat(case.tokenizer, "问", stop_strings="")


def test_an_answer_of_nothing_is_streamed_too(case):
    entry = case.entries[0]
    stop = chat_format_for(case.tokenizer).stop_token_ids(case.tokenizer)[0]
    force = LogitsProcessorList([ForceAt(stop, len(entry["prompt_ids"]))])
    streamed = list(case.model.stream_chat(case.tokenizer, **greedy(entry), logits_processor=force))
    assert [response for response, _ in streamed] == [""]


def test_closing_the_stream_ends_the_work(case, monkeypatch):
    calls, threads, request = [], threading.active_count(), case.model.session.request
    infer = request.infer
    monkeypatch.setattr(request, "infer", lambda *args, **kwargs: calls.append(1) or infer(*args, **kwargs))
    answers = case.model.stream_chat(case.tokenizer, "你好", do_sample=False, max_new_tokens=2000)
    next(answers)
    answers.close()
    assert 0 < len(calls) < 2000
    assert threading.active_count() == threads
    entry, chat = case.entries[0], chat_format_for(case.tokenizer)
    again = case.model.chat(case.tokenizer, **greedy(entry))
    assert again == chat.answer(case.tokenizer, entry["generated_ids"], **question(entry))


def test_a_second_turn_without_a_cache_is_the_same(case):
    """There is one in the model, whatever a config says."""
    first, history = case.model.chat(case.tokenizer, "ab", do_sample=False, max_new_tokens=5)
    wanted = case.model.chat(case.tokenizer, "cd", history=history, do_sample=False, max_new_tokens=5)
    case.model.generation_config.use_cache = False
    try:
        assert case.model.chat(case.tokenizer, "ab", do_sample=False, max_new_tokens=5) == (first, history)
        got = case.model.chat(case.tokenizer, "cd", history=history, do_sample=False, max_new_tokens=5)
    finally:
        case.model.generation_config.use_cache = True
    assert got == wanted


OPEN_STREAM = """
import sys
from chatglm_ov import OVChatGLMForCausalLM, load_tokenizer

model, tokenizer = OVChatGLMForCausalLM.from_pretrained(sys.argv[1]), load_tokenizer(sys.argv[1])
answers = model.stream_chat(tokenizer, "ab", do_sample=False, max_new_tokens=1500, min_new_tokens=1500)
print(len(next(answers)))
sys.exit(3)
"""


def test_a_program_may_end_with_an_open_stream(tmp_path):
    convert(CHECKPOINT, tmp_path, ("int8",), progress=False)
    done = subprocess.run([sys.executable, "-c", OPEN_STREAM, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "2\n"), done.stderr


def test_beams_that_end_early_leave_the_others_alone(tmp_path):
    """Prompts of unequal length, of which some are done before others."""
    convert(CHECKPOINT, tmp_path, ("f32",), progress=False)
    model, tokenizer = (
        OVChatGLMForCausalLM.from_pretrained(tmp_path, inference_precision="f32"),
        load_tokenizer(tmp_path),
    )
    texts = ["床前明月光", "白日依山尽，黄河入海流", "离离原上草，一岁一枯荣。野火烧不尽"]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    together = model.generate(**given, num_beams=3, max_new_tokens=32)[:, given["input_ids"].shape[1] :]
    for text, row in zip(texts, together, strict=True):
        alone = tokenizer([text], return_tensors="pt")
        ids = model.generate(**alone, num_beams=3, max_new_tokens=32)[0, alone["input_ids"].shape[1] :]
        assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_question_that_begins_with_a_token_of_the_format(case):
    """In the first generation there is no column before `<sop>` then, and nothing in the cache to go on from."""
    options = {"do_sample": False, "max_new_tokens": 4}
    first = case.model.chat(case.tokenizer, "<sop>ab", **options)
    assert case.model.chat(case.tokenizer, "<sop>ab", **options) == first
    assert case.model.chat(case.tokenizer, "<sop>cd", **options)[1][-1] != first[1][-1]


def test_errors_of_the_other_thread_come_out(case):
    with pytest.raises(ValueError, match="not used by the model"):
        list(case.model.stream_chat(case.tokenizer, "你好", unheard_of=1))
    with pytest.raises(ValueError, match="streamer"):
        list(stream_tokens(case.model, torch.tensor([case.entries[0]["prompt_ids"]]), num_beams=2))


def test_wrong_questions_are_refused_before_any_work(case):
    for call in (case.model.chat, case.model.stream_chat):
        with pytest.raises(ChatGLMError, match="query"):
            call(case.tokenizer, 5)
        with pytest.raises(ChatGLMError, match=r"chat: prompt is \d+ tokens long, expected fewer than 2"):
            call(case.tokenizer, "你好", max_length=2)


def test_settings_are_the_originals_unless_told(case):
    chat = chat_format_for(case.tokenizer)
    config = SimpleNamespace(max_position_embeddings=4096)
    settings = _settings(chat, 10, {}, config)
    defaults = chat.defaults
    assert settings["do_sample"] is True
    assert (settings["top_p"], settings["temperature"]) == (defaults.top_p, defaults.temperature)
    assert settings["max_length"] == min(defaults.max_length, 4096)
    told = _settings(chat, 10, {"max_new_tokens": 7, "temperature": 0.2, "top_k": 3}, config)
    assert (told["max_length"], told["temperature"], told["top_k"]) == (17, 0.2, 3)
    assert _settings(chat, 10, {"max_new_tokens": 9999}, config)["max_length"] == 4096
    # Without sampling its parameters say nothing, and the library warns of them.
    plain = _settings(chat, 10, {"do_sample": False}, config)
    assert (plain["top_p"], plain["temperature"]) == (1.0, 1.0)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": False}], ids=str)
@pytest.mark.parametrize("zero", [0, 0.0])
def test_no_temperature_is_greedy(case, options, zero):
    asked = {**question(case.entries[0]), "max_new_tokens": 8}
    wanted = case.model.chat(case.tokenizer, **asked, do_sample=False)
    assert case.model.chat(case.tokenizer, **asked, **options, temperature=zero) == wanted
    assert list(case.model.stream_chat(case.tokenizer, **asked, **options, temperature=zero))[-1] == wanted


def test_a_stream_as_the_originals_are_called(case):
    """Turn by turn with the cache handed on, which need not be: the next turn finds what it has in common anyway."""
    options = {"do_sample": False, "max_new_tokens": 5}
    history, past = [], None
    for query in ("ab", "cd"):
        wanted = case.model.chat(case.tokenizer, query, history=history, **options)
        plain = {"past_key_values": None, "return_past_key_values": False}
        assert list(case.model.stream_chat(case.tokenizer, query, history, **plain, **options))[-1] == wanted
        handed_on = {"past_key_values": past, "return_past_key_values": True}
        told = list(case.model.stream_chat(case.tokenizer, query, history, **handed_on, **options))
        assert all(isinstance(handle, StateCache) for _, _, handle in told)
        answer, history, past = told[-1]
        assert (answer, history) == wanted
    assert past.get_seq_length() == len(past.columns.ids[0]) > 0
    for call in (case.model.chat, case.model.stream_chat):
        assert call(case.tokenizer, "ef", history=history, past_key_values=past, **options)
        with pytest.raises(ChatGLMError, match="chat: past_key_values is of type list, expected None or what"):
            call(case.tokenizer, "ef", past_key_values=[])


def test_a_pipeline_takes_the_model_without_a_warning(case, caplog):
    base = logging.getLogger("transformers.pipelines.base")
    base.addHandler(caplog.handler)
    # Other tests make the whole library silent.
    base.setLevel(logging.WARNING)
    try:
        base.warning("told")
        pipeline("text-generation", model=case.model, tokenizer=case.tokenizer)
    finally:
        base.removeHandler(caplog.handler)
        base.setLevel(logging.NOTSET)
    told = {record.message for record in caplog.records}
    assert "told" in told and not any("not supported" in message for message in told)


def test_a_pipeline_goes_on_with_an_answer(case):
    asked = [{"role": "user", "content": "你好"}]
    talk = pipeline("text-generation", model=case.model, tokenizer=case.tokenizer)
    options = {"do_sample": False, "max_new_tokens": 4}
    for begun in (asked, [*asked, {"role": "assistant", "content": "明月"}]):
        goes_on = len(begun) == 2
        ids = case.tokenizer.apply_chat_template(
            begun, add_generation_prompt=not goes_on, continue_final_message=goes_on, return_dict=False
        )
        new = case.model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
        (made,) = talk(begun, **options)
        last = made["generated_text"][-1]
        assert last["role"] == "assistant" and last["content"].startswith("明月" if goes_on else "")
        assert last["content"].endswith(case.tokenizer.decode(new, skip_special_tokens=True).strip())


def test_a_config_of_the_call_counts(case):
    told = {"do_sample": False, "max_new_tokens": 3}
    wanted = case.model.chat(case.tokenizer, "ab", **told)
    assert case.model.chat(case.tokenizer, "ab", generation_config=GenerationConfig(**told)) == wanted
    longer = GenerationConfig(do_sample=False)
    assert case.model.chat(case.tokenizer, "ab", generation_config=longer, max_new_tokens=3) == wanted
    chat = chat_format_for(case.tokenizer)
    ends = case.model.stop_ids(chat, case.tokenizer, {"generation_config": GenerationConfig(eos_token_id=5)})
    assert 5 in ends and set(chat.stop_token_ids(case.tokenizer)) < set(ends)
    limit = case.model.config.max_position_embeddings if hasattr(case.model.config, "max_position_embeddings") else 4096
    settings = _settings(chat, 9, {"generation_config": longer}, case.model.config)
    assert settings["max_length"] == min(limit, chat.defaults.max_length)


@pytest.mark.parametrize(
    ("option", "value"),
    [("return_dict_in_generate", True), ("num_return_sequences", 2), ("streamer", object()), ("max_new_tokens", 0)],
)
def test_what_is_not_one_answer_is_refused(case, option, value):
    for ask in (case.model.chat, lambda *call, **options: next(case.model.stream_chat(*call, **options))):
        with pytest.raises(ChatGLMError, match=f"chat: {option} is"):
            ask(case.tokenizer, "ab", **{option: value})


def test_sampling_is_the_default_and_follows_the_seed(case):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(case.model.chat(case.tokenizer, "你好", max_new_tokens=12, temperature=2.0)[0])
    torch.manual_seed(1)
    *_, (streamed, _) = case.model.stream_chat(case.tokenizer, "你好", max_new_tokens=12, temperature=2.0)
    assert drawn[0] == drawn[1] == streamed
    assert drawn[0] != drawn[2]


def test_stop_strings_of_a_config(case):
    for entry in case.entries:
        asked = {**question(entry), "do_sample": False, "max_new_tokens": 12, "eos_token_id": -1}
        whole = case.model.chat(case.tokenizer, **asked)[0]
        if isinstance(whole, str) and len(whole) >= 6:
            break
    stop = whole[len(whole) // 2 :][:2]
    wanted = case.model.chat(case.tokenizer, **asked, stop_strings=stop)
    assert len(wanted[0]) < len(whole)
    of_call = GenerationConfig(do_sample=False, max_new_tokens=12, stop_strings=[stop])
    del asked["do_sample"], asked["max_new_tokens"]
    assert case.model.chat(case.tokenizer, **asked, generation_config=of_call) == wanted
    assert list(case.model.stream_chat(case.tokenizer, **asked, generation_config=of_call))[-1] == wanted
    of_model = case.model.generation_config
    try:
        of_model.stop_strings = stop
        assert case.model.chat(case.tokenizer, **asked, do_sample=False, max_new_tokens=12) == wanted
        silent = GenerationConfig(do_sample=False, max_new_tokens=12)
        assert case.model.chat(case.tokenizer, **asked, generation_config=silent) == wanted
    finally:
        of_model.stop_strings = None


def test_a_config_says_greedy_and_how_long(case):
    cold = GenerationConfig(do_sample=True, temperature=0.0, max_new_tokens=5)
    wanted = case.model.chat(case.tokenizer, "ab", do_sample=False, max_new_tokens=5)
    assert case.model.chat(case.tokenizer, "ab", generation_config=cold) == wanted
    unsaid = GenerationConfig().max_length
    lengths = {n: _of_config(GenerationConfig(max_length=n)).get("max_length") for n in (19, 20, 21)}
    assert lengths == {n: None if n == unsaid else n for n in lengths}
