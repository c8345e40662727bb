"""Errors that a user can act on."""

from __future__ import annotations

from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: BaseException) -> str:
    """What OpenVINO's errors end with: what is wrong, behind where it was noticed."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


class ChatGLMError(Exception):
    """A user error, told in one line: where it is, which field, what was seen, what was wanted.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, where: Any, field: str, seen: Any, wanted: Any):
        self.where, self.field, self.seen, self.wanted = str(where), field, seen, wanted
        super().__init__(f"{where}: {field} is {seen}, expected {wanted}")

    def __reduce__(self) -> tuple[type[ChatGLMError], tuple[str, str, str, str]]:
        """What another process is told: values as text, since not all of them can be sent there."""
        return type(self), (self.where, self.field, f"{self.seen}", f"{self.wanted}")
