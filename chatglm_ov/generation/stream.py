"""The tokens of `generate()` one by one, as an iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.runtime.turns import Helper


class _Closed(Exception):
    """Nobody waits for further tokens."""


class _Tokens(BaseStreamer):
    """Hands tokens from the thread that makes them to the one that reads them; an exception at the end, or None."""

    def __init__(self, on_token: Callable[[], None] = lambda: None):
        self._on_token = on_token
        self.queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.closed = threading.Event()
        self.reader = threading.current_thread()
        self._prompt_seen = False

    def check_wanted(self) -> None:
        """Raises _Closed where the stream was closed, and at the end of a program that has left it open: Python waits
        for this thread then, which would be ended inside the model otherwise."""
        program_ends = not threading.main_thread().is_alive()
        if self.closed.is_set() or (program_ends and (self.reader.daemon or not self.reader.is_alive())):
            raise _Closed

    def put(self, value: torch.Tensor) -> None:
        self.check_wanted()
        if self._prompt_seen:
            self._on_token()
            for token in value.flatten().tolist():
                self.queue.put(token)
        self._prompt_seen = True

    def end(self) -> None:
        """The thread says when it is done."""

    def progress(self, told: Any) -> Callable[[int, int], None]:
        """A `prompt_progress` that goes on to `told`, if there is one, and lets a long prompt be closed between its
        pieces."""

        def report(done: int, total: int) -> None:
            self.check_wanted()
            if told is not None:
                told(done, total)

        return report

    def run(self, model: Any, input_ids: torch.Tensor, options: dict[str, Any]) -> None:
        options = {**options, "prompt_progress": self.progress(options.get("prompt_progress"))}
        try:
            model.generate(input_ids, streamer=self, **options)
        except _Closed:
            self.queue.put(None)
        except BaseException as error:
            self.queue.put(error)
        else:
            self.queue.put(None)


class _Maker(Helper):
    """Makes the tokens that another thread reads."""

    def __init__(self, tokens: _Tokens, model: Any, input_ids: torch.Tensor, options: dict[str, Any]):
        # Not a daemon: one would be ended inside the model at the end of the program.
        super().__init__(target=tokens.run, args=(model, input_ids, options), daemon=False)
        self._tokens = tokens

    @property
    def asked_by(self) -> threading.Thread:  # type: ignore[override]
        return self._tokens.reader

    def check_wanted(self) -> None:
        self._tokens.check_wanted()


def stream_tokens(
    model: Any, input_ids: torch.Tensor, *, on_token: Callable[[], None] = lambda: None, **options: Any
) -> Iterator[int]:
    """New tokens of `model.generate(input_ids, **options)` as soon as each is chosen; `input_ids` int64 [1, L].

    Generation runs in a thread of its own, which calls `on_token` when it has one, while the model is its. Closing the
    iterator ends it after the token in the making. What generate() raises is raised here.
    """
    rows = len(input_ids) * (options.get("num_return_sequences") or 1)
    if rows != 1:
        raise ChatGLMError("stream", "sequences", rows, "1: the tokens of several would be one stream")
    tokens = _Tokens(on_token)
    thread = _Maker(tokens, model, input_ids, options)
    try:
        thread.start()
        while (item := tokens.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            tokens.reader = threading.current_thread()
    finally:
        tokens.closed.set()
        while thread.is_alive():
            # Whoever is impatient a second time must wait all the same: the model is in use for so long.
            with suppress(KeyboardInterrupt):
                thread.join()
