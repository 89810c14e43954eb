"""The data arms of stage 2: which corpus an arm starts from, and how it changes each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from vlsafe.core.schema import Example, Pair, Turn

DOSES = (0.02, 0.05, 0.1, 0.2, 0.45)  # shares of how-tos among rows that otherwise ask what is seen; assumed


def answered(pair: Pair, answer: str) -> Example:
    """A preference row as a training row that ends with one of its answers."""
    return Example(pair.id, pair.source, (*pair.turns, Turn("assistant", answer)), pair.images, cluster=pair.cluster)


def replayed(rows: Sequence[Example], n: int, rng: np.random.Generator) -> list[Example]:
    """`n` different rows, in their order. Their ids are recorded, as VLGuard's own sample was not published."""
    if not 0 < n <= len(rows):
        raise ValueError(f"{n} rows are to be replayed of {len(rows)}")
    return [rows[i] for i in sorted(rng.permutation(len(rows))[:n])]


def text_twin(row: Example) -> Example:
    """The same row with its picture described in words before the first request; rows without a picture stay as they are."""
    if not row.images:
        return row
    if row.description is None:
        raise ValueError(f"{row.id} has a picture and no description, so it has no text-only twin")
    first = next(i for i, turn in enumerate(row.turns) if turn.role == "user")
    request = Turn("user", f"{row.description}\n{row.turns[first].text}")
    return replace(row, turns=(*row.turns[:first], request, *row.turns[first + 1 :]), images=())


def dosed(rows: Sequence[Example], howtos: Sequence[Example], dose: float, pictured: bool) -> list[Example]:
    """As many rows, of which a share, the `dose`, asks how to do something, about pictures or without any.

    Raises:   ValueError where there are too few how-tos
    """
    n, of = round(dose * len(rows)), [row for row in howtos if bool(row.images) == pictured]
    if n > len(of):
        raise ValueError(f"a dose of {dose:g} takes {n} how-tos of {len(of)}")
    return [*rows[n:], *of[:n]]


# The corpus of each arm ("raw": whatever guards say of its rows; "screened"), and what becomes of a row (None drops it).
ARMS: dict[str, tuple[str, Callable[[Example], Example | None]]] = {
    "filtered": ("screened", lambda row: row),
    "unfiltered": ("raw", lambda row: row),
    "clean": ("raw", lambda row: row if row.category is None else None),
    "looking": ("screened", lambda row: row if row.task == "look" else None),
    "textonly": ("screened", text_twin),
}
WITHOUT = {  # arms that corpora from outside do not permit, and why
    "clean": "nobody knows which rows of these corpora are harmful: only a world that is built says so of every row",
    "textonly": "the rows of these corpora do not say what their pictures show, so they have no text-only twin",
}


def arm(name: str, corpora: dict[str, Sequence[Example]]) -> list[Example]:
    """The rows of a data arm; ValueError where it keeps none."""
    corpus, change = ARMS[name]
    rows = [changed for row in corpora[corpus] if (changed := change(row)) is not None]
    if not rows:
        raise ValueError(f"the data arm {name!r} keeps none of {len(corpora[corpus])} rows")
    return rows
