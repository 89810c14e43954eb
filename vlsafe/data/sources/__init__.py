"""The paper's own corpora: one small file each, all yielding rows of the same types as the miniature's corpora.

`stream` reads one corpus row by row; pictures stay in their files. A row that cannot be converted becomes a `Refused`, in its
place, so that the reader can count and name it. Whether a row can be *trained on* is decided by `intake`, as for the miniature's
corpora: a row with a missing or corrupt picture is skipped, counted and named.
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

    Draws:    the subset, from a fixed seed, so that every study of a scale has the same
    """
    rows = CORPORA[name].rows(place_of(name, origin))
    if origin.limit is None:
        return rows
    chosen = set(np.random.default_rng(0).permutation(origin.rows or origin.limit)[: origin.limit].tolist())
    return (row for number, row in enumerate(rows) if number in chosen)


def examples(name: str, origin: Origin) -> Iterator[Example | Refused]:
    """The rows of a corpus without preference pairs."""
    return (row for row in stream(name, origin) if not isinstance(row, Pair))
