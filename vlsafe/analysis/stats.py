"""Rates, intervals, paired differences and tests, without a model library: the claims must be checkable without one.

Answers to prompts about one verb–object pair are correlated, so every interval is computed over clusters, not over items.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from scipy import special

LEVEL = 0.95  # of every interval
POWER = 0.9  # of the smallest detectable difference
Shares = TypeVar("Shares", np.ndarray, np.float64)


@dataclass(frozen=True)
class Rate:
    """A share of events among `n` judged or unjudged items, or a mean of such shares; `value`, `low`, `high` are fractions in
    [0, 1], below 0 only where right answers are counted from chance.

    Where responses could not be judged the rate is a bound: `value` counts them as no event, `value_high` as events,
    and the interval covers both.
    """

    value: float
    low: float
    high: float
    n: int
    n_clusters: int
    n_unjudged: int = 0
    value_high: float = float("nan")


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's score interval for a share `p` of `n` (effective) independent items.

    Raises:   ValueError where n is not positive or p lies outside [0, 1]
    Source:   Wilson 1927
    """
    if n <= 0 or not 0 <= p <= 1:
        raise ValueError(f"an interval needs n > 0 and 0 <= p <= 1, not n = {n}, p = {p}")
    low, high = wilsons(np.float64(p), np.float64(n))
    return float(low), float(high)


def wilsons(p: Shares, n: Shares) -> tuple[Shares, Shares]:
    z = special.ndtri(0.5 + LEVEL / 2)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.clip(centre - half, 0.0, p), np.clip(centre + half, p, 1.0)  # never beside p by rounding


