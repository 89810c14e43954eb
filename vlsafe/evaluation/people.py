"""How far a judge that is a rule agrees with people who labelled the same answers, which one package ships.

Texts stay in values: they are harmful, and nothing here prints them or puts them into a message.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import dropwhile

import numpy as np

from vlsafe.core.assets import Packed
from vlsafe.core.schema import Item, Turn
from vlsafe.data.pocket import packages
from vlsafe.evaluation.judges import JUDGES

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


def agreement(judge: str, label: str, answers: Iterable[Labelled]) -> dict[str, float]:
    """Counts, agreement and Cohen's kappa of whether an answer has the label, against people's `engaged`.

    Units:    counts of answers; a share; kappa is nan where people or the judge say the same of all
    """
    from statsmodels.stats.inter_rater import cohens_kappa  # half a second that other commands need not wait

    table = np.zeros((2, 2), int)
    for one in answers:
        item = Item("people", "people", (Turn("user", one.request),), harmful=True)
        table[int(one.engaged), int(JUDGES[judge](item, one.answer).label == label)] += 1
    varied = min(table.sum(0).min(), table.sum(1).min()) > 0
    return {
        "n": int(table.sum()), "neither": int(table[0, 0]), "judge_alone": int(table[0, 1]), "people_alone": int(table[1, 0]),
        "both": int(table[1, 1]), "agreement": float(table.trace() / table.sum()),
        "kappa": float(cohens_kappa(table).kappa) if varied else float("nan"),
    }  # fmt: skip
