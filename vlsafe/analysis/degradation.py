"""T02, T08, F02 and F03: what adaptation changed on every measure. Rates with intervals, never a number without n."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vlsafe.analysis import measures
from vlsafe.analysis.measures import DATA, MEASURES, UNIT, Lacking, differences, in_worlds, main_line, rates, run_names
from vlsafe.core.schema import MAIN_LINE

CHANGES = {name: f"from_stage_1_{name}" for name in ("difference", "low", "high")}


def degradation(raw: pd.DataFrame) -> pd.DataFrame:
    """T02: parent against adapted on every measure, one line per backbone × seed × measure; other recipes are T03's.

    A parent was examined without pictures: its multimodal cells are empty. Where stage 1 was examined in full its rates stand
    beside, and `from_stage_1_difference` is the paired change from it.

    Raises:   Lacking where neither was examined
    """
    raw = main_line(raw)
    final, after = raw[raw["exam"] == "full"], [MAIN_LINE["adapted"]]
    change = differences(raw, MAIN_LINE["parent"], after, list(MEASURES)).drop(columns=["stage", "recipe"])
    later = differences(raw, MAIN_LINE["stage 1"], after, [name for name in MEASURES if name not in set(change["measure"])])
    later = later[[*UNIT, "measure", *CHANGES]].rename(columns=CHANGES)
    lines = rates(final, list(MEASURES), [*UNIT, "stage"])
    if lines.empty or set(lines["stage"]) == {"projector"}:
        raise Lacking("there is no full examination of the parent or of the adapted model")
    wide = lines.pivot_table(
        index=[*UNIT, "measure"], columns="stage", values=["value", "value_high", "low", "high", "n", "n_unjudged"], sort=False
    )
    wide.columns = [f"{stage}_{value}" for value, stage in wide.columns]
    merged = wide.reset_index().merge(change, on=[*UNIT, "measure"], how="left").merge(later, on=[*UNIT, "measure"], how="left")
    merged.insert(3, "label", merged["measure"].map(lambda name: MEASURES[name]["label"]))
    order = {name: i for i, name in enumerate(MEASURES)}
    return merged.sort_values([*UNIT, "measure"], key=lambda c: c.map(order) if c.name == "measure" else c)


def sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """T02 for the eye, in percent: a line per backbone × measure, `measures.spread` over its seeds, the change from the parent,
    where that was not asked from stage 1; n: items of a seed, and how many of them were at most unjudged."""
    stage_1 = {"stage 1": "projector_"} if "projector_value" in lines else {}  # a model that others have trained has none
    said, sides = [], {"parent": "parent_", **stage_1, "adapted": "instruct_"}
    lines = lines.assign(
        **{name: lines[name].astype(float).fillna(lines[other].astype(float)) for name, other in CHANGES.items()}
    )
    for key, of in measures.groups(lines.drop(columns="value", errors="ignore"), ["backbone", "label"]):
        cells = {side: measures.spread(of, [prefix + end for end in ("value", "low", "high")]) for side, prefix in sides.items()}
        cells["change"] = measures.spread(of.rename(columns={"difference": "value"}), sign="+")
        n, unjudged = (of.filter([f"parent_{end}", f"instruct_{end}"]).max(axis=None) for end in ("n", "n_unjudged"))
        n = f"{n:.0f}{f', {unjudged:.0f} unjudged' * bool(unjudged > 0)}"
        said.append({"backbone": key["backbone"], "measure": key["label"], "seeds": of["seed"].nunique(), **cells, "n": n})
    return pd.DataFrame(said)


OVERVIEW: tuple[str, ...] = DATA["overview"]


def everything(raw: pd.DataFrame) -> pd.DataFrame:
    """T08: one line per backbone × seed × model × measure, of every model's full examination."""
    return rates(raw[raw["exam"] == "full"], OVERVIEW, [*UNIT, "stage", "recipe"])


def overview(lines: pd.DataFrame) -> pd.DataFrame:
    """T08 for the eye: one line per backbone × model, a column per measure, `measures.spread` over its seeds, which are counted
    (fewest and most of the measures)."""
    index = ["backbone", "stage", "recipe"]
    by = lines.groupby([*index, "measure"], sort=False)[["value", "value_high", "low", "high"]]
    cells = by.apply(measures.spread).unstack("measure")
    wide = cells.reindex(columns=list(OVERVIEW)).dropna(axis=1, how="all").rename(columns=lambda name: MEASURES[name]["label"])
    counts = lines.groupby([*index, "measure"])["seed"].nunique().groupby(index).agg(["min", "max"])
    wide.insert(0, "seeds", ["–".join(map(str, sorted({*ends}))) for ends in counts.loc[wide.index].to_numpy().tolist()])
    order = {stage: place for place, stage in enumerate(dict.fromkeys(lines["stage"]))}
    return wide.reset_index().sort_values(["backbone", "stage"], key=lambda c: c.map(order) if c.name == "stage" else c)


def dynamics(raw: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """F02: every checkpoint of the main line, from the graft with its random projector (stage 1, step 0) to the last."""
    return rates(main_line(raw), measures)


def by_category(raw: pd.DataFrame) -> pd.DataFrame:
    """F03: ASR per category of harm before and after adaptation, for each seed and (seed "all") over all of them.

    Before means the parent for text. For pictures it is the end of stage 1: the same language model, just connected to a
    vision tower. One verb–object pair in two seeds is two clusters, for it is a verb–object pair of two worlds, unless all seeds
    share their items.

    Raises:   Lacking where none of the three was asked
    """
    raw = main_line(raw)
    final = raw[(raw["exam"] == "full") & raw["harmful"].astype(bool)]
    final = final.assign(kind=run_names(final).map({run: name for name, run in MAIN_LINE.items()}))
    final = in_worlds(final)
    frames = []
    for measure, before in (("text_asr", "parent"), ("multimodal_asr", "stage 1")):
        rows = final[final["kind"].isin([before, "adapted"])]
        by = ["backbone", "kind", "category"]
        frames += [rates(rows, [measure], by).assign(seed="all"), rates(rows, [measure], ["seed", *by])]
    measured = [frame for frame in frames if len(frame)]
    if not measured:
        raise Lacking("there is no full examination of the parent, of stage 1 or of the adapted model on harmful prompts")
    lines = pd.concat(measured, ignore_index=True)
    lines["before"] = lines["kind"] != "adapted"
    ends = ["value", "value_high", "low", "high"]
    return lines[["backbone", "seed", "measure", "category", "kind", "before", *ends, "n", "n_clusters", "judge"]]
