"""Chat formats beside the goldens: answers with tool calls, stop tokens, histories, bad input."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
from tokenizer_cases import fast_folder, small_folder, tokenizer_of

from chatglm_ov.chat import chat_format_for
from chatglm_ov.chat.chatglm import ChatGLMFormat
from chatglm_ov.chat.chatglm2 import ChatGLM2Format
from chatglm_ov.chat.chatglm3 import ChatGLM3Format
from chatglm_ov.chat.glm import GLMFormat
from chatglm_ov.chat.glm4 import GLM4Format
from chatglm_ov.chat.shortening import shortened
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation.stop_strings import StopStrings
from chatglm_ov.tokenizer import load_tokenizer

pytestmark = pytest.mark.transformers_matrix

TOOLS = [{"name": "track", "description": "追踪股票", "parameters": {"type": "object"}}]
TOOL_HISTORY = [{"role": "system", "content": "Answer.", "tools": TOOLS}]


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return load_tokenizer(small_folder(tmp_path_factory.mktemp("v2"), "chatglm2"))


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    return load_tokenizer(small_folder(tmp_path_factory.mktemp("v3"), "chatglm3"))


def test_formats_by_tokenizer(v2, v3, tmp_path):
    assert isinstance(chat_format_for(tokenizer_of("v1")), ChatGLMFormat)
    assert isinstance(chat_format_for(v2), ChatGLM2Format)
    assert isinstance(chat_format_for(v3), ChatGLM3Format)
    assert chat_format_for(tokenizer_of("glm4")).escaped_json is True
    assert chat_format_for(load_tokenizer(fast_folder(tmp_path))).escaped_json is False
    with pytest.raises(ChatGLMError, match="tokenizer is a object without chat_template"):
        chat_format_for(object())


def test_stop_tokens(v2, v3):
    assert chat_format_for(tokenizer_of("v1")).stop_token_ids(tokenizer_of("v1")) == [1605]
    assert chat_format_for(v2).stop_token_ids(v2) == [2]
    user, observation = v3.get_command("<|user|>"), v3.get_command("<|observation|>")
    assert chat_format_for(v3).stop_token_ids(v3) == [2, user, observation]
    assert chat_format_for(tokenizer_of("glm4")).stop_token_ids(tokenizer_of("glm4")) == [1500, 1507, 1509]


def test_real_stop_tokens():
    v3 = tokenizer_of("v3")
    assert chat_format_for(v3).stop_token_ids(v3) == [2, 64795, 64797]
    assert chat_format_for(tokenizer_of("v1_real")).stop_token_ids(tokenizer_of("v1_real")) == [130005]


def test_defaults_are_those_of_the_originals(v2, v3):
    v1 = chat_format_for(tokenizer_of("v1")).defaults.as_dict()
    assert v1 == {"max_length": 2048, "top_p": 0.7, "temperature": 0.95, "do_sample": True, "num_beams": 1}
    for tokenizer in (v2, v3, tokenizer_of("glm4")):
        defaults = chat_format_for(tokenizer).defaults
        assert (defaults.max_length, defaults.top_p, defaults.temperature) == (8192, 0.8, 0.8)


def test_only_a_stop_token_is_cut_off(v3):
    chat, stop = chat_format_for(v3), v3.get_command("<|user|>")
    ids = v3.encode_ordinary("明月光")
    assert chat.without_stop_token(v3, [*ids, stop]) == ids
    assert chat.without_stop_token(v3, ids) == ids
    assert chat.without_stop_token(v3, []) == []
    assert chat.answer(v3, [*v3.encode_ordinary("\n明月光"), stop], "问", [])[0] == "明月光"


@pytest.mark.parametrize(
    ("raw", "shown"), [(" [[训练时间]] ", "2023年"), ("好,a!好:x;好?", "好，a！好：x；好？"), ("a,b", "a,b")]
)
def test_v1_answers_get_wide_punctuation_back(raw, shown):
    assert ChatGLMFormat().process_response(raw, "q", [("a", "b")]) == (shown, [("a", "b"), ("q", shown)])


def test_chatglm2_answer():
    response = ChatGLM2Format().process_response(" 好,[[训练时间]]\n", "q")
    assert response == ("好,2023年", [("q", "好,2023年")])


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("tool_call(symbol='10111')", {"symbol": "10111"}),
        (
            "tool_call(city=\"北京\", days=3, units=['C', -1.5], exact=True, note=None)",
            {"city": "北京", "days": 3, "units": ["C", -1.5], "exact": True, "note": None},
        ),
        ("tool_call()", {}),
        ("tool_call(\n    a={'b': (1, 2)}\n)", {"a": {"b": (1, 2)}}),
    ],
)
def test_chatglm3_tool_call_arguments_are_read(call, arguments):
    output = f"track\n ```python\n{call}\n```"
    response, history = ChatGLM3Format().process_response(output, "股价?", TOOL_HISTORY)
    assert response == {"name": "track", "parameters": arguments}
    assert history[-1] == {"role": "assistant", "metadata": "track", "content": f" ```python\n{call}\n```"}
    assert history[-2] == {"role": "user", "content": "股价?"}


@pytest.mark.parametrize(
    "call",
    [
        "tool_call(x=__import__('os').system('echo'))",
        "__import__('os').getcwd()",
        "tool_call(*[1])",
        "tool_call(**{'a': 1})",
        "tool_call(1)",
        "tool_call(a=b)",
        "other(a=1)",
        "tool_call(a=1",
        "tool_call(a=" + "[" * 5000,
        "",
    ],
)
def test_chatglm3_tool_call_that_is_not_literal_stays_text(call):
    content = f" ```python\n{call}\n```"
    response, history = ChatGLM3Format().process_response(f"track\n{content}", "q", TOOL_HISTORY)
    assert response == {"name": "track", "content": content}
    assert history[-1]["content"] == content


def test_tool_call_without_tools_in_the_history():
    response, _ = ChatGLM3Format().process_response("track\n ```python\ntool_call(a=1)\n```", "q", [])
    assert response == {"name": "track", "content": " ```python\ntool_call(a=1)\n```"}


def test_answer_of_several_messages():
    output = "\n好的，让我查一下。<|assistant|>track\n ```python\ntool_call(symbol='1')\n```"
    response, history = ChatGLM3Format().process_response(output, "q", TOOL_HISTORY)
    assert response == {"name": "track", "parameters": {"symbol": "1"}}
    assert [message["content"] for message in history[2:]] == ["好的，让我查一下。", output.split("track\n")[1]]


def test_answer_without_a_first_line_is_text():
    response, history = ChatGLM3Format().process_response("明月", "q", [])
    assert response == "明月"
    assert history[-1] == {"role": "assistant", "metadata": "", "content": "明月"}


@pytest.mark.parametrize(
    ("content", "response"),
    [
        ('{"symbol": "10111"}', {"name": "track", "parameters": {"symbol": "10111"}}),
        ("{'symbol': 1}", {"name": "track", "content": "{'symbol': 1}"}),
        ('{"symbol": "101', {"name": "track", "content": '{"symbol": "101'}),
        ("[" * 100_000, {"name": "track", "content": "[" * 100_000}),
    ],
)
def test_glm4_tool_call(content, response):
    found, history = GLM4Format().process_response(f"track\n{content}", "q", TOOL_HISTORY)
    assert found == response
    assert history[-1] == {"role": "assistant", "metadata": "track", "content": content}


def test_plain_tools_are_functions_to_glm4():
    messages = [{"role": "user", "content": "q"}]
    plain, functions = ([tool] for tool in (TOOLS[0], {"type": "function", "function": TOOLS[0]}))
    chat, tokenizer = GLM4Format(), tokenizer_of("glm4")
    wanted = chat.conversation_text(tokenizer, messages, functions)
    assert "## track" in wanted
    assert chat.conversation_text(tokenizer, messages, plain) == wanted
    with_system = [{"role": "system", "content": "", "tools": plain}, *messages]
    assert chat.conversation_text(tokenizer, with_system) == wanted
    assert plain == TOOLS


@pytest.mark.parametrize(
    ("chat", "output", "stop", "kept"),
    [
        (ChatGLM3Format(), "\n 床前明月光\n疑是地上霜", "\n", "\n 床前明月光"),
        (GLM4Format(), "\n床前明月光。疑是。", "。", "\n床前明月光"),
        (ChatGLM2Format(), " 春眠 不觉晓", " ", " 春眠"),
        (ChatGLMFormat(), "你好,世界.再见", "，", "你好"),
        (ChatGLMFormat(), "see a,b", "，", "see a,b"),
        (ChatGLMFormat(), "see a, b", ", b", "see a"),
        (GLMFormat(), "<think>\nWell. Now.</think>\n\nYes. No.", ".", "<think>\nWell. Now.</think>\n\nYes"),
        (GLMFormat("\n<think>"), "Well. Now.</think>\nYes. No.", ".", "Well. Now.</think>\nYes"),
        (GLMFormat("\n<think>"), "Well. Now.", ".", "Well. Now."),
        (GLMFormat(), "Well. Now.", ".", "Well"),
    ],
)
def test_a_stop_text_is_looked_for_in_the_answer_as_it_is_told(chat, output, stop, kept):
    ends = StopStrings(["@", stop], chat.split_answer)
    assert ends.cut(output) == kept
    assert ends.complete(output) == (kept != output)
    response, _ = chat.process_response(kept, "q")
    for end in range(len(output) + 1):
        certain = ends.stable_output(chat.stable_output(output[:end]))
        told, _ = chat.process_response(certain, "q")
        assert response.startswith(told.strip()), (certain, told)


@pytest.mark.parametrize("chat", [ChatGLMFormat(), ChatGLM2Format(), ChatGLM3Format(), GLM4Format(), GLMFormat()])
@pytest.mark.parametrize(
    "output",
    [
        "好a,你b,c",
        "a!,?你",
        "[[训练时间]],好",
        "a[b][[训练]] [[训练时间]]年:",
        "[[[训练时间]]",
        "a,[[训练时间]",
        "你;[[",
    ],
)
def test_what_is_settled_of_an_answer_that_grows_never_changes(chat, output):
    told = [chat.process_response(chat.stable_output(output[:end]), "q")[0] for end in range(len(output) + 1)]
    shown = [chat.stable_response(response) for response in told]
    for shorter, longer in pairwise([*shown, told[-1]]):
        assert longer.startswith(shorter), (shorter, longer)
    assert len(told[-1]) - len(shown[-1]) <= len("[[训练时间]")


def pairs(count: int) -> list[tuple[str, str]]:
    return [(f"question {index}", "answer " * (1 + index % 3)) for index in range(count)]


def messages(count: int) -> list[dict]:
    """Each third round has a call of a tool in it."""
    history = copy.deepcopy(TOOL_HISTORY)
    for index, (query, answer) in enumerate(pairs(count)):
        call = {"role": "assistant", "metadata": "track", "content": "tool_call()"}
        told = [] if index % 3 else [call, {"role": "observation", "content": "7"}]
        history += [{"role": "user", "content": query}, *told, {"role": "assistant", "content": answer}]
    return history


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "glm4"])
def test_a_conversation_that_is_too_long_loses_its_oldest_rounds(name, v2, v3):
    tokenizer = {"v2": v2, "v3": v3}.get(name) or tokenizer_of(name)
    chat = chat_format_for(tokenizer)
    make, before = (pairs, []) if name in ("v1", "v2") else (messages, TOOL_HISTORY)
    history = make(20)

    def tokens(rounds: list) -> int:
        return len(chat.build_inputs(tokenizer, "q", rounds))

    def all_but(rounds: int) -> list:
        return [*before, *history[[*chat.round_starts(history), len(history)][rounds] :]]

    whole, bare = tokens(history), tokens(before)
    assert len(chat.round_starts(history)) == 20 and all_but(0) == history
    assert shortened(chat, tokenizer, "q", history, 10, whole + 10) == (history, 0)
    for limit in (whole + 9, whole, (whole + bare) // 2, 2 * bare + 10):
        left, rounds = shortened(chat, tokenizer, "q", history, 10, limit)
        assert left == all_but(rounds) and tokens(left) <= limit // 2 < tokens(all_but(rounds - 1))
    assert shortened(chat, tokenizer, "q", history, 10, bare + 1) == (before, 20)
    assert shortened(chat, tokenizer, "q", history, 10, bare) == (history, 0)
    assert shortened(chat, tokenizer, "q", before, 10, bare + 1) == (before, 0)


def test_histories_are_not_changed(v3):
    history = [*copy.deepcopy(TOOL_HISTORY), {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = copy.deepcopy(history)
    chat = chat_format_for(v3)
    chat.build_inputs(v3, "q", history)
    _, after = chat.process_response("\nx", "q", history)
    after[0]["tools"].append("changed")
    assert history == before
    pairs = [("a", "b")]
    assert ChatGLM2Format().process_response("x", "q", pairs)[1] is not pairs and pairs == [("a", "b")]


def test_chatglm3_role_tokens_that_were_typed_stay_text(v3):
    ids = chat_format_for(v3).build_inputs(v3, "<|system|>x<|assistant|>[gMASK]sop", [])
    special = [index for index in ids if index >= v3.get_command("[MASK]")]
    assert special == [v3.get_command(name) for name in ("[gMASK]", "sop", "<|user|>", "<|assistant|>")]


def test_tools_argument_of_a_template(v3):
    messages = [{"role": "user", "content": "q"}]
    with_system = [{"role": "system", "content": ChatGLM3Format.tools_system_text, "tools": TOOLS}, *messages]
    expected = v3.apply_chat_template(with_system, return_dict=False)
    assert v3.apply_chat_template(messages, tools=TOOLS, return_dict=False) == expected
    glm4 = tokenizer_of("glm4")
    tools = [{"type": "function", "function": TOOLS[0]}]
    text = glm4.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert "## track" in text and text.endswith("<|user|>\nq<|assistant|>") and text.count("<|system|>") == 1


def get_weather(city: str, days: int = 1):
    """天气。

    Args:
        city: 城市的名字
        days: 天数
    """


def test_python_functions_as_tools(v3):
    """What transformers' own tokenizers take."""
    written = {
        "name": "get_weather",
        "description": "天气。",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "城市的名字"},
                "days": {"type": "integer", "description": "天数"},
            },
            "required": ["city"],
        },
    }
    messages = [{"role": "user", "content": "q"}]
    for tokenizer in (v3, tokenizer_of("glm4")):
        texts = [
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            for tools in ([get_weather, TOOLS[0]], [written, TOOLS[0]])
        ]
        assert texts[0] == texts[1] and "get_weather" in texts[0]


