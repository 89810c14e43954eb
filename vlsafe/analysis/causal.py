"""F10 and T06 in numbers: what transplants, directions, frozen blocks and conflict-free tuning do.

All comparisons within a study share their bootstrap samples of verb–object pairs, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.analysis import adaptation, measures, resampling
from vlsafe.analysis.measures import UNIT, events, groups, run_names
from vlsafe.analysis.probing import DRAWS, OUTCOMES
from vlsafe.analysis.resampling import Draws
from vlsafe.analysis.stats import at_level, percentiles
from vlsafe.core.schema import MAIN_LINE

EXAMINED = (*OUTCOMES, "twin_refusal", "exaggerated_refusal", "helpfulness")


def transplants(raw: pd.DataFrame, located: pd.DataFrame) -> pd.DataFrame:
    """F10: one line per patch × measure, with its change from the unpatched model and its distance from the training curve.

    Measures are those of EXAMINED that the models were asked about. `excess` is attack success less that of stage 2's own
    curve where it is as helpful as the patched model: below zero, the patch restores more safety than unlearning as much
    would. For the reverse, the unpatched model is the parent with the adapted vision tower and projector.

    Draws:    bootstrap samples of clusters that all patches of a study share
    """
    lines = []
    for unit, rows in groups(raw, UNIT, sort=True):
        drawn, curve, band = _drawn(rows, unit["seed"]), _curve(rows), band_of(located, unit)
        patches = rows[rows["kind"] != "curve"].drop_duplicates("recipe")
        n = {measure: len(events(rows[rows["recipe"] == patches["recipe"].iloc[0]], measure)) for measure in drawn}
        parent = next(iter(patches.loc[patches["kind"] == "all", "recipe"]))
        ends = _ends(rows[rows["kind"] != "curve"], drawn)
        for patch in patches.itertuples():
            blocks = tuple(int(part) for part in patch.recipe.split("-")[1:])
            what = {"patch": patch.recipe, "kind": patch.kind, "width": len(blocks), "start": blocks[0] if blocks else None}
            what |= {"located": patch.kind in ("band", "reverse") and blocks == band, "shares": bool(set(blocks) & set(band))}
            for measure, points in drawn.items():
                here, base = points[patch.recipe, 0], (parent, 0) if patch.kind == "reverse" else curve[-1]
                line = unit | what | {"measure": measure, "n": n[measure]}
                line |= {"value": float(here[0])} | ends[patch.recipe, measure] | percentiles(here - points[base], "change")
                if measure in OUTCOMES and "helpfulness" in drawn:
                    height, values = (np.stack([drawn[name][p] for p in curve], 1) for name in ("helpfulness", measure))
                    level = np.minimum(drawn["helpfulness"][patch.recipe, 0], height.max(1))  # more helpful than any: its best
                    line |= percentiles(here - at_level(height, values, level), "excess")
                lines.append(line)
    return pd.DataFrame(lines)


def _drawn(raw: pd.DataFrame, seed: int) -> dict[str, Draws]:
    """Measures of every model of one study that it was asked about, as they are and over bootstrap samples that all share."""
    return resampling.bootstrap(raw, measures.present(raw, EXAMINED), np.random.default_rng(seed), DRAWS)


def _ends(rows: pd.DataFrame, names: Iterable[str]) -> dict[tuple[Any, ...], dict[str, float]]:
    """The intervals of rates, which have a width at 0 and 100 % too, as bootstrap samples do not; by recipe and measure."""
    return measures.rates(rows, list(names), ["recipe"]).set_index(["recipe", "measure"])[["low", "high"]].to_dict("index")


def _curve(raw: pd.DataFrame) -> list[tuple[str, int]]:
    """The points of stage 2's training in one study, the end of stage 1 first."""
    points = raw.loc[raw["kind"] == "curve", ["stage", "recipe", "step"]].drop_duplicates()
    points = points.assign(late=points["stage"] == "instruct").sort_values(["late", "step"])
    return list(zip(points["recipe"], points["step"], strict=True))


def band_of(located: pd.DataFrame, unit: dict[str, object]) -> tuple[int, ...]:
    """The blocks of the band that freezing and transplants use for a study; `located` has a line for each."""
    return tuple(range(*located.loc[(located[UNIT] == list(unit.values())).all(axis=1), ["start", "end"]].iloc[0]))


def against_random(raw: pd.DataFrame, located: pd.DataFrame) -> pd.DataFrame:
    """Whether the place matters: the located band and the best band of each width against other sets of as many blocks.

    The others are the random sets, at width 1 the other single blocks. `as_good` is how many of them do at least as well,
    and `sharing` how many of these hold a block of the located band; `difference` is the band's value less the others'
    mean. The best band is chosen by text ASR and has the advantage of having been chosen.
    """
    lines = []
    for unit, rows in groups(raw, UNIT, sort=True):
        drawn, band = _drawn(rows, unit["seed"]), band_of(located, unit)
        names = rows.loc[rows["kind"].isin(["band", "random"]), "recipe"].unique()
        sets = {name: frozenset(map(int, name.split("-")[1:])) for name in names}
        for width in sorted({len(blocks) for blocks in sets.values()}):
            same = [name for name, blocks in sets.items() if len(blocks) == width]
            bands = [name for name in same if name.startswith("band")]
            best = min(bands, key=lambda name: [drawn[measure][name, 0][0] for measure in OUTCOMES if measure in drawn])
            for which, chosen in (("located", "-".join(["band", *map(str, band)])), ("best", best)):
                others = [name for name in same if name != chosen and (width == 1 or name.startswith("random"))]
                if chosen not in same or not others:
                    continue
                for measure, points in drawn.items():
                    here, theirs = points[chosen, 0], {name: points[name, 0] for name in others}
                    sign = -1 if measure == "helpfulness" else 1
                    good = [name for name, values in theirs.items() if sign * values[0] <= sign * here[0]]
                    mean = np.mean(list(theirs.values()), axis=0)
                    line = unit | {"width": width, "which": which, "band": chosen, "measure": measure}
                    line |= {"value": float(here[0]), "mean_of_others": float(mean[0]), "others": len(others)}
                    line |= {"as_good": len(good), "sharing": sum(bool(sets[name] & set(band)) for name in good)}
                    lines.append(line | percentiles(here - mean, "difference"))
    return pd.DataFrame(lines)


