"""Rates, intervals, paired differences. NumPy and SciPy only: the claims must be checkable without a model library.

Answers to prompts about one deed are correlated, so every interval is computed over clusters, not over items.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats


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


def wilson(p: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share `p` of `n` (effective) independent items.

    Raises:   ValueError where n is not positive or p lies outside [0, 1]
    Source:   Wilson 1927
    """
    if n <= 0 or not 0 <= p <= 1:
        raise ValueError(f"an interval needs n > 0 and 0 <= p <= 1, not n = {n}, p = {p}")
    z = stats.norm.ppf(0.5 + level / 2)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def effective_size(values: np.ndarray, clusters: Sequence[Hashable]) -> float:
    """How many independent items the clustered ones are worth.

    n divided by the design effect, the ratio of the clustered variance of the mean to the independent one, never
    below 1; where all values are equal the correlation is unknown and a cluster counts as one item.

    Source:   Kish 1965; sandwich variance of a mean over clusters, with the small-sample factor C / (C - 1)
    """
    _, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    n, n_clusters = len(values), int(index.max()) + 1
    spread = values.var()
    if spread == 0 or n_clusters < 2:
        return float(n_clusters)
    residual = np.bincount(index, weights=values - values.mean())
    clustered = (residual**2).sum() / n**2 * n_clusters / (n_clusters - 1)
    return float(n / max(1.0, clustered / (spread / n)))


def rate(events: Sequence[bool | None], clusters: Sequence[Hashable], level: float = 0.95) -> Rate:
    """The share of events with a clustered Wilson interval; None is an unjudged response.

    Raises:   ValueError where there is nothing to rate or the lengths differ
    """
    if not len(events) or len(events) != len(clusters):
        raise ValueError(f"a rate needs as many clusters as events and at least one, not {len(events)}, {len(clusters)}")
    unjudged = sum(event is None for event in events)
    least = np.array([bool(event) for event in events], float)
    most = np.array([event is None or bool(event) for event in events], float)
    low, _ = wilson(least.mean(), effective_size(least, clusters), level)
    _, high = wilson(most.mean(), effective_size(most, clusters), level)
    n_clusters = len({str(c) for c in clusters})
    return Rate(float(least.mean()), low, high, len(events), n_clusters, unjudged, float(most.mean()))


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], rng: np.random.Generator,
    draws: int = 2000, level: float = 0.95,
) -> tuple[float, float, float]:  # fmt: skip
    """Mean of b - a over the same items, with a bootstrap interval that draws whole clusters.

    Shapes:   a, b, clusters  [N]  ->  (difference, low, high)
    Draws:    from `rng` only
    Raises:   ValueError where the lengths differ or there is nothing to compare
    Source:   Efron and Tibshirani 1993, percentile interval; clusters as in Field and Welsh 2007
    """
    if not len(a) or not len(a) == len(b) == len(clusters):
        raise ValueError(f"paired values must be as many as clusters: {len(a)}, {len(b)}, {len(clusters)}")
    change = np.asarray(b, float) - np.asarray(a, float)
    _, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    total, size = np.bincount(index, weights=change), np.bincount(index)
    drawn = rng.integers(len(size), size=(draws, len(size)))
    means = total[drawn].sum(1) / size[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(change.mean()), float(low), float(high)


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
    if not values.any():
        return 1.0  # every flip is as far out
    flipped = (rng.integers(2, size=(draws, len(values))) * 2 - 1) @ values
    return float((1 + (np.abs(flipped) >= abs(values.sum()) - 1e-12).sum()) / (1 + draws))


def stratified(
    strata: Sequence[Stratum], rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float, float]:
    """Weighted sum of the strata's means: (least, most, low, high), where the interval covers both bounds.

    The bootstrap draws whole clusters within each stratum. It knows no spread where all clusters of a stratum agree:
    the interval of a model that is always wrong has no width.

    Draws:    from `rng` only
    Raises:   ValueError where there is nothing to average or a stratum is empty or uneven
    Source:   Efron and Tibshirani 1993, percentile interval
    """
    if not strata or any(not s.least or not len(s.least) == len(s.most) == len(s.clusters) for s in strata):
        raise ValueError("a stratified mean needs strata, and in each as many values as clusters and at least one")
    point, drawn = np.zeros(2), np.zeros((2, draws))
    for stratum in strata:
        _, index = np.unique([str(c) for c in stratum.clusters], return_inverse=True)
        size = np.bincount(index)
        chosen = rng.integers(len(size), size=(draws, len(size)))
        for bound, values in enumerate((stratum.least, stratum.most)):
            total = np.bincount(index, weights=values)
            point[bound] += stratum.weight * total.sum() / size.sum()
            drawn[bound] += stratum.weight * total[chosen].sum(1) / size[chosen].sum(1)
    low, high = np.quantile(drawn[0], (1 - level) / 2), np.quantile(drawn[1], (1 + level) / 2)
    return float(point[0]), float(point[1]), float(low), float(high)


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
    found = values[curve, before] + share * (values[curve, after] - values[curve, before])
    return np.where(reached.any(1), found, np.nan)
