"""T05, F05 and F06: what safety tuning buys and what it costs, beside the adapted model and the parent.

Every difference is paired over the same items. The p-values of the headline measures are corrected after Holm within
one family: all methods of one backbone and seed against one reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vlsafe.analysis import measures as analysis_measures
from vlsafe.analysis import stats
from vlsafe.analysis.measures import DATA, HEADLINE, MEASURES, UNIT, Lacking, differences, run_names
from vlsafe.core.schema import MAIN_LINE

REFERENCES = ("adapted", "parent")
SHOWN: tuple[str, ...] = DATA["tuning"]
THREE_JUDGES = ("text_asr", "text_asr_strings", "text_asr_guard")
# What over-refusal is measured on: measure, groups (None: all), what it is for the eye, text or pictures.
REFUSALS: tuple[tuple[str, tuple[str, ...] | None, str, str], ...] = DATA["refusals"]
TAUGHT_ON = {  # by what a recipe's name begins with: its objective, and whether its safety rows have pictures
    "mtl": ("SFT", "pictures"), "mtl-pcgrad": ("SFT", "pictures"), "sl": ("SFT", "pictures"),
    "sl-replay": ("SFT", "pictures"), "sibling": ("SFT", "pictures"),
    "textsft": ("SFT", "text"), "dpo-text": ("DPO", "text"), "dpo-image": ("DPO", "pictures"), "dpo-both": ("DPO", "both"),
    "grpo-text": ("GRPO", "text"),
}  # fmt: skip


def kind(stage: str, recipe: str) -> str:
    """What a model is, as `style.KINDS` calls it: parent, adapted, or its tuning's objective.

    Raises:   KeyError for a recipe that TAUGHT_ON does not know
    """
    known = {run: name for name, run in MAIN_LINE.items()}
    return known.get(f"{stage}/{recipe}") or TAUGHT_ON[recipe.rpartition("-")[0]][0]


def final(raw: pd.DataFrame) -> pd.DataFrame:
    """Full examinations of the parent, the adapted model and the tuned ones."""
    compared = (raw["stage"] == "safety") | run_names(raw).isin([MAIN_LINE[name] for name in REFERENCES])
    return raw[(raw["exam"] == "full") & compared]


def methods(raw: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """T05: one line per backbone × seed × model × measure, with its paired changes from the adapted model and from the parent.

    `validation` holds the checkpoints' validation lines; steps and tokens are those of the chosen checkpoint's safety tuning
    alone. A parent has no multimodal measures, so such changes are empty.

    Units:    fractions; p-values are two-sided, by flipping the signs of clusters
    Raises:   Lacking where there is no tuned model
    """
    rows = final(raw)
    if "safety" not in set(rows["stage"]):
        raise Lacking("there is no full examination of a tuned model; make the stages of notebook 04 first")
    lines = analysis_measures.rates(rows, SHOWN, [*UNIT, "stage", "recipe"])
    tuned = [f"safety/{recipe}" for recipe in rows.loc[rows["stage"] == "safety", "recipe"].unique()]
    for reference in REFERENCES:
        change = holm(differences(rows, MAIN_LINE[reference], tuned, SHOWN, tested=True))
        lines = analysis_measures.with_changes(lines, change, f"{reference}_")
    costs = validation.loc[validation["chosen"], [*UNIT, "stage", "recipe", "step", "tokens"]]
    return lines.merge(costs, on=[*UNIT, "stage", "recipe"], how="left").astype({"step": "Int64", "tokens": "Int64"})


def holm(changes: pd.DataFrame, by: Sequence[str] = UNIT) -> pd.DataFrame:
    """Add `p_holm`: corrected over all methods and headline measures of one backbone and seed; empty for other measures."""
    headline = changes["p"].where(changes["measure"].isin(HEADLINE))
    return changes.assign(p_holm=stats.holm(headline, [changes[name] for name in by]))


def sheet(lines: pd.DataFrame, reference: str = "adapted", measures: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """T05 for the eye: one line per model, in percent, with its changes from a reference and which of them Holm's p supports."""
    of = lines[lines["measure"].isin(measures)].rename(columns=lambda name: name.removeprefix(f"{reference}_"))
    index = [*UNIT, "stage", "recipe"]
    costs = of[[*index, "step", "tokens"]].drop_duplicates(index)
    clear = of[of["p_holm"] < 0.05].groupby(index)["measure"].agg(lambda names: ", ".join(MEASURES[n]["label"] for n in names))
    whole = costs.merge(analysis_measures.compact(of, index), on=index, how="left")
    return whole.merge(clear.rename("Holm p < 0.05").reset_index(), on=index, how="left")


