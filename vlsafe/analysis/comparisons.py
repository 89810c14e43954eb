"""The comparisons that claims are made of: from frames to changes of items, one study at a time.

Most of them compare runs by the answers of full examinations; others use checkpoints, layers, frozen blocks or gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlsafe.analysis import measures as analysis_measures
from vlsafe.analysis.measures import SAME, UNIT, events, run_names
from vlsafe.analysis.stats import Stratum
from vlsafe.core.schema import MAIN_LINE

ADAPTED = MAIN_LINE["adapted"]
Frames = Mapping[str, Any]
Unit = tuple[str, int]  # backbone and seed of a study


class Changes(NamedTuple):
    """What a comparison found in one study: changes of items, and the mean rate on both sides."""

    strata: list[Stratum]
    before: float
    after: float


class Part(NamedTuple):
    """`after` minus `before`, claimed to lie above (sign 1) or below (-1) `against`.

    Runs are stage/recipe patterns; several that match are averaged. Several measures are added up. `method` finds the items.
    """

    what: str
    sign: int
    before: str
    after: str
    measures: tuple[str, ...] = ("text_asr",)
    against: float = 0.0
    method: Callable[[Part, Frames, Unit], Changes | None] | None = None


def changes(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """What a comparison finds in one study; None where it was not measured there."""
    return (part.method or answers)(part, frames, unit)


def answers(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """Changes between two groups of runs over the items that all of them answered and that could be judged."""
    strata, rates = list[Stratum](), []
    for measure in part.measures:
        wide = frames["answers"].get((*unit, measure), pd.DataFrame())
        after = [run for run in wide if fnmatchcase(run, part.after)]
        before = [run for run in wide if fnmatchcase(run, part.before) and run not in after]
        if not before or not after:
            return None
        judged = wide.dropna(subset=[*before, *after])
        sides = [judged[runs].mean(axis=1) for runs in (before, after)]
        change = _strata(sides[1] - sides[0], measure)
        if not change:
            return None
        strata += change
        rates += [float(sum(s.weight * np.mean(s.least) for s in _strata(side, measure))) for side in sides]
    return Changes(strata, *rates[:2])


def _strata(values: pd.Series, measure: str) -> list[Stratum]:
    rows = values.index.to_frame(index=False)
    return analysis_measures.strata(rows.assign(least=values.to_numpy(), most=values.to_numpy()), measure)


def trend(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """The rise of a line fitted through a run's checkpoints, evenly spaced, from the first to the last; on the panel's items."""
    wide = frames["panels"].get((*unit, part.measures[0]))
    if wide is None or wide.shape[1] < 3:
        return None
    judged = wide.dropna()
    place = np.linspace(-0.5, 0.5, judged.shape[1])
    rise = pd.Series(judged.to_numpy(float) @ (place / (place**2).sum()), judged.index)
    first, last = judged.iloc[:, 0].mean(), judged.iloc[:, -1].mean()
    return Changes(_strata(rise, part.measures[0]), float(first), float(last))


def band_similarity(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """How much less alike parent and adapted model are inside the parent's located band than outside, per harmful text prompt.

    `part.measures` names the cosine. Not measured where no band was located.
    """
    place, layers = _of(frames, "located", unit), _of(frames, "layers", unit)
    if place is None or layers is None or not place["located"].iloc[0]:
        return None
    layers = layers[(run_names(layers) == ADAPTED) & layers["harmful"].astype(bool) & (layers["group"] == "text")]
    layers = layers[layers["step"] == layers["step"].max()]
    loss = 1 - layers.pivot(index=["item", "cluster"], columns="layer", values=part.measures[0])
    inside = (loss.columns >= place["start"].iloc[0]) & (loss.columns < place["end"].iloc[0])
    if inside.all() or not inside.any():
        return None
    after, before = loss.loc[:, inside].mean(axis=1), loss.loc[:, ~inside].mean(axis=1)
    change = _stratum(after - before, loss.index.get_level_values("cluster"))
    return Changes([change], float(before.mean()), float(after.mean()))


def frozen(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """ASR after stage 2 with the located band frozen, less the mean over all other sets of as many blocks (the full grid's)."""
    place, grid = _of(frames, "located", unit), _of(frames, "frozen", unit)
    if grid is None or place is None or not place["located"].iloc[0]:
        return None
    grid = grid[grid["step"] == grid["step"].max()]
    grid = grid.assign(recipe=grid["recipe"].where(~grid["located"].astype(bool), "located"))
    counted = events(grid, part.measures[0])
    wide = counted.pivot_table(index=SAME, columns="recipe", values="event", aggfunc=lambda v: float(v.iloc[0])).dropna()
    if "located" not in wide or wide.shape[1] < 2:
        return None
    after, before = wide["located"], wide.drop(columns="located").mean(axis=1)
    return Changes(_strata(after - before, part.measures[0]), float(before.mean()), float(after.mean()))


def gradients(part: Part, frames: Frames, unit: Unit) -> Changes | None:
    """Cosines of gradients of two batches, one of each task, against zero or ("within") against two batches of one task.

    The mean over layers and checkpoints; pairs that share their first batch are one cluster.
    """
    rows = _of(frames, "gradients", unit)
    if rows is None:
        return None
    kind = np.where(rows["task_a"] == rows["task_b"], "within", "between")
    pairs = rows.assign(kind=kind).groupby(["kind", "a", "b"])["cosine"].mean().reset_index()
    sides = {kind: pairs[pairs["kind"] == kind] for kind in part.measures}
    strata = [_stratum(of["cosine"], of["a"], 1.0 if kind == "between" else -1.0) for kind, of in sides.items()]
    before = float(sides["within"]["cosine"].mean()) if "within" in sides else 0.0
    return Changes(strata, before, float(sides["between"]["cosine"].mean()))


METHODS = {"trend": trend, "band_similarity": band_similarity, "frozen": frozen, "gradients": gradients}
NEEDS: dict[Any, str] = {  # what each needs of a study
    trend: "three checkpoints of the adapted model", band_similarity: "its layers, and a located band that leaves some out",
    frozen: "the SPPFT grid and a located band", gradients: "gradients of both tasks",
}  # fmt: skip


def lacking(part: Part, frames: Frames, unit: Unit) -> str:
    """What a comparison lacks in one study: runs that nobody examined, with the reason where `frames["without"]` has one."""
    if part.method:
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
    """The frames with answers to some measures laid out by study: item × run at the end, item × checkpoint on the panel; and the
    judges of each measure."""
    result: dict[str, Any] = {**frames, "answers": {}, "panels": {}, "judges": {}}
    for unit, raw in frames["raw"].groupby(UNIT):
        final, line = raw[raw["exam"] == "full"], raw[(run_names(raw) == ADAPTED) & raw["exam"].isin(["panel", "full"])]
        line = line[line["item"].isin(line.loc[line["exam"] == "panel", "item"])]
        for measure in sorted(set(measures) & set(analysis_measures.MEASURES)):
            for name, rows, column in (("answers", final, "run"), ("panels", line, "step")):
                counted = events(rows, measure)
                if len(counted):
                    result["judges"].setdefault(measure, {}).update(dict.fromkeys(counted["judge"]))
                    counted = counted.assign(run=run_names(counted), event=pd.to_numeric(counted["event"].astype("Float64")))
                    result[name][(*unit, measure)] = counted.pivot(index=SAME, columns=column, values="event").astype(float)
    return result
