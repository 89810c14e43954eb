"""VLGuard: pictures with unsafe instructions, which are refused, and safe ones, which are answered. Gated.

The training rows become conversations as in its authors' own conversion: one per picture, on safe pictures with both exchanges
in random order. `records` also reads the test split, from which a benchmark takes its subsets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from vlsafe.core.schema import Example, Stored, Turn
from vlsafe.data.sources.files import Place, Refused, converted, json_list, path_of, picture, text_of

_SEED = 0  # as in the authors' script; their order of draws is not claimed


class Record(NamedTuple):
    """One picture. `pairs` are (instruction, response): one on an unsafe picture; on a safe one a safe, then an unsafe one."""

    id: str
    image: Stored
    safe: bool
    category: str | None
    pairs: tuple[tuple[str, str], ...]


def records(place: Place, split: str) -> Iterator[Record | Refused]:
    """The pictures of a split in the file's order."""

    def record(row: dict[str, Any], name: str) -> Record:
        exchanges, image, safe = row["instr-resp"], row["image"], row["safe"]
        keys = ("safe_instruction", "unsafe_instruction") if safe else ("instruction",)
        pairs = tuple((text_of(exchanges[i][key]), text_of(exchanges[i]["response"])) for i, key in enumerate(keys))
        category = None if safe else f"{row['harmful_category']}/{row['harmful_subcategory']}"
        candidates = [f"{split}/{image}", image, f"{split}.zip!{split}/{image}", f"{split}.zip!{image}"]
        return Record(name, picture(place, candidates), safe, category, pairs)

    return converted(json_list(path_of(place, f"{split}.json")), record, "VLGuard")


def rows(place: Place) -> Iterator[Example | Refused]:
    """The training conversations; the order of the exchanges on safe pictures is drawn from a fixed seed."""
    rng = random.Random(_SEED)
    for record in records(place, "train"):
        if isinstance(record, Refused):
            yield record
            continue
        pairs = list(record.pairs)
        rng.shuffle(pairs)
        turns = [turn for text, answer in pairs for turn in (Turn("user", text), Turn("assistant", answer))]
        yield Example(record.id, "safety", tuple(turns), (record.image,), cluster=record.category)
