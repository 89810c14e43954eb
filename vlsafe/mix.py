"""Screen rows with guards, keep what passes, and say of every dropped row why. Splits are disjoint by content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vlsafe.schema import Example, Item, content_digest


def audit(rows: Sequence[Example], text: Sequence[Any], image: Sequence[Any | None]) -> list[dict[str, Any]]:
    """One line per row: what the guards said and whether it is kept; the truth stands beside, for marking guards.

    A row is dropped when any guard calls it unsafe, and also when a guard's answer could not be read ("unread"):
    in doubt a row is not "safe data".

    Shapes:   N rows, N text assessments, N image assessments (None: no picture)  ->  N lines
    """
    lines = []
    for row, said, seen in zip(rows, text, image, strict=True):
        reasons = [name for name, found in (("text", said), ("image", seen)) if found is not None and found.unsafe]
        reasons += [f"{name} unread" for name, found in (("text", said), ("image", seen)) if found and found.unsafe is None]
        line = dict(
            id=row.id, source=row.source, category=row.category, has_picture=bool(row.images),
            text_score=said.score, text_codes=",".join(said.categories),
            image_score=seen.score if seen is not None else None, reasons=",".join(reasons), kept=not reasons,
        )  # fmt: skip
        lines.append(line)
    return lines


def screened(rows: Iterable[Example], lines: Iterable[dict[str, Any]]) -> list[Example]:
    """The rows that the audit keeps, in order.

    Raises:   ValueError when the audit is about other rows
    """
    kept = []
    for row, line in zip(rows, lines, strict=True):
        if row.id != line["id"]:
            raise ValueError(f"the audit speaks of {line['id']!r} where the corpus has {row.id!r}")
        if line["kept"]:
            kept.append(row)
    return kept


def refuse_leaks(training: Iterable[Example], items: Iterable[Item]) -> None:
    """Stop where a benchmark prompt, pictures included, also stands in a training row.

    Raises:   ValueError naming the first item and how many there are
    """
    asked = set()
    for row in training:
        opening = [turn for turn in row.turns if turn.role != "system"][:1]
        asked.add(content_digest(Example(row.id, row.source, tuple(opening), row.images)))
    leaked = [item.id for item in items if content_digest(item) in asked]
    if leaked:
        raise ValueError(f"{len(leaked)} benchmark prompts also stand in training rows, first {leaked[0]!r}")
