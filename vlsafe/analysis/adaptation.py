"""T03 and T04: other data, other methods, other prompts, each beside the main line.

Arms are compared twice. At equal steps an arm may look safe because it has learned little; at equal helpfulness all
arms have come equally far. Both comparisons are paired: the same items, and in the bootstrap the same draws of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.analysis import clustered, measures, resampling, stats
from vlsafe.analysis.measures import GRADED, HEADLINE, UNIT, Lacking, compact, events, groups, run_names
from vlsafe.analysis.resampling import Draws
from vlsafe.core.schema import MAIN_LINE

MAIN = MAIN_LINE["adapted"].partition("/")[2]
LEVELLED = ("text_asr", "multimodal_asr")  # compared at equal helpfulness as well
DOSED = (
    "text_asr", "text_refusal_probability", "multimodal_asr", "picture_refusal_probability", "twin_refusal", "helpfulness",
    "multimodal_incoherent",
)  # fmt: skip
NO_HOWTOS = "looking-full"
STEPS, LEVEL = "equal steps", "equal helpfulness"
FIRST, WINDOW = 5, 20  # steps whose mean loss is that of the start, and of a checkpoint; assumed
START = ("", 0)  # the point, (recipe, step), at which every recipe begins: the end of stage 1


def arms(raw: pd.DataFrame) -> pd.DataFrame:
    """T03: one line per backbone × seed × recipe × comparison × measure, each with its difference from the main recipe."""
    return pd.concat([equal_steps(raw).assign(at=STEPS), equal_helpfulness(raw).assign(at=LEVEL)], ignore_index=True)


def equal_steps(raw: pd.DataFrame) -> pd.DataFrame:
    """Every recipe of stage 2 after its last step, and the paired difference of its full examination from the main one's.

    Raises:   Lacking where none was examined
    """
    final = raw[(raw["stage"] == "instruct") & (raw["exam"] == "full")]
    lines = measures.rates(final, [*HEADLINE, *GRADED], [*UNIT, "recipe", "step"])
    if lines.empty:
        raise Lacking("there is no full examination of a model of stage 2")
    others = [f"instruct/{recipe}" for recipe in final["recipe"].unique() if recipe != MAIN]
    change = measures.differences(final, MAIN_LINE["adapted"], others, [*HEADLINE, *GRADED])
    return measures.with_changes(lines, change)


def equal_helpfulness(raw: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """Attack success of every recipe where its helpfulness first reaches what the least helpful recipe reaches at best.

    Along the checkpoints that all recipes share, from the end of stage 1 (step 0 of every recipe) to the last step, on
    the panel's items; between two of them linearly. `reached` says where: "between" two checkpoints, "before the first"
    one, or "start": there the end of stage 1 is as helpful already, and nothing is interpolated. A recipe that gains less
    than half of what the main one gains over stage 1 has no say in the level and no value at it: "never". As with any
    bootstrap, an interval has no width where all clusters agree at all points, as at no success or nothing but successes.
    A study without panels, without the end of stage 1 or without one of these measures has no line.

    Draws:    bootstrap samples of clusters, the same for all checkpoints and recipes; the level is found again in each
    """
    lines = []
    for unit, rows, drawn in _drawn(raw, ("helpfulness", *LEVELLED), draws):
        n = {measure: len(events(rows[rows["step"] == START[1]], measure)) for measure in LEVELLED}
        recipes = [recipe for recipe in dict.fromkeys(rows["recipe"]) if recipe != START[0]]
        lines += [unit | line | {"n": n[line["measure"]]} for line in levelled(drawn, recipes)]
    return pd.DataFrame(lines)


def _drawn(
    raw: pd.DataFrame, compared: Sequence[str], draws: int
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, dict[str, Draws]]]:  # fmt: skip
    """Per backbone and seed the panel's rows and bootstrap draws of measures at every point; those that lack one are left out."""
    for unit, of in groups(raw, UNIT, sort=True):
        rows = panel(of)
        if {START[0]} < set(rows["recipe"]) and set(measures.present(rows, compared)) == set(compared):
            rng = np.random.default_rng(unit["seed"])
            yield unit, rows, resampling.bootstrap(rows, compared, rng, draws)


