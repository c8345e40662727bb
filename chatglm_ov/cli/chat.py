"""`chatglm-ov chat`: a conversation on the terminal.

Ctrl-C stops an answer, or drops the line that is being typed; Ctrl-D or /exit ends the chat.
"""

from __future__ import annotations

import argparse
import locale
import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

from chatglm_ov.cli.options import add_generation_options, add_model_options, generation_options, model_options
from chatglm_ov.cli.program import USER_ERROR
from chatglm_ov.errors import ChatGLMError

SUMMARY = "hold a conversation"
PROMPT = "> "
HELP = """/clear  forget the conversation
/stats  switch the figures after an answer on or off
/help   show this
/exit   end the chat, as Ctrl-D does
Ctrl-C  stop an answer; what was said of it stays in the conversation"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told about its task (ChatGLM3 and later)")
    parser.add_argument("--stats", action="store_true", help="say after each answer how long it took")
    add_generation_options(parser)


def run(arguments: argparse.Namespace) -> int:
    options = generation_options(arguments)

    from chatglm_ov.cli.answer import PromptBar, assistant_options, open_model, running

    settings = model_options(arguments)
    model, tokenizer = open_model(arguments.folder, **settings)
    options |= {"prompt_progress": PromptBar(), **assistant_options(arguments.assistant, settings["properties"])}
    conversation = Conversation(model, tokenizer, options, arguments.system, arguments.stats)
    _edit_lines()
    if sys.stdin.isatty():
        print(f"{arguments.folder}: {running(model)}. /help shows the commands.")
    while (line := read_line()) is not None:
        if not conversation.take(line):
            break
    # On a terminal the errors have been read.
    return USER_ERROR if conversation.failed and not sys.stdin.isatty() else 0


def _edit_lines() -> None:
    """Line editing for input(), where the system has it. In the C locale, whose text is UTF-8 to Python, readline would
    take the bytes of a Chinese character for keys; it asks for the locale at each line."""
    codeset = locale.nl_langinfo(locale.CODESET) if hasattr(locale, "nl_langinfo") else ""
    if sys.flags.utf8_mode and codeset.upper() != "UTF-8":
        os.environ["LC_ALL"] = "C.UTF-8"
    with suppress(ImportError):
        import readline  # noqa: F401


def read_line() -> str | None:
    """The next line that the user gives, None at the end of the input."""
    try:
        return input(PROMPT if sys.stdin.isatty() else "")
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None


class Conversation:
    """A history and what a line of the user does to it."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any], system: str | None, stats: bool):
        self._model, self._tokenizer, self._options, self._stats = model, tokenizer, options, stats
        from chatglm_ov.cli.answer import beginning

        self.failed = False
        """Whether a question has had no answer."""
        self._beginning = beginning(tokenizer, system)
        self._history = list(self._beginning)
        self._commands: dict[str, Callable[[], None]] = {
            "/clear": self._clear,
            "/stats": self._switch_stats,
            "/help": lambda: print(HELP),
        }

    def take(self, line: str) -> bool:
        """Obey or answer `line`; False when the user wants to end."""
        word = line.strip()
        if word == "/exit":
            return False
        if word in self._commands:
            self._commands[word]()
        elif word.startswith("/") and " " not in word and word.isascii():
            print(f"{word} is no command; /help shows them")
        elif word:
            self._answer(_valid(line))
        return True

    def _clear(self) -> None:
        self._history = list(self._beginning)
        for model in filter(None, (self._model, self._options.get("assistant_model"))):
            model.release_cache()
        print("The conversation is forgotten.")

    def _switch_stats(self) -> None:
        self._stats = not self._stats
        print(f"Figures are {'on' if self._stats else 'off'}.")

    def _answer(self, query: str) -> None:
        """A stopped answer stays in the history as far as it came; an error leaves the history as it was."""
        from transformers import StoppingCriteriaList

        from chatglm_ov.chat import chat_format_for
        from chatglm_ov.cli.answer import as_text, cut_short, default_new_tokens, figures
        from chatglm_ov.cli.printing import TextPrinter
        from chatglm_ov.generation.timing import Stopwatch

        chat = chat_format_for(self._tokenizer)
        watch, printer, text, before, cut = Stopwatch(), TextPrinter(), "", self._history, ""
        options = {"max_new_tokens": default_new_tokens(self._tokenizer), **self._options}
        options["stopping_criteria"] = StoppingCriteriaList([watch])
        try:
            self._leave_out_rounds(query, options["max_new_tokens"])
            with closing(self._model.stream_chat(self._tokenizer, query, self._history, **options)) as answers:
                for response, self._history in answers:
                    text = as_text(response, self._history)
                    printer.show(chat.stable_response(text))
            printer.finish(text)
            ends = self._model.stop_ids(chat, self._tokenizer, options)
            cut = cut_short(self._model, watch, options["max_new_tokens"], ends)
        except KeyboardInterrupt:
            printer.finish(text)
            print("[stopped]")
        except ChatGLMError as error:
            self._history, self.failed = before, True
            print(f"error: {error}", file=sys.stderr)
        if self._stats and watch.timing:
            print(f"[{figures(watch.timing, self._model)}]")
        if cut:
            print(f"[{cut}]", file=sys.stderr, flush=True)

    def _leave_out_rounds(self, query: str, answer: int) -> None:
        """Drop the oldest rounds of a conversation that is too long for the model, or, where that has no limit, for the
        original's chat: there is to be room for an answer of so many tokens, or of a quarter of all."""
        from chatglm_ov.chat import chat_format_for
        from chatglm_ov.chat.shortening import shortened

        chat_format = chat_format_for(self._tokenizer)
        limit = getattr(self._model.config, "max_position_embeddings", None) or chat_format.defaults.max_length
        room = min(answer, limit // 4)
        self._history, rounds = shortened(chat_format, self._tokenizer, query, self._history, room, limit)
        if rounds:
            told = "the oldest round is" if rounds == 1 else f"the {rounds} oldest rounds are"
            print(f"[{told} left out: all together are too much for {limit} tokens]", file=sys.stderr)


def _valid(text: str) -> str:
    """Bytes that the terminal's encoding does not know come in as lone surrogates; a tokenizer takes characters."""
    return text.encode(errors="replace").decode()
