"""F10 and T06 in numbers: what transplants, directions, frozen blocks and conflict-free tuning do. Imports no model library.

All comparisons within a study share their bootstrap samples of verb–object pairs, so differences are paired.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from vlsafe.analysis import adaptation, measures, stats
from vlsafe.analysis.measures import events, named
from vlsafe.analysis.probing import DRAWS, OUTCOMES, UNIT, interval
from vlsafe.core.schema import MAIN_LINE

EXAMINED = (*OUTCOMES, "twin_refusal", "exaggerated_refusal", "helpfulness")


def transplants(raw: pd.DataFrame, located: pd.DataFrame) -> pd.DataFrame:
    """F10: one line per patch × measure, with its change from the unpatched model and its distance from the training curve.

    `excess` is attack success less that of stage 2's own curve where it is as helpful as the patched model: below zero,
    the patch restores more safety than unlearning as much would. For the reverse, the unpatched model is the parent
    behind the adapted model's eyes.

    Draws:    bootstrap samples of clusters that all patches of a study share
    """
    lines = []
    for unit, of in raw.groupby(UNIT):
        drawn, curve = _drawn(of, unit[1]), _curve(of)
        patches = of[of["kind"] != "curve"].drop_duplicates("recipe")
        n = {measure: len(events(of[of["recipe"] == patches["recipe"].iloc[0]], measure)) for measure in EXAMINED}
        base = {"reverse": (next(iter(patches.loc[patches["kind"] == "all", "recipe"])), 0)}
        for patch in patches.itertuples():
            blocks = tuple(int(part) for part in patch.recipe.split("-")[1:])
            told = dict(zip(UNIT, unit, strict=True)) | {"patch": patch.recipe, "kind": patch.kind, "width": len(blocks)}
            at_band = patch.kind in ("band", "reverse") and blocks == band_of(located, unit)
            told |= {
                "start": blocks[0] if blocks else None,
                "located": at_band,
                "shares": bool(set(blocks) & set(band_of(located, unit))),
            }
            for measure, points in drawn.items():
                here = points[patch.recipe, 0]
                line = told | {"measure": measure, "n": n[measure], **interval(here)}
                line |= _named("change", here - points[base.get(patch.kind, curve[-1])])
                if measure in OUTCOMES:
                    height, values = (np.stack([drawn[name][p] for p in curve], 1) for name in ("helpfulness", measure))
                    level = np.minimum(drawn["helpfulness"][patch.recipe, 0], height.max(1))  # more helpful than any: its best
                    line |= _named("excess", here - stats.at_level(height, values, level))
                lines.append(line)
    return pd.DataFrame(lines)


def _drawn(raw: pd.DataFrame, seed: int) -> dict[str, adaptation.Draws]:
    """Every examined measure of every model of one study, as it is and over bootstrap samples that all of them share."""
    return {measure: adaptation.redrawn(raw, measure, np.random.default_rng(seed), DRAWS) for measure in EXAMINED}


def _curve(raw: pd.DataFrame) -> list[tuple[str, int]]:
    """The points of stage 2's training in one study, the end of stage 1 first."""
    points = raw.loc[raw["kind"] == "curve", ["stage", "recipe", "step"]].drop_duplicates()
    points = points.assign(late=points["stage"] == "instruct").sort_values(["late", "step"])
    return list(zip(points["recipe"], points["step"], strict=True))


def band_of(located: pd.DataFrame, unit: tuple[str, int]) -> tuple[int, ...]:
    """The blocks of the band that freezing and transplants use for a study; `located` has a line for each."""
    line = located[(located[UNIT] == list(unit)).all(axis=1)].iloc[0]
    return tuple(range(line["start"], line["end"]))


def _named(name: str, drawn: np.ndarray) -> dict[str, float]:
    told = interval(drawn)
    return {name: told["value"], f"{name}_low": told["low"], f"{name}_high": told["high"]}


def against_random(raw: pd.DataFrame, located: pd.DataFrame) -> pd.DataFrame:
    """Whether the place matters: the located band and the best band of each width against other sets of as many blocks.

    The others are the random sets, at width 1 the other single blocks. `as_good` is how many of them do at least as well,
    and `sharing` how many of these hold a block of the located band; `difference` is the band's value less the others'
    mean. The best band is chosen by text ASR and has the advantage of having been chosen.
    """
    lines = []
    for unit, of in raw.groupby(UNIT):
        drawn, band = _drawn(of, unit[1]), band_of(located, unit)
        names = of.loc[of["kind"].isin(["band", "random"]), "recipe"].unique()
        sets = {name: frozenset(map(int, name.split("-")[1:])) for name in names}
        for width in sorted({len(blocks) for blocks in sets.values()}):
            same = [name for name, blocks in sets.items() if len(blocks) == width]
            bands = [name for name in same if name.startswith("band")]
            best = min(bands, key=lambda name: [drawn[measure][name, 0][0] for measure in OUTCOMES])
            for which, chosen in (("located", "-".join(["band", *map(str, band)])), ("best", best)):
                others = [name for name in same if name != chosen and (width == 1 or name.startswith("random"))]
                if chosen not in same or not others:
                    continue
                told = dict(zip(UNIT, unit, strict=True)) | {"width": width, "which": which, "band": chosen}
                for measure, points in drawn.items():
                    here, theirs = points[chosen, 0], {name: points[name, 0] for name in others}
                    sign = -1 if measure == "helpfulness" else 1
                    good = [name for name, values in theirs.items() if sign * values[0] <= sign * here[0]]
                    mean = np.mean(list(theirs.values()), axis=0)
                    line = told | {"measure": measure, "value": float(here[0]), "mean_of_others": float(mean[0])}
                    line |= {"others": len(others), "as_good": len(good), "sharing": sum(bool(sets[n] & set(band)) for n in good)}
                    lines.append(line | _named("difference", here - mean))
    return pd.DataFrame(lines)


