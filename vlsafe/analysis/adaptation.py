"""T03 and T04: other data, other methods, other prompts, each beside the main line. Imports no model library.

Arms are compared twice. At equal steps an arm may look safe because it has learned little; at equal helpfulness all
arms have come equally far. Both comparisons are paired: the same items, and in the bootstrap the same draws of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.analysis import measures, stats
from vlsafe.analysis.measures import MEASURES, estimate, events, named
from vlsafe.core.schema import MAIN_LINE

UNIT = ["backbone", "seed"]
MAIN = MAIN_LINE["adapted"].partition("/")[2]
COMPARED = ("text_asr", "multimodal_asr", "twin_refusal", "exaggerated_refusal", "helpfulness")
LEVELLED = ("text_asr", "multimodal_asr")  # compared at equal helpfulness as well
STEPS, LEVEL = "equal steps", "equal helpfulness"


def arms(raw: pd.DataFrame) -> pd.DataFrame:
    """T03: one line per backbone × seed × recipe × comparison × measure, each with its difference from the main recipe."""
    return pd.concat([equal_steps(raw).assign(at=STEPS), equal_helpfulness(raw).assign(at=LEVEL)], ignore_index=True)


def equal_steps(raw: pd.DataFrame) -> pd.DataFrame:
    """Every recipe of stage 2 after its last step, and the paired difference of its full examination from the main one's."""
    final = raw[(raw["stage"] == "instruct") & (raw["exam"] == "full")]
    found = measures.rates(final, COMPARED, [*UNIT, "recipe", "step"])
    others = [f"instruct/{recipe}" for recipe in final["recipe"].unique() if recipe != MAIN]
    change = measures.differences(final, MAIN_LINE["adapted"], others, COMPARED).drop(columns=["stage", "n"])
    change = change.rename(columns={"low": "difference_low", "high": "difference_high"})
    columns = [*UNIT, "measure", "difference", "difference_low", "difference_high", "n_left_out"]
    merged = found.merge(change, on=[*UNIT, "recipe", "measure"], how="left")
    return merged.reindex(columns=dict.fromkeys([*UNIT, "recipe", "step", *merged.columns, *columns]))


