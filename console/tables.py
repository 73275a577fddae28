"""Tables that fit their terminal: where one would not, its rows stand one below the other, unbroken.

A table that is squeezed breaks names, hashes and paths in the middle, and what is copied from it is
wrong. A line that is longer than the terminal is left for the terminal to break, which copies it whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text
_UNBOUNDED = 100_000


def show_table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[Cell]], title: str | None = None
) -> None:
    """Print a table, or each row as lines of its own where the terminal is too narrow.

    Args:
        console: Where to print.
        columns: Their names.
        rows: As many cells each.
        title: Of the table.
    """
    listed = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    table = Table(*columns, title=title)
    for row in listed:
        table.add_row(*row)
    if _width(console, table) <= console.width:
        console.print(table)
        return
    if title is not None:
        console.print(Text(title, style="italic"), soft_wrap=True)
    for row in listed:
        for column, cell in zip(columns, row, strict=True):
            console.print(Text.assemble((f"{column}: ", "dim"), cell), soft_wrap=True)
        console.print()


def show_pairs(console: Console, pairs: Iterable[tuple[str, Cell]]) -> None:
    """Print names and values in two columns, or each value below its name where one would be broken."""
    listed = [(name, Text(value) if isinstance(value, str) else value) for name, value in pairs]
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in listed:
        table.add_row(Text(name, style="dim"), value)
    if _width(console, table) <= console.width:
        console.print(table)
        return
    for name, value in listed:
        console.print(Text(name, style="dim"), soft_wrap=True)
        console.print(Text.assemble("  ", value), soft_wrap=True)


def _width(console: Console, table: Table) -> int:
    """Return how wide a table is if nothing in it is broken."""
    return console.measure(table, options=console.options.update(width=_UNBOUNDED)).maximum
