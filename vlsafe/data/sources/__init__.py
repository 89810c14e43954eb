"""The paper's own corpora: one small file each, all yielding the rows that the miniature's corpora have.

`stream` reads one corpus row by row; pictures stay where they lie. What no row can be made of comes out as `Refused`, in
its place, so that whoever reads can count and name it. Whether a row can be *trained on* is for intake to say (`mix`), for
these corpora as for the miniature's: a missing or corrupt picture takes its row out, counted and named.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlsafe.core.assets import Origin
from vlsafe.core.schema import Example, Pair
from vlsafe.data.sources import llava_instruct, llava_pretrain, safe_rlhf, spa_vl, vlguard
from vlsafe.data.sources.files import Place, Refused, locate, missing

__all__ = ["CORPORA", "Place", "Refused", "examples", "locate", "missing", "place_of", "stream"]

CORPORA = {  # by the names that the miniature's corpora have
    "captions": llava_pretrain, "instructions": llava_instruct, "safety": vlguard, "safe_rlhf": safe_rlhf, "spa_vl": spa_vl,
}  # fmt: skip


def place_of(name: str, origin: Origin) -> Place:
    """Where a corpus is read from."""
    return locate(origin, CORPORA[name].FOLDER)


def stream(name: str, origin: Origin) -> Iterator[Example | Pair | Refused]:
    """The rows of a corpus, or of its fixed random subset where the origin has a limit.

    Draws:    the subset, from a seed of its own, so that every study of a scale has the same
    """
    found = CORPORA[name].rows(place_of(name, origin))
    if origin.limit is None:
        yield from found
        return
    total = origin.rows or origin.limit
    chosen = set(np.random.default_rng(0).permutation(total)[: origin.limit].tolist())
    yield from (row for number, row in enumerate(found) if number in chosen)


def examples(name: str, origin: Origin) -> Iterator[Example | Refused]:
    """The rows of a corpus that holds no pairs."""
    return (row for row in stream(name, origin) if not isinstance(row, Pair))
