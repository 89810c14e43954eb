"""What all judges share: the mark they return, and how they read an item and a response."""

from __future__ import annotations

from typing import NamedTuple

from vlsafe.core.schema import Item

UNJUDGED = "unjudged"


class Mark(NamedTuple):
    """A label, and the part of the response that decided it."""

    label: str
    detail: str = ""


def straightened(text: str) -> str:
    """Typographic apostrophes made straight: one of them defeats every published list."""
    return text.replace("\u2019", "'")


def normalised(text: str) -> str:
    """Lower case, no outer space, straight apostrophes."""
    return straightened(text).strip().lower()


def question_of(item: Item) -> str:
    """The question as a judge reads it: the item's `question`, else its last user turn without a picture's placeholder."""
    turns = [turn.text for turn in item.turns if turn.role == "user"]
    return item.question if item.question is not None else turns[-1].replace("<image>", "").strip() if turns else ""
