"""What every judge returns."""

from __future__ import annotations

from typing import NamedTuple

UNJUDGED = "unjudged"


class Mark(NamedTuple):
    """A label, and what the judge saw that made it say so."""

    label: str
    detail: str = ""
