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


METHODS = {  # for the eye
    "mtl": "multitask SFT", "mtl-pcgrad": "multitask SFT, PCGrad", "sl": "sequential SFT", "sl-replay": "sequential SFT, replay",
    "sibling": "SFT from stage 1", "textsft": "SFT on text", "dpo-text": "DPO on text", "dpo-image": "DPO on pictures",
    "dpo-both": "DPO on both", "grpo-text": "GRPO on text",
}  # fmt: skip
HOW = {"full": "", "lora": ", LoRA", "sppft": ", SPPFT"}


def named(recipe: str) -> str:
    """What a tuning is called: its method, and how its weights were trained where not all of them were."""
    method, _, how = recipe.rpartition("-")
    return f"{METHODS[method]}{HOW[how]}" if method in METHODS and how in HOW else recipe


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
        of = rows[rows["group"].isin(kinds) if kinds else rows["benchmark"] == MEASURES[measure]["benchmark"]]
        rates = analysis_measures.rates(of, [measure], [*UNIT, "stage", "recipe"])
        frames.append(rates.assign(what=what, modality=modality))
    measured = [frame for frame in frames if len(frame)]
    if not measured:
        raise Lacking("there is no full examination of the parent, the adapted or a tuned model on harmless requests")
    return pd.concat(measured, ignore_index=True)


AXES = {"text_asr": -1, "multimodal_asr": -1, "twin_refusal": -1, "helpfulness": 1}  # what models are judged by, and its sign


def front(points: pd.DataFrame) -> pd.DataFrame:
    """The models that no other one of their backbone beats in the means over seeds of AXES: none is nowhere worse and somewhere
    better. A model that lacks a measure beats none and is beaten by none; what could not be judged counts against it.

    Shapes:   long: backbone, name, what (a measure), value, value_high  ->  backbone and name of each
    """
    points = points.assign(value=analysis_measures.cautious(points, "what"))
    means = points.groupby(["backbone", "name", "what"], sort=False)["value"].mean().unstack("what")
    kept = []
    for _, of in means.groupby("backbone", sort=False):
        values = of[list(of.columns)].to_numpy(float) * [AXES[name] for name in of.columns]
        no_worse, better = ((values[None] >= values[:, None]).all(-1), (values[None] > values[:, None]).any(-1))
        kept.append(of[~(no_worse & better).any(axis=1)])
    return pd.concat(kept).index.to_frame(index=False)


def plane(lines: pd.DataFrame) -> pd.DataFrame:
    """F05: the measures of AXES of every model of T05's lines, where one was tuned: parent and adapted first, then by text ASR.

    Raises:   Lacking where nothing of that was measured
    """
    of = lines[lines["backbone"].isin(lines.loc[lines["stage"] == "safety", "backbone"]) & lines["measure"].isin(list(AXES))]
    if of.empty:
        raise Lacking("no model was examined on attacks or helpfulness")
    kinds = [kind(*pair) for pair in zip(of["stage"], of["recipe"], strict=True)]
    names = [named(recipe) if stage == "safety" else kind(stage, recipe)
             for stage, recipe in zip(of["stage"], of["recipe"], strict=True)]  # fmt: skip
    return by_text_asr(of.assign(kind=kinds, name=names, what=of["measure"]))


def with_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """Points of models whose names say so where they are of fewer seeds than others of their backbone."""
    seeds, most = (points.groupby(by)["seed"].transform("nunique") for by in (["backbone", "name"], ["backbone"]))
    fewer = points["name"] + " (" + seeds.astype(str) + " of " + most.astype(str) + " seeds)"
    return points.assign(name=points["name"].where(seeds == most, fewer))


def by_text_asr(points: pd.DataFrame) -> pd.DataFrame:
    """Points of models in the order of their mean text ASR, untouched ones first; who lacks seeds is called so."""
    points = with_seeds(points)
    asr = points[points["what"] == "text_asr"].groupby(["backbone", "name"])["value"].mean().rename("asr")
    order = points.join(asr, on=["backbone", "name"]).assign(first=~points["kind"].isin(["parent", "adapted"]))
    return points.loc[order.sort_values(["backbone", "first", "asr"], kind="stable").index]
