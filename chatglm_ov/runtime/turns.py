"""One user of a model at a time: other threads wait for their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.runtime.process import check_process

_POLL_SECONDS = 0.05


class Helper(threading.Thread):
    """A thread that works for another one, `asked_by`."""

    asked_by: threading.Thread

    def check_wanted(self) -> None:
        """Called now and then while this waits for its turn; what it raises ends the waiting."""


class Turns:
    """Whose turn it is. A thread may take its turn again while it has it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._user: threading.Thread | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Raises ChatGLMError where this thread would wait for itself, or, as the main thread, for a stream that it
        reads: a program that has left one open should be told, and not wait for its last token. In a fork as
        `check_process` does."""
        check_process()
        me, user = threading.current_thread(), self._user
        if user is not None and user is not me and _in_vain(user, _asking(me)):
            wanted = (
                "the end of that first (a stream is read to its end, or closed): "
                "OVChatGLMForCausalLM(model.config, model.compiled) is another model over the same weights"
            )
            raise ChatGLMError("model", "use", "by this thread already", wanted)
        with self._waited(me) if isinstance(me, Helper) else self._lock:
            # An inner turn leaves it alone: one that Ctrl-C has cut off may end after the outer one.
            outermost = self._user is not me
            self._user = me
            try:
                yield
            finally:
                # Before the lock is released: the next one to come must not be taken for this one.
                if outermost:
                    self._user = None

    @contextmanager
    def _waited(self, helper: Helper) -> Iterator[None]:
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            helper.check_wanted()
        try:
            yield
        finally:
            self._lock.release()


def _asking(thread: threading.Thread) -> threading.Thread:
    return thread.asked_by if isinstance(thread, Helper) else thread


def _in_vain(user: threading.Thread, asking: threading.Thread) -> bool:
    return user is asking or (_asking(user) is asking and asking is threading.main_thread())
