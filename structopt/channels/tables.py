"""Rows of words as plain columns and as a table in HTML."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from html import escape

_WIDTH = 100  # columns of the plain text


def few(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def percent(share: float) -> str:
    return f"{math.floor(share * 1000) / 10:.1f}%"  # never 100% for less than all


def columns(head: list[str], rows: list[list[str]], wrapped: int) -> list[str]:
    """Plain columns; the one numbered `wrapped` runs on over several lines."""
    sizes = [max(len(row[k]) for row in [head, *rows]) for k in range(wrapped)]
    sizes = [min(size, 60) for size in sizes]
    rest = max(_WIDTH - sum(sizes) - 2 * wrapped, 30)
    lines = []
    for row in [head, None, *rows]:
        if row is None:
            row = ["-" * size for size in sizes] + ["-" * min(rest, len(head[wrapped]))]
        parts = textwrap.wrap(row[wrapped], rest, break_long_words=False, break_on_hyphens=False)
        left = [
            cell.rjust(size) if k and cell[:1].isdigit() else cell.ljust(size)
            for k, (cell, size) in enumerate(zip(row[:wrapped], sizes, strict=True))
        ]
        pad = [" " * max(size, len(cell)) for cell, size in zip(left, sizes, strict=True)]
        for n, part in enumerate(parts or [""]):
            lines.append("  ".join([*(pad if n else left), part]))
    return lines


def table(caption: str, head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that takes its colours from the page; rows and columns have headers."""
    left = 'style="text-align: left; vertical-align: top"'
    top = "".join(f'<th scope="col" {left}>{escape(name)}</th>' for name in head)
    body = "\n".join(
        f'<tr><th scope="row" {left}>{escape(row[0])}</th>'
        + "".join(f"<td {left}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<table>\n<caption style="text-align: left">{escape(caption)}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    )
