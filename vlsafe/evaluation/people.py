"""How far a judge that is a rule agrees with people who labelled the same answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.evaluation.judges import JUDGES


def agreement(judge: str, label: str, answers: Iterable[Any]) -> dict[str, float]:
    """Counts, agreement and Cohen's kappa of whether an answer has the label, against people's `engaged` (`data.pocket.labels`).

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
