"""T07, F12 and F13: merges against tunings and ensembles, the choice of a ratio, and who dominates whom.

A merge is named `<rule>/<A>+<partner>/<ratio>`. Differences are paired over the same items; p-values are corrected after Holm
over all rules × partners × headline measures against one reference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from vlsafe.analysis import measures as analysis_measures
from vlsafe.analysis import resampling, stats, tuning
from vlsafe.analysis.measures import GRADED, HEADLINE, MEASURES, UNIT, Lacking, groups, run_names
from vlsafe.analysis.stats import percentiles
from vlsafe.core.schema import MAIN_LINE

KEYS = [*UNIT, "rule", "partner"]
CONTROLS = ("ensemble", "checkpoint")
TUNED = {"mtl": "safety/mtl-full", "sl": "safety/sl-full", "dpo": "safety/dpo-both-full"}
ENDS, WITH_PARENT = ("/0.00", "/1.00"), "+aligned"
CALLED = {  # rules for the eye; α: the partner's weight
    "linear": "linear, 0 ≤ α ≤ 1", "inside": "linear, 0 < α < 1", "outside": "outside the band",
}  # fmt: skip
LINEAR = "^(inside|task_arithmetic)/"  # rules that are the linear merge at the ratio they chose (of task vectors: up to rounding)
VERDICTS = {  # by whether some measure is clearly better, and some clearly worse
    (True, False): "dominates", (True, True): "trades", (False, False): "not resolved", (False, True): "is dominated",
}  # fmt: skip


def needed(*measures: str) -> set[str]:
    """The benchmarks that some measures are about, or stand in for one of these."""
    parts = [MEASURES[part] for measure in measures for part in MEASURES[measure].get("parts", (measure,))]
    return {name for part in parts for name in (part["benchmark"], *part.get("stand_in", ()))}


def chosen(lines: pd.DataFrame, fixed: float | None = None) -> pd.Series:
    """Which ratio of each rule and partner the validation pairs choose: one truth value per line, one truth per group.

    `asr` and its upper bound `asr_high` are those of the worse modality. Of lines whose bound is at most their `limit` the
    most helpful is chosen, of equals the safer; where there is none, the one with the lowest ASR, of equals the more helpful.
    Without helpfulness (text alone) the lowest ASR decides. Where nothing may be chosen, the ratio nearest to `fixed` is taken.
    An ensemble at an end of the line is one of its members, and not chosen.
    """
    index = lines.index
    lines = lines[(lines["rule"] != "ensemble") | ~lines["ratio"].isin([0.0, 1.0])]
    if fixed is not None:
        distance = (lines["ratio"].astype(float) - fixed).abs().fillna(0.0)
        return pd.Series(index.isin(lines.assign(d=distance).sort_values("d", kind="stable").drop_duplicates(KEYS).index), index)
    helpful = lines["helpfulness"].astype(float).fillna(-1.0)
    asr, allowed = lines["asr"], lines["asr_high"] <= lines["limit"]
    order = {"refused": ~allowed, "first": (-helpful).where(allowed, asr), "second": asr.where(allowed, -helpful)}
    best = lines.assign(**order).sort_values(list(order), kind="stable").drop_duplicates(KEYS).index
    return pd.Series(index.isin(best), index)


def rates(raw: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """One line per merge × measure, with the parts of its recipe: rule, partner, place (the ratio as written, or a step)."""
    lines = analysis_measures.rates(raw[raw["stage"] == "merge"], measures, [*UNIT, "recipe"])
    if lines.empty:
        return lines
    parts = lines["recipe"].str.split("/", expand=True).reindex(columns=range(3))
    return lines.assign(rule=parts[0], partner=parts[1].str.partition("+")[2], place=parts[2].fillna(""))


def sweep(panel: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """F12: every model of a sweep on the panel: rates with intervals (fractions), its ratio, and whether it was chosen.

    Raises:   Lacking where no merge was asked
    """
    swept = rates(panel, [*HEADLINE, *GRADED])
    if swept.empty:
        raise Lacking("no merge was examined on the panel")
    return swept.merge(lines[[*UNIT, "recipe", "ratio", "chosen", "same_as"]], on=[*UNIT, "recipe"], how="left")


def at_most_items(raw: pd.DataFrame, panel: pd.DataFrame) -> pd.DataFrame:
    """Answers of merges at every ratio: to all test items for backbone and partner where asked, else to the panel."""
    whole = raw[raw["exam"] == "ratios"]
    lines, whole_lines = (of["backbone"] + " " + of["recipe"].str.split("/").str[1] for of in (panel, whole))
    return pd.concat([whole, panel[~lines.isin(whole_lines)]], ignore_index=True)


def barriers(lines: pd.DataFrame) -> pd.DataFrame:
    """By how much the loss on the way from A to the partner rises above the straight line between its ends, at most.

    Units:    nats per answer to the validation pairs
    Source:   Frankle et al. 2020, linear mode connectivity (with losses in place of errors)
    """
    found = []
    for key, rows in groups(lines[lines["rule"] == "linear"].dropna(subset=["loss"]), [*UNIT, "partner"]):
        loss, ratio = (rows.sort_values("ratio")[name].to_numpy(float) for name in ("loss", "ratio"))
        above = loss - np.interp(ratio, ratio[[0, -1]], loss[[0, -1]])
        place = int(above.argmax())
        line = {"loss_a": loss[0], "loss_b": loss[-1], "barrier": float(above[place]), "at": float(ratio[place])}
        found.append(key | line | {"lowest": float(ratio[loss.argmin()])})
    return pd.DataFrame(found)


def references(runs: Collection[str], partner: str) -> dict[str, str]:
    """What a merge with a partner is compared with, by name: adapted model, tunings, and with this partner the ensemble and the
    linear merge between the ends."""
    own = {
        name: run for name, rule in {"ensemble": "ensemble", "linear": "inside"}.items()
        for run in runs if run.startswith(f"merge/{rule}/") and run.split("/")[2].endswith(f"+{partner}")
    }  # fmt: skip
    names = {"adapted": MAIN_LINE["adapted"], **TUNED, **own}
    return {name: run for name, run in names.items() if run in runs}


def methods(raw: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """T07: one line per backbone × seed × chosen merge or control × measure, with its paired changes from each reference.

    Units:    fractions; p-values two-sided by flipping the signs of clusters, Holm per reference
    Raises:   Lacking where there is no merge, or nothing to compare one with
    """
    final = raw[(raw["exam"] == "full") & raw["benchmark"].isin(needed(*HEADLINE))]
    models, changes = rates(final, HEADLINE), []
    if models.empty:
        raise Lacking("there is no full examination of a merge; make the stages of notebook 06 first")
    for unit, part in groups(final, UNIT, sort=True):
        runs = run_names(part).unique()
        merged = models[(models[UNIT] == list(unit.values())).all(axis=1)].drop_duplicates("recipe")
        compared: dict[tuple[str, str], list[str]] = {}  # the name of a reference and its run -> the merges it is compared with
        for recipe, partner in zip(merged["recipe"], merged["partner"], strict=True):
            for reference in references(runs, partner).items():
                if reference[1] != f"merge/{recipe}":
                    compared.setdefault(reference, []).append(f"merge/{recipe}")
        for (name, before), after in compared.items():
            change = analysis_measures.differences(part, before, after, HEADLINE, tested=True)
            changes.append(change.assign(reference=name))
    if not changes:
        raise Lacking("no merge was examined beside a model to compare it with")
    change = tuning.holm(pd.concat(changes, ignore_index=True), [*UNIT, "reference"])
    whole = analysis_measures.with_changes(models, change)
    return whole.merge(lines.loc[lines["chosen"], [*UNIT, "recipe", "ratio", "same_as"]], on=[*UNIT, "recipe"], how="left")


def verdicts(lines: pd.DataFrame) -> pd.DataFrame:
    """Per merge and reference: "dominates" (some headline measure clearly better, none clearly worse), "is dominated", "trades"
    (some better, some worse) or "not resolved", after Holm at 0.05; and which measures changed. `lines` are those of `methods`.
    """
    result = []
    for key, rows in groups(lines.dropna(subset=["reference"]), [*KEYS, "recipe", "reference"]):
        clear = rows.loc[rows["p_holm"] < 0.05, ["measure", "difference"]]
        specs = clear["measure"].map(MEASURES)
        better = (clear["difference"] < 0) == specs.map(lambda spec: spec["worse"] == "higher")
        names = {side: [spec["label"] for spec in specs[better == (side == "better")]] for side in ("better", "worse")}
        key["verdict"] = VERDICTS[bool(names["better"]), bool(names["worse"])]
        whole = set(HEADLINE) == set(rows["measure"])
        result.append(key | {side: ", ".join(labels) for side, labels in names.items()} | {"whole": whole})
    return pd.DataFrame(result)


def answer(verdict: pd.DataFrame) -> str:
    """Does merging dominate? The statistics' own answer, over merges of two tuned models that were examined on all five measures.

    A merge with the parent is none, nor is an end of the line; one that was not compared with every rival dominates not all.
    Rules that give the same weights at the same ratio count once.
    """
    rivals = [*TUNED, "ensemble"]
    whole = verdict["whole"] & ~verdict["recipe"].str.endswith(ENDS) & (verdict["partner"] != WITH_PARENT[1:])
    of = verdict[whole & ~verdict["rule"].isin(CONTROLS) & verdict["reference"].isin(rivals)]
    if of.empty:
        return "Nothing can be said: no merge of two tuned models was examined on all five measures."
    weights = of["recipe"].str.replace(LINEAR, "linear/", regex=True)
    of = of.assign(weights=weights).drop_duplicates([*UNIT, "weights", "reference"])
    parts, there = [], [rival for rival in rivals if rival in set(of["reference"])]
    called = {name: tuning.named(run.partition("/")[2]) for name, run in TUNED.items()} | {"ensemble": "the ensemble"}
    for name in there:
        counts = of.loc[of["reference"] == name, "verdict"].value_counts()
        parts.append(f"{called[name]}: " + ", ".join(f"{kind}: {counts.get(kind, 0)}" for kind in VERDICTS.values()))
    best = of.assign(won=of["verdict"] == "dominates").groupby([*UNIT, "weights"])["won"].sum() == len(there)
    what = f"{'Yes, some' if best.any() else 'No'}: {best.sum()} of {len(best)} merges of two tuned models dominate "
    some = f"those of {', '.join(called[name] for name in there)} that were examined in their seed"
    what += "every tuning and their ensemble" if there == rivals else some
    return f"{what} ({'; '.join(parts)})."


def beyond_linear(verdict: pd.DataFrame) -> str:
    """Which rules' chosen merges of two tuned models dominate the linear one between the ends with the same partner."""
    others = ~verdict["rule"].isin([*CONTROLS, "linear", "inside"]) & (verdict["partner"] != WITH_PARENT[1:])
    of = verdict[others & (verdict["reference"] == "linear") & verdict["whole"] & ~verdict["recipe"].str.endswith(ENDS)]
    if of.empty:
        return "No merge by another rule was compared with the linear one."
    won = of[of["verdict"] == "dominates"].groupby("rule", sort=False).size()
    which = ", ".join(f"{rule} {n}" for rule, n in won.items())
    lost = (of["verdict"] == "is dominated").sum()
    return (
        f"Of {len(of)} merges by other rules, one for each rule, partner and seed, {won.sum()} dominate the linear one"
        f"{f' ({which})' if which else ''}, and it dominates {lost}."
    )


