"""T07, F12 and F13: merges against tunings and ensembles, the choice of a ratio, and who dominates whom. No model library.

A merge is named `<rule>/<A>+<partner>/<ratio>`. Differences are paired over the same items; p-values are corrected after Holm
over all rules × partners × headline measures against one reference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.analysis import adaptation, tuning
from vlsafe.analysis import measures as analysis_measures
from vlsafe.analysis.measures import MEASURES, named
from vlsafe.core.schema import MAIN_LINE

UNIT = ["backbone", "seed"]
KEYS = [*UNIT, "rule", "partner"]
CONTROLS = ("ensemble", "checkpoint")
TUNED = {"mtl": "safety/mtl-full", "sl": "safety/sl-full", "dpo": "safety/dpo-both-full"}
SWEPT = ("text_asr", "multimodal_asr", "twin_refusal", "exaggerated_refusal", "helpfulness")
HEADLINE = tuning.HEADLINE
VERDICTS = {  # by whether some measure is clearly better, and some clearly worse
    (True, False): "dominates", (True, True): "trades", (False, False): "not resolved", (False, True): "is dominated",
}  # fmt: skip


def needed(*measures: str) -> set[str]:
    """The benchmarks that some measures are about."""
    return {MEASURES[part]["benchmark"] for measure in measures for part in MEASURES[measure].get("parts", (measure,))}


def chosen(lines: pd.DataFrame) -> pd.Series:
    """Which ratio of each rule and partner the validation pairs choose: one truth value per line, one truth per group.

    Of those whose upper bound of ASR is at most the line's `limit` the most helpful, of equals the safer; where none is, the
    one with the lowest ASR, of equals the more helpful. Without helpfulness (text alone) the lowest ASR decides.
    """
    helpful = lines["helpfulness"].astype(float).fillna(-1.0)
    told = lines.assign(helpful=helpful, allowed=lines["asr_high"] <= lines["limit"])
    found = pd.Series(False, index=lines.index)
    for _, of in told.groupby(KEYS, sort=False):
        allowed = of[of["allowed"]]
        order = (["helpful", "asr"], [False, True]) if len(allowed) else (["asr", "helpful"], [True, False])
        best = (allowed if len(allowed) else of).sort_values(order[0], ascending=order[1], kind="stable")
        found[best.index[0]] = True
    return found


def parsed(lines: pd.DataFrame) -> pd.DataFrame:
    """Lines on merges with what their recipe tells: rule, partner, place (the ratio as it is written, or a step)."""
    parts = lines["recipe"].str.split("/", expand=True).reindex(columns=range(3))
    return lines.assign(rule=parts[0], partner=parts[1].str.partition("+")[2], place=parts[2].fillna(""))


def rates(raw: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """One line per merge × measure: what its recipe tells, value, interval, n."""
    found = analysis_measures.rates(raw[raw["stage"] == "merge"], measures, [*UNIT, "recipe"])
    return parsed(found) if len(found) else found


def sweep(panel: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """F12: every model of a sweep on the panel: rates with intervals, its ratio, and whether it was chosen."""
    return rates(panel, SWEPT).merge(lines[[*UNIT, "recipe", "ratio", "chosen", "same_as"]], on=[*UNIT, "recipe"], how="left")


def barriers(lines: pd.DataFrame) -> pd.DataFrame:
    """By how much the loss on the way from A to the partner rises above the straight line between its ends, at most.

    Units:    nats per answer to the validation pairs
    Source:   Frankle et al. 2020, linear mode connectivity (with losses in place of errors)
    """
    found = []
    for key, of in lines[lines["rule"] == "linear"].dropna(subset=["loss"]).groupby([*UNIT, "partner"], sort=False):
        of = of.sort_values("ratio")
        loss, ratio = of["loss"].to_numpy(float), of["ratio"].to_numpy(float)
        above = loss - np.interp(ratio, ratio[[0, -1]], loss[[0, -1]])
        place = int(above.argmax())
        told = {"loss_a": loss[0], "loss_b": loss[-1], "barrier": float(above[place]), "at": float(ratio[place])}
        found.append(dict(zip([*UNIT, "partner"], key, strict=True)) | told | {"lowest": float(ratio[loss.argmin()])})
    return pd.DataFrame(found)


def references(runs: Collection[str], partner: str) -> dict[str, str]:
    """What a merge with a partner is compared with, by name: adapted model, tunings, the ensemble with this partner."""
    own = [run for run in runs if run.startswith("merge/ensemble/") and run.split("/")[2].endswith(f"+{partner}")]
    found = {"adapted": MAIN_LINE["adapted"], **TUNED, **dict(zip(["ensemble"], own, strict=False))}
    return {name: run for name, run in found.items() if run in runs}


def methods(raw: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """T07: one line per backbone × seed × chosen merge or control × measure, with its paired changes from each reference.

    Units:    fractions; p-values two-sided by flipping the signs of clusters, Holm per reference
    Raises:   ValueError where there is no merge
    """
    final = raw[(raw["exam"] == "full") & raw["benchmark"].isin(needed(*HEADLINE))]
    found, changes = rates(final, HEADLINE), []
    if found.empty:
        raise ValueError("there is no full examination of a merge; make the stages of notebook 06 first")
    for unit, part in final.groupby(UNIT):
        runs = named(part).unique()
        merged = found[(found[UNIT] == list(unit)).all(axis=1)].drop_duplicates("recipe")
        asked: dict[tuple[str, str], list[str]] = {}  # the name of a reference and its run -> the merges it is compared with
        for recipe, partner in zip(merged["recipe"], merged["partner"], strict=True):
            for reference in references(runs, partner).items():
                if reference[1] != f"merge/{recipe}":
                    asked.setdefault(reference, []).append(f"merge/{recipe}")
        for (name, before), after in asked.items():
            changes.append(tuning.compared(part, before, after, HEADLINE).assign(reference=name))
    change = pd.concat(changes, ignore_index=True).drop(columns="stage")
    change = pd.concat([tuning.holm(part) for _, part in change.groupby("reference", sort=False)], ignore_index=True)
    lined = lines.loc[lines["chosen"], [*UNIT, "recipe", "ratio", "same_as"]]
    return found.merge(change, on=[*UNIT, "recipe", "measure"], how="left").merge(lined, on=[*UNIT, "recipe"], how="left")


def verdicts(found: pd.DataFrame) -> pd.DataFrame:
    """Per merge and reference: "dominates" (some headline measure clearly better, none clearly worse), "is dominated", "trades"
    (some better, some worse) or "not resolved", after Holm at 0.05; and which measures moved.
    """
    lines, told = [], found.dropna(subset=["reference"])
    for key, of in told.groupby([*KEYS, "recipe", "reference"], sort=False):
        clear = of[of["p_holm"] < 0.05]
        good = [(row.difference < 0) == (MEASURES[row.measure]["worse"] == "higher") for row in clear.itertuples()]
        better, worse = (clear["measure"][[flag == side for flag in good]].tolist() for side in (True, False))
        line = dict(zip([*KEYS, "recipe", "reference"], key, strict=True))
        shown = [", ".join(MEASURES[m]["label"] for m in names) for names in (better, worse)]
        whole = set(HEADLINE) == set(of["measure"])
        lines.append(
            line | {"verdict": VERDICTS[bool(better), bool(worse)], "better": shown[0], "worse": shown[1], "whole": whole}
        )
    return pd.DataFrame(lines)


def answer(verdict: pd.DataFrame) -> str:
    """Does merging dominate? The statistics' own answer, over merges that were asked all five measures."""
    rivals = [*TUNED, "ensemble"]
    of = verdict[~verdict["rule"].isin(CONTROLS) & verdict["whole"] & verdict["reference"].isin(rivals)]
    if of.empty:
        return "Nothing can be said: no merge was asked all five measures."
    told = []
    for name in [rival for rival in rivals if rival in set(of["reference"])]:
        counts = of.loc[of["reference"] == name, "verdict"].value_counts()
        told.append(f"{name}: " + ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in VERDICTS.values()))
    best = of.assign(won=of["verdict"] == "dominates").groupby(KEYS)["won"].all()
    said = "Yes, some" if best.any() else "No"
    return f"{said}: {best.sum()} of {len(best)} merges dominate every tuning and their ensemble ({'; '.join(told)})."