def directed(raw: pd.DataFrame) -> pd.DataFrame:
    """What ablating and adding the refusal direction does, and random directions: value, change from the untouched model.

    Random directions are one line: the mean over them, and over the bootstrap samples of that mean; `lowest` and `highest` are
    single ones.
    """
    lines = []
    for key, of in raw.groupby([*UNIT, "of"]):
        for measure in EXAMINED if (of["benchmark"] == "mm_safetybench").any() else ("text_asr", "exaggerated_refusal"):
            drawn = adaptation.redrawn(of, measure, np.random.default_rng(key[1]), DRAWS)
            names = of.drop_duplicates("recipe").groupby(["what", "strength"], sort=False)["recipe"].agg(list)
            none = drawn[names["none"].iloc[0][0], 0]
            for (what, strength), recipes in names.items():
                found = np.stack([drawn[recipe, 0] for recipe in recipes])
                told = dict(zip([*UNIT, "of"], key, strict=True)) | {"what": what, "strength": strength, "measure": measure}
                told |= {"lowest": float(found[:, 0].min()), "highest": float(found[:, 0].max()), "directions": len(recipes)}
                mean = found.mean(0)
                lines.append(told | interval(mean) | _named("change", mean - none))
    return pd.DataFrame(lines)


def frozen(raw: pd.DataFrame, patched: pd.DataFrame, located: pd.DataFrame) -> pd.DataFrame:
    """T06: SPPFT with every set of blocks, at equal steps and at equal helpfulness, beside stage 2 with nothing frozen.

    `raw` are the answers of the grid's checkpoints, `patched` those of transplants, which hold stage 2's own curve; a study
    without these is left out. A study in which all sets of as many blocks are bands has no random ones.
    """
    lines = []
    for unit, grid in raw.groupby(UNIT):
        own = patched[(patched[UNIT] == list(unit)).all(axis=1) & (patched["kind"] == "curve")]
        if own.empty:
            continue
        shared = set(grid["step"])
        start = own[own["stage"] == "projector"].assign(recipe=adaptation.START[0], step=adaptation.START[1])
        rows = pd.concat([start, own[(own["stage"] == "instruct") & own["step"].isin(shared)], grid])
        rng = np.random.default_rng(unit[1])
        drawn = {measure: adaptation.redrawn(rows, measure, rng, DRAWS) for measure in EXAMINED}
        recipes, last = [r for r in dict.fromkeys(rows["recipe"]) if r != adaptation.START[0]], max(shared)
        given = dict(zip(UNIT, unit, strict=True))
        found = [
            {"recipe": r, "measure": m, "at": adaptation.STEPS, **interval(points[r, last]),
             **_named("difference", points[r, last] - points[adaptation.MAIN, last])}
            for m, points in drawn.items() for r in recipes
        ]  # fmt: skip
        found += [line | {"at": adaptation.LEVEL} for line in adaptation.levelled(drawn, recipes)]
        band = "-".join(["band", *map(str, band_of(located, unit))])
        kind = {r: "nothing frozen" if r == adaptation.MAIN else "located" if r == band else r.partition("-")[0] for r in recipes}
        lines += [given | {"kind": kind[line["recipe"]]} | line for line in found]
    return pd.DataFrame(lines)


def frozen_over_seeds(lines: pd.DataFrame) -> pd.DataFrame:
    """T06 over studies: the located band against the mean of the other bands and of the random sets, each study's difference."""
    by = [*UNIT, "at", "measure"]
    mean = lines.groupby([*by, "kind"])["value"].mean().unstack("kind")
    found = []
    for other in ("band", "random", "nothing frozen"):
        if other in mean:
            difference = (mean["located"] - mean[other]).dropna()
            told = difference.groupby(["backbone", "at", "measure"]).agg(["size", "mean", "min", "max"])
            found.append(told.assign(against=other, below=(difference < 0).groupby(["backbone", "at", "measure"]).sum()))
    return pd.concat(found).reset_index().rename(columns={"size": "n_seeds"})


def remedy(raw: pd.DataFrame) -> pd.DataFrame:
    """Multitask tuning with conflict-free gradients beside the plain one: rates, and the paired difference from the plain one."""
    plain, surgery = "safety/mtl-full", "safety/mtl-pcgrad-full"
    final = raw[(raw["exam"] == "full") & named(raw).isin([plain, surgery, MAIN_LINE["adapted"]])]
    found = measures.rates(final, EXAMINED, [*UNIT, "stage", "recipe"])
    change = measures.differences(final, plain, [surgery], EXAMINED).drop(columns="n")
    change = change.rename(columns={"low": "difference_low", "high": "difference_high"})
    return found.merge(change, on=[*UNIT, "stage", "recipe", "measure"], how="left")