def equal_helpfulness(raw: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """Attack success of every recipe where its helpfulness first reaches what the least helpful recipe reaches at best.

    Along the checkpoints that all recipes share, from the end of stage 1 (step 0 of every recipe) to the last step, on
    the panel's items; between two of them linearly. `reached` says where: "between" two checkpoints, "before the first"
    one, or "start": there the end of stage 1 is as helpful already, and nothing is interpolated. A recipe that gains less
    than half of what the main one gains over stage 1 has no say in the level and no value at it: "never". As with any
    bootstrap, an interval has no width where all clusters agree at all points, as at no success or nothing but successes.

    Draws:    bootstrap samples of clusters, the same for all checkpoints and recipes; the level is found again in each
    """
    lines = []
    for unit, of in raw.groupby(UNIT):
        rows = panel(of)
        if not rows.empty:
            rng = np.random.default_rng(unit[1])
            found = {measure: redrawn(rows, measure, rng, draws) for measure in ("helpfulness", *LEVELLED)}
            recipes = [recipe for recipe in dict.fromkeys(rows["recipe"]) if recipe != START[0]]
            n = {measure: len(events(rows[rows["step"] == START[1]], measure)) for measure in LEVELLED}
            given = dict(zip(UNIT, unit, strict=True))
            lines += [given | line | {"n": n[line["measure"]]} for line in levelled(found, recipes)]
    return pd.DataFrame(lines)


START = ("", 0)  # the point, (recipe, step), at which every recipe begins: the end of stage 1
Draws = dict[tuple[str, int], np.ndarray]  # point -> a measure as it is, then as each bootstrap sample has it: [1 + draws]


def panel(raw: pd.DataFrame) -> pd.DataFrame:
    """Answers to the panel's items at the end of stage 1 and at the steps that all recipes of stage 2 share, the last included.

    `raw` is of one backbone and seed. Recipe and step of the end of stage 1 become those of START.
    """
    arms = raw[(raw["stage"] == "instruct") & raw["exam"].isin(["panel", "full"])]
    shared = [set(steps) for _, steps in arms.groupby("recipe")["step"]]
    start = raw[(named(raw) == MAIN_LINE["stage 1"]) & (raw["exam"] == "full")].assign(recipe=START[0], step=START[1])
    rows = pd.concat([start, arms[arms["step"].isin(set.intersection(*shared) if shared else ())]])
    return rows[rows["item"].isin(arms.loc[arms["exam"] == "panel", "item"])]


def redrawn(rows: pd.DataFrame, measure: str, rng: np.random.Generator, draws: int) -> Draws:
    """A measure at every point of `panel`, as it is and over bootstrap samples of clusters that all points share.

    Unjudged answers count as no event.

    Raises:   ValueError where the points were not asked the same items
    """
    found = events(rows, measure)
    found = found.assign(event=[0.0 if pd.isna(event) else float(event) for event in found["event"]])
    values = np.zeros((1, 1))
    for _, part in found.groupby("part", sort=False):
        for _, of in part.groupby("stratum", sort=False):
            by = of.groupby(["cluster", "recipe", "step"])["event"]
            sums, sizes = by.sum().unstack(["recipe", "step"]).sort_index(axis=1), by.size().unstack(["recipe", "step"])
            if not sizes.eq(sizes.iloc[:, 0], axis=0).all(axis=None):
                raise ValueError(f"the checkpoints to be compared were not asked the same items ({measure})")
            n = len(sizes)
            counts = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=draws)])
            weight = 1 / found["part"].nunique() / part["stratum"].nunique()
            values = values + weight * (counts @ sums.to_numpy()) / (counts @ sizes.iloc[:, 0].to_numpy())[:, None]
    return {point: values[:, place] for place, point in enumerate(sums.columns)}


def levelled(found: dict[str, Draws], recipes: Sequence[str]) -> list[dict[str, Any]]:
    """One line per recipe × measure at the level of one backbone and seed; see `equal_helpfulness`."""
    points = sorted(found["helpfulness"])
    curves = {recipe: [START, *(p for p in points if p[0] == recipe)] for recipe in recipes}
    heights = {recipe: np.stack([found["helpfulness"][p] for p in curve], 1) for recipe, curve in curves.items()}
    gains = {recipe: height[0, 1:].max() - height[0, 0] for recipe, height in heights.items()}
    enough = [recipe for recipe, gain in gains.items() if gain >= gains.get(MAIN, max(gains.values())) / 2]
    level = np.min([heights[recipe][:, 1:].max(1) for recipe in enough], axis=0)
    lines = []
    for measure in LEVELLED:
        at = {
            recipe: stats.at_level(heights[recipe], np.stack([found[measure][p] for p in curve], 1), level)
            for recipe, curve in curves.items()
            if recipe in enough
        }
        for recipe, curve in curves.items():
            if recipe not in enough:
                lines.append({"recipe": recipe, "measure": measure, "reached": "never"})
                continue
            height, steps = heights[recipe][:1], np.array([[float(step) for _, step in curve]])
            place = int((height >= level[0]).argmax())
            line = {"recipe": recipe, "measure": measure, "level": level[0], "step": stats.at_level(height, steps, level[:1])[0]}
            line |= {"reached": ("start", "before the first")[place] if place < 2 else "between"}
            line |= dict(zip(("value", "low", "high"), _spread(at[recipe]), strict=True))
            if recipe != MAIN and MAIN in at:
                names = ("difference", "difference_low", "difference_high")
                line |= dict(zip(names, _spread(at[recipe] - at[MAIN]), strict=True))
            lines.append(line)
    return lines


