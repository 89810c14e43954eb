"""LLaVA-Pretrain: 558K pictures with a caption each, for stage 1.

The request before each caption is kept; LLaVA's own "plain" template would discard it (README, departures). Pictures are read
from `images/`, or straight from `images.zip`; from the hub, that archive is read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlsafe.core.schema import Example
from vlsafe.data.sources import llava
from vlsafe.data.sources.files import Place, Refused

FOLDER = "LLaVA-Pretrain"
FILE = "blip_laion_cc_sbu_558k.json"


def rows(place: Place) -> Iterator[Example | Refused]:
    """Captions in the file's order; `image` is there in every row."""
    for row in llava.rows(place, FILE, "captions", lambda name: (f"images/{name}", name, f"images.zip!{name}")):
        yield row if isinstance(row, Refused) or row.images else Refused(row.id, "no picture")