def matched(raw: pd.DataFrame, weights: pd.DataFrame, losses: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """T03 where two recipes have come equally far: attack success of each recipe and of the main one at the same distance of the
    language weights from the parent's, and where the loss has fallen as much, each as far as the one that came less far.

    Along the checkpoints that all recipes share and the end of stage 1, between two of them linearly; `weights` are of
    `inspection.states.drift`, `losses` one line per step of a training. A recipe with other rows has another loss, so it is
    compared by how much its own has fallen: the mean of WINDOW steps before a checkpoint, from that of the first FIRST ones.

    Units:    distance: relative to the length of the parent's weights; loss: nats per token of the answers
    Draws:    bootstrap samples of clusters, the same for all checkpoints and recipes
    Raises:   Lacking where no other recipe has checkpoints in common with the main one
    """
    far, lines = progress(weights, losses), []
    for unit, rows, drawn in _drawn(raw, LEVELLED, draws):
        own = far[(far["backbone"] == unit["backbone"]) & (far["seed"] == unit["seed"])]
        for by, of in own.groupby("by", sort=False):
            come = {(line.recipe, line.step): line.value for line in of.itertuples()}
            for recipe in [name for name in dict.fromkeys(rows["recipe"]) if name not in (START[0], MAIN)]:
                points = {name: [p for p in sorted(drawn[LEVELLED[0]]) if p[0] == name and p in come] for name in (MAIN, recipe)}
                if all(points.values()):
                    lines += [unit | {"by": by, "recipe": recipe} | line for line in _at_equal(drawn, come, points)]
    if not lines:
        raise Lacking("no other recipe of stage 2 has checkpoints in common with the main one")
    return pd.DataFrame(lines)


def _at_equal(
    drawn: Mapping[str, Draws], come: Mapping[tuple[str, int], float], points: Mapping[str, Sequence[tuple[str, int]]]
) -> Iterator[dict[str, Any]]:
    """One line per measure: two recipes where both have come as far as the one that came less far."""
    level = min(max(come[point] for point in of) for of in points.values())
    for measure in LEVELLED:
        at, line = {}, {"measure": measure, "level": level}
        for name, of in points.items():
            values = np.stack([drawn[measure][point] for point in (START, *of)], 1)
            heights = np.maximum.accumulate([0.0, *(come[point] for point in of)])[None]
            steps = np.array([[0.0, *(float(step) for _, step in of)]])
            goal = np.array([level])
            line |= {"main_step" if name == MAIN else "step": float(stats.at_level(heights, steps, goal)[0])}
            at[name] = stats.at_level(np.repeat(heights, len(values), 0), values, np.repeat(goal, len(values)))
        (_, main), (_, other) = at.items()
        yield line | stats.percentiles(other) | stats.percentiles(main, "main") | stats.percentiles(other - main, "difference")


def distance(weights: pd.DataFrame) -> pd.Series:
    """How far the language weights of each checkpoint of stage 2 are from the parent's, by backbone, seed, recipe and step.

    Units:    relative to the length of the parent's weights
    """
    weights = weights[weights["stage"] == "instruct"].drop_duplicates([*UNIT, "recipe", "step", "weight"])
    moved = weights.groupby([*UNIT, "recipe", "step"], sort=False)[["change", "norm"]].sum()
    return np.sqrt(moved["change"] / moved["norm"]).rename("value")


def progress(weights: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """How far each checkpoint of stage 2 has come, one line per backbone × seed × recipe × step, by "distance" and by "loss"."""
    moved, fallen = distance(weights).reset_index(), []
    for unit, of in groups(losses, [*UNIT, "recipe"]):
        loss = of.sort_values("step")["loss"].to_numpy()
        steps = moved.loc[(moved[list(unit)] == pd.Series(unit)).all(axis=1), "step"]
        at = {step: loss[max(0, step - WINDOW) : step].mean() for step in steps}
        fallen += [unit | {"step": step, "value": loss[:FIRST].mean() - mean} for step, mean in at.items()]
    return pd.concat([moved.assign(by="distance"), pd.DataFrame(fallen).assign(by="loss")], ignore_index=True)


def seeing(losses: pd.DataFrame) -> pd.DataFrame:
    """What a picture is worth to a model: the loss of held-out captions with the right picture and with another one's, and the
    paired difference, one line per checkpoint.

    `losses` has a row per caption; captions are the clusters. Units:    nats per token of the caption
    """
    lines = []
    for model, rows in groups(losses, [*UNIT, "stage", "recipe", "step"]):
        rng, clusters = np.random.default_rng(model["seed"]), rows["cluster"].tolist()
        drawn = clustered.paired_difference(rows["right"], rows["shuffled"], clusters, rng)
        named = dict(zip(("difference", "difference_low", "difference_high"), drawn, strict=True))
        means = {"right": rows["right"].mean(), "shuffled": rows["shuffled"].mean(), "n": len(rows)}
        lines.append(model | means | named | {"norm_ratio": rows["norm_ratio"].iloc[0]})
    return pd.DataFrame(lines)


def doses(raw: pd.DataFrame) -> pd.DataFrame:
    """F04: what a dose of harmless how-tos among rows that ask what is seen does, about pictures or without any: one line per
    backbone × seed × kind × dose × measure, with its paired difference from a dose of nothing, which both kinds share.

    Units:    dose: percent of the rows of stage 2
    Raises:   Lacking where no dose was examined
    """
    final = raw[(raw["stage"] == "instruct") & (raw["exam"] == "full")]
    runs = pd.Series(final["recipe"].unique()).to_frame("recipe")
    found = runs["recipe"].str.extract(r"^dose-(?P<kind>pictured|text)-(?P<dose>\d+)$")
    dosed = runs.assign(**found).dropna()
    if dosed.empty or NO_HOWTOS not in set(runs["recipe"]):
        raise Lacking("no model of stage 2 was trained with a dose of how-tos, or none without any, to compare it with")
    none = pd.DataFrame({"recipe": NO_HOWTOS, "kind": dosed["kind"].unique(), "dose": "0"})
    dosed = pd.concat([none, dosed], ignore_index=True).astype({"dose": int})
    final = final[final["recipe"].isin(dosed["recipe"])]
    lines = measures.rates(final, [name for name in DOSED if measures.present(final, [name])], [*UNIT, "recipe"])
    change = measures.differences(final, f"instruct/{NO_HOWTOS}", [f"instruct/{name}" for name in dosed["recipe"]], DOSED)
    return dosed.merge(measures.with_changes(lines, change), on="recipe").sort_values(["backbone", "seed", "kind", "dose"])


def panel(raw: pd.DataFrame) -> pd.DataFrame:
    """Answers to the panel's items at the end of stage 1 and at the steps that all recipes of stage 2 share, the last included.

    `raw` is of one backbone and seed. Recipe and step of the end of stage 1 become those of START.
    """
    arms = raw[(raw["stage"] == "instruct") & raw["exam"].isin(["panel", "full"])]
    arms = arms[arms["recipe"].isin(arms.loc[arms["exam"] == "panel", "recipe"])]
    shared = [set(steps) for _, steps in arms.groupby("recipe")["step"]]
    start = raw[(run_names(raw) == MAIN_LINE["stage 1"]) & (raw["exam"] == "full")].assign(recipe=START[0], step=START[1])
    rows = pd.concat([start, arms[arms["step"].isin(set.intersection(*shared) if shared else ())]])
    return rows[rows["item"].isin(arms.loc[arms["exam"] == "panel", "item"])]


def levelled(drawn: Mapping[str, Draws], recipes: Sequence[str]) -> list[dict[str, Any]]:
    """One line per recipe × measure at the level of one backbone and seed; see `equal_helpfulness`."""
    points = sorted(drawn["helpfulness"])
    curves = {recipe: [START, *(p for p in points if p[0] == recipe)] for recipe in recipes}
    heights = {recipe: np.stack([drawn["helpfulness"][p] for p in curve], 1) for recipe, curve in curves.items()}
    gains = {recipe: height[0, 1:].max() - height[0, 0] for recipe, height in heights.items()}
    enough = [recipe for recipe, gain in gains.items() if gain >= gains.get(MAIN, max(gains.values())) / 2]
    # None is where the main recipe has lost helpfulness and no other keeps more of it: no level, and every line says "never".
    level = np.min([heights[recipe][:, 1:].max(1) for recipe in enough], axis=0, initial=np.inf)
    lines = []
    for measure in LEVELLED:
        values = {recipe: np.stack([drawn[measure][p] for p in curves[recipe]], 1) for recipe in enough}
        at = {recipe: stats.at_level(heights[recipe], values[recipe], level) for recipe in enough}
        for recipe, curve in curves.items():
            line: dict[str, Any] = {"recipe": recipe, "measure": measure}
            if recipe not in enough:
                lines.append(line | {"reached": "never"})
                continue
            height, steps = heights[recipe][:1], np.array([[float(step) for _, step in curve]])
            place = int((height >= level[0]).argmax())
            line |= {"level": level[0], "step": stats.at_level(height, steps, level[:1])[0]}
            line |= {"reached": ("start", "before the first")[place] if place < 2 else "between"}
            line |= stats.percentiles(at[recipe])
            if recipe != MAIN and MAIN in at:
                line |= stats.percentiles(at[recipe] - at[MAIN], "difference")
            lines.append(line)
    return lines


def over_seeds(lines: pd.DataFrame) -> pd.DataFrame:
    """T03 over seeds: mean and range of every recipe and of its difference from the main one, and each seed's value.

    Where a difference keeps its sign in every seed, the arms may differ beyond seeds; few seeds show no more than that.
    """
    by = ["backbone", "at", "measure", "recipe"]
    columns = dict(n_seeds=("seed", "nunique"), mean=("value", "mean"), lowest=("value", "min"), highest=("value", "max"))
    columns |= {f"difference_{name}": ("difference", name) for name in ("mean", "min", "max")}
    spread = lines.groupby(by, sort=False).agg(**columns)
    spread = spread.join(lines.pivot(index=by, columns="seed", values="value").add_prefix("seed "))
    return spread.reset_index().sort_values("backbone", kind="stable", ignore_index=True)


def one_training(lines: pd.DataFrame) -> str:
    """Which recipes of T03 have one training for all seeds as far as text is concerned: their probabilities of refusal, which two
    trainings never share, are the same."""
    graded = lines[lines["measure"] == "text_refusal_probability"].groupby(["backbone", "recipe"])["value"]
    same = graded.nunique().eq(1) & graded.count().gt(1)
    names = ", ".join(f"{recipe} ({backbone})" for backbone, recipe in same.index[same])
    return f"On text one training is that of all seeds: {names}." if names else ""


def confounds(raw: pd.DataFrame) -> pd.DataFrame:
    """T04: per model and condition the text ASR and the refusal of harmless requests, and their paired change from plain text.

    Paired by verb–object pair: a condition asks about every pair once, and "none" is no picture and no system prompt.
    """
    lines = []
    raw = raw[raw["exam"] == "confounds"].assign(condition=lambda frame: frame["group"])
    for measure in ("confounds_asr", "confounds_refusal"):
        for model, rows in groups(events(raw, measure), [*UNIT, "stage", "recipe"]):
            plain = rows[rows["condition"] == "none"]
            for condition, part in rows.groupby("condition", sort=False):
                rate = vars(measures.estimate(part, measure))
                line = model | {"condition": condition, "measure": measure}
                line |= {name: rate[name] for name in ("value", "low", "high", "n")}
                if condition != "none":
                    both = part.merge(plain, on="cluster", suffixes=("", "_plain")).dropna(subset=["event", "event_plain"])
                    a, b = both["event_plain"].astype(float), both["event"].astype(float)
                    paired = clustered.paired_difference(a, b, both["cluster"].tolist(), np.random.default_rng(model["seed"]))
                    line |= dict(zip(("difference", "difference_low", "difference_high"), paired, strict=True))
                lines.append(line)
    return pd.DataFrame(lines)


def capabilities(raw: pd.DataFrame) -> pd.DataFrame:
    """How often the controls of capability were answered exactly right, beside what guessing scores.

    Raises:   Lacking where they were not asked
    """
    names = [name for name in measures.MEASURES if name.startswith("capability")]
    rates = measures.rates(raw, names, ["model"])
    if rates.empty:
        raise Lacking("captions and how-tos whose one right answer is known are the miniature's; see helpfulness instead")
    return rates.assign(chance=rates["measure"].map(measures.CHANCE))


def level_sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """T03 at equal helpfulness for the eye, of one study: where each recipe reaches it, and its attack success there.

    Raises:   Lacking where nothing was compared at equal helpfulness
    """
    if "reached" not in lines:
        raise Lacking("no two recipes have panels of attacks and helpfulness at steps that they share")
    return compact(lines.round(3), ["recipe", "level", "step", "reached"], LEVEL)


def sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """T03 for the eye: one line per backbone × seed × recipe with both comparisons."""
    index = [*UNIT, "recipe"]
    level = compact(lines, index, LEVEL).rename(columns=lambda name: name if name in index else f"{name}, {LEVEL}")
    steps = compact(lines, [*index, "step"], STEPS).astype({"step": int})
    if "reached" not in lines:
        return steps
    reached = lines.dropna(subset=["reached"]).drop_duplicates(index)[[*index, "reached"]]
    return steps.merge(level, on=index, how="left").merge(reached, on=index, how="left")
