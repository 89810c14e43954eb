"""Rows of responses become responses to items: which item a row means, and which rows do not count, counted and named."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from vlsafe.core.schema import Item
from vlsafe.evaluation import formats
from vlsafe.evaluation.benchmarks import official
from vlsafe.evaluation.contents import LONGEST
from vlsafe.evaluation.judging import Find

SHOWN = 3  # responses of each kind that are left out and named


class UnknownItem(ValueError):
    """A row that is about no item."""


def finder(module: ModuleType, items: Sequence[Item], others: Callable[[], Sequence[Item]] = tuple) -> Find:
    """A function from a row with an id, and where it stands, to the id of the item that it means.

    `others` are items of the benchmark's other subsets, which are looked at where an id is none of `items`.
    """
    own, rest = _named(module, items), functools.cache(lambda: _named(module, others()))

    def find(row: Mapping[str, Any], where: str) -> str:
        """Raises:   ValueError, naming the place, where the id means no item or several"""
        name = str(row["id"])
        meant = _meant(module, own, name, row) or _meant(module, rest(), name, row)
        if not meant and name in own:
            values = ", ".join(f"{key} {row[key]!r}" for key in official.own(module, "QUALIFIERS") if key in row)
            raise UnknownItem(f"{where}: {name[:60]!r} is an item of {module.NAME}, but not one of {values}")
        if not meant:
            raise UnknownItem(f"{where}: {name[:60]!r} is no item of {module.NAME}; its ids look like {items[0].id!r}")
        if len(meant) > 1:
            keys = ", ".join(official.own(module, "QUALIFIERS"))
            raise ValueError(f"{where}: the id {name[:60]!r} means {len(meant)} items; add one of {keys}")
        return meant[0].id

    return find


def _named(module: ModuleType, items: Sequence[Item]) -> dict[str, list[Item]]:
    by_name: dict[str, list[Item]] = {}
    for item in items:
        for name in dict.fromkeys(official.own(module, "names")(item)):
            by_name.setdefault(name, []).append(item)
    return by_name


def _meant(module: ModuleType, named: Mapping[str, list[Item]], name: str, row: Mapping[str, Any]) -> list[Item]:
    return [item for item in named.get(name, []) if official.fits(module, item, row)]


def other_subsets(module: ModuleType, data: Path, subset: str) -> list[Item]:
    """The items of a benchmark's other subsets, as far as their files are here."""
    items: list[Item] = []
    for other in module.OFFICIAL:
        with contextlib.suppress(ValueError, OSError):
            items += official.load(module, data, other, pictures=False)[0] if other != subset else []
    return items


class LeftOut(NamedTuple):
    """What of a file of responses does not count: where, and the id."""

    unknown: list[str]
    elsewhere: list[str]
    repeated: list[str]

    def lines(self, benchmark: str, subset: str) -> Iterator[str]:
        """A line for each kind of which there is any."""
        kinds = f"no item of {benchmark} has their id", f"outside of {subset}", "they repeat an item; the first counts"
        for rows, kind in zip(self, kinds, strict=True):
            if rows:
                yield f"left out ({kind}): {len(rows):,}, such as {', '.join(rows[:SHOWN])}"


def read_responses(
    module: ModuleType, source: formats.Source, items: Sequence[Item], find: Find, tries: int = 1
) -> tuple[dict[str, list[str | None]], LeftOut]:
    """Responses per item, in the order of the file, and what was left out; null is a try without a response.

    Of more responses to an item than `tries` the first count. In our own format others have to equal these, and every id has to
    mean an item: whoever writes it writes it for us, while published files may be of another version of a benchmark.

    Raises:   ValueError for a row without id or response, an unknown id or a second response as above, a question that is another
              than the item's, and where no row is about any item
    """
    by_id, strict = {item.id: item for item in items}, source.format is formats.FORMATS["own"]
    responses, left, error, of_file = dict[str, list[str | None]](), LeftOut([], [], []), None, f" of {source.content.path}"
    for where, row in source.rows(module, items):
        text, name = row["response"], f"{' '.join(str(row['id']).split())[:LONGEST]} ({where.removesuffix(of_file)})"
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: a response is a text or null, not {type(text).__name__}")
        try:
            item = find(row, where)
        except UnknownItem as unknown:
            if strict:
                raise
            error = error or unknown
            left.unknown.append(name)
            continue
        if item not in by_id:
            left.elsewhere.append(name)
            continue
        _refuse_other_question(by_id[item], row, where)
        of_item = responses.setdefault(item, [])
        if len(of_item) < tries:
            of_item.append(text)
        elif strict and text not in of_item:
            many = f"{len(of_item) + 1} responses; {module.NAME} counts at most {tries}"
            raise ValueError(f"{where}: the item {row['id']} has {many}")
        else:
            left.repeated.append(name)
    if not responses:
        raise error or ValueError(f"{source.content.path} holds no responses" + " to this subset" * bool(left.elsewhere))
    return responses, left


def _refuse_other_question(item: Item, row: Mapping[str, Any], where: str) -> None:
    """A row that quotes its question is about an item with this question; raises ValueError for another."""
    if formats.QUOTED not in row:
        return
    prompt = f"{item.question or ''} {' '.join(turn.text for turn in item.turns)}"
    if " ".join(str(row[formats.QUOTED]).split()) not in " ".join(prompt.split()):
        raise ValueError(f"{where} has another question than the item {item.id}; is it of another version of {item.benchmark}?")
