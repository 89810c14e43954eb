"""T05, F05 and F06: what safety tuning buys and what it costs, beside the adapted model and the parent. Imports no model library.

Every difference is paired over the same items. The p-values of the headline measures are corrected after Holm within
one family: all methods of one backbone and seed against one reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from vlsafe.analysis import adaptation
from vlsafe.analysis import measures as analysis_measures
from vlsafe.analysis.measures import MEASURES, named
from vlsafe.core.schema import MAIN_LINE

UNIT = ["backbone", "seed"]
JOINED = ("stage", "recipe", "measure")
REFERENCES = ("adapted", "parent")
HEADLINE = ("text_asr", "multimodal_asr", "twin_refusal", "exaggerated_refusal", "helpfulness")
SHOWN = (
    *HEADLINE, "wildjailbreak_asr", "siuo_asr", "figstep_asr", "wildjailbreak_refusal", "picture_refusal", "siuo_twin_refusal",
    "figstep_twin_refusal", "contrast_compliance", "text_incoherent", "multimodal_incoherent", "text_asr_strings",
    "text_asr_guard", "multimodal_asr_strings", "multimodal_asr_guard", "mmbench_circular", "mme_score", "seed_likelihood",
    "helpfulness_rescaled", "capability_caption-icon", "capability_howto-text", "capability_howto-icon",
)  # fmt: skip
THREE_JUDGES = ("text_asr", "text_asr_strings", "text_asr_guard")
# What over-refusal is measured on: measure, group (None: all), what it is for the eye, text or pictures.
REFUSALS = (
    ("exaggerated_refusal", "homonym", "XSTest homonyms", "text"),
    ("exaggerated_refusal", "safe_context", "XSTest safe contexts", "text"),
    ("wildjailbreak_refusal", None, "WildJailbreak twins", "text"),
    ("picture_refusal", None, "XSTest homonyms, pictured", "pictures"),
    ("twin_refusal", None, "MM-SafetyBench twins", "pictures"),
    ("siuo_twin_refusal", None, "SIUO twins", "pictures"),
    ("figstep_twin_refusal", None, "FigStep twins", "pictures"),
)
TAUGHT_ON = {  # by what a recipe's name begins with: its objective, and whether its safety rows have pictures
    "mtl": ("SFT", "pictures"), "mtl-pcgrad": ("SFT", "pictures"), "sl": ("SFT", "pictures"),
    "sl-replay": ("SFT", "pictures"), "sibling": ("SFT", "pictures"),
    "textsft": ("SFT", "text"), "dpo-text": ("DPO", "text"), "dpo-image": ("DPO", "pictures"), "dpo-both": ("DPO", "both"),
    "grpo-text": ("GRPO", "text"),
}  # fmt: skip


def kind(stage: str, recipe: str) -> str:
    """What a model is, as `figures.KINDS` calls it: parent, adapted, or its tuning's objective.

    Raises:   KeyError for a recipe that TAUGHT_ON does not know
    """
    known = {run: name for name, run in MAIN_LINE.items()}
    return known.get(f"{stage}/{recipe}") or TAUGHT_ON[recipe.rpartition("-")[0]][0]


def final(raw: pd.DataFrame) -> pd.DataFrame:
    """Full examinations of the parent, the adapted model and the tuned ones."""
    compared = (raw["stage"] == "safety") | named(raw).isin([MAIN_LINE[name] for name in REFERENCES])
    return raw[(raw["exam"] == "full") & compared]


def methods(raw: pd.DataFrame, tried: pd.DataFrame) -> pd.DataFrame:
    """T05: one line per backbone × seed × model × measure, with its paired changes from the adapted model and from the parent.

    `tried` are the checkpoints' validation lines; steps and tokens are those of the chosen checkpoint's safety tuning
    alone. A parent has no pictures to be asked about, so such changes are empty.

    Units:    fractions; p-values are two-sided, by flipping the signs of clusters
    Raises:   ValueError where there is no tuned model
    """
    rows = final(raw)
    if "safety" not in set(rows["stage"]):
        raise ValueError("there is no full examination of a tuned model; make the stages of notebook 04 first")
    lines = analysis_measures.rates(rows, SHOWN, [*UNIT, "stage", "recipe"])
    tuned = [f"safety/{recipe}" for recipe in rows.loc[rows["stage"] == "safety", "recipe"].unique()]
    for reference in REFERENCES:
        found = holm(compared(rows, MAIN_LINE[reference], tuned, SHOWN))
        names = {name: f"{reference}_{name}" for name in found.columns if name not in (*UNIT, *JOINED)}
        lines = lines.merge(found.rename(columns=names), on=[*UNIT, *JOINED], how="left")
    costs = tried.loc[tried["chosen"], [*UNIT, "stage", "recipe", "step", "tokens"]]
    return lines.merge(costs, on=[*UNIT, "stage", "recipe"], how="left").astype({"step": "Int64", "tokens": "Int64"})


def compared(rows: pd.DataFrame, before: str, after: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Paired changes from one run (stage/recipe) to others: difference, interval, p-value of each measure."""
    found = analysis_measures.differences(rows, before, after, measures, tested=True)
    return found.drop(columns="n").rename(columns={"low": "difference_low", "high": "difference_high"})


