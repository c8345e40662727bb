"""Tables for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on the standard output: the first column to the left, the others, which hold figures, to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, value)
    _console().print(table)


def _console() -> Console:
    """Lines are broken for terminals only, not for files and pipes."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=1000)