def against_ensemble(panel: pd.DataFrame) -> pd.DataFrame:
    """What the linear merge changes over the output ensemble of the same two models at the same ratio, paired, on the panel.

    The panel's few verb–object pairs allow an interval and no test that could survive a correction.

    Units:    fractions
    Raises:   Lacking where the panel has no such pair
    """
    runs, changes = dict(list(panel.assign(exam="full").groupby("recipe", sort=False))), []
    for ensemble in [recipe for recipe in runs if recipe.startswith("ensemble/")]:
        linear, (_, pair, ratio) = ensemble.replace("ensemble/", "linear/", 1), ensemble.split("/")
        if linear in runs:
            both = pd.concat([runs[ensemble], runs[linear]])
            change = analysis_measures.differences(both, f"merge/{ensemble}", [f"merge/{linear}"], HEADLINE)
            changes.append(change.assign(partner=pair.partition("+")[2], ratio=float(ratio)))
    if not changes:
        raise Lacking("no linear merge was examined beside its ensemble on the panel")
    return pd.concat(changes, ignore_index=True).drop(columns=["stage", "recipe"])


def _at_ratios(raw: pd.DataFrame) -> pd.DataFrame:
    """Answers of linear merges and ensembles at every ratio to all test items: the rule as recipe, the ratio as step.

    Raises:   Lacking where there are none
    """
    rows = raw[(raw["stage"] == "merge") & (raw["exam"] == "ratios")]
    if rows.empty:
        raise Lacking('the grid "full" alone examines every ratio on all test items')
    parts = rows["recipe"].str.split("/", expand=True)
    return rows.assign(recipe=parts[0], partner=parts[1].str.partition("+")[2], step=parts[2].astype(float))


