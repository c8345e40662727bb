"""Text that grows on the terminal."""

from __future__ import annotations

import sys


class TextPrinter:
    """Prints what is new of a text that is given again and again, each time longer."""

    def __init__(self) -> None:
        self._printed = ""

    def show(self, text: str) -> None:
        """`text`: all of it so far."""
        self._print(text)

    def finish(self, text: str) -> None:
        """`text`: the whole of it. Ends the line."""
        self._print(text)
        print(flush=True)
        self._printed = ""

    def _print(self, text: str) -> None:
        if self._printed.startswith(text):
            return
        if not text.startswith(self._printed):
            # Earlier text has changed after all: what is on the terminal cannot be taken back.
            print()
            self._printed = ""
        sys.stdout.write(text[len(self._printed) :])
        sys.stdout.flush()
        self._printed = text
