"""A table that prints itself as text, as HTML in a notebook and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A value and its spread, in the same unit.

    >>> print(Measured(89.234, 0.31)), float(Measured(2.0, 0.5))
    89.23 ± 0.31
    (None, 2.0)
    """

    value: float
    spread: float

    def __str__(self) -> str:
        if not self.spread or not math.isfinite(self.spread):
            return show(self.value)
        smaller = min(self.spread, abs(self.value) or self.spread)
        decimals = max(0, 1 - math.floor(math.log10(smaller)))  # two digits
        return f"{self.value:,.{decimals}f} ± {self.spread:,.{decimals}f}"

    def __float__(self) -> float:
        return float(self.value)


def si(number: float) -> str:
    """A number with three digits and a letter for the thousands.

    >>> si(14_745_600), si(950), si(12.3456)
    ('14.7 M', '950', '12.3')
    """
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * factor:  # three digits of anything below are fewer than 1000
            return f"{number / factor:.3g} {letter}"
    return f"{number:.3g}"


def show(value: Any, decimals: int | None = None) -> str:
    """A cell as text: thousands apart, – for nothing, fractions with four digits by default.

    >>> show(53898), show(0.012341), show(1.0, 2), show(None)
    ('53,898', '0.01234', '1.00', '–')
    """
    value = _plain(value)
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{_decimals([value]) if decimals is None else decimals}f}"


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as Python's."""
    return value.item() if getattr(value, "ndim", 1) == 0 and hasattr(value, "item") else value


def _decimals(values: Iterable[Any]) -> int | None:
    """Decimals that show four digits of the largest fraction; None if the smallest would vanish."""
    sizes = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v) and v]
    if not sizes:
        return 0
    if min(sizes) < max(sizes) / 1000:
        return None
    return max(0, 3 - math.floor(math.log10(max(sizes))))


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of named values.

    Args:
        rows: one dict a row; a missing column shows as –.
        columns: which columns, in which order; by default all, as they first appear.
        notes: lines printed beneath.
        marked: numbers of the rows that carry a ★.

    Raises:
        ValueError: a column that no row has.

    Example:
        >>> table = Table([{"model": "dense", "MACs": 1200}, {"model": "half", "MACs": 600}])
        >>> print(table)
        model   MACs
        -----  -----
        dense  1,200
        half     600
        >>> print(table.markdown())
        | model | MACs |
        |:--|--:|
        | dense | 1,200 |
        | half | 600 |
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[str] = ()
    notes: Sequence[str] = ()
    marked: Sequence[int] = ()

    def __post_init__(self) -> None:
        every = list(dict.fromkeys(name for row in self.rows for name in row))
        unknown = [name for name in self.columns if name not in every]
        if unknown:
            raise ValueError(f"no row has a column {unknown}; there are {every}")
        object.__setattr__(self, "columns", tuple(self.columns or every))
        plain = [{name: _plain(value) for name, value in row.items()} for row in self.rows]
        object.__setattr__(self, "rows", plain)

    def _cells(self) -> list[list[str]]:
        decimals = {name: _decimals(row.get(name) for row in self.rows) for name in self.columns}
        cells = [[show(row.get(n), decimals[n]) for n in self.columns] for row in self.rows]
        for number in self.marked:
            cells[number][0] += " ★"
        return cells

    def _is_number(self, name: str) -> bool:
        values = [row.get(name) for row in self.rows]
        return all(v is None or isinstance(v, int | float | Measured) for v in values)

    def __str__(self) -> str:
        cells = [list(self.columns), *self._cells()]
        widths = [max(len(row[k]) for row in cells) for k in range(len(self.columns))]
        cells.insert(1, ["-" * width for width in widths])
        right = [self._is_number(name) for name in self.columns]

        def line(row: list[str]) -> str:
            pairs = zip(row, widths, right, strict=True)
            return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in pairs).rstrip()

        return "\n".join([*map(line, cells), *self.notes])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            pairs = zip(cells, self.columns, strict=True)
            aligned = (
                f'<{tag} style="text-align: {"right" if self._is_number(name) else "left"}">'
                f"{escape(cell)}</{tag}>"
                for cell, name in pairs
            )
            return f"<tr>{''.join(aligned)}</tr>"

        body = "\n".join(row(cells, "td") for cells in self._cells())
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        head = row(self.columns, "th")
        return f"<table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>\n</table>{notes}"

    def markdown(self) -> str:
        """The table for a README: pipes, then the notes as a list."""
        right = (self._is_number(name) for name in self.columns)
        lines = [list(self.columns), *self._cells()]
        text = [f"| {' | '.join(c.replace('|', '&#124;') for c in cells)} |" for cells in lines]
        text.insert(1, f"|{'|'.join('--:' if r else ':--' for r in right)}|")
        return "\n".join([*text, *([""] if self.notes else []), *(f"- {n}" for n in self.notes)])