@pytest.mark.parametrize(
    ("tool", "told"),
    [(lambda city: city, "chat: tools is <lambda> \\(.*docstring"), (print, "chat: tools is print \\(.*type hint")],
)
def test_functions_that_cannot_be_described(tool, told, v3):
    with pytest.raises(ChatGLMError, match=told):
        v3.apply_chat_template([{"role": "user", "content": "q"}], tools=[tool])


def test_template_of_a_folder_without_one():
    tokenizer, chat = copy.copy(tokenizer_of("glm4")), GLM4Format()
    messages = [{"role": "system", "content": "s", "tools": [{"type": "function", "function": TOOLS[0]}]}]
    messages.append({"role": "user", "content": "q"})
    with_template = chat.conversation_text(tokenizer, messages)
    tokenizer.chat_template = None
    assert chat.conversation_text(tokenizer, messages) == with_template


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ("text", "history: value is of type str, expected a list of (query, answer) pairs"),
        ([("a", "b", "c")], "history[0]: round is of type tuple, expected (query, answer), two texts"),
        ([("a", "b"), ("a", None)], "history[1]: round is of type tuple, expected (query, answer), two texts"),
        ([{"role": "user", "content": "a"}], "history[0]: round is of type dict, expected (query, answer), two texts"),
    ],
)
def test_bad_rounds(history, told):
    tokenizer = tokenizer_of("v1")
    with pytest.raises(ChatGLMError) as error:
        chat_format_for(tokenizer).build_inputs(tokenizer, "q", history)
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ([("a", "b")], "history[0]: message is of type tuple, expected a dict with role and content"),
        ({"role": "user"}, "history: value is of type dict, expected a list of messages (dict)"),
        (
            [{"role": "tool", "content": ""}],
            "history[0]: role is 'tool', expected system, user, assistant or observation",
        ),
        ([{"role": "user"}], "history[0]: content is of type NoneType, expected text"),
        (
            [{"role": "user", "content": "a", "image": "a.png"}],
            "history[0]: image is given, expected none: images are not supported",
        ),
        ([{"role": "user", "content": "a", "metadata": 1}], "history[0]: metadata is of type int, expected text"),
        (
            [{"role": "system", "content": "", "tools": "x"}],
            "messages[0]: tools is of type str, expected a list of JSON objects (dict)",
        ),
    ],
)
def test_bad_messages(v3, history, told):
    for tokenizer in (v3, tokenizer_of("glm4")):
        with pytest.raises(ChatGLMError) as error:
            chat_format_for(tokenizer).build_inputs(tokenizer, "q", history)
        assert str(error.value) == told


