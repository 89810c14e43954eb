"""Measures over bootstrap samples of clusters, and of seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.analysis import clustered, stats
from vlsafe.analysis.measures import MEASURES, SAME, Lacking, events, in_worlds, settled, weighted_groups, whole

Draws = dict[tuple[str, int], np.ndarray]  # (recipe, step) -> a measure as it is, then in each bootstrap sample: [1 + draws]
_Summed = tuple[float, pd.DataFrame, np.ndarray]


def bootstrap(rows: pd.DataFrame, names: Iterable[str], rng: np.random.Generator, draws: int) -> dict[str, Draws]:
    """Measures at every point (recipe, step), as they are and over bootstrap samples of clusters that all points and all of the
    measures share.

    What could not be judged at some point is left out at all of them; of right answers it is wrong.

    Raises:   ValueError where points have other items, or of a measure rescaled from chance; Lacking where a part was not asked
    """
    return _drawn({measure: _summed(rows, measure) for measure in names}, rng, draws)


def _drawn(parts: Mapping[Any, Sequence[_Summed]], rng: np.random.Generator, draws: int) -> dict[Any, Draws]:
    """What `_summed` found, as it is and over bootstrap samples of the clusters of all."""
    numbered, sets = clustered.together([sums.index for of in parts.values() for _, sums, _ in of])
    found, places = dict[Any, Draws](), iter(numbered)
    drawn = np.concatenate([stats.resamples(len(own), draws, rng) for own in sets], axis=1)
    counts = drawn[:, np.argsort(np.concatenate(sets))]
    for name, of in parts.items():
        values: Any = 0.0
        for weight, sums, sizes in of:
            own = counts[:, next(places)]
            n, mean = (own @ sizes)[:, None], sums.to_numpy().sum(0) / sizes.sum()  # which samples without any item keep
            values = values + weight * np.where(n > 0, (own @ sums.to_numpy()) / np.maximum(n, 1), mean)
        found[name] = {point: values[:, place] for place, point in enumerate(of[0][1].columns)}
    return found


def _summed(rows: pd.DataFrame, measure: str) -> list[_Summed]:
    """Per stratum of a measure: its weight, sums of events (cluster × point), and how many there are of each cluster."""
    if MEASURES[measure].get("rescaled"):
        raise ValueError(f"{measure} is rescaled from chance: no share of items, which could be drawn again")
    rows = settled(events(rows, measure))
    if (unjudged := rows["event"].isna()).any():
        rows = rows[~rows.set_index(SAME).index.isin(rows[unjudged].set_index(SAME).index)]
    if not whole(rows, measure):
        raise Lacking(f"{MEASURES[measure]['label']} was not measured")
    rows, parts = rows.assign(event=rows["event"].astype(float)), list[_Summed]()
    for weight, stratum in weighted_groups(rows):
        by = stratum.groupby(["cluster", "recipe", "step"])["event"]
        sums, sizes = by.sum().unstack(["recipe", "step"]).sort_index(axis=1), by.size().unstack(["recipe", "step"])
        if not sizes.eq(sizes.iloc[:, 0], axis=0).all(axis=None) or (parts and not sums.columns.equals(parts[0][1].columns)):
            raise ValueError(f"the checkpoints to be compared were not examined on the same items ({measure})")
        parts.append((weight, sums, sizes.iloc[:, 0].to_numpy(float)))
    return parts


def over_seeds(rows: pd.DataFrame, measure: str, draws: int) -> dict[str, dict[Any, np.ndarray]]:
    """A measure's mean over seeds by recipe and step, of the points that all seeds have: as it is, then over bootstrap samples of
    seeds and of clusters within each, [1 + draws]; where seeds share their items, of the same clusters in each. Draws may lie
    outside [0, 1], so that differences of two are not narrowed: the ends of a rate's interval are to be clipped.

    Deviations are stretched as for a variance of so few seeds, and by as much as Student's quantile is larger than a normal one.
    """
    by_seed, rng = in_worlds(rows).groupby("seed", sort=True), np.random.default_rng(0)
    each = list(_drawn({seed: _summed(of, measure) for seed, of in by_seed}, rng, draws).values())
    k, found = len(each), dict[str, dict[Any, np.ndarray]]()
    weights, stretch = stats.resamples(k, draws, rng) / k, stats.stretch(k)
    for recipe, step in sorted(set.intersection(*map(set, each))):
        drawn = (np.stack([one[recipe, step] for one in each], 1) * weights).sum(1)
        found.setdefault(recipe, {})[step] = drawn[0] + (drawn - drawn[0]) * stretch
    return found
