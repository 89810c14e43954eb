"""Rates, intervals, paired differences and tests, without a model library: the claims must be checkable without one.

Answers to prompts about one verb–object pair are correlated, so every interval is computed over clusters, not over items.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import scipy  # `scipy.stats` is imported when it is first used: it takes half a second

RARE = 10  # with fewer clusters that changed at all, a bootstrap knows too little of their spread
LEVEL = 0.95  # of every interval
POWER = 0.9  # of the smallest detectable difference
Shares = TypeVar("Shares", np.ndarray, np.float64)


@dataclass(frozen=True)
class Rate:
    """A share of events among `n` judged or unjudged items; `value`, `low`, `high` are fractions in [0, 1].

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


class Stratum(NamedTuple):
    """A weighted group of values in clusters; `least` and `most` bound each value and differ where it is unknown."""

    weight: float
    least: Sequence[float]
    most: Sequence[float]
    clusters: Sequence[Hashable]


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's score interval for a share `p` of `n` (effective) independent items.

    Raises:   ValueError where n is not positive or p lies outside [0, 1]
    Source:   Wilson 1927
    """
    if n <= 0 or not 0 <= p <= 1:
        raise ValueError(f"an interval needs n > 0 and 0 <= p <= 1, not n = {n}, p = {p}")
    low, high = _wilson(np.float64(p), np.float64(n))
    return float(low), float(high)


def _wilson(p: Shares, n: Shares) -> tuple[Shares, Shares]:
    z = scipy.stats.norm.ppf(0.5 + LEVEL / 2)
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

    Shapes:   values [N, K]; index, sizes of `clusters_of`  ->  [K]
    Source:   Kish 1965; sandwich variance of a mean over clusters, with the small-sample factor C / (C - 1)
    Departs:  the shrinkage, without which rare events in large clusters are covered in 83 % instead of 95 % (LOG.md)
    """
    n, n_clusters = len(values), len(sizes)
    if n == n_clusters:
        return np.full(values.shape[1], float(n))
    total, mean, spread = totals(values, index, n_clusters), values.mean(0), values.var(0)
    clustered = ((total - mean * sizes[:, None]) ** 2).sum(0) / n**2 * n_clusters / max(1, n_clusters - 1)
    informative = np.minimum((total > 0).sum(0), (total < sizes[:, None]).sum(0))
    largest = n / n_clusters
    effect = np.divide(clustered * n, spread, out=np.full(len(mean), largest), where=spread > 0)
    return n / np.maximum(1.0, (informative * effect + largest) / (informative + 1))