def directed(raw: pd.DataFrame) -> pd.DataFrame:
    """What ablating and adding the refusal direction does, and random directions: value, change from the untouched model.

    Random directions are one line: the mean over them, and over the bootstrap samples of that mean; `lowest` and `highest` are
    single ones.
    """
    lines = []
    for key, rows in groups(raw, [*UNIT, "of"], sort=True):
        names = rows.drop_duplicates("recipe").groupby(["what", "strength"], sort=False)["recipe"].agg(list)
        found = _drawn(rows, key["seed"])
        ends = _ends(rows, found)
        for measure, drawn in found.items():
            untouched = drawn[names["none"].iloc[0][0], 0]
            for (what, strength), recipes in names.items():
                values = np.stack([drawn[recipe, 0] for recipe in recipes])
                mean, single = values.mean(0), values[:, 0]
                line = key | {"what": what, "strength": strength, "measure": measure}
                line |= {"lowest": float(single.min()), "highest": float(single.max()), "directions": len(recipes)}
                line |= percentiles(mean) | (ends[recipes[0], measure] if len(recipes) == 1 else {})
                lines.append(line | percentiles(mean - untouched, "change"))
    return pd.DataFrame(lines)


def frozen(raw: pd.DataFrame, patched: pd.DataFrame, located: pd.DataFrame) -> pd.DataFrame:
    """T06: SPPFT with every set of blocks, at equal steps and at equal helpfulness, beside stage 2 with nothing frozen.

    `raw` are the answers of the grid's checkpoints, `patched` those of transplants, which hold stage 2's own curve; a study
    without these is left out. A study in which all sets of as many blocks are bands has no random ones.
    """
    lines = []
    for unit, grid in groups(raw, UNIT, sort=True):
        own = patched[(patched["kind"] == "curve") & (patched[UNIT] == list(unit.values())).all(axis=1)]
        if own.empty:
            continue
        start = own[own["stage"] == "projector"].assign(recipe=adaptation.START[0], step=adaptation.START[1])
        rows = pd.concat([start, own[(own["stage"] == "instruct") & own["step"].isin(grid["step"])], grid])
        rng = np.random.default_rng(unit["seed"])
        drawn = resampling.bootstrap(rows, measures.present(rows, EXAMINED), rng, DRAWS)
        recipes, last = [r for r in dict.fromkeys(rows["recipe"]) if r != adaptation.START[0]], max(grid["step"])
        found = [
            {"recipe": r, "measure": measure, "at": adaptation.STEPS, **percentiles(points[r, last]),
             **percentiles(points[r, last] - points[adaptation.MAIN, last], "difference")}
            for measure, points in drawn.items() for r in recipes
        ]  # fmt: skip
        if {"helpfulness", *adaptation.LEVELLED} <= set(drawn):
            found += [line | {"at": adaptation.LEVEL} for line in adaptation.levelled(drawn, recipes)]
        kinds = {recipe: recipe.partition("-")[0] for recipe in recipes} | {adaptation.MAIN: "nothing frozen"}
        kinds["-".join(["band", *map(str, band_of(located, unit))])] = "located"
        lines += [unit | {"kind": kinds[line["recipe"]]} | line for line in found]
    return pd.DataFrame(lines)


def frozen_over_seeds(lines: pd.DataFrame) -> pd.DataFrame:
    """T06 over studies: the located band against the mean of the other bands and of the random sets, each study's difference."""
    by, frames = ["backbone", "at", "measure"], []
    mean = lines.pivot_table(index=[*UNIT, "at", "measure"], columns="kind", values="value")
    for other in ("band", "random", "nothing frozen"):
        if {"located", other} <= set(mean):
            difference = (mean["located"] - mean[other]).dropna()
            spread = difference.groupby(by).agg(n_seeds="size", mean="mean", min="min", max="max")
            frames.append(spread.assign(against=other, below=(difference < 0).groupby(by).sum()))
    return pd.concat(frames).reset_index()


def remedy(raw: pd.DataFrame) -> pd.DataFrame:
    """Multitask tuning with conflict-free gradients beside the plain one: rates, and the paired difference from the plain one.

    Raises:   Lacking where it was not made, as in the default grid
    """
    plain, surgery = "safety/mtl-full", "safety/mtl-pcgrad-full"
    if surgery not in set(run_names(raw)):
        raise measures.Lacking("no model was tuned with conflict-free gradients; the grid 'full' has it")
    final = raw[(raw["exam"] == "full") & run_names(raw).isin([plain, surgery, MAIN_LINE["adapted"]])]
    change = measures.differences(final, plain, [surgery], EXAMINED)
    return measures.with_changes(measures.rates(final, EXAMINED, [*UNIT, "stage", "recipe"]), change)
