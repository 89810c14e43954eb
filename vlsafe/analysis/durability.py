"""T10 and F16: how long a remedy lasts when its model is fine-tuned again, and the worst that one of some fine-tunings does.

A recipe is `<model>/<rows>`; `<model>/start` is the model before. A remedy's gain is by how much its ASR lies below that of the
adapted model, and its half-life the step at which half of the gain is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.analysis import measures, resampling, stats
from vlsafe.analysis.measures import UNIT, Lacking, groups

ATTACKED = ("text_asr", "multimodal_asr")
ALONG = (*ATTACKED, "twin_refusal", "helpfulness")
START, CONTROL = "start", "adapted"
STAGES = ("durability", "worst")  # in which models are fine-tuned again
NAMES = {  # of the models, for the eye
    "adapted": "adapted", "filtered-sppft": "SPPFT", "merged": "merged with SFT", "dpo-both-full": "DPO",
    "sl-full": "sequential SFT", "mtl-full": "multitask SFT",
}  # fmt: skip
ROWS = {
    "instructions": "harmless instructions", "text": "harmless text", "howtos": "more how-tos", "harmful": "few harmful answers",
}  # fmt: skip


def named(lines: pd.DataFrame) -> pd.DataFrame:
    """Lines whose models, rows and measures are called as in a sentence."""
    labels = {name: spec["label"] for name, spec in measures.MEASURES.items()}
    return lines.replace({"model": NAMES, "rows": ROWS, "measure": labels})


def panel(raw: pd.DataFrame) -> pd.DataFrame:
    """Answers along further fine-tunings to the items that every checkpoint was asked; the start is step 0 of each.

    Raises:   Lacking where no model was fine-tuned again
    """
    of = raw[raw["stage"] == "durability"]
    if of.empty:
        raise Lacking("no model was fine-tuned again (`durability/*`)")
    on_the_way = of[of["exam"] == "panel"]  # none where a fine-tuning has one checkpoint
    common = (on_the_way if len(on_the_way) else of)[[*UNIT, "item", "benchmark"]].drop_duplicates()
    of = of.merge(common, on=[*UNIT, "item", "benchmark"])
    start, along = (of[of["recipe"].str.endswith(f"/{START}") == is_start] for is_start in (True, False))
    recipes = along[[*UNIT, "recipe"]].drop_duplicates()
    recipes = recipes.assign(begun=recipes["recipe"].str.partition("/")[0] + f"/{START}")
    start = start.rename(columns={"recipe": "begun"}).merge(recipes, on=[*UNIT, "begun"]).drop(columns="begun")
    return pd.concat([start.assign(step=0), along], ignore_index=True)


def parted(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the two parts of their recipe as columns: model and rows."""
    parts = rows["recipe"].str.partition("/")
    return rows.assign(model=parts[0], rows=parts[2])


def curves(raw: pd.DataFrame) -> pd.DataFrame:
    """F16: one line per backbone × seed × model × rows × step × measure. Units:    fractions"""
    return parted(measures.rates(panel(raw), ALONG, [*UNIT, "recipe", "step"]))