def transfer(lines: pd.DataFrame) -> pd.DataFrame:
    """What a tuning changes on the modality of its safety data and on the other one, in fractions.

    One line per backbone × seed × recipe × modality that was tested, with the ASR's change from the adapted model.
    """
    tested = {"text_asr": "text", "multimodal_asr": "pictures"}
    of = lines[(lines["stage"] == "safety") & lines["measure"].isin(list(tested))]
    taught = of["recipe"].map(lambda recipe: TAUGHT_ON[recipe.rpartition("-")[0]][1])
    of = of.assign(taught_on=taught, tested_on=of["measure"].map(tested))
    columns = ["value", *(name for name in of.columns if name.startswith("adapted_"))]
    return of[[*UNIT, "taught_on", "recipe", "tested_on", *columns]].sort_values([*UNIT, "taught_on", "recipe"], kind="stable")


def refusals(raw: pd.DataFrame) -> pd.DataFrame:
    """F06: how often each model refuses harmless requests, by XSTest's types and by the benign twins of each attack.

    Raises:   Lacking where no model was asked one
    """
    rows, frames = final(raw), []
    for measure, kinds, what, modality in REFUSALS:
        of = rows[rows["group"].isin(kinds)] if kinds else rows
        rates = analysis_measures.rates(of, [measure], [*UNIT, "stage", "recipe"])
        frames.append(rates.assign(what=what, modality=modality))
    measured = [frame for frame in frames if len(frame)]
    if not measured:
        raise Lacking("there is no full examination of the parent, the adapted or a tuned model on harmless requests")
    return pd.concat(measured, ignore_index=True)


def front(points: pd.DataFrame) -> pd.Series:
    """Which points no other one beats: none is at least as safe and as helpful, and better in one of the two.

    Shapes:   columns asr and helpfulness  ->  one truth value per line
    """
    asr, help_ = points["asr"].to_numpy(float), points["helpfulness"].to_numpy(float)
    no_worse = (asr[None] <= asr[:, None]) & (help_[None] >= help_[:, None])
    better = (asr[None] < asr[:, None]) | (help_[None] > help_[:, None])
    return pd.Series(~(no_worse & better).any(axis=1), index=points.index)


def asr_beside_helpfulness(rates: pd.DataFrame) -> pd.DataFrame:
    """One line per model × modality: ASR, n and helpfulness with their intervals; `rates` are lines of `measures.rates`.

    Raises:   Lacking where no model was examined on both
    """
    if not {"text_asr", "multimodal_asr"} & set(rates.get("measure", ())) or "helpfulness" not in set(rates["measure"]):
        raise Lacking("no model was examined on both attacks and helpfulness")
    rates, ends, frames = rates.set_index([*UNIT, "stage", "recipe"]), ["value", "low", "high"], []
    helpful = rates.loc[rates["measure"] == "helpfulness", ends].add_prefix("helpfulness_")
    for measure, modality in (("text_asr", "text"), ("multimodal_asr", "pictures")):
        asr = rates.loc[rates["measure"] == measure, [*ends, "n", "judge"]].add_prefix("asr_")
        frames.append(asr.join(helpful).reset_index().assign(modality=modality))
    names = {"asr_value": "asr", "asr_n": "n", "asr_judge": "judge", "helpfulness_value": "helpfulness"}
    return pd.concat([frame for frame in frames if len(frame)], ignore_index=True).rename(columns=names)


def fronts(points: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Which points lie on the front of their group; those without helpfulness lie on none."""
    parts = [front(part) for _, part in points.dropna(subset=["helpfulness"]).groupby(list(by))]
    return pd.concat(parts).reindex(points.index, fill_value=False) if parts else pd.Series(False, index=points.index)


def plane(lines: pd.DataFrame) -> pd.DataFrame:
    """F05: one line per model × modality: ASR and helpfulness with their intervals, and whether it lies on the front.

    The parent has no helpfulness on pictures and no multimodal ASR; its text ASR is a line across the plane.
    """
    points = asr_beside_helpfulness(lines[lines["backbone"].isin(lines.loc[lines["stage"] == "safety", "backbone"])])
    points["front"] = fronts(points, [*UNIT, "modality"])
    return points.assign(kind=[kind(*pair) for pair in zip(points["stage"], points["recipe"], strict=True)])
