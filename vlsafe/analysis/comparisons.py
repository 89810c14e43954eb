"""The comparisons that claims are made of: from frames to changes of items, one study at a time.

Most of them compare runs by the answers of full examinations; others use checkpoints, layers, frozen blocks or gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlsafe.analysis import adaptation, stats
from vlsafe.analysis import measures as analysis_measures
from vlsafe.analysis.clustered import Stratum
from vlsafe.analysis.measures import SAME, UNIT, events, run_names
from vlsafe.core.schema import MAIN_LINE

ADAPTED = MAIN_LINE["adapted"]
BEGUN = "durability/adapted/start"  # the adapted model as further fine-tunings were compared with it
LOCATED = 0.05  # above this p-value chance explains the best of all scaled bands, and none is located
EARLY = 0.25  # of the steps: the last checkpoint before is an early one
Frames = Mapping[str, Any]
Unit = tuple[str, int]  # backbone and seed of a study


class Changes(NamedTuple):
    """What a comparison found in one study: changes of items, and the mean rate on both sides."""

    strata: list[Stratum]
    before: float
    after: float


class Part(NamedTuple):
    """`after` minus `before`, claimed to lie above (sign 1) or below (-1) `against`.

    Runs are stage/recipe patterns; several that match are averaged. Several measures are added up. `method`: one of METHODS.
    """

    what: str
    sign: int
    before: str
    after: str
    measures: tuple[str, ...] = ("text_asr",)
    against: float = 0.0
    method: str = "answers"


def changes(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """What a comparison finds in one study; None where it was not measured there. Claims and tables share some."""
    key, memory = (part._replace(what="", sign=1, against=0.0), unit), frames["changes"]
    if key not in memory:
        memory[key] = METHODS[part.method](part, frames, unit)
    return memory[key]


def answers(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """Changes between two groups of runs over the items that all of them answered and that could be judged."""
    strata, rates = list[Stratum](), []
    for measure in part.measures:
        wide = frames["answers"].get((*unit, measure), pd.DataFrame())
        after = [run for run in wide if fnmatchcase(run, part.after)]
        before = [run for run in wide if fnmatchcase(run, part.before) and run not in after]
        doses = [{_dose(run) for run in side} for side in (before, after)]
        if None not in doses[0] | doses[1]:  # several doses of each are held against each other where both have them
            before, after = ([run for run in side if _dose(run) in doses[0] & doses[1]] for side in (before, after))
        if not before or not after:
            return None
        judged = wide.dropna(subset=[*before, *after])
        sides = {name: judged[runs].mean(axis=1).to_numpy() for name, runs in (("before", before), ("after", after))}
        found = analysis_measures.weighted(judged.index.to_frame(index=False).assign(**sides), measure)
        if not found:
            return None
        strata += [_stratum(of["after"] - of["before"], of["cluster"], weight) for weight, of in found]
        rates.append([float(sum(weight * np.mean(of[side].tolist()) for weight, of in found)) for side in sides])
    return Changes(strata, *map(sum, zip(*rates, strict=True)))


def _dose(run: str) -> int | None:
    number = run.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


def bounds(part: Part) -> tuple[float, float]:
    """Between which values both sides of a comparison lie."""
    return (-1.0 if part.method == "gradients" else 0.0), float(len(part.measures) if part.method == "answers" else 1)


def _strata(values: pd.Series, measure: str) -> list[Stratum]:
    rows = values.index.to_frame(index=False)
    return analysis_measures.strata(rows.assign(least=values.to_numpy(), most=values.to_numpy()), measure)


def _curve(part: Part, frames: Frames, unit: Unit, run: str) -> pd.DataFrame:
    """Item × step on the panel: a run's checkpoints that all recipes of stage 2 share, and the end of stage 1 as step 0."""
    wide = frames["panels"].get((*unit, part.measures[0]), pd.DataFrame())
    own = wide[[place for place in wide if place[0] in (adaptation.START[0], run.partition("/")[2])]].dropna()
    return own.set_axis([step for _, step in own], axis=1)