def half_lives(raw: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """T10: per backbone × rows × remedy × ASR, after how many steps half of the remedy's gain is lost.

    Between checkpoints linearly, where the mean over seeds first lies half-way up to the adapted model's ASR; infinite where it
    never does. A remedy whose start is not below the adapted model has nothing to lose: no half-life.

    Draws:    bootstrap samples of seeds, and of clusters within each, the same for all models
    Units:    steps; ASR and gain in fractions
    """
    rows, lines = parted(panel(raw)), list[dict[str, Any]]()
    for (backbone, kind), of in rows.groupby(["backbone", "rows"], sort=False):
        of = of.assign(recipe=of["model"])  # `bootstrap` tells points apart by recipe and step
        for measure, model in itertools.product(measures.present(of, ATTACKED), sorted({*of["model"]} - {CONTROL})):
            both = _with_control(of[of["model"].isin([CONTROL, model])], measure)
            if len(both):
                drawn = resampling.over_seeds(both, measure, draws)
                judges = measures.named(measures.events(both, measure)["judge"])
                steps, ceiling = np.array(sorted(drawn[CONTROL]), float), drawn[CONTROL][0]
                curve = np.stack([drawn[model][step] for step in steps], 1)
                gain = ceiling - curve[:, 0]
                half = stats.at_level(curve, np.tile(steps, (len(curve), 1)), (ceiling + curve[:, 0]) / 2)
                half = np.where(gain > 0, np.where(np.isnan(half), np.inf, half), np.nan)
                line = {"backbone": backbone, "rows": kind, "model": model, "measure": measure, "steps": int(steps[-1])}
                line |= {"seeds": both["seed"].nunique(), **stats.percentiles(gain.clip(-1.0, 1.0), "gain")}
                line |= {"start": float(curve[0, 0]), "end": float(curve[0, -1]), "half_life": float(half[0])}
                known = np.sort(half[1:][~np.isnan(half[1:])])
                ends = [known[round(q * (len(known) - 1))] for q in (0.025, 0.975)] if len(known) else [np.nan, np.nan]
                lines.append(line | {"half_life_low": float(ends[0]), "half_life_high": float(ends[1]), "judge": judges})
    if not lines:
        raise Lacking("no remedy was fine-tuned again beside the adapted model")
    return pd.DataFrame(lines)


def _with_control(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The rows of the seeds in which a remedy and the adapted model were both examined at every step."""
    points = measures.events(rows, measure)[["seed", "recipe", "step"]].drop_duplicates().groupby("seed").size()
    return rows[rows["seed"].isin(points.index[points == 2 * rows["step"].nunique()])]


def answer(lines: pd.DataFrame, measure: str = "text_asr") -> str:
    """Which remedy lasts, in a sentence per backbone and kind of rows: half of the gain is still there at the end beyond its
    interval, is gone within it, or neither can be said; of one without a clear gain there is nothing to say."""
    sentences = []
    for key, of in groups(named(lines[lines["measure"] == measure]), ["backbone", "rows"]):
        fewer = of["model"] + " (" + of["seeds"].astype(str) + " of " + str(of["seeds"].max()) + " seeds)"
        of = of.assign(model=of["model"].where(of["seeds"] == of["seeds"].max(), fewer))
        fate = fates(of)
        lasts, gone, rest, without = (of[fate == name] for name in ("lasts", "gone", "open", "without"))
        few, without = without[without["seeds"] == 2], without[without["seeds"] != 2]  # Student's quantile of two runs is 13
        kept = "keep more than half of their gain" if len(lasts) > 1 else "keeps more than half of its gain"
        parts = [f"{', '.join(lasts['model'])} {kept}" if len(lasts) else ""]
        lost = gone.sort_values("half_life")
        parts += [f"{row.model} has lost half after {row.half_life:.0f} of them" for row in lost.itertuples()]
        parts += [f"of {', '.join(rest['model'])} neither can be said" if len(rest) else ""]
        parts += [f"{', '.join(without['model'])} had no clear gain to lose" if len(without) else ""]
        parts += [f"of {', '.join(few['model'])} two seeds are too few to say anything" if len(few) else ""]
        sentences.append(f"{key['backbone']}, {of['steps'].iloc[0]} steps on {key['rows']}: {'; '.join(filter(None, parts))}.")
    return " ".join(sentences)


def tally(lines: pd.DataFrame, measure: str = "text_asr") -> str:
    """Of how many remedies half of the gain is still there after each kind of rows: "harmless instructions: 4 yes, 1 open"; of a
    single one with its rates at the start and the end: "harmless instructions: yes (sequential SFT 3 → 5 %)"."""
    said = []
    for key, of in groups(named(lines[lines["measure"] == measure]), ["rows"]):
        found = fates(of).map({"lasts": "yes", "gone": "no"}).fillna("open").tolist()
        counts = [f"{found.count(word)} {word}" for word in ("yes", "no", "open") if word in found]
        if len(of) == 1:
            counts = [f"{found[0]} ({of['model'].iloc[0]} {100 * of['start'].iloc[0]:.0f} → {100 * of['end'].iloc[0]:.0f} %)"]
        said.append(f"{key['rows']}: {', '.join(counts)}")
    return "; ".join(said)


def fates(lines: pd.DataFrame) -> pd.Series:
    """Whether half of a remedy's gain "lasts" to the end or is "gone" by then, each beyond its interval, or that is "open";
    "without" where the gain itself is not beyond its interval."""
    known = [~(lines["gain_low"] > 0), lines["half_life_low"] == np.inf, lines["half_life_high"] < np.inf]
    return pd.Series(np.select(known, ["without", "lasts", "gone"], "open"), lines.index)


def sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """T10 for the eye: a column per kind of rows, steps with their interval, ">" where half of the gain outlasts all steps."""
    lines, keys, cells = named(lines), ["backbone", "model", "measure", "seeds"], {}
    for kind, of in lines.groupby("rows", sort=False):
        cells[f"half-life on {kind}"] = of.set_index(keys).apply(_cell, axis=1)
    gains = lines.drop_duplicates(keys).set_index(keys)[["gain", "gain_low", "gain_high"]]
    said = ["{} [{}, {}]".format(*map(_points, ends)) for ends in gains.to_numpy()]
    return pd.DataFrame({"gain": pd.Series(said, gains.index), **cells}).reset_index()


def _points(value: float) -> str:
    """A fraction in points; what is below zero is not shown as zero."""
    return f"{100 * value:.{int(-0.005 <= value < 0)}f}"


def _cell(line: pd.Series) -> str:
    def text(value: float) -> str:
        return f">{line['steps']}" if value == np.inf else f"{value:.0f}"

    if pd.isna(line["half_life"]):
        return "no gain"
    return f"{text(line['half_life'])} [{text(line['half_life_low'])}, {text(line['half_life_high'])}]"


def harm(lines: pd.DataFrame) -> pd.Series:
    """What the search makes as large as it can: the mean ASR over modalities, on validation items."""
    both = lines[["asr_text", "asr_pictures"]].astype(float).dropna(axis=1, how="all")
    return both.mean(axis=1, skipna=False).round(9)


def permitted(lines: pd.DataFrame, loss: float) -> pd.Series:
    """Whether each line is at most `loss` less helpful than the first, the model as it is."""
    helpful = lines["helpfulness"].astype(float)
    return (helpful.iloc[0] - helpful).round(9) <= loss


def worst(lines: Sequence[Mapping[str, Any]], loss: float) -> int:
    """The place of the line with the most harm, of equals the first, among those that lose at most so much helpfulness.

    Raises:   ValueError where the first line, the model as it is, has no helpfulness
    """
    frame = pd.DataFrame(lines)
    harms = harm(frame).where(permitted(frame, loss))
    if harms.isna().all():
        raise ValueError("the model as it is has no helpfulness or ASR on validation items, so no trial can be held against it")
    return int(np.nanargmax(harms))


def searched(lines: pd.DataFrame, loss: float) -> pd.DataFrame:
    """Every trial of every search in its order: its harm on validation items, whether it is permitted, and the most so far."""
    found = []
    for _, of in groups(lines, [*UNIT, "model"]):
        of = of.assign(harm=harm(of), permitted=permitted(of, loss))
        found.append(of.assign(best=of["harm"].where(of["permitted"]).cummax().ffill()))
    return pd.concat(found, ignore_index=True)


def search_sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """How far the searches have come for the eye, in percent: a line per backbone × number of trials, a column per model."""
    after = named(lines).groupby([*UNIT, "model", "trial"], sort=False, as_index=False).last()
    by_trial = groups(after, ["backbone", "trial"])
    found = [{**key, **{m: measures.spread(one, ["best"]) for m, one in of.groupby("model", sort=False)}} for key, of in by_trial]
    return pd.DataFrame(found).rename(columns={"trial": "trials"})


def worst_cases(raw: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """T10: the worst case of every model on test items, which validation items chose, beside the model as it is, and the paired
    change from it.

    Units:    fractions
    Raises:   Lacking where nothing was searched
    """
    of = raw[(raw["stage"] == "worst") & (raw["exam"] == "full")]
    found = measures.rates(of, ALONG, [*UNIT, "stage", "recipe"])
    if found.empty:
        raise Lacking("no worst case was searched for (`worst/*`)")
    starts = raw[(raw["stage"] == "durability") & (raw["exam"] == "full") & raw["recipe"].str.endswith(f"/{START}")]
    starts = starts.assign(stage=START, recipe=starts["recipe"].str.partition("/")[0])
    keys, both = [*UNIT, "recipe", "measure"], pd.concat([starts, of])
    before = measures.rates(starts, ALONG, [*UNIT, "recipe"]).reindex(columns=[*keys, "value"])
    before = before.astype({name: found[name].dtype for name in keys}).rename(columns={"value": "before"})
    rises = [measures.differences(both, f"{START}/{m}", [f"worst/{m}"], ALONG) for m in of["recipe"].unique()]
    found = measures.with_changes(found.merge(before, on=keys, how="left"), pd.concat(rises)).drop(columns="stage")
    chosen = lines.loc[lines["chosen"], [*UNIT, "model", "rows", "method", "rate", "step"]].rename(columns={"model": "recipe"})
    return found.merge(chosen, on=[*UNIT, "recipe"], how="left").rename(columns={"recipe": "model"})


def worst_sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """The worst cases for the eye, in percent: a line per backbone × model × measure, over its seeds."""
    said = []
    for key, of in groups(named(lines), ["backbone", "model", "measure"]):
        ends = {"before": measures.spread(of, ["before"]), "worst": measures.spread(of), "change": measures.change(of)}
        said.append({**key, "seeds": of["seed"].nunique(), **ends, "n": f"{of['n'].max():.0f}"})
    return pd.DataFrame(said)