def intervals(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Clustered Wilson intervals of the mean of every column of values in [0, 1]: [N, K] -> low, high [K]."""
    return _wilson(values.mean(0), effective_size(values, *clusters_of(clusters)))


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


def stratified(strata: Sequence[Stratum]) -> tuple[float, float, float, float]:
    """Weighted sum of the strata's means: (least, most, low, high), where the interval covers both bounds.

    Values lie in [0, 1] and weights are positive. The distances from each stratum's mean to the ends of its clustered
    Wilson interval are squared, weighted and added, so the interval has a width also where all answers agree.

    Raises:   ValueError where there is nothing to average or a stratum is empty or uneven
    Source:   Zou and Donner 2008 (square-and-add; MOVER), for the sum of independent means
    """
    _refuse_uneven(strata)
    least = most = below = above = 0.0
    for stratum in strata:
        bounds = np.column_stack([stratum.least, stratum.most]).astype(float)
        (low, _), (_, high) = intervals(bounds, stratum.clusters)
        means = bounds.mean(0)
        least, most = least + stratum.weight * means[0], most + stratum.weight * means[1]
        below, above = below + (stratum.weight * (means[0] - low)) ** 2, above + (stratum.weight * (high - means[1])) ** 2
    return float(least), float(most), float(least - below**0.5), float(most + above**0.5)


def _refuse_uneven(strata: Sequence[Stratum]) -> None:
    if not strata or any(not len(s.least) or not len(s.least) == len(s.most) == len(s.clusters) for s in strata):
        raise ValueError("a stratified mean needs strata, and in each as many values as clusters and at least one")


@dataclass(frozen=True)
class Compared:
    """A paired difference `effect` with its interval and two-sided p-value against one hypothesis; arrays where several
    were compared at once.

    `changed` counts items that differ. Tested by a bootstrap of clusters, or where few of them differ by an exact test.
    `se` is the standard error over items, `detectable` the smallest difference found in nine of ten such comparisons.
    """

    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    n: int
    n_clusters: int
    changed: np.ndarray
    se: np.ndarray
    detectable: np.ndarray


def compare(strata: Sequence[Stratum], rng: np.random.Generator, against: float = 0.0, draws: int = 2000) -> Compared:
    """Test whether a weighted sum of mean paired changes differs from `against`.

    A stratum's `least` holds the change of each item, [N], or [N, K] for K comparisons at once. With at least RARE clusters
    that changed, not all of them alike, whole clusters are resampled, and the percentiles are moved out as far as a t-interval's
    bounds lie from a normal one's; where few samples lie beyond `against`, the tail of a normal distribution says how many would.
    Otherwise the interval adds up Wilson's for rises and for falls, and the p-value is the sign test's over clusters:
    McNemar's exact test where every cluster is one item.

    Draws:    from `rng` only
    Raises:   ValueError where there is nothing to compare
    Source:   Field and Welsh 2007 (clusters); Hesterberg 2015 (expanded percentiles); McNemar 1947; Zou and Donner 2008
    """
    _refuse_uneven(strata)
    parts = [(s.weight, np.asarray(s.least, float).reshape(len(s.least), -1), *clusters_of(s.clusters)) for s in strata]
    n_clusters, width = sum(len(sizes) for *_, sizes in parts), parts[0][1].shape[1]
    effect, drawn, changed, moved = np.zeros(width), np.zeros((draws, width)), np.zeros(width, int), np.zeros(width, int)
    for weight, values, index, sizes in parts:
        counts = _redrawn(len(sizes), draws, rng)
        effect += weight * values.mean(0)
        drawn += weight * (counts @ totals(values, index, len(sizes))) / (counts @ sizes.astype(float))[:, None]
        changed += (values != 0).sum(0)
        moved += (totals(np.abs(values), index, len(sizes)) > 0).sum(0)
    free = max(1, n_clusters - len(parts))
    stretch = np.sqrt((free + 1) / free)
    end = scipy.stats.norm.cdf(stretch * scipy.stats.t.ppf((1 - LEVEL) / 2, free))
    low, high = np.quantile(drawn, [end, 1 - end], axis=0)
    few = np.minimum((drawn <= against).sum(0), (drawn >= against).sum(0))
    distance = np.abs(effect - against)
    tail = scipy.stats.norm.sf(np.divide(distance, drawn.std(0), out=np.full(width, np.inf), where=drawn.std(0) > 0))
    beyond = np.where((few < RARE) & (distance > 0), np.minimum(tail, (1 + few) / (1 + draws)), (1 + few) / (1 + draws))
    p = 2 * scipy.stats.t.cdf(scipy.stats.norm.ppf(np.minimum(0.5, beyond)) / stretch, free)
    exact = (moved < RARE) | (drawn.std(0) < 1e-12)
    for k in np.flatnonzero(exact):
        column = [(weight, values[:, k], index, sizes) for weight, values, index, sizes in parts]
        low[k], high[k] = _square_and_add(column)
        reach = (high[k] if against > effect[k] else low[k]) - effect[k]
        scaled = scipy.stats.norm.ppf(0.5 + LEVEL / 2) * (against - effect[k]) / reach  # ending there, p = 1 - level
        p[k] = _sign_test(column) if against == 0 else 2 * scipy.stats.norm.sf(scaled)
    se = drawn.std(0) * stretch
    reach = _detectable(parts, se, free)
    se = np.where(exact, (high - low) / 2 / scipy.stats.norm.ppf(0.5 + LEVEL / 2), se)
    return Compared(effect, low, high, p, sum(len(values) for _, values, *_ in parts), n_clusters, changed, se, reach)


def _redrawn(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n clusters is in each bootstrap sample, [draws, n]; twenty times as fast as drawing multinomials."""
    chosen = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * n).reshape(draws, n).astype(float)


_Column = Sequence[tuple[float, np.ndarray, np.ndarray, np.ndarray]]


def _square_and_add(column: _Column) -> tuple[float, float]:
    """Interval of a weighted sum of mean changes from Wilson's intervals of the rises and of the falls in each stratum."""
    effect = below = above = 0.0
    for weight, values, index, sizes in column:
        both = np.column_stack([values, -values]) * np.sign(weight)
        both, scale = np.maximum(both, 0), np.abs(values).max() or 1.0  # in units of the largest change
        rise, fall = both.mean(0)
        low, high = _wilson(both.mean(0) / scale, effective_size(both / scale, index, sizes))
        low, high = low * scale, high * scale
        effect += abs(weight) * (rise - fall)
        below += weight**2 * ((rise - low[0]) ** 2 + (high[1] - fall) ** 2)
        above += weight**2 * ((high[0] - rise) ** 2 + (fall - low[1]) ** 2)
    return effect - below**0.5, effect + above**0.5


