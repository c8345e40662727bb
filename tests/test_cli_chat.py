"""`chatglm-ov chat`: a conversation through pipes and on a terminal."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import pytest
from command_line import PROGRAM, Run, checkpoint, converted, run  # noqa: F401

from chatglm_ov import OVChatGLMForCausalLM, load_tokenizer
from chatglm_ov.cli.answer import as_text
from chatglm_ov.cli.printing import TextPrinter

EXACT = ("--weight-format", "f32", "--inference-precision", "f32")
CUT = "[cut after 12 tokens: --max-new-tokens allows more]\n"
Converse = Callable[..., str]


@pytest.fixture
def converse(converted: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Converse:
    """Function from the lines that the user gives, and options, to what is printed, but for the remark behind each
    answer that it is cut."""

    def hold(lines: Iterable[str], *options: object, code: int = 0) -> str:
        left = iter(lines)

        def read(prompt: str = "") -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        done = run("chat", converted, "--max-new-tokens", 12, *EXACT, *options)
        assert done.code == code and next(left, None) is None
        return done.out + done.err.replace(CUT, "")

    return hold


@pytest.fixture(scope="module")
def answers(converted: Path) -> Callable[..., str]:
    """Function from the user's turns to the model's answers as they are printed."""
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(converted, "f32", "f32"), load_tokenizer(converted)

    def answer(queries: list[str], history: list | None = None) -> str:
        text = ""
        for query in queries:
            response, history = model.chat(tokenizer, query, history=history, do_sample=False, max_new_tokens=12)
            text += as_text(response) + "\n"
        return text

    return answer


def test_a_conversation_has_a_memory(converse: Converse, answers: Callable[..., str]) -> None:
    printed = converse(["你好", "", "Write a function."])
    assert printed == answers(["你好", "Write a function."])
    assert printed != answers(["你好"]) + answers(["Write a function."])


def test_clear_forgets_all_but_the_system_text(converse: Converse, answers: Callable[..., str]) -> None:
    system = [{"role": "system", "content": "You are a poet."}]
    printed = converse(["你好", "/clear", "再见"], "--system", "You are a poet.")
    assert printed == answers(["你好"], system) + "The conversation is forgotten.\n" + answers(["再见"], system)
    assert answers(["你好"], system) != answers(["你好"])


def test_commands(converse: Converse, answers: Callable[..., str]) -> None:
    printed = converse(["/help", "/stats", "你好", "/stats", "/quit", "/home/me is a folder", " /exit "])
    for word in ("/clear", "/stats", "/exit", "Ctrl-C"):
        assert word in printed.partition("Figures")[0]
    assert re.search(r"on\.\n.*\[12 tokens, first token .* tokens/s\]\nFigures are off", printed, re.DOTALL)
    assert "/quit is no command; /help shows them\n" in printed
    assert printed.count("tokens/s") == 1
    last = answers(["你好", "/home/me is a folder"]).removeprefix(answers(["你好"]))
    assert printed.endswith(last)


def test_bytes_that_are_no_characters_are_replaced(converse: Converse, answers: Callable[..., str]) -> None:
    assert converse(["a\udce4\udcbd"]) == answers(["a??"])


def test_an_error_leaves_the_conversation_as_it_was(converse: Converse, answers: Callable[..., str]) -> None:
    printed = converse(["你好", "好" * 5000, "再见"], code=2)
    error = "error: chat: prompt is 50"
    assert error in printed
    assert "".join(line for line in printed.splitlines(True) if error not in line) == answers(["你好", "再见"])


def test_a_conversation_that_fills_the_model_goes_on(converse: Converse, answers: Callable[..., str]) -> None:
    long = "好" * 1500
    printed = converse(["你好", long, "再见", long, long, "再见"])
    told = "[the 4 oldest rounds are left out: all together are too much for 4096 tokens]\n"
    assert printed.count("left out") == printed.count(told) == 1
    assert printed.replace(told, "") == answers(["你好", long, "再见", long]) + answers([long, "再见"])


def test_a_cut_is_told_where_no_terminal_is(
    converted: Path, run: Run, answers: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    done = run("chat", converted, "--max-new-tokens", 12, *EXACT)
    assert (done.out, done.err) == (answers(["你好"]), CUT)


def test_ctrl_c_while_typing_goes_on(converted: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter([KeyboardInterrupt, EOFError])

    def read(prompt: str = "") -> str:
        raise next(typed)

    monkeypatch.setattr("builtins.input", read)
    assert run("chat", converted, *EXACT).code == 0
    assert next(typed, None) is None


def test_no_system_text_for_a_generation_without_that_role(shared: Path, tmp_path: Path, run: Run) -> None:
    from command_line import copy_of

    source = copy_of(shared / "golden" / "v1" / "v1_chat" / "checkpoint", tmp_path / "v1")
    for file in (shared / "golden" / "v1" / "tokenizer").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    assert run("convert", source, tmp_path / "v1-ov", "--weight-format", "bf16").code == 0
    assert "chatglm has no system role" in run("chat", tmp_path / "v1-ov", "--system", "You are a poet.").error


# A terminal


class Terminal:
    """`chatglm-ov chat` on a terminal of its own."""

    def __init__(self, *arguments: object, **environment: str):
        self._end, there = pty.openpty()
        command = [*PROGRAM, *map(str, arguments)]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "dumb", **environment}
        self._process = subprocess.Popen(
            command,
            stdin=there,
            stdout=there,
            stderr=there,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(there)
        self._seen = b""

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def read_until(self, mark: str, seconds: float = 90) -> str:
        """What was shown since the last call, up to and including `mark`."""
        end = time.monotonic() + seconds
        while mark.encode() not in self._seen:
            assert time.monotonic() < end, self._seen.decode(errors="replace")
            if select.select([self._end], [], [], 0.1)[0]:
                self._seen += os.read(self._end, 4096)
        before, found, self._seen = self._seen.partition(mark.encode())
        return (before + found).decode(errors="replace")

    def read_some(self, count: int, seconds: float = 90) -> None:
        """Waits for so many new bytes."""
        end = time.monotonic() + seconds
        while len(self._seen) < count:
            assert time.monotonic() < end, self._seen.decode(errors="replace")
            if select.select([self._end], [], [], 0.1)[0]:
                self._seen += os.read(self._end, 4096)

    def exit_code(self) -> int:
        return self._process.wait(30)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_chinese_is_typed_in_the_c_locale(converted: Path, answers: Callable[..., str]) -> None:
    terminal = Terminal("chat", converted, "--max-new-tokens", 12, *EXACT, LC_ALL="C")
    terminal.read_until("> ")
    terminal.type("你好\r")
    assert answers(["你好"]).strip() in terminal.read_until("\n> ").replace("\r", "")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(converted: Path) -> None:
    terminal = Terminal("chat", converted, "--max-new-tokens", 4000, *EXACT)
    assert "/help shows the commands" in terminal.read_until("> ")
    terminal.type("Write a function.\r")
    terminal.read_until("function.\r\n")
    # Of the answer: before it, what is typed may still go to the line that was read.
    terminal.read_some(20)
    terminal.type("\x03")
    shown = terminal.read_until("[stopped]").partition("^C")[0].replace("\r\n", "\n")
    terminal.read_until("> ")
    terminal.type("/clear\r")
    terminal.read_until("forgotten")
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(converted, "f32", "f32"), load_tokenizer(converted)
    with closing(model.stream_chat(tokenizer, "Write a function.", do_sample=False, max_new_tokens=4000)) as answers:
        longer = next(text for text in (as_text(*each) for each in answers) if len(text) > len(shown))
    assert longer.startswith(shown.rstrip("\n"))


@pytest.mark.parametrize("command", ["chat", "generate", "generate --raw"])
def test_an_answer_that_is_cut_says_so(converted: Path, command: str) -> None:
    name, *raw = command.split()
    prompt = ("--prompt", "床前明月光") if name == "generate" else ()
    terminal = Terminal(name, converted, "--max-new-tokens", 5, *EXACT, *raw, *prompt)
    terminal.read_until(f"{converted}: f32, f32 cache, " if name == "chat" else "[f32, f32 cache, ")
    assert re.search(r"^\d+ threads, (fused|stock) operations", terminal.read_until("operations"))
    if name == "chat":
        terminal.read_until("> ")
        terminal.type("床前明月光\r")
    terminal.read_until("[cut after 5 tokens: --max-new-tokens allows more]")
    if name == "chat":
        terminal.read_until("> ")
        terminal.type("\x04")
    assert terminal.exit_code() == 0


# Text that grows


def test_printer_shows_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TextPrinter()
    shown = []
    for text in ("好", "好a,", "好a,", "好a, [["):
        printer.show(text)
        shown.append(capsys.readouterr().out)
    printer.finish("好a, [[!")
    assert [*shown, capsys.readouterr().out] == ["好", "a,", "", " [[", "!\n"]


def test_printer_shows_the_whole_text_again_when_its_beginning_changed(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TextPrinter()
    printer.show("one two")
    printer.finish("one three")
    assert capsys.readouterr().out == "one two\none three\n"


def test_printer_ends_a_line_that_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TextPrinter()
    printer.show("all")
    printer.finish("all")
    assert capsys.readouterr().out == "all\n"


@pytest.mark.parametrize(
    ("response", "last", "text"),
    [
        ("b", ("a", "b"), "b"),
        ("b", {"role": "assistant", "content": "b"}, "b"),
        ("", {"role": "assistant", "content": "", "thinking": "hm"}, "<think>\nhm"),
        ("b", {"role": "assistant", "content": "b", "thinking": "hm"}, "<think>\nhm\n</think>\n\nb"),
        (
            {"name": "f", "parameters": {"x": 1}},
            {"role": "assistant", "thinking": ""},
            '<think>\n\n</think>\n\nf\n{"x": 1}',
        ),
    ],
)
def test_thinking_is_shown_before_the_answer(response, last, text):
    assert as_text(response, [last]) == text


def test_figures_tell_what_was_reused_and_guessed(converse: Converse, converted: Path) -> None:
    printed = converse(["你好", "再见"], "--stats", "--prompt-lookup", 4)
    first, second = re.findall(r"^\[.*\]$", printed, re.MULTILINE)
    assert "reused" not in first and "guesses right" in first
    assert int(re.search(r"(\d+) prompt tokens reused", second)[1]) >= 6
    assert converse(["你好", "再见"]) == re.sub(r"^\[.*\]\n", "", printed, flags=re.MULTILINE)
    assert "guesses right" in converse(["你好"], "--stats", "--assistant", converted)


def test_two_sources_of_guesses_are_one_too_many(converted: Path, run: Run) -> None:
    done = run("chat", converted, "--prompt-lookup", 3, "--assistant", converted)
    assert "--prompt-lookup" in done.error
