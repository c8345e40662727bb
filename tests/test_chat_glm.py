"""Chat of transformers' own classes: tokenizer.json with its template, stop tokens, tools, thinking."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizer_cases import fast_folder
from transformers import LogitsProcessor, LogitsProcessorList

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM, convert, load_tokenizer
from chatglm_ov.chat import chat_format_for
from chatglm_ov.chat.glm import GLMFormat
from chatglm_ov.chat.glm4 import GLM4Format
from chatglm_ov.chat.templates import answer_opening

pytestmark = pytest.mark.transformers_matrix

CHECKPOINT = Path(__file__).parent / "data" / "golden" / "glm4" / "glm4_chat" / "checkpoint"
TOOLS = [{"type": "function", "function": {"name": "track", "description": "追踪股票", "parameters": {}}}]
ASKED = [{"role": "user", "content": "你好"}]
TALK = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer of `fast_folder` with these arguments, loaded once."""
    loaded = {}

    def load(**arguments):
        key = tuple(arguments.items())
        if key not in loaded:
            loaded[key] = load_tokenizer(fast_folder(tmp_path_factory.mktemp("fast"), **arguments))
        return loaded[key]

    return load


def names(tokenizer, ids) -> list[str]:
    """The special tokens among `ids`."""
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in tokenizer.added_tokens_encoder]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("template", ["", "0414", "z1", "edge"])
def test_prompt_has_the_prefix_of_the_template_once(tokenizer, template, prefix):
    loaded = tokenizer(template=template, prefix=prefix)
    ids = chat_format_for(loaded).build_inputs(loaded, "你好")
    expected = (
        ["<|user|>", "<|assistant|>"] if template == "edge" else ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    )
    assert names(loaded, ids) == expected
    assert names(loaded, loaded("x")["input_ids"]) == (["[gMASK]", "<sop>"] if prefix else [])


@pytest.mark.parametrize("template", ["", "0414", "z1", "edge", None])
def test_prompt_is_that_of_apply_chat_template(tokenizer, template):
    loaded = tokenizer(template=template, prefix=True, size=59246 if template is None else 400)
    *history, last = TALK
    ids = chat_format_for(loaded).build_inputs(loaded, last["content"], history)
    options = {"add_generation_prompt": True, "return_dict": False}
    assert ids == loaded.apply_chat_template(TALK, **options)
    assert ids == loaded.encode(loaded.apply_chat_template(TALK, tokenize=False, **options), add_special_tokens=False)


def test_tools_reach_a_template_either_way(tokenizer):
    loaded = tokenizer(template="0414")
    chat = chat_format_for(loaded)
    expected = loaded.apply_chat_template(ASKED, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert chat.conversation_ids(loaded, ASKED, TOOLS) == expected
    text = chat.conversation_text(loaded, [{"role": "system", "content": "s", "tools": TOOLS}, *ASKED])
    assert text.count("# 可用工具") == text.count("## track") == 1 and "追踪股票" in text
    assert text.endswith("<|user|>\n你好<|assistant|>")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages[0].content }}",
        "{% if documents is not none %}{{ documents[0].text }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_what_transformers_gives_templates_is_there(tokenizer, source):
    loaded = tokenizer(template=source)
    wanted = loaded.apply_chat_template(ASKED, tokenize=False)
    assert wanted and chat_format_for(loaded).conversation_text(loaded, ASKED) == wanted


def test_tools_for_a_template_without_a_place_for_them(tokenizer):
    loaded = tokenizer(template="edge")
    with pytest.raises(ChatGLMError, match="chat_template: tools is given, expected none: the template has no place"):
        chat_format_for(loaded).conversation_ids(loaded, ASKED, TOOLS)


def test_default_template_of_the_edge_vocabulary(tokenizer):
    loaded = tokenizer(template=None, size=59246)
    assert loaded.convert_tokens_to_ids("<|endoftext|>") == 59246
    text = chat_format_for(loaded).conversation_text(loaded, TALK)
    assert text == "<|system|>\nAnswer.<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>"


def test_default_template_of_the_glm4_vocabulary(tokenizer):
    loaded = tokenizer(template=None, size=151329)
    text = chat_format_for(loaded).conversation_text(loaded, TALK)
    assert text == "[gMASK]<sop><|system|>\nAnswer.<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>"
    assert "# 可用工具\n## track\n" in chat_format_for(loaded).conversation_text(loaded, TALK, TOOLS)
    assert loaded.apply_chat_template(TALK, tools=TOOLS, tokenize=False, add_generation_prompt=True) == (
        chat_format_for(loaded).conversation_text(loaded, TALK, TOOLS)
    )