def clusters_of(clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Which cluster each item is in, as numbers, and how many items each cluster has."""
    _, index, sizes = np.unique([str(c) for c in clusters], return_inverse=True, return_counts=True)
    return index, sizes


def totals(values: np.ndarray, index: np.ndarray, n_clusters: int) -> np.ndarray:
    """Sums over the items of each cluster: [N, K] -> [C, K]."""
    order = np.argsort(index, kind="stable")
    return np.add.reduceat(values[order], np.searchsorted(index[order], np.arange(n_clusters)), axis=0)


def effective_size(values: np.ndarray, index: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many independent items each column of clustered values in [0, 1] is worth: n divided by the design effect.

    The design effect is the ratio of the clustered variance of the mean to the independent one, never below 1. Where
    few clusters hold an event, or few hold none, it is hardly known and is drawn towards the largest one possible, by
    which a cluster counts as one item: by as much as one more cluster would weigh among those few.

    The largest one is the sum of squared cluster sizes over n; where nothing or everything is an event, a cluster of any size
    counts as one item. Residuals are the jackknife's, for a large cluster pulls the mean towards itself.

    Shapes:   values [N, K]; index, sizes of `clusters_of`  ->  [K]
    Source:   Kish 1965; jackknife variance of a mean over clusters (CR3, Bell and McCaffrey 2002)
    Departs:  the shrinkage, without which rare events in large clusters are covered in 83 % instead of 95 % (LOG.md)
    """
    n, n_clusters = len(values), len(sizes)
    if n == n_clusters:
        return np.full(values.shape[1], float(n))
    if n_clusters == 1:
        return np.ones(values.shape[1])
    total, mean, spread = totals(values, index, n_clusters), values.mean(0), values.var(0)
    left_out = (total - mean * sizes[:, None]) / (n - sizes[:, None])
    clustered = (left_out**2).sum(0) * (n_clusters - 1) / n_clusters
    informative = np.minimum((total > 0).sum(0), (total < sizes[:, None]).sum(0))
    largest = np.where(informative > 0, (sizes.astype(float) ** 2).sum() / n, n / n_clusters)
    effect = np.divide(clustered * n, spread, out=largest.copy(), where=spread > 1e-12)
    return n / np.clip((informative * effect + largest) / (informative + 1), 1.0, n)


def intervals(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Clustered Wilson intervals of the mean of every column of values in [0, 1]: [N, K] -> low, high [K]."""
    return wilsons(values.mean(0), effective_size(values, *clusters_of(clusters)))


def rate(events: Sequence[bool | None], clusters: Sequence[Hashable]) -> Rate:
    """The share of events with a clustered Wilson interval; None is an unjudged response.

    Raises:   ValueError where there is nothing to rate or the lengths differ
    """
    if not len(events) or len(events) != len(clusters):
        raise ValueError(f"a rate needs as many clusters as events and at least one, not {len(events)}, {len(clusters)}")
    unjudged = sum(event is None for event in events)
    bounds = np.array([[bool(event), event is None or bool(event)] for event in events], float)
    (low, _), (_, high) = intervals(bounds, clusters)
    least, most = bounds.mean(0)
    return Rate(float(least), float(low), float(high), len(events), len({str(c) for c in clusters}), unjudged, float(most))


def over_seeds(effects: np.ndarray, se: np.ndarray, p: np.ndarray, against: float = 0.0, bound: float = 1.0) -> dict[str, Any]:
    """The mean effect over training runs as the sample, none of which lies outside ±`bound`; `p` are those of each run's items.

    Wilson's interval of a clustered share, the runs its clusters, stretched from [0, 1] to ±bound, with Student's quantile: the
    spread of a mean shrinks towards a bound as it would for shares. The error is never below what the items alone would give.
    Runs "differ" where some lie above the threshold and some below it, each with Bonferroni's correction over the runs;
    `heterogeneity` is the p-value of no spread beyond the items', `sd_seeds` that spread.

    Shapes:   effects, se, p  [K] or [K, D], K runs at least two  ->  each value [] or [D]
    Source:   Korn and Graubard 1998 (clustered shares by an effective size, with Student's quantile); Cochran 1954 (Q);
              Piantadosi and Gail 1993 (differences of sign: the range test)
    """
    k, mean, between, items = len(effects), effects.mean(0), effects.var(0, ddof=1), np.mean(se**2, 0)
    variance = np.maximum(between, items) / k
    room = np.maximum(bound**2 - mean**2, 2 * bound * np.sqrt(items) / k)  # runs without any variation lie at a bound
    quantile, share = special.stdtrit(k - 1, 0.5 + LEVEL / 2), mean / bound
    c = quantile**2 * variance / room
    half = np.sqrt(c * np.maximum(0.0, 1 + c - share**2))
    error = np.sqrt(variance * (bound**2 - against**2) / room)  # were the threshold the truth
    weight = 1 / se**2
    q = (weight * (effects - (weight * effects).sum(0) / weight.sum(0)) ** 2).sum(0)
    beyond = [((p < (1 - LEVEL) / k) & (sign * (effects - against) > 0)).any(0) for sign in (1, -1)]
    return {
        "seed_low": bound * (share - half) / (1 + c), "seed_high": bound * (share + half) / (1 + c),
        "seed_p": 2 * special.stdtr(k - 1, -np.abs(mean - against) / error),
        "seed_detectable": (quantile + special.stdtrit(k - 1, POWER)) * np.sqrt(variance),
        "sd_seeds": np.sqrt(np.maximum(0.0, between - items)), "heterogeneity": special.chdtrc(k - 1, q),
        "differs": beyond[0] & beyond[1],
    }  # fmt: skip


def at_level(heights: np.ndarray, values: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Values along curves, interpolated linearly to where a curve's height first reaches a level.

    A curve that begins at or above the level gives its first value, one that never reaches it NaN.

    Shapes:   heights, values  [D, K],  level  [D]  ->  [D]
    """
    reached = heights >= level[:, None]
    curve, after = np.arange(len(level)), reached.argmax(1)
    before = np.maximum(after - 1, 0)
    rise = heights[curve, after] - heights[curve, before]
    share = np.divide(level - heights[curve, before], rise, out=np.ones(len(level)), where=rise > 0)
    crossing = values[curve, before] + share * (values[curve, after] - values[curve, before])
    return np.where(reached.any(1), crossing, np.nan)


def resamples(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n clusters counts, [1 + draws, n]: once in the data themselves, then in each bootstrap sample."""
    return np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=draws)])


def stretch(n: int) -> float:
    """By how much the deviations of a bootstrap over n runs fall short of those of Student's interval: 1 for one run, which has
    none.

    Source:   Hesterberg 2015 (variance of so few, expanded percentiles)
    """
    quantile = 0.5 + LEVEL / 2
    return 1.0 if n < 2 else (n / (n - 1)) ** 0.5 * special.stdtrit(n - 1, quantile) / special.ndtri(quantile)


def percentiles(drawn: np.ndarray, name: str = "") -> dict[str, float]:
    """The value itself, which comes first, and the 95 % percentile interval of the bootstrap draws behind it.

    Shapes:   [1 + draws]  ->  value, low, high; with a name: name, name_low, name_high
    """
    known = np.isfinite(drawn[1:]).any()
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975]) if known else (np.nan, np.nan)
    prefix = f"{name}_" if name else ""
    return {name or "value": float(drawn[0]), f"{prefix}low": float(low), f"{prefix}high": float(high)}


def simultaneous(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A band that holds K values at once: their standard errors times one factor, the quantile over bootstrap samples of the
    largest deviation in standard errors.

    Shapes:   [1 + draws, K], the values themselves first  ->  low, high [K]
    Source:   Montiel Olea and Plagborg-Møller 2019 (sup-t bands)
    """
    away = drawn[1:] - drawn[0]
    error = away.std(0)
    scaled = np.divide(np.abs(away), error, out=np.zeros_like(away), where=error > 0)
    half = np.quantile(scaled.max(1), LEVEL) * error
    return drawn[0] - half, drawn[0] + half


def holm(p: pd.Series, families: list[pd.Series]) -> pd.Series:
    """P-values corrected within each family, whose keys are given as columns; unknown p-values stay unknown and do not count.

    Source:   Holm 1979
    """
    known = p.dropna().astype(float).groupby(families)
    steps = known.transform(lambda of: (of.sort_values() * np.arange(len(of), 0, -1)).cummax().clip(upper=1))
    return steps.reindex(p.index)