def against_ensemble(panel: pd.DataFrame) -> pd.DataFrame:
    """What the linear merge changes over the output ensemble of the same two models at the same ratio, paired, on the panel.

    The panel's few verb–object pairs allow an interval and no test that could survive a correction.

    Units:    fractions
    """
    of, found = panel.assign(exam="full"), []
    runs = dict(list(of.groupby("recipe", sort=False)))
    for recipe in [recipe for recipe in runs if recipe.startswith("ensemble/")]:
        line, (_, pair, ratio) = recipe.replace("ensemble/", "linear/", 1), recipe.split("/")
        if line in runs:
            both = pd.concat([runs[recipe], runs[line]])
            told = analysis_measures.differences(both, f"merge/{recipe}", [f"merge/{line}"], HEADLINE).drop(
                columns=["stage", "recipe"]
            )
            found.append(told.assign(partner=pair.partition("+")[2], ratio=float(ratio)))
    return pd.concat(found, ignore_index=True)


def plane(raw: pd.DataFrame) -> pd.DataFrame:
    """F13: chosen merges, controls, tunings and the adapted model: ASR and helpfulness with intervals; who is on which front."""
    final = raw[(raw["exam"] == "full") & (raw["stage"].isin(["merge", "safety"]) | (named(raw) == MAIN_LINE["adapted"]))]
    final = final[final["backbone"].isin(raw.loc[raw["stage"] == "merge", "backbone"])]
    index, frames = [*UNIT, "stage", "recipe"], []
    found = analysis_measures.rates(final, ("text_asr", "multimodal_asr", "helpfulness"), index)
    helpful = found[found["measure"] == "helpfulness"].set_index(index)[["value", "low", "high"]].add_prefix("helpfulness_")
    renamed = {"asr_value": "asr", "helpfulness_value": "helpfulness", "asr_n": "n"}
    for measure, modality in (("text_asr", "text"), ("multimodal_asr", "pictures")):
        of = found[found["measure"] == measure].set_index(index)[["value", "low", "high", "n"]]
        frames.append(of.add_prefix("asr_").join(helpful, how="left").reset_index().assign(modality=modality))
    points = pd.concat(frames, ignore_index=True).rename(columns=renamed)
    points["family"] = [family(*pair) for pair in zip(points["stage"], points["recipe"], strict=True)]
    points["name"] = [named_short(*pair) for pair in zip(points["stage"], points["recipe"], strict=True)]
    told = [tuning.front(part) for _, part in points.dropna().groupby([*UNIT, "modality", "family"])]
    return points.assign(front=pd.concat(told).reindex(points.index, fill_value=False) if told else False)