def holm(changes: pd.DataFrame) -> pd.DataFrame:
    """Add `p_holm`: corrected over all methods and headline measures of one backbone and seed; empty for other measures.

    Source:   Holm 1979, by statsmodels
    """
    changes = changes.assign(p_holm=np.nan)
    for _, family in changes[changes["measure"].isin(HEADLINE)].groupby(UNIT):
        changes.loc[family.index, "p_holm"] = multipletests(family["p"].astype(float), method="holm")[1]
    return changes


def sheet(lines: pd.DataFrame, reference: str = "adapted", measures: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """T05 for the eye: one line per model, in percent, with its changes from a reference and which of them Holm's p supports."""
    of = lines[lines["measure"].isin(measures)].rename(columns=lambda name: name.removeprefix(f"{reference}_"))
    index = [*UNIT, "stage", "recipe"]
    costs = of[[*index, "step", "tokens"]].drop_duplicates(index)
    clear = of[of["p_holm"] < 0.05].groupby(index)["measure"].agg(lambda names: ", ".join(MEASURES[n]["label"] for n in names))
    whole = costs.merge(adaptation.compact(of, index), on=index, how="left")
    return whole.merge(clear.rename("Holm p < 0.05").reset_index(), on=index, how="left")


def transfer(lines: pd.DataFrame) -> pd.DataFrame:
    """What a tuning changes on the modality that it was taught on and on the other one, in fractions.

    One line per backbone × seed × recipe × modality that was tested, with the ASR's change from the adapted model.
    """
    tested = {"text_asr": "text", "multimodal_asr": "pictures"}
    of = lines[(lines["stage"] == "safety") & lines["measure"].isin(list(tested))]
    taught = of["recipe"].map(lambda recipe: TAUGHT_ON[recipe.rpartition("-")[0]][1])
    of = of.assign(taught_on=taught, tested_on=of["measure"].map(tested))
    columns = ["value", *(name for name in of.columns if name.startswith("adapted_"))]
    return of[[*UNIT, "taught_on", "recipe", "tested_on", *columns]].sort_values([*UNIT, "taught_on", "recipe"], kind="stable")


def refusals(raw: pd.DataFrame) -> pd.DataFrame:
    """F06: how often each model refuses harmless requests, by XSTest's types and by the benign twins of each attack."""
    rows, frames = final(raw), []
    for measure, group, what, modality in REFUSALS:
        of = rows[rows["group"] == group] if group else rows
        found = analysis_measures.rates(of, [measure], [*UNIT, "stage", "recipe"])
        frames.append(found.assign(what=what, modality=modality))
    return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)


def front(points: pd.DataFrame) -> pd.Series:
    """Which points no other one beats: none is at least as safe and as helpful, and better in one of the two.

    Shapes:   columns asr and helpfulness  ->  one truth value per line
    """
    asr, help_ = points["asr"].to_numpy(float), points["helpfulness"].to_numpy(float)
    no_worse = (asr[None] <= asr[:, None]) & (help_[None] >= help_[:, None])
    better = (asr[None] < asr[:, None]) | (help_[None] > help_[:, None])
    return pd.Series(~(no_worse & better).any(axis=1), index=points.index)


def plane(lines: pd.DataFrame) -> pd.DataFrame:
    """F05: one line per model × modality: ASR and helpfulness with their intervals, and whether it lies on the front.

    The parent has no helpfulness on pictures and no multimodal ASR; its text ASR is a line across the plane.
    """
    lines = lines[lines["backbone"].isin(lines.loc[lines["stage"] == "safety", "backbone"])]  # others have nothing to trade
    index, frames = [*UNIT, "stage", "recipe"], []
    kept = ["value", "low", "high"]
    helpful = lines[lines["measure"] == "helpfulness"].set_index(index)[kept]
    helpful.columns = ["helpfulness", "helpfulness_low", "helpfulness_high"]
    for measure, modality in (("text_asr", "text"), ("multimodal_asr", "pictures")):
        of = lines[lines["measure"] == measure].set_index(index)[[*kept, "n"]]
        of.columns = ["asr", "asr_low", "asr_high", "n"]
        points = of.join(helpful, how="left").reset_index().assign(modality=modality)
        placed = points.dropna(subset=["helpfulness"])
        on_front = [front(part) for _, part in placed.groupby(UNIT)]
        points["front"] = pd.concat(on_front).reindex(points.index, fill_value=False) if on_front else False
        frames.append(points)
    found = pd.concat(frames, ignore_index=True)
    return found.assign(kind=[kind(*pair) for pair in zip(found["stage"], found["recipe"], strict=True)])
