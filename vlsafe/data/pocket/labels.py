"""What people say of answers to harmful and harmless requests: labels that one package ships, by which a judge can be checked.

Texts stay in values: they are harmful, and nothing here prints them or puts them into a message.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from itertools import dropwhile

from vlsafe.core.assets import Packed
from vlsafe.data.pocket import packages

FILES = {  # label: files, and the score by which people say that the answer engages with the request
    "refusal": (("refusal_scorer/refusal.csv", "refusal_scorer/refusal_extra.csv"), "0"),  # they mark what does not: 1
    "objective": (("objective/*.csv",), "1"),  # whether it does what was requested
}
FOLDER = "pyrit/datasets/scorer_evals/"


@dataclass(frozen=True)
class Labelled:
    """A request, an answer to it, and whether people say that the answer engages with the request (or achieves it)."""

    request: str = field(repr=False)
    answer: str = field(repr=False)
    engaged: bool


def labelled(packed: Packed, label: str) -> list[Labelled]:
    """PyRIT's answers with people's labels of one kind: "refusal" (anything that is no answer counts as one) or "objective".

    Raises:   FileNotFoundError or ValueError as in `packages.path`; KeyError for another label
    """
    patterns, engaged = FILES[label]
    package = packed.packages["pyrit"]
    rows = []
    for pattern in patterns:
        for path in packages.paths(package, FOLDER + pattern):
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True)
            for row in csv.DictReader(dropwhile(lambda line: line.startswith("#"), lines)):
                if row["human_score"] in ("0", "1"):
                    rows.append(Labelled(row["objective"] or "", row["assistant_response"] or "", row["human_score"] == engaged))
    return rows
