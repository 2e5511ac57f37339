"""What a file weighs, and which tensor takes how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One tensor in the file. ``entropy``: bytes its codes would take at their entropy alone."""

    name: str
    form: str
    numbers: int
    bytes: int
    entropy: float | None


@dataclass(frozen=True)
class Report:
    """What a file weighs, by tensor. ``structure`` counts all that is not a tensor's own."""

    path: Path
    bytes: int
    dense: int
    structure: int
    rows: tuple[Row, ...]

    @property
    def times(self) -> float:
        """How many times larger the tensors are in memory."""
        return self.dense / self.bytes

    @property
    def by_form(self) -> dict[str, int]:
        """Bytes for each form that tensors have in the file."""
        made: dict[str, int] = {}
        for row in self.rows:
            made[row.form] = made.get(row.form, 0) + row.bytes
        return made

    def __str__(self) -> str:
        lines = [f"{'tensor':<28}{'form':<10}{'numbers':>10}{'bytes':>10}{'bits each':>11}"]
        for row in self.rows:
            bits = f"{8 * row.bytes / row.numbers:.2f}" if row.numbers else "-"
            lines.append(
                f"{row.name:<28}{row.form:<10}{row.numbers:>10,}{row.bytes:>10,}{bits:>11}"
            )
        lines.append(f"{'structure and checksum':<48}{self.structure:>10,}")
        lines.append(f"{f'the file, 1/{self.times:.1f} of memory':<48}{self.bytes:>10,}")
        return "\n".join(lines)
