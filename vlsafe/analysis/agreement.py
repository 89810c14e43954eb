"""F15: judges against each other, and against people where they rated.

A judge that moves every method's ASR alike changes the numbers of a table and not its message; one that reorders the methods
changes both. So agreement on single answers and stability of the ranking stand beside each other.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import kendalltau
from statsmodels.stats.inter_rater import cohens_kappa

from vlsafe.analysis import durability, stats
from vlsafe.analysis.measures import MEASURES, Lacking, about, groups, in_worlds

ATTACKS = {"text_asr": "text", "multimodal_asr": "pictures"}
METHOD = ["backbone", "modality", "stage", "recipe"]
ANSWER = [*METHOD, "seed", "item", "cluster"]


def verdicts(raw: pd.DataFrame, people: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line per answer to a harmful request after each run, a column per judge: did the attack succeed? NaN: unjudged.
    Clusters are those of one seed, unless all seeds share their items. Models that are fine-tuned again are no methods, and
    before it their answers are those of another run: they are left out.

    Raises:   Lacking where no model was asked one, or no verdict of `people` is of an answer that is here
    """
    rows = raw if people is None else pd.concat([raw, people], ignore_index=True)
    rows = rows[(rows["exam"] == "full") & ~rows["stage"].isin(durability.STAGES)]
    rows = pd.concat([about(rows, MEASURES[measure]).assign(modality=name) for measure, name in ATTACKS.items()])
    if rows.empty:
        raise Lacking("there is no full examination on harmful requests")
    rows = in_worlds(rows).assign(event=pd.to_numeric(rows["event"].astype("Float64")))
    wide = rows.pivot_table(index=ANSWER, columns="judge", values="event", aggfunc="first").reset_index()
    rated = wide[wide["people"].notna()] if "people" in wide else wide.iloc[:0]
    if people is not None and not rated[judges(wide)[:-1]].notna().any(axis=None):
        raise Lacking("no verdict of people is of an answer of these studies, or none was examined yet")
    return wide


def judges(wide: pd.DataFrame) -> list[str]:
    """The judges of a table of verdicts, people last."""
    return sorted(set(wide.columns) - set(ANSWER), key=lambda name: (name == "people", name))


def pairs(wide: pd.DataFrame) -> pd.DataFrame:
    """Per backbone × modality × pair of judges: the confusion of single answers, agreement, Cohen's kappa, and Kendall's tau
    of the methods' ranking by ASR, over the answers and the methods that both judged.

    Kappa and tau are empty where a judge says the same of everything: there is nothing to agree on by more than chance.
    """
    lines = []
    for (backbone, modality), of in wide.groupby(["backbone", "modality"]):
        for one, two in combinations(judges(wide), 2):
            both = of.dropna(subset=[one, two])
            if both.empty:
                continue
            table = pd.crosstab(both[one], both[two]).reindex(index=[0, 1], columns=[0, 1], fill_value=0).to_numpy()
            varied = min(table.sum(0).min(), table.sum(1).min()) > 0
            means = both.groupby(["stage", "recipe"])[[one, two]].mean()
            ranked = len(means) > 2 and means.nunique().min() > 1
            tau = kendalltau(means[one], means[two]) if ranked else None
            lines.append(
                {"backbone": backbone, "modality": modality, "judge": one, "other": two, "n": len(both), "neither": table[0, 0],
                 "only_other": table[0, 1], "only_judge": table[1, 0], "both": table[1, 1],
                 "agreement": table.trace() / table.sum(), "kappa": cohens_kappa(table).kappa if varied else np.nan,
                 "methods": len(means), "tau": tau.statistic if tau else np.nan, "tau_p": tau.pvalue if tau else np.nan}
            )  # fmt: skip
    return pd.DataFrame(lines)


def rates(wide: pd.DataFrame) -> pd.DataFrame:
    """ASR of every method by every judge: value, interval, n, over the answers that all judges of a backbone could judge, so that
    judges alone make the difference. All seeds together.
    """
    lines = []
    for _, whole in groups(wide, ["backbone", "modality"]):
        names = [name for name in judges(wide) if whole[name].notna().any()]
        for method, rows in groups(whole.dropna(subset=names), METHOD):
            for name in names:
                rate = vars(stats.rate(rows[name].tolist(), rows["cluster"].tolist()))
                lines.append(method | {"judge": name} | {column: rate[column] for column in ("value", "low", "high", "n")})
    return pd.DataFrame(lines)