def family(stage: str, recipe: str) -> str:
    """Which front a model belongs to: merged, ensemble, checkpoint, or its tuning's kind."""
    if stage == "merge":
        rule = recipe.partition("/")[0]
        return rule if rule in CONTROLS else "merged"
    return tuning.kind(stage, recipe)


def named_short(stage: str, recipe: str) -> str:
    """What a model is called where seeds are averaged: a merge by rule and partner, without the ratio, which seeds choose."""
    if stage != "merge":
        return tuning.kind(stage, recipe) if stage == "instruct" else recipe.removesuffix("-full")
    rule, pair, *_ = recipe.split("/")
    partner = pair.partition("+")[2].removesuffix("-full")
    return f"{rule.replace('_', ' ')} + {partner if partner != 'aligned' else 'parent'}"


def hypervolume(points: np.ndarray) -> np.ndarray:
    """The area of the plane that a set of points dominates, both coordinates better when larger, from (0, 0).

    Shapes:   [D, N, 2]  ->  [D]
    Source:   Zitzler and Thiele 1998
    """
    order = np.argsort(-points[..., 0], axis=1)
    x, y = (np.take_along_axis(points[..., axis], order, 1) for axis in (0, 1))
    tops = np.maximum.accumulate(np.maximum(y, 0.0), axis=1)
    widths = x - np.concatenate([x[:, 1:], np.zeros((len(x), 1))], 1)
    return (np.maximum(widths, 0.0) * tops).sum(1)


def hypervolumes(raw: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """Area under each family's front (1 − ASR against helpfulness), and by how much all merges' exceeds it.

    Draws:    bootstrap samples of clusters, the same for all models of one backbone and seed
    """
    lines = []
    final = raw[(raw["exam"] == "full") & (raw["stage"].isin(["merge", "safety"]) | (named(raw) == MAIN_LINE["adapted"]))]
    for unit, of in final.groupby(UNIT):
        if "merge" not in set(of["stage"]):
            continue
        seeing = of[of["recipe"].isin(of.loc[of["benchmark"] == "mm_safetybench", "recipe"])].assign(step=0)
        rng = np.random.default_rng(unit[1])
        drawn = {m: adaptation.redrawn(seeing, m, rng, draws) for m in ("text_asr", "multimodal_asr", "helpfulness")}
        stages = seeing.groupby("recipe")["stage"].first()
        for measure in ("text_asr", "multimodal_asr"):
            areas = {}
            for name, recipes in families(stages).items():
                xy = [np.stack([1 - drawn[measure][r, 0], drawn["helpfulness"][r, 0]], -1) for r in recipes]
                areas[name] = hypervolume(np.stack(xy, 1))
            for name, area in areas.items():
                line = dict(zip(UNIT, unit, strict=True)) | {"measure": measure, "family": name}
                line |= {"models": len(families(stages)[name])} | _spread("area", area)
                lines.append(line | (_spread("merges_exceed_by", areas["merged"] - area) if name != "merged" else {}))
    return pd.DataFrame(lines)


def families(stages: pd.Series) -> dict[str, list[str]]:
    """Sets of models whose fronts are compared: all merges, the single tunings, all tunings, the ensembles."""
    found: dict[str, list[str]] = {"merged": []}
    for recipe, stage in stages.items():
        of = family(stage, recipe)
        found.setdefault(of if stage == "merge" or of == "adapted" else "tuned", []).append(recipe)
    singles = {name: [run.partition("/")[2]] for name, run in TUNED.items() if run.partition("/")[2] in stages.index}
    return {name: recipes for name, recipes in {**found, **singles}.items() if recipes}


def _spread(name: str, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return {name: float(drawn[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def sheet(found: pd.DataFrame, verdict: pd.DataFrame, reference: str = "adapted") -> pd.DataFrame:
    """T07 for the eye: one line per rule × partner in percent, with changes from a reference and the verdicts on the others."""
    index = [*KEYS, "place"]
    of = found[(found["reference"] == reference) | found["reference"].isna()]
    shown = adaptation.compact(of, index)
    wide: Any = verdict.pivot_table(index=KEYS, columns="reference", values="verdict", aggfunc="first")
    wanted: Sequence[str] = [name for name in ("mtl", "sl", "dpo", "ensemble") if name in wide.columns]
    return shown.merge(wide[wanted].add_prefix("against ").reset_index(), on=KEYS, how="left")
