"""LLaVA's conversations as rows: what LLaVA-Pretrain and LLaVA-Instruct have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlsafe.core.schema import Example, Turn
from vlsafe.data.sources.files import Place, Refused, json_list, path_of, picture, text_of

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
IMAGE = "<image>"


def rows(place: Place, file: str, source: str, candidates: Callable[[str], Sequence[str]]) -> Iterator[Example | Refused]:
    """Every row of a file, in order. `candidates` maps a picture's name to the places below the corpus where it may be.

    Ids of LLaVA-Instruct repeat (a picture has several conversations), so the row's number in the file is added to them.
    """
    for number, row in enumerate(json_list(path_of(place, file))):
        name = f"{row.get('id', '')}#{number}"
        try:
            yield example(row, name, source, place, candidates)
        except (KeyError, TypeError, AttributeError) as error:
            yield Refused(name, f"not a LLaVA row ({type(error).__name__})")


def example(row: dict[str, Any], name: str, source: str, place: Place, candidates: Callable[[str], Sequence[str]]) -> Example:
    """One row. As in LLaVA, the placeholder is removed and the picture belongs to the first request. A text-only row lacks the
    `image` key or has null there; it keeps a placeholder in its text, and intake then skips it.

    Raises:   KeyError, TypeError or AttributeError where it is no such row; ValueError for a picture outside the folder
    """
    image = row.get("image")
    if isinstance(image, list):
        raise TypeError("several pictures")  # LLaVA-1.5 has none of these
    turns = [Turn(ROLES[turn["from"]], text_of(turn["value"])) for turn in row["conversations"]]
    if not image:
        return Example(name, source, tuple(turns))
    cleaned = tuple(Turn(turn.role, turn.text.replace(IMAGE, "").strip()) for turn in turns)
    return Example(name, source, cleaned, (picture(place, candidates(image)),), cluster=image)
