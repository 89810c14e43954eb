"""The paper's own corpora: one small file each, all yielding rows of the same types as the miniature's corpora.

`stream` reads one corpus row by row; pictures stay in their files. A row that cannot be converted becomes a `Refused`, in its
place, so that the reader can count and name it. Whether a row can be *trained on* is decided by `intake`, as for the miniature's
corpora: a row with a missing or corrupt picture is skipped, counted and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vlsafe.core import assets
from vlsafe.core.assets import Origin
from vlsafe.core.schema import Example, Pair
from vlsafe.data.sources import llava, safe_rlhf, spa_vl, vlguard
from vlsafe.data.sources.files import Place, Refused


class Corpus(NamedTuple):
    """The folder of a corpus below `VLSAFE_DATA`, and the function that reads its rows."""

    folder: str
    rows: Callable[[Place], Iterator[Any]]


CORPORA = {  # by the names of the miniature's corpora
    "captions": Corpus("LLaVA-Pretrain", llava.captions),
    "instructions": Corpus("LLaVA-Instruct-150K", llava.instructions),
    "safety": Corpus("VLGuard", vlguard.rows),
    "safe_rlhf": Corpus("PKU-SafeRLHF", safe_rlhf.rows),
    "spa_vl": Corpus("SPA-VL", spa_vl.rows),
}


def place_of(name: str, origin: Origin) -> Place:
    """Where a corpus is read from: the local folder where there is one, else the hub."""
    root, folder = assets.outside(), CORPORA[name].folder
    return Place(origin, folder if root is not None and (root / folder).is_dir() else None)


def stream(name: str, origin: Origin) -> Iterator[Example | Pair | Refused]:
    """The rows of a corpus, or a random subset where the origin has a limit; the fixed seed gives all studies the same."""
    rows = CORPORA[name].rows(place_of(name, origin))
    if origin.limit is None:
        return rows
    chosen = set(np.random.default_rng(0).permutation(origin.rows or origin.limit)[: origin.limit].tolist())
    return (row for number, row in enumerate(rows) if number in chosen)


def examples(name: str, origin: Origin) -> Iterator[Example | Refused]:
    """The rows of a corpus without preference pairs."""
    return (row for row in stream(name, origin) if not isinstance(row, Pair))