def ratios(raw: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """T07 along the ratio, on all test items: the mean over seeds of linear merge and ensemble with bands that hold all ratios at
    once, and how far the merge lies from the ensemble at the same ratio, with a band of its own.

    Draws:    bootstrap samples of seeds, and of clusters within each, of `resampling.over_seeds`
    Units:    fractions
    """
    lines = []
    for key, rows in groups(_at_ratios(raw), ["backbone", "partner"], sort=True):
        seeds = rows["seed"].nunique()
        for measure in analysis_measures.present(rows, HEADLINE):
            drawn = resampling.over_seeds(rows, measure, draws)
            places = {rule: list(of) for rule, of in drawn.items()}
            curves = {rule: np.stack(list(of.values()), 1) for rule, of in drawn.items()}
            if {"linear", "ensemble"} <= set(places) and places["linear"] == places["ensemble"]:
                curves["linear - ensemble"], places["linear - ensemble"] = curves["linear"] - curves["ensemble"], places["linear"]
            for rule, curve in curves.items():
                low, high = stats.simultaneous(curve)
                low, high = np.maximum(low, 0.0 if rule in drawn else -1.0), np.minimum(high, 1.0)
                for place, ratio in enumerate(places[rule]):
                    ends = {"value": curve[0, place], "low": low[place], "high": high[place]}
                    lines.append(key | {"rule": rule, "measure": measure, "ratio": ratio, "seeds": seeds} | ends)
    return pd.DataFrame(lines)


def regret(raw: pd.DataFrame, lines: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """By how much the ratio that validation chose falls short of the best one on test items, in the mean of four measures, each
    better where larger. The best one is found on the items that it is measured on: the regret is an upper bound.

    Units:    fractions
    Draws:    bootstrap samples of clusters, in each of which the best ratio is found again
    """
    found, rows = [], _at_ratios(raw)
    picked = lines[lines["chosen"]].set_index([*UNIT, "partner", "rule"])["ratio"]
    for key, of in groups(rows, [*UNIT, "partner"], sort=True):
        if set(analysis_measures.present(of, tuning.AXES)) != set(tuning.AXES):
            continue
        drawn = resampling.bootstrap(of, tuning.AXES, np.random.default_rng(key["seed"]), draws)
        each = [(sign, drawn[measure]) for measure, sign in tuning.AXES.items()]
        for rule in dict.fromkeys(of["recipe"]):
            places = sorted(ratio for name, ratio in each[0][1] if name == rule)
            score = np.mean([sign * np.stack([drawn[rule, ratio] for ratio in places], 1) for sign, drawn in each], axis=0)
            chosen = picked.get((*key.values(), rule))
            if chosen in places:
                line = key | {"rule": rule, "chosen": chosen, "best": places[int(score[0].argmax())]}
                found.append(line | stats.percentiles(score.max(1) - score[:, places.index(chosen)], "regret"))
    return pd.DataFrame(found)


def final(raw: pd.DataFrame) -> pd.DataFrame:
    """Full examinations of merges, tunings and the adapted model."""
    compared = raw["stage"].isin(["merge", "safety"]) | (run_names(raw) == MAIN_LINE["adapted"])
    return raw[(raw["exam"] == "full") & compared]


def plane(raw: pd.DataFrame) -> pd.DataFrame:
    """F13: the measures of AXES of chosen merges, controls, tunings and the adapted model, in the order of their text ASR."""
    rows = final(raw)
    rows = rows.merge(raw.loc[raw["stage"] == "merge", UNIT].drop_duplicates())  # means are of the same seeds
    rates = analysis_measures.rates(rows, list(tuning.AXES), [*UNIT, "stage", "recipe"])
    if rates.empty:
        raise Lacking("no merge was examined on attacks or helpfulness")
    models = list(zip(rates["stage"], rates["recipe"], strict=True))
    kinds, names = [family(*model) for model in models], [named_short(*model) for model in models]
    return tuning.by_text_asr(rates.assign(kind=kinds, name=names, what=rates["measure"]))


def family(stage: str, recipe: str) -> str:
    """Which front a model belongs to: merged, ensemble, checkpoint, or its tuning's kind."""
    if stage == "merge":
        rule = recipe.partition("/")[0]
        return rule if rule in CONTROLS else "merged"
    return tuning.kind(stage, recipe)


def named_short(stage: str, recipe: str) -> str:
    """What a model is called where seeds are averaged: a merge by rule and partner, without the ratio, which seeds choose."""
    if stage != "merge":
        return tuning.kind(stage, recipe) if stage == "instruct" else tuning.named(recipe)
    rule, pair, *_ = recipe.split("/")
    partner = pair.partition("+")[2]
    return f"{CALLED.get(rule, rule).replace('_', ' ')} + {tuning.named(partner) if partner != 'aligned' else 'parent'}"


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
    """Area under each family's front (1 − ASR against helpfulness), and by how much that of merges of two models exceeds it.

    An end of the line between two models is no merge of them, and merges with the parent are a family of their own.

    Draws:    bootstrap samples of clusters, the same for all models of one backbone and seed
    """
    lines = []
    for unit, rows in groups(final(raw), UNIT, sort=True):
        rows = rows[~(rows["recipe"].str.endswith(ENDS) & (rows["stage"] == "merge"))]
        if "merge" not in set(rows["stage"]):
            continue
        seen = rows.loc[rows["benchmark"].isin(needed("multimodal_asr")), "recipe"]
        rows = rows[rows["recipe"].isin(seen)].assign(step=0)
        rng = np.random.default_rng(unit["seed"])
        drawn = resampling.bootstrap(rows, ("text_asr", "multimodal_asr", "helpfulness"), rng, draws)
        whole = {recipe for recipe, _ in set.intersection(*map(set, drawn.values()))}  # a guard alone may have marked others
        rows = rows[rows["recipe"].isin(whole)]
        of_family = families(rows.groupby("recipe")["stage"].first())
        if "merged" not in of_family:
            continue
        for measure in ("text_asr", "multimodal_asr"):
            points = {r: np.stack([1 - drawn[measure][r, 0], drawn["helpfulness"][r, 0]], -1) for r in rows["recipe"].unique()}
            areas = {name: hypervolume(np.stack([points[r] for r in recipes], 1)) for name, recipes in of_family.items()}
            for name, area in areas.items():
                line = unit | {"measure": measure, "family": name, "models": len(of_family[name])} | percentiles(area, "area")
                exceeded = percentiles(areas["merged"] - area, "merges_exceed_by") if name != "merged" else {}
                lines.append(line | exceeded)
    return pd.DataFrame(lines)


def families(stages: pd.Series) -> dict[str, list[str]]:
    """Sets of models whose fronts are compared: all merges, the single tunings, all tunings, the ensembles."""
    recipes: dict[str, list[str]] = {"merged": []}
    for recipe, stage in stages.items():
        of = family(stage, recipe)
        of = "merged with the parent" if of == "merged" and WITH_PARENT in recipe else of
        recipes.setdefault(of if stage == "merge" or of == "adapted" else "tuned", []).append(recipe)
    singles = {name: [run.partition("/")[2]] for name, run in TUNED.items() if run.partition("/")[2] in stages.index}
    return {name: members for name, members in {**recipes, **singles}.items() if members}


def sheet(lines: pd.DataFrame, verdict: pd.DataFrame, reference: str = "adapted") -> pd.DataFrame:
    """T07 for the eye: one line per rule × partner in percent, with changes from a reference and the verdicts on the others, and
    whether the merge can answer at all, where the lines say so."""
    shown = analysis_measures.compact(lines[(lines["reference"] == reference) | lines["reference"].isna()], [*KEYS, "place"])
    # in part: not all measures were taken of both
    shown_verdict = verdict["verdict"].where(verdict["whole"], verdict["verdict"] + " (in part)")
    wide = verdict.assign(verdict=shown_verdict).pivot_table(index=KEYS, columns="reference", values="verdict", aggfunc="first")
    rivals = [name for name in ("mtl", "sl", "dpo", "ensemble", "linear") if name in wide.columns]
    against = wide[rivals].rename(columns={"linear": CALLED["inside"]}).add_prefix("against ")
    whole = shown.merge(against.reset_index(), on=KEYS, how="left")
    own = [name for name in ("capable",) if name in lines]
    return whole.merge(lines[[*KEYS, *own]].drop_duplicates(KEYS), on=KEYS, how="left").replace({"rule": CALLED})


def dominance(verdict: pd.DataFrame) -> pd.DataFrame:
    """The lines of `verdicts` for the eye."""
    return verdict.replace({"rule": CALLED, "reference": {"linear": CALLED["inside"]}})