def test_vocabulary_that_does_not_say_whose_it_is(tokenizer):
    with pytest.raises(
        ChatGLMError, match=r"without chat_template, in which <\|endoftext\|> is 400, expected one from"
    ):
        chat_format_for(tokenizer(template=None))


@pytest.mark.parametrize("size", [400, 59246])
def test_stop_tokens_by_name(tokenizer, size):
    loaded = tokenizer(template="edge", size=size)
    assert chat_format_for(loaded).stop_token_ids(loaded) == [size, size + 7, size + 9]


def test_stop_tokens_that_a_vocabulary_does_not_have(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE({"<unk>": 0, "<|user|>": 1}, [], unk_token="<unk>"))
    loaded = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", chat_template="x")
    assert chat_format_for(loaded).stop_token_ids(loaded) == [1]


# ---- answers


def thinking(prompt_thinks: bool = True) -> GLMFormat:
    return GLMFormat(opening="\n<think>" if prompt_thinks else "")


def test_the_prompt_says_whether_the_answer_begins_with_thinking(tokenizer):
    assert answer_opening(tokenizer(template="z1").chat_template) == "\n<think>"
    assert answer_opening(tokenizer(template="0414").chat_template) == ""
    assert answer_opening("{{ raise_exception('no') }}") == "" == answer_opening("no roles")
    assert chat_format_for(tokenizer(template="z1")).defaults.temperature == 0.6
    assert chat_format_for(tokenizer(template="0414")).defaults.temperature == 0.8


@pytest.mark.parametrize(
    ("output", "thought", "answer"),
    [
        ("\n先想想。\n</think>\n你好！", "先想想。", "你好！"),
        ("<think>a</think>b", "a", "b"),
        ("a</think>b</think>c", "a", "b</think>c"),
        ("a<|assistant|>b</think>c", "a<|assistant|>b", "c"),
        ("cut", "cut", ""),
        ("cut </thi", "cut </thi", ""),
        ("</think>Sure:\n- x", "", "Sure:\n- x"),
        ("", "", ""),
    ],
)
def test_thinking_is_told_apart(output, thought, answer):
    response, history = thinking().process_response(output, "q", [])
    assert response == answer
    assert history == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "metadata": "", "content": answer, "thinking": thought},
    ]


def test_thinking_that_the_answer_opens():
    response, history = thinking(False).process_response("\n<think>\na\n</think>\nb", "q")
    assert (response, history[-1]["thinking"]) == ("b", "a")
    response, history = thinking(False).process_response("a <think> b", "q")
    assert response == "a <think> b" and "thinking" not in history[-1]


def test_old_thinking_is_not_in_the_next_prompt(tokenizer):
    loaded = tokenizer(template="z1")
    chat = chat_format_for(loaded)
    _, history = chat.process_response("secret</think>shown", "q")
    assert "secret" not in loaded.decode(chat.build_inputs(loaded, "next", history))
    everything = tokenizer(template="{{ messages | tojson }}")
    text = chat_format_for(everything).conversation_text(everything, history)
    assert "shown" in text and "secret" not in text
    assert history[-1]["thinking"] == "secret"


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ('track\n{"symbol": "10111"}', {"name": "track", "parameters": {"symbol": "10111"}}),
        ("track\n__import__('os')", {"name": "track", "content": "__import__('os')"}),
        ("other\n{}", "other\n{}"),
        ("Two lines:\n{}", "Two lines:\n{}"),
        ("track", "track"),
    ],
)
def test_tool_calls(opened, answer, response):
    output = f"hm</think>\n{answer}" if opened else f"\n{answer}"
    history = [{"role": "system", "content": "", "tools": TOOLS}]
    found, messages = thinking(opened).process_response(output, "q", history)
    assert found == response
    assert messages[-1]["metadata"] == (response["name"] if isinstance(response, dict) else "")
    assert thinking(opened).process_response(output, "q", [])[0] == answer


@pytest.mark.parametrize("tools", [[{"name": "track"}], [{"type": "track"}], TOOLS])
def test_names_of_tools(tools):
    history = [{"role": "system", "content": "", "tools": tools}]
    assert thinking(False).process_response("track\n1", "q", history)[0] == {"name": "track", "parameters": 1}