def test_tools_that_are_not_json(v3):
    for tokenizer in (v3, tokenizer_of("glm4")):
        history = [{"role": "system", "content": "s", "tools": [{"function": {"name": object()}}]}]
        if tokenizer is not v3:
            history[0]["tools"][0]["type"] = "function"
        with pytest.raises(ChatGLMError, match="JSON"):
            chat_format_for(tokenizer).build_inputs(tokenizer, "q", history)


@pytest.mark.parametrize("name", ["v1", "glm4"])
def test_bad_query_and_role(name):
    tokenizer = tokenizer_of(name)
    chat = chat_format_for(tokenizer)
    with pytest.raises(ChatGLMError, match="chat: query is of type int, expected text"):
        chat.build_inputs(tokenizer, 3, [])
    with pytest.raises(ChatGLMError, match="chat: role is 'nobody'"):
        chat.build_inputs(tokenizer, "q", [], role="nobody")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "system", "content": "s"}], "messages[0]: role is 'system', expected 'user'"),
        ([{"role": "user", "content": "a"}] * 2, "messages[1]: role is 'user', expected 'assistant'"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "messages: number is 2, expected an odd one, ending with the user's question",
        ),
    ],
)
def test_order_of_roles_in_rounds(v2, messages, told):
    for tokenizer in (v2, tokenizer_of("v1")):
        with pytest.raises(ChatGLMError) as error:
            tokenizer.apply_chat_template(messages)
        assert str(error.value) == told