def _spread(drawn: np.ndarray) -> tuple[float, float, float]:
    """The value itself, which comes first, and the 95 % percentile interval of the draws behind it."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return float(drawn[0]), float(low), float(high)


def over_seeds(lines: pd.DataFrame) -> pd.DataFrame:
    """T03 over seeds: mean and range of every recipe and of its difference from the main one, and each seed's value.

    Where a difference keeps its sign in every seed, the arms may differ beyond seeds; few seeds show no more than that.
    """
    by = ["backbone", "at", "measure", "recipe"]
    told = dict(n_seeds=("seed", "nunique"), mean=("value", "mean"), lowest=("value", "min"), highest=("value", "max"))
    told |= {f"difference_{name}": ("difference", name) for name in ("mean", "min", "max")}
    found = lines.groupby(by, sort=False).agg(**told)
    found = found.join(lines.pivot(index=by, columns="seed", values="value").add_prefix("seed "))
    return found.reset_index().sort_values("backbone", kind="stable", ignore_index=True)


def confounds(raw: pd.DataFrame) -> pd.DataFrame:
    """T04: per model and condition the text ASR and the refusal of harmless requests, and their paired change from plain text.

    Paired by verb–object pair: a condition asks every verb–object pair once, and "none" is no picture and no system prompt.
    """
    lines = []
    of = raw[raw["exam"] == "confounds"]
    model = [*UNIT, "stage", "recipe"]
    for measure in ("confounds_asr", "confounds_refusal"):
        rows = events(of, measure)
        for key, part in rows.groupby([*model, "group"], sort=False):
            rate = estimate(part, measure)
            line = dict(zip([*model, "condition"], key, strict=True)) | {"measure": measure}
            line |= {name: getattr(rate, name) for name in ("value", "low", "high", "n")}
            if key[-1] != "none":
                plain = rows[(rows[model] == list(key[:-1])).all(axis=1) & (rows["group"] == "none")]
                both = part.merge(plain, on="cluster", suffixes=("", "_plain")).dropna(subset=["event", "event_plain"])
                a, b = both["event_plain"].astype(float), both["event"].astype(float)
                paired = stats.paired_difference(a, b, both["cluster"].tolist(), np.random.default_rng(key[1]))
                line |= dict(zip(("difference", "difference_low", "difference_high"), paired, strict=True))
            lines.append(line)
    return pd.DataFrame(lines)


def compact(lines: pd.DataFrame, index: Sequence[str], at: str | None = None) -> pd.DataFrame:
    """One line per `index`, a column per measure and one for its difference, in percent with intervals, for the eye."""
    lines = lines if at is None else lines[lines["at"] == at]
    index, cells = list(index), {}
    for measure in dict.fromkeys(lines["measure"]):
        of, label = lines[lines["measure"] == measure].set_index(index), MEASURES[measure]["label"]
        cells[label] = of.apply(_cell, axis=1, names=("value", "low", "high"))
        cells[f"Δ {label}"] = of.apply(_cell, axis=1, names=("difference", "difference_low", "difference_high"), sign="+")
    return lines[index].drop_duplicates().join(pd.DataFrame(cells), on=index).reset_index(drop=True)


def sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """T03 for the eye: one line per backbone × seed × recipe with both comparisons."""
    index = [*UNIT, "recipe"]
    level = compact(lines, index, LEVEL).rename(columns=lambda name: name if name in index else f"{name}, {LEVEL}")
    reached = lines.dropna(subset=["reached"]).drop_duplicates(index)[[*index, "reached"]]
    steps = compact(lines, [*index, "step"], STEPS).astype({"step": int})
    return steps.merge(level, on=index, how="left").merge(reached, on=index, how="left")


def _cell(line: pd.Series, names: Sequence[str], sign: str = "") -> str:
    value, low, high = (100 * line[name] for name in names)
    return "" if pd.isna(value) else f"{round(value):{sign}} [{round(low):{sign}}, {round(high):{sign}}]"