def test_observations_follow_tool_calls(tokenizer):
    loaded = tokenizer(template="0414")
    chat = chat_format_for(loaded)
    _, history = chat.process_response('track\n{"a": 1}', "q", [{"role": "system", "content": "s", "tools": TOOLS}])
    text = loaded.decode(chat.build_inputs(loaded, "42", history, role="observation"))
    assert text.endswith('<|user|>\nq<|assistant|>track\n{"a": 1}<|observation|>\n42<|assistant|>')


def test_glm4_prompts_that_end_the_first_line_themselves():
    text = "Sure:\n- x"
    assert GLM4Format(opening="\n").process_response(text, "q")[0] == text
    assert GLM4Format().process_response(text, "q")[0] == {"name": "Sure:", "content": "- x"}


def test_only_what_cannot_become_a_tag_is_certain():
    chat = thinking()
    for tag in ("<think>", "</think>"):
        assert all(chat.stable_output(f"a{tag[:length]}") == "a" for length in range(1, len(tag)))
        assert chat.stable_output(f"a{tag}") == f"a{tag}"
    assert chat.stable_output("a < b") == "a < b"


def test_half_a_surrogate_pair_in_a_question(tokenizer):
    loaded = tokenizer(template="0414")
    assert "x\ufffdy" in loaded.decode(chat_format_for(loaded).build_inputs(loaded, "x\ud800y"))


# ---- with a model


class Force(LogitsProcessor):
    """The given tokens, one after the other, behind a prompt of `start` tokens."""

    def __init__(self, start: int, ids: list[int]):
        self.start, self.ids = start, ids

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0
        return forced


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    convert(CHECKPOINT, folder, weight_formats=("f32",), ops="stock", progress=False)
    return OVChatGLMForCausalLM.from_pretrained(folder, inference_precision="f32")


def forced(loaded, ids: list[int], **options) -> dict:
    start = len(chat_format_for(loaded).build_inputs(loaded, "q"))
    processors = LogitsProcessorList([Force(start, ids)])
    return {"query": "q", "do_sample": False, "logits_processor": processors, "max_new_tokens": len(ids), **options}


def test_a_stream_tells_thinking_from_the_answer(model, tokenizer):
    loaded = tokenizer(template="z1")
    ids = loaded.encode("\n先想 a < b 👋\n</think>\n明月光 👋", add_special_tokens=False)
    options = forced(loaded, [*ids, loaded.convert_tokens_to_ids("<|user|>")])
    streamed = [(response, history[-1]["thinking"]) for response, history in model.stream_chat(loaded, **options)]
    assert streamed[-1] == ("明月光 👋", "先想 a < b 👋")
    for (answer, thought), (next_answer, next_thought) in pairwise(streamed):
        assert next_answer.startswith(answer) and next_thought.startswith(thought)
        assert not answer or thought == next_thought
        assert "\ufffd" not in next_answer + next_thought and "</" not in next_thought
    assert len({thought for _, thought in streamed}) > 5
    answer, history = model.chat(loaded, **options)
    assert (answer, history[-1]["thinking"]) == streamed[-1]


def test_an_answer_cut_while_it_thinks(model, tokenizer):
    loaded = tokenizer(template="z1")
    options = forced(loaded, loaded.encode("hm a <", add_special_tokens=False))
    *_, (response, history) = model.stream_chat(loaded, **options)
    assert (response, history[-1]["content"], history[-1]["thinking"]) == ("", "", "hm a <")
    assert model.chat(loaded, **options) == (response, history)


def test_stop_tokens_of_the_configs(model, tokenizer, monkeypatch):
    loaded = tokenizer(template="0414")
    text, end = loaded.encode("明月光", add_special_tokens=False), loaded.encode("x", add_special_tokens=False)[0]
    options = forced(loaded, [*text, end, *text])
    assert model.chat(loaded, **options)[0] == "明月光x明月光"
    for config in (model.config, model.generation_config):
        monkeypatch.setattr(config, "eos_token_id", [end, 1])
        assert model.chat(loaded, **options)[0] == "明月光"
        assert list(model.stream_chat(loaded, **options))[-1][0] == "明月光"
        assert model.chat(loaded, **options, eos_token_id=1)[0] == "明月光x明月光"
        assert list(model.stream_chat(loaded, **options, eos_token_id=1))[-1][0] == "明月光x明月光"
        monkeypatch.undo()
