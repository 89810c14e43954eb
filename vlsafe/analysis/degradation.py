"""Raw rows to tables: rates with intervals, never a number without n. Imports no model library."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vlsafe.analysis.measures import MEASURES, differences, main_line, named, rates
from vlsafe.core.schema import MAIN_LINE


def degradation(raw: pd.DataFrame) -> pd.DataFrame:
    """T02: parent against adapted on every measure, one line per backbone × seed × measure; other recipes are T03's.

    A parent has no pictures to be asked about: its multimodal cells are empty, and the graft with its random
    projector stands in the table of the dynamics (F02), not here.
    """
    raw = main_line(raw)
    final = raw[(raw["exam"] == "full") & raw["stage"].isin(["parent", "instruct"])]
    found = rates(final, list(MEASURES), ["backbone", "seed", "stage"])
    change = differences(raw, MAIN_LINE["parent"], [MAIN_LINE["adapted"]], list(MEASURES)).drop(columns=["stage", "recipe"])
    wide = found.pivot_table(
        index=["backbone", "seed", "measure"], columns="stage", values=["value", "low", "high", "n", "n_unjudged"], sort=False
    )
    wide.columns = [f"{stage}_{value}" for value, stage in wide.columns]
    merged = wide.reset_index().merge(change, on=["backbone", "seed", "measure"], how="left", suffixes=("", "_difference"))
    merged.insert(3, "label", merged["measure"].map(lambda name: MEASURES[name]["label"]))
    order = {name: i for i, name in enumerate(MEASURES)}
    return merged.sort_values(["backbone", "seed", "measure"], key=lambda c: c.map(order) if c.name == "measure" else c)


OVERVIEW = (
    "text_asr", "wildjailbreak_asr", "multimodal_asr", "figstep_asr", "siuo_asr", "twin_refusal", "exaggerated_refusal",
    "picture_refusal", "helpfulness", "helpfulness_rescaled", "mmbench_circular", "mme_score", "seed_likelihood",
    "text_incoherent", "multimodal_incoherent",
)  # fmt: skip


def everything(raw: pd.DataFrame) -> pd.DataFrame:
    """T08: one line per backbone × seed × model × measure, of every model's full examination."""
    return rates(raw[raw["exam"] == "full"], OVERVIEW, ["backbone", "seed", "stage", "recipe"])


def overview(lines: pd.DataFrame) -> pd.DataFrame:
    """T08 for the eye: one line per backbone × model, a column per measure, in percent: the mean over seeds and their range."""
    index = ["backbone", "stage", "recipe"]
    by = lines.groupby([*index, "measure"], sort=False)["value"]
    told = (100 * by.agg(["mean", "min", "max"])).round().astype(int)
    ranged = told["mean"].astype(str) + " (" + told["min"].astype(str) + "–" + told["max"].astype(str) + ")"
    cells = ranged.where(by.size() > 1, told["mean"].astype(str)).unstack("measure")  # one seed has no range
    found = cells.reindex(columns=list(OVERVIEW)).rename(columns=lambda name: MEASURES[name]["label"])
    order = {stage: place for place, stage in enumerate(dict.fromkeys(lines["stage"]))}
    return found.reset_index().sort_values(["backbone", "stage"], key=lambda c: c.map(order) if c.name == "stage" else c)


def dynamics(raw: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """F02: every checkpoint of the main line, from the graft with its random projector (stage 1, step 0) to the last."""
    return rates(main_line(raw), measures)


def by_category(raw: pd.DataFrame) -> pd.DataFrame:
    """F03: ASR per category of harm before and after adaptation, for each seed and (seed "all") over all of them.

    Before means the parent for text. For pictures it is the end of stage 1: the same language model, which has just
    been given eyes. One verb–object pair in two seeds is two clusters, for it is a verb–object pair of two worlds.
    """
    raw = main_line(raw)
    final = raw[(raw["exam"] == "full") & raw["harmful"].astype(bool)]
    final = final.assign(kind=named(final).map({run: name for name, run in MAIN_LINE.items()}))
    final = final.assign(cluster=final["seed"].astype(str) + " " + final["cluster"].astype(str))
    frames = []
    for measure, before in (("text_asr", "parent"), ("multimodal_asr", "stage 1")):
        of = final[final["kind"].isin([before, "adapted"])]
        by = ["backbone", "kind", "category"]
        frames += [rates(of, [measure], by).assign(seed="all"), rates(of, [measure], ["seed", *by])]
    found = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    found["before"] = found["kind"] != "adapted"
    return found[["backbone", "seed", "measure", "category", "kind", "before", "value", "low", "high", "n", "n_clusters"]]