def test_template_that_cannot_be_applied(monkeypatch):
    tokenizer = tokenizer_of("glm4")
    for template, part in (
        ("{% for x %}", "TemplateSyntaxError"),
        ("{{ messages.nothing.at.all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(ChatGLMError, match=part):
            tokenizer.apply_chat_template([{"role": "user", "content": "q"}])


def test_template_that_fails_in_several_lines(monkeypatch):
    tokenizer = tokenizer_of("glm4")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('first\nsecond') }}")
    with pytest.raises(ChatGLMError, match="messages is first second, expected"):
        tokenizer.apply_chat_template([{"role": "user", "content": "q"}])
    monkeypatch.setattr(tokenizer, "chat_template", "{% macro f(a) %}{{ f(a) }}{% endmacro %}{{ f(1) }}{{ 1 / 0 }}")
    with pytest.raises(ChatGLMError, match="RecursionError"):
        tokenizer.apply_chat_template([{"role": "user", "content": "q"}])


def test_history_that_is_nested_too_deeply(v3):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for tokenizer in (v3, tokenizer_of("glm4")):
        for message, told in (({"extra": deep}, "nested too deeply"), ({"tools": [{"x": deep}]}, "nested too deeply")):
            with pytest.raises(ChatGLMError, match=told):
                chat_format_for(tokenizer).build_inputs(tokenizer, "q", [{"role": "system", "content": "s", **message}])
        with pytest.raises(ChatGLMError, match="chat: tools is not JSON"):
            tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tools=[{"x": deep}])
    while deep:  # freed level by level
        deep = deep.pop()


