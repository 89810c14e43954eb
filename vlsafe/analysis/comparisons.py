"""What a comparison of the claims reads: from frames to changes of items, one study at a time. Loads no model.

Most parts compare runs by the answers of full examinations; others read checkpoints, layers, frozen sets of blocks or gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlsafe.analysis import measures as analysis_measures
from vlsafe.analysis import stats
from vlsafe.analysis.measures import events, named
from vlsafe.core.schema import MAIN_LINE

ADAPTED = MAIN_LINE["adapted"]
Found = Mapping[str, Any]
Unit = tuple[str, int]
INDEX = ["part", "item", "stratum", "floor", "cluster"]


class Reading(NamedTuple):
    """What a part found in one study: changes of items, and the mean rate on both sides."""

    strata: list[stats.Stratum]
    before: float
    after: float


class Part(NamedTuple):
    """One comparison: `after` minus `before`, claimed to lie above (sign 1) or below (-1) `against`.

    Runs are stage/recipe patterns; several that match are averaged. Several measures are added up. `read` finds the items.
    """

    what: str
    sign: int
    before: str
    after: str
    measures: tuple[str, ...] = ("text_asr",)
    against: float = 0.0
    read: Callable[[Part, Found, Unit], Reading | None] | None = None


def read(part: Part, found: Found, unit: Unit) -> Reading | None:
    """What a part finds in one study; None where it was not measured there."""
    return (part.read or answers)(part, found, unit)


def answers(part: Part, found: Found, unit: Unit) -> Reading | None:
    """Changes between two groups of runs over the items that all of them were asked and that could be judged."""
    strata: list[stats.Stratum] = []
    ends: list[float] = []
    for measure in part.measures:
        asked = found["answers"].get((*unit, measure))
        if asked is None:
            return None
        sides = [[run for run in asked.columns if fnmatchcase(run, glob)] for glob in (part.before, part.after)]
        sides[0] = [run for run in sides[0] if run not in sides[1]]
        if not all(sides):
            return None
        judged = asked.dropna(subset=[run for side in sides for run in side])
        before, after = (judged[side].mean(axis=1) for side in sides)
        of = _strata(judged, after - before, measure)
        if not of:
            return None
        strata += of
        ends += [float(sum(s.weight * np.mean(s.least) for s in _strata(judged, side, measure))) for side in (before, after)]
    return Reading(strata, *ends[:2])


def _strata(asked: pd.DataFrame, values: pd.Series, measure: str) -> list[stats.Stratum]:
    rows = asked.index.to_frame(index=False)
    return analysis_measures.strata(rows.assign(least=values.to_numpy(), most=values.to_numpy()), measure)


def trend(part: Part, found: Found, unit: Unit) -> Reading | None:
    """The rise of a line fitted through a run's checkpoints, evenly spaced, from the first to the last; on the panel's items."""
    asked = found["panels"].get((*unit, part.measures[0]))
    if asked is None or asked.shape[1] < 3:
        return None
    judged = asked.dropna()
    place = np.linspace(-0.5, 0.5, judged.shape[1])
    rise = judged.to_numpy(float) @ (place / (place**2).sum())
    return Reading(
        _strata(judged, pd.Series(rise), part.measures[0]), float(judged.iloc[:, 0].mean()), float(judged.iloc[:, -1].mean())
    )


def band(part: Part, found: Found, unit: Unit) -> Reading | None:
    """How much less alike parent and adapted model are inside the parent's located band than outside, per harmful text prompt.

    `part.measures` names the cosine. Not measured where no band was located.
    """
    place, told = _of(found, "located", unit), _of(found, "layers", unit)
    if place is None or told is None or not place["located"].iloc[0]:
        return None
    told = told[(named(told) == ADAPTED) & told["harmful"].astype(bool) & (told["group"] == "text")]
    told = told[told["step"] == told["step"].max()]
    loss = 1 - told.pivot(index=["item", "cluster"], columns="layer", values=part.measures[0])
    inside = (loss.columns >= place["start"].iloc[0]) & (loss.columns < place["end"].iloc[0])
    if inside.all() or not inside.any():
        return None
    after, before = loss.loc[:, inside].mean(axis=1), loss.loc[:, ~inside].mean(axis=1)
    return Reading([_stratum(after - before, loss.index.get_level_values("cluster"))], float(before.mean()), float(after.mean()))


def frozen(part: Part, found: Found, unit: Unit) -> Reading | None:
    """ASR after stage 2 with the located band frozen, less the mean over all other sets of as many blocks (the full grid's)."""
    told = _of(found, "frozen", unit)
    place = _of(found, "located", unit)
    if told is None or place is None or not place["located"].iloc[0]:
        return None
    told = told[told["step"] == told["step"].max()]
    counted = events(told.assign(recipe=told["recipe"].where(~told["located"].astype(bool), "located")), part.measures[0])
    asked = counted.pivot_table(index=INDEX, columns="recipe", values="event", aggfunc=lambda v: float(v.iloc[0])).dropna()
    if "located" not in asked or asked.shape[1] < 2:
        return None
    after, before = asked["located"], asked.drop(columns="located").mean(axis=1)
    return Reading(_strata(asked, after - before, part.measures[0]), float(before.mean()), float(after.mean()))


def pulls(part: Part, found: Found, unit: Unit) -> Reading | None:
    """Cosines of gradients of two batches, one of each task, against zero or ("within") against two batches of one task.

    The mean over layers and checkpoints; pairs that share their first batch are one cluster.
    """
    told = _of(found, "gradients", unit)
    if told is None:
        return None
    told = told.assign(kind=np.where(told["task_a"] == told["task_b"], "within", "between"))
    pairs = told.groupby(["kind", "a", "b"])["cosine"].mean().reset_index()
    sides = {kind: pairs[pairs["kind"] == kind] for kind in part.measures}
    strata = [_stratum(of["cosine"], of["a"], 1.0 if kind == "between" else -1.0) for kind, of in sides.items()]
    before = float(sides["within"]["cosine"].mean()) if "within" in sides else 0.0
    return Reading(strata, before, float(sides["between"]["cosine"].mean()))


def _of(found: Found, name: str, unit: Unit) -> pd.DataFrame | None:
    """A frame's lines of one study, or None where there is no such frame or no such line."""
    frame = found.get(name)
    if frame is None or frame.empty:
        return None
    of = frame[(frame["backbone"] == unit[0]) & (frame["seed"] == unit[1])]
    return None if of.empty else of


def _stratum(values: pd.Series, clusters: Any, weight: float = 1.0) -> stats.Stratum:
    return stats.Stratum(weight, values.tolist(), values.tolist(), list(clusters))


def prepared(found: Found, wanted: Iterable[str]) -> dict[str, Any]:
    """The frames with answers to the wanted measures laid out by study: item × run at the end, item × checkpoint on the panel."""
    laid: dict[str, Any] = {**found, "answers": {}, "panels": {}}
    for unit, raw in found["raw"].groupby(["backbone", "seed"]):
        final, line = raw[raw["exam"] == "full"], raw[(named(raw) == ADAPTED) & raw["exam"].isin(["panel", "full"])]
        line = line[line["item"].isin(line.loc[line["exam"] == "panel", "item"])]
        for measure in sorted(set(wanted) & set(analysis_measures.MEASURES)):
            for name, rows, column in (("answers", final, "run"), ("panels", line, "step")):
                counted = events(rows, measure)
                if len(counted):
                    counted = counted.assign(run=named(counted), event=pd.to_numeric(counted["event"].astype("Float64")))
                    laid[name][(*unit, measure)] = counted.pivot(index=INDEX, columns=column, values="event").astype(float)
    return laid
