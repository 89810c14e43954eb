"""Screen rows with guards, keep what passes, and say of every dropped row why. Splits are disjoint by content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from vlsafe.schema import Example, Item, Turn, content_digest


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


def text_twin(row: Example) -> Example:
    """The same row with its picture told in words before the first request; rows without a picture stay as they are.

    Raises:   ValueError for a row with a picture of which nobody knows what it shows
    """
    if not row.images:
        return row
    if row.description is None:
        raise ValueError(f"{row.id} has a picture and no description; its text-only twin cannot be told")
    first = next(i for i, turn in enumerate(row.turns) if turn.role == "user")
    told = Turn("user", f"{row.description}\n{row.turns[first].text}")
    return replace(row, turns=(*row.turns[:first], told, *row.turns[first + 1 :]), images=())


# The data arms of stage 2: which corpus an arm starts from ("raw" or "screened"), and what it makes of a row (None drops it).
ARMS: dict[str, tuple[str, Callable[[Example], Example | None]]] = {
    "filtered": ("screened", lambda row: row),
    "unfiltered": ("raw", lambda row: row),
    "clean": ("raw", lambda row: row if row.category is None else None),
    "looking": ("screened", lambda row: row if row.task == "look" else None),
    "textonly": ("screened", text_twin),
}


def arm(name: str, corpora: dict[str, Sequence[Example]]) -> list[Example]:
    """The rows of a data arm.

    Raises:   KeyError for an unknown arm; ValueError where it keeps no row
    """
    start, change = ARMS[name]
    rows = [changed for row in corpora[start] if (changed := change(row)) is not None]
    if not rows:
        raise ValueError(f"the data arm {name!r} keeps none of {len(corpora[start])} rows")
    return rows