def trend(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """From an earlier to a later checkpoint, the mean change over all pairs of them; on the panel's items.

    Source:   Mann 1945, for 0 and 1; only the order of the steps counts, and no line leaves their range
    """
    line = _curve(part, frames, unit, part.after)
    n = line.shape[1]
    return _along(part, line, (2 * np.arange(n) - n + 1) / (n * (n - 1) / 2)) if n > 2 else None


def onset(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """How far the mean over the steps lies above the middle of both ends: 0 on a straight line, above it for an early rise."""
    line = _curve(part, frames, unit, part.after)
    steps = line.columns.to_numpy(float)
    if len(steps) < 3:
        return None
    gaps, ends = np.diff(steps) / np.ptp(steps), np.zeros(len(steps))
    ends[[0, -1]] = 1.0
    return _along(part, line, (np.r_[gaps, 0.0] + np.r_[0.0, gaps] - ends) / 2)


def _along(part: Part, line: pd.DataFrame, weights: np.ndarray) -> Changes | None:
    """A weighted sum over the checkpoints, per item."""
    change = _strata(pd.Series(line.to_numpy(float) @ weights, line.index), part.measures[0]) if len(line) else []
    return Changes(change, float(line.iloc[:, 0].mean()), float(line.iloc[:, -1].mean())) if change else None


def dose(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """How much a straight line through the rates at all doses rises from none, `part.before`, to the largest; the doses are the
    numbers at the ends of the recipes that match `part.after`."""
    wide = frames["answers"].get((*unit, part.measures[0]), pd.DataFrame())
    dosed = {run: number for run in wide if fnmatchcase(run, part.after) and (number := _dose(run)) is not None}
    if part.before not in wide or len(dosed) < 2:
        return None
    doses = pd.Series({part.before: 0} | dosed).sort_values() / max(dosed.values())
    away = doses - doses.mean()
    return _along(part, wide[list(doses.index)].dropna(), (away / (away**2).sum()).to_numpy())


def half(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """Where a remedy ends after a further fine-tuning, above the middle of where it, `part.before`, and the adapted model began:
    below it, more than half of the remedy's gain is still there."""
    wide = frames["answers"].get((*unit, part.measures[0]), pd.DataFrame())
    runs = [part.before, BEGUN, part.after]
    if not set(runs) <= set(wide):
        return None
    found = _along(part, line := wide[runs].dropna(), np.array([-0.5, -0.5, 1.0]))
    return found and found._replace(before=float(line.iloc[:, :2].mean(axis=None)))


def matched(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """Two recipes of stage 2 where their weights have moved equally far from the parent's; see `adaptation.matched`."""
    weights = [rows for name in ("drift", "moved") if (rows := _of(frames, name, unit)) is not None]
    far = adaptation.distance(pd.concat(weights)) if weights else pd.Series(dtype=float)
    sides = {run: _curve(part, frames, unit, run) for run in (part.before, part.after)}
    both = sides[part.before].index.intersection(sides[part.after].index)
    heights = {}
    for run, line in sides.items():
        steps = [step for step in line if (*unit, run.partition("/")[2], step) in far.index]
        if 0 not in line or not steps or both.empty:
            return None
        sides[run] = line.loc[both, [0, *steps]]
        heights[run] = np.maximum.accumulate([0.0, *(far[(*unit, run.partition("/")[2], step)] for step in steps)])
    level, n = min(height[-1] for height in heights.values()), len(both)
    before, after = (
        pd.Series(stats.at_level(np.tile(heights[run], (n, 1)), sides[run].to_numpy(float), np.full(n, level)), both)
        for run in (part.before, part.after)
    )
    return Changes(_strata(after - before, part.measures[0]), float(before.mean()), float(after.mean()))


def foreseen(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """How far from every recipe's final rate in one seed a line lies that was fitted to early and final rates of the other seeds,
    less how far the recipe's mean over these seeds does. Recipes are the items; two other seeds are needed.
    """
    found = [
        (seed, run, of[place].mean(), frames["answers"][backbone, seed, measure][run].mean())
        for (backbone, seed, measure), of in frames["panels"].items() if (backbone, measure) == (unit[0], part.measures[0])
        for place in _early(of) if (run := f"instruct/{place[0]}") in frames["answers"].get((backbone, seed, measure), ())
    ]  # fmt: skip
    points = pd.DataFrame(found, columns=["seed", "run", "early", "final"]).dropna()
    others, own = points[points["seed"] != unit[1]], points[points["seed"] == unit[1]].set_index("run")
    means = others.groupby("run")["final"].mean().reindex(own.index)
    own, means = own[means.notna()], means.dropna()
    if others["seed"].nunique() < 2 or others["early"].nunique() < 2 or len(own) < 3:
        return None
    slope, start = np.polyfit(others["early"], others["final"], 1)
    after, before = ((guess - own["final"]).abs() for guess in ((start + slope * own["early"]).clip(0, 1), means))
    return Changes([_stratum(after - before, own.index)], float(before.mean()), float(after.mean()))


def _early(panel: pd.DataFrame) -> list[tuple[str, int]]:
    """The early checkpoint of every recipe."""
    steps = [step for recipe, step in panel if recipe != adaptation.START[0]]
    early = max((step for step in steps if step <= EARLY * max(steps)), default=None)
    return [place for place in panel if place[1] == early and place[0] != adaptation.START[0]]


def band_similarity(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """How much less alike parent and adapted model are inside the parent's located band than outside, per harmful text prompt.

    `part.measures` names the cosine. Not measured where no band was located.
    """
    place, layers = _band(frames, unit), _of(frames, "layers", unit)
    if place is None or layers is None:
        return None
    layers = layers[(run_names(layers) == ADAPTED) & layers["harmful"].astype(bool) & (layers["group"] == "text")]
    layers = layers[layers["step"] == layers["step"].max()]
    loss = 1 - layers.pivot(index=["item", "cluster"], columns="layer", values=part.measures[0])
    inside = (loss.columns >= place[0]) & (loss.columns < place[1])
    if inside.all() or not inside.any():
        return None
    after, before = loss.loc[:, inside].mean(axis=1), loss.loc[:, ~inside].mean(axis=1)
    change = _stratum(after - before, loss.index.get_level_values("cluster"))
    return Changes([change], float(before.mean()), float(after.mean()))


def frozen(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """ASR after stage 2 with the located band frozen, less the mean over other sets of as many blocks, those of `part.before`."""
    grid = _of(frames, "frozen", unit)
    if grid is None or _band(frames, unit) is None:
        return None
    grid = grid[grid["step"] == grid["step"].max()]
    grid = grid.assign(recipe=grid["recipe"].where(~grid["located"].astype(bool), "located"))
    counted = analysis_measures.settled(events(grid, part.measures[0]))
    counted = counted.assign(event=counted["event"].astype("Float64").astype(float))
    wide = counted.pivot_table(index=SAME, columns="recipe", values="event", aggfunc="first").dropna()
    others = [name for name in wide if name != "located" and fnmatchcase(f"sppft/{name}", part.before)]
    if "located" not in wide or not others:
        return None
    after, before = wide["located"], wide[others].mean(axis=1)
    return Changes(_strata(after - before, part.measures[0]), float(before.mean()), float(after.mean()))


def _band(frames: Frames, unit: Unit) -> tuple[int, int] | None:
    """The band that localisation found in a parent, where it makes it refuse more than chance does."""
    place = _of(frames, "located", unit)
    if place is None or not place["located"].iloc[0] or not place["p"].iloc[0] < LOCATED:
        return None
    return place["start"].iloc[0], place["end"].iloc[0]


def gradients(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """Cosines of gradients of two batches, one of each task, against zero or ("within") against two batches of one task: the mean
    over layers and checkpoints. Tasks with one true gradient have the geometric mean of both tasks' cosines between them.

    A batch is in several pairs, so batches are the sample: each has the jackknife's pseudovalue, in a stratum per task.
    """
    rows = _of(frames, "gradients", unit)
    if rows is None:
        return None
    pairs = rows.groupby(["task_a", "task_b", "a", "b"])["cosine"].mean().reset_index()
    ends = partial(_between_tasks, within="within" in part.measures)
    before, after = ends(pairs)
    if np.isnan(before) or (not before and "within" in part.measures):
        return None
    batches, strata = dict(zip([*pairs["a"], *pairs["b"]], [*pairs["task_a"], *pairs["task_b"]], strict=True)), []
    for task in sorted(set(batches.values())):
        own = [batch for batch in batches if batches[batch] == task]
        left = np.array([np.subtract(*ends(pairs[(pairs[["a", "b"]] != batch).all(axis=1)])) for batch in own])
        if np.isnan(left).any():  # two batches of a task: without one there is no pair
            return None
        strata.append(_stratum(pd.Series((after - before) / 2 + (len(own) - 1) * (left - left.mean())), own))
    return Changes(strata, before, after)


def _between_tasks(pairs: pd.DataFrame, within: bool) -> tuple[float, float]:
    """The mean cosine of two tasks' batches: what noise alone would leave (0 unless `within`; NaN: unknown), and what it is."""
    other = pairs["task_a"] != pairs["task_b"]
    own = pairs[~other].groupby("task_a")["cosine"].mean().clip(lower=0)
    expected = float(np.sqrt(own.prod())) if len(own) == 2 else np.nan
    return expected if within else 0.0, float(pairs.loc[other, "cosine"].mean())


METHODS = {
    function.__name__: function
    for function in (answers, trend, onset, dose, half, matched, foreseen, band_similarity, frozen, gradients)
}  # fmt: skip
OF_THE_STUDY = ("foreseen", "gradients")  # whose items are no prompts that studies could share
NEEDS = {  # what each needs of a study
    "trend": "three checkpoints of the adapted model", "onset": "three checkpoints of the adapted model",
    "dose": "the arm without how-tos and two doses of one kind",
    "half": "the remedy and the adapted model, as they are and fine-tuned again (`GRID=full`)",
    "matched": "panels of both recipes, the end of stage 1, and how far their weights moved",
    "foreseen": "panels of three recipes, and two other seeds",
    "frozen": "the SPPFT grid, a band located beyond chance and such other sets",
    "band_similarity": "its layers, and a band located beyond chance that leaves some out",
    "gradients": "gradients of both tasks, with something in common between two batches of each",
}  # fmt: skip


def lacking(part: Part, frames: Frames, unit: Unit) -> str:
    """What a comparison lacks in one study: runs that nobody examined, with the reason where `frames["without"]` has one."""
    if part.method in NEEDS:
        return f"needs {NEEDS[part.method]}"
    for measure in part.measures:
        runs = list(frames["answers"].get((*unit, measure), ()))
        for wanted in (part.before, part.after):
            if not any(fnmatchcase(run, wanted) for run in runs):
                without, examined = frames.get("without", {}), f"examination/{wanted.replace('/', '.')}"
                reason = next((without[stage] for stage in (wanted, examined) if stage in without), "not examined")
                return f"no {measure} of {wanted}: {reason}"
    return f"not all parts of {' and '.join(part.measures)} were judged on the same items for {part.before} and {part.after}"


def judge(part: Part, frames: Frames) -> str:
    """Who marked the answers that a comparison is about; nothing for one of states or gradients."""
    return analysis_measures.named(name for measure in part.measures for name in frames["judges"].get(measure, ()))


def _of(frames: Frames, name: str, unit: Unit) -> pd.DataFrame | None:
    """A frame's rows of one study, or None where there is no such frame or no such row."""
    if name not in frames:
        return None
    rows = frames[name][(frames[name][UNIT] == list(unit)).all(axis=1)]
    return None if rows.empty else rows


def _stratum(values: pd.Series, clusters: Iterable[Any], weight: float = 1.0) -> Stratum:
    return Stratum(weight, values.tolist(), values.tolist(), list(clusters))


def prepared(frames: Frames, measures: Iterable[str]) -> dict[str, Any]:
    """The frames with answers to some measures laid out by study: item × run at the end, item × (recipe, step) on the panel; and
    the judges of each measure; `shared`: whether all seeds were asked the same items."""
    shared = analysis_measures.shared(frames["raw"])
    own: dict[str, dict[Any, Any]] = {name: {} for name in ("answers", "panels", "judges", "changes", "compared")}
    result: dict[str, Any] = {**frames, **own, "shared": shared}
    for unit, raw in frames["raw"].groupby(UNIT):
        final, panel = raw[raw["exam"] == "full"], adaptation.panel(raw)
        for measure in sorted(set(measures) & set(analysis_measures.MEASURES)):
            for name, rows, columns in (("answers", final, ["run"]), ("panels", panel, ["recipe", "step"])):
                counted = analysis_measures.settled(events(rows, measure))
                if len(counted):
                    result["judges"].setdefault(measure, {}).update(dict.fromkeys(counted["judge"]))
                    counted = counted.assign(run=run_names(counted), event=pd.to_numeric(counted["event"].astype("Float64")))
                    wide = counted.pivot(index=SAME, columns=columns, values="event").astype(float)
                    result[name][(*unit, measure)] = wide.set_axis(wide.columns.tolist(), axis=1)
    return result