def _sign_test(column: _Column) -> float:
    """Exact two-sided p-value: do more clusters rise than fall?"""
    changes = np.concatenate([w * totals(values[:, None], index, len(sizes)) for w, values, index, sizes in column])
    rises, falls = int((changes > 0).sum()), int((changes < 0).sum())
    return float(scipy.stats.binomtest(rises, rises + falls).pvalue) if rises + falls else 1.0


def _detectable(parts: _Column, se: np.ndarray, free: int) -> np.ndarray:
    """The smallest difference that is found with a probability of POWER, were the items as many and as clustered as here.

    A true difference brings its own spread: had nothing changed so far, the standard error seen would be zero. How large a
    change of one item is, where none was seen, is taken to be 1.
    """
    reach = scipy.stats.t.ppf(0.5 + LEVEL / 2, free) + scipy.stats.norm.ppf(POWER)
    own = sum(weight**2 / effective_size((values != 0).astype(float), index, sizes) for weight, values, index, sizes in parts)
    total, changed = sum(np.abs(values).sum(0) for _, values, *_ in parts), sum((values != 0).sum(0) for _, values, *_ in parts)
    own = own * np.where(changed > 0, total / np.maximum(changed, 1), 1.0)
    return np.maximum(reach * se, reach**2 * own / (1 + reach**2 * own))


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], rng: np.random.Generator,
    draws: int = 2000,
) -> tuple[float, float, float]:  # fmt: skip
    """Mean of b - a over the same items, with `compare`'s interval.

    Shapes:   a, b, clusters  [N]  ->  (difference, low, high)
    Draws:    from `rng` only
    Raises:   ValueError where the lengths differ or there is nothing to compare
    """
    if len(a) != len(b):
        raise ValueError(f"paired values must be as many on both sides: {len(a)}, {len(b)}")
    change = np.asarray(b, float) - np.asarray(a, float)
    result = compare([Stratum(1.0, change, change, clusters)], rng, draws=draws)
    return float(result.effect[0]), float(result.low[0]), float(result.high[0])


def sign_flip(contributions: Sequence[float], rng: np.random.Generator, draws: int = 9999) -> float:
    """Two-sided p-value of a paired difference that is the sum of its clusters' contributions: were it zero, each could
    as well have the other sign.

    Draws:    from `rng` only
    Raises:   ValueError where there is nothing to flip
    Source:   Fisher 1935; random flips, the observed ones counted among them (Phipson and Smyth 2010)
    """
    values = np.asarray(contributions, float)
    if not len(values):
        raise ValueError("a test of paired differences needs at least one cluster")
    values = values[values != 0]  # the others are the same either way
    if not len(values):
        return 1.0  # every flip is as far out
    kept = rng.integers(2, size=(draws, len(values)), dtype=np.int8) @ values  # the rest is flipped
    flipped = 2 * kept - values.sum()
    return float((1 + (np.abs(flipped) >= abs(values.sum()) - 1e-12).sum()) / (1 + draws))


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
    quantile, share = scipy.stats.t.ppf(0.5 + LEVEL / 2, k - 1), mean / bound
    c = quantile**2 * variance / room
    half = np.sqrt(c * np.maximum(0.0, 1 + c - share**2))
    error = np.sqrt(variance * (bound**2 - against**2) / room)  # were the threshold the truth
    weight = 1 / se**2
    q = (weight * (effects - (weight * effects).sum(0) / weight.sum(0)) ** 2).sum(0)
    beyond = [((p < (1 - LEVEL) / k) & (sign * (effects - against) > 0)).any(0) for sign in (1, -1)]
    return {
        "seed_low": bound * (share - half) / (1 + c), "seed_high": bound * (share + half) / (1 + c),
        "seed_p": 2 * scipy.stats.t.sf(np.abs(mean - against) / error, k - 1),
        "seed_detectable": (quantile + scipy.stats.t.ppf(POWER, k - 1)) * np.sqrt(variance),
        "sd_seeds": np.sqrt(np.maximum(0.0, between - items)), "heterogeneity": scipy.stats.chi2.sf(q, k - 1),
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