def test_conversations_of_a_batch_are_checked_each(v3):
    asked = [{"role": "user", "content": "q"}]
    for tokenizer in (v3, tokenizer_of("v1"), tokenizer_of("glm4")):
        for wrong in (None, 3, {"role": "user"}):
            with pytest.raises(ChatGLMError, match="messages: value is of type"):
                tokenizer.apply_chat_template([asked, wrong])
        with pytest.raises(ChatGLMError, match=r"messages\[0\]"):
            tokenizer.apply_chat_template([asked, [3]])


@pytest.mark.parametrize("name", ["v1", "glm4"])
def test_answers_are_checked_like_questions(name):
    chat = chat_format_for(tokenizer_of(name))
    for arguments, field in (((3, "q", []), "output"), (("a", 3, []), "query"), (("a", "q", [], "nobody"), "role")):
        with pytest.raises(ChatGLMError, match=f"chat: {field} is"):
            chat.process_response(*arguments)


def test_metadata_of_nothing_is_no_metadata():
    tokenizer = tokenizer_of("glm4")
    said = {"role": "assistant", "content": "a"}
    ids = chat_format_for(tokenizer).build_inputs(tokenizer, "q", [said])
    assert ids == chat_format_for(tokenizer).build_inputs(tokenizer, "q", [{**said, "metadata": None, "tools": None}])
