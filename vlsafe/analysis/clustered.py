"""Weighted sums of means over strata whose items lie in clusters: their intervals, paired differences and tests.

Strata may share clusters: the same requests in several measures, modalities or runs of training. A cluster is drawn, or its sign
flipped, in all of them at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from vlsafe.analysis.stats import LEVEL, POWER, effective_size, totals, wilsons

RESIDUE = 1e-12  # of rounding, relative to the numbers that are added
RARE = 10  # with fewer clusters that changed at all, a bootstrap knows too little of their spread


class Stratum(NamedTuple):
    """A weighted group of values in clusters; `least` and `most` bound each value and differ where it is unknown."""

    weight: float
    least: Sequence[float]
    most: Sequence[float]
    clusters: Sequence[Hashable]


def stratified(strata: Sequence[Stratum]) -> tuple[float, float, float, float]:
    """Weighted sum of the strata's means: (least, most, low, high), where the interval covers both bounds.

    Values lie in [0, 1] and weights are positive. The distances from each stratum's mean to the ends of its clustered
    Wilson interval are weighted, squared and added, with twice the products of those that share clusters times their
    correlation, so the interval has a width also where all answers agree.

    Raises:   ValueError where there is nothing to average or a stratum is empty or uneven
    Source:   Zou 2008 (square-and-add, MOVER, of correlated estimates)
    """
    _refuse_uneven(strata)
    parts, _, _ = _laid_out(strata, both=True)
    means = np.array([part.weight * part.values.mean(0) for part in parts])
    ends = np.array([part.weight * np.array(part.intervals()) for part in parts])  # [S, 2, 2]: low and high of both bounds
    (least, most), alike = means.sum(0), _correlations(parts)
    below, above = _length(means[:, 0] - ends[:, 0, 0], alike[0]), _length(ends[:, 1, 1] - means[:, 1], alike[1])
    return float(least), float(most), float(least - below), float(most + above)


class _Part(NamedTuple):
    """A stratum laid out: `within` and `sizes` as of `clusters_of`, `place` each cluster's number among those of all strata."""

    weight: float
    values: np.ndarray
    within: np.ndarray
    sizes: np.ndarray
    place: np.ndarray

    def totals(self) -> np.ndarray:
        return totals(self.values, self.within, len(self.sizes))

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        return wilsons(self.values.mean(0), effective_size(self.values, self.within, self.sizes))


def together(clusters: Sequence[Sequence[Hashable]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Clusters of several strata under common numbers, and the numbers of each set of strata that share some: what is to be
    drawn by itself, for no stratum has clusters of two sets.

    Shapes:   strata of names [N]  ->  strata of numbers [N], sets of numbers
    """
    _, numbers = np.unique([str(name) for of in clusters for name in of], return_inverse=True)
    numbered, sets = np.split(numbers, np.cumsum([len(of) for of in clusters])[:-1]), list[np.ndarray]()
    for own in map(np.unique, numbered):
        joined = [one for one in sets if np.isin(own, one).any()]
        apart = [one for one in sets if not np.isin(own, one).any()]
        sets = [*apart, np.unique(np.concatenate([own, *joined]))]
    return numbered, sets


def _laid_out(strata: Sequence[Stratum], both: bool = False) -> tuple[list[_Part], list[np.ndarray], int]:
    """Strata with the values `least`, or `both` bounds as columns; the sets of `together`, and how many clusters there are."""
    numbered, sets = together([s.clusters for s in strata])
    parts = []
    for s, own in zip(strata, numbered, strict=True):
        values = np.column_stack([s.least, s.most]).astype(float) if both else np.asarray(s.least, float).reshape(len(own), -1)
        place, index, sizes = np.unique(own, return_inverse=True, return_counts=True)
        parts.append(_Part(s.weight, values, index, sizes, place))
    return parts, sets, sum(map(len, sets))


def _correlations(parts: Sequence[_Part]) -> np.ndarray:
    """How the means of strata go together by the clusters that they share, per column: [K, S, S].

    As `effective_size`, drawn towards the greatest correlation possible, by as much as one more cluster would weigh among those
    few that hold an event; where a mean has no spread between clusters, that is all that is known.
    """
    n_clusters, width = 1 + max(part.place.max() for part in parts), parts[0].values.shape[1]
    residuals, sizes = np.zeros((width, len(parts), n_clusters)), np.zeros((len(parts), n_clusters))
    informative = np.zeros((width, len(parts)))
    for s, part in enumerate(parts):
        total = part.totals()
        residual = total - part.values.mean(0) * part.sizes[:, None]
        residuals[:, s, part.place], sizes[s, part.place] = residual.T, part.sizes
        spread = np.abs(residual).max(0) > RESIDUE * part.sizes.max()
        informative[:, s] = np.minimum((total > 0).sum(0), (total < part.sizes[:, None]).sum(0)) * spread
    overlap, known = _cosines(sizes), np.minimum(informative[:, :, None], informative[:, None])
    return (known * _cosines(residuals) + overlap) / (known + 1)


def _cosines(rows: np.ndarray) -> np.ndarray:
    length = np.sqrt((rows**2).sum(-1, keepdims=True))
    unit = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return unit @ np.swapaxes(unit, -1, -2)


def _length(distances: np.ndarray, alike: np.ndarray) -> float:
    """Of a sum of correlated terms, whose own distances are these."""
    return float(max(0.0, distances @ alike @ distances)) ** 0.5


def _refuse_uneven(strata: Sequence[Stratum]) -> None:
    if not strata or any(not len(s.least) or not len(s.least) == len(s.most) == len(s.clusters) for s in strata):
        raise ValueError("a stratified mean needs strata, and in each as many values as clusters and at least one")


@dataclass(frozen=True)
class Compared:
    """A paired difference `effect` with its interval and two-sided p-value against one hypothesis; arrays where several
    were compared at once.

    `changed` counts items that differ. Tested by a bootstrap of clusters, or where few of them differ by an exact test.
    `se` is the standard error over items, `detectable` the smallest difference found in nine of ten such comparisons.
    `contributions` is what each cluster adds to the effect, [C, K]; they sum up to it.
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
    contributions: np.ndarray


def compare(strata: Sequence[Stratum], rng: np.random.Generator, against: float = 0.0, draws: int = 2000) -> Compared:
    """Test whether a weighted sum of mean paired changes differs from `against`.

    A stratum's `least` holds the change of each item, [N], or [N, K] for K comparisons at once. With at least RARE clusters
    that changed, not all of them alike, whole clusters are resampled, and the percentiles are moved out as far as a t-interval's
    bounds lie from a normal one's; where few samples lie beyond `against`, the tail of a normal distribution says how many would.
    Otherwise the interval adds up Wilson's for rises and for falls, and the p-value is that of all flips of the clusters' signs:
    McNemar's exact test where every cluster is one item. Clusters of one name are drawn together, in whichever strata they are.

    Draws:    from `rng` only
    Raises:   ValueError where there is nothing to compare
    Source:   Field and Welsh 2007 (clusters); Hesterberg 2015 (expanded percentiles); McNemar 1947; Zou and Donner 2008
    """
    _refuse_uneven(strata)
    parts, sets, n_clusters = _laid_out(strata)
    width, counts = parts[0].values.shape[1], np.empty((draws, n_clusters))
    for of in sets:
        counts[:, of] = _redrawn(len(of), draws, rng)
    effect, drawn, changed = np.zeros(width), np.zeros((draws, width)), np.zeros(width, int)
    contributions, touched = np.zeros((n_clusters, width)), np.zeros((n_clusters, width), bool)
    for part in parts:
        mean, total, own = part.values.mean(0), part.totals(), counts[:, part.place]
        size = (own @ part.sizes.astype(float))[:, None]
        effect += part.weight * mean  # which a sample without any item of this stratum keeps
        drawn += part.weight * np.where(size > 0, (own @ total) / np.maximum(size, 1), mean)
        changed += (part.values != 0).sum(0)
        contributions[part.place] += part.weight * total / len(part.values)
        touched[part.place] |= part._replace(values=np.abs(part.values)).totals() > 0
    moved, free = touched.sum(0), max(1, n_clusters - len(sets))
    stretch = np.sqrt((free + 1) / free)
    end = special.ndtr(stretch * special.stdtrit(free, (1 - LEVEL) / 2))
    low, high = np.quantile(drawn, [end, 1 - end], axis=0)
    few = np.minimum((drawn <= against).sum(0), (drawn >= against).sum(0))
    distance = np.abs(effect - against)
    tail = special.ndtr(-np.divide(distance, drawn.std(0), out=np.full(width, np.inf), where=drawn.std(0) > 0))
    beyond = np.where((few < RARE) & (distance > 0), np.minimum(tail, (1 + few) / (1 + draws)), (1 + few) / (1 + draws))
    p = 2 * special.stdtr(free, special.ndtri(np.minimum(0.5, beyond)) / stretch)
    exact = (moved < RARE) | (drawn.std(0) < 1e-12)
    for k in np.flatnonzero(exact):
        low[k], high[k] = _square_and_add([part._replace(values=part.values[:, [k]]) for part in parts])
        flips = _flips(contributions[:, k], rng)
        if flips >= 1 - LEVEL:  # what this test does not tell from nothing, the interval does not either
            low[k], high[k] = min(low[k], 0.0), max(high[k], 0.0)
        p[k] = flips
        if against:
            reach = (high[k] if against > effect[k] else low[k]) - effect[k]
            scaled = (against - effect[k]) / reach if reach else 0.0  # in units of the interval's own length
            within = against * (effect[k] - against) > 0  # a threshold between nothing and the effect is the harder one to pass
            p[k] = max(2 * special.ndtr(-scaled * special.ndtri(0.5 + LEVEL / 2)), flips if within else 0.0)
    se = drawn.std(0) * stretch
    reach = _detectable(parts, se, free)
    se = np.where(exact, (high - low) / 2 / special.ndtri(0.5 + LEVEL / 2), se)
    n = sum(len(part.values) for part in parts)
    return Compared(effect, low, high, p, n, n_clusters, changed, se, reach, contributions)


def _redrawn(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n clusters is in each bootstrap sample, [draws, n]; twenty times as fast as drawing multinomials."""
    chosen = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * n).reshape(draws, n).astype(float)


def _square_and_add(parts: Sequence[_Part]) -> tuple[float, float]:
    """Interval of a weighted sum of mean changes from Wilson's intervals of the rises and of the falls in each stratum."""
    effect, sides, distances = 0.0, list[_Part](), list[np.ndarray]()
    for part in parts:
        both = np.column_stack([part.values, -part.values]) * np.sign(part.weight)
        scale = np.abs(part.values).max() or 1.0  # in units of the largest change
        side = part._replace(weight=abs(part.weight) * scale, values=np.maximum(both, 0) / scale)
        (rise, fall), (low, high) = side.values.mean(0), side.intervals()
        effect += side.weight * (rise - fall)
        distances.append(side.weight * np.array([rise - low[0], high[1] - fall, high[0] - rise, fall - low[1]]))
        sides.append(side)
    of, alike = np.array(distances).T, _correlations(sides)
    down, below, up, above = (_length(distance, alike[column]) for distance, column in zip(of, (0, 1, 0, 1), strict=True))
    return effect - np.hypot(down, below), effect + np.hypot(up, above)


def _flips(contributions: np.ndarray, rng: np.random.Generator) -> float:
    """`sign_flip`'s p-value by all flips of the few contributions that are not zero, or of those that are all of one sign."""
    moved = _moved(contributions)
    if (moved > 0).all() or (moved < 0).all():
        return min(1.0, 2.0 ** (1 - len(moved)))
    if len(moved) >= RARE:
        return sign_flip(moved, rng)
    signs = 2 * (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1) - 1
    return float((np.abs(signs @ moved) >= abs(moved.sum()) - RESIDUE * np.abs(moved).sum()).mean())


def _moved(contributions: np.ndarray) -> np.ndarray:
    """Those that are not zero, be it by rounding."""
    return contributions[np.abs(contributions) > RESIDUE * np.abs(contributions).max(initial=0.0)]


def _detectable(parts: Sequence[_Part], se: np.ndarray, free: int) -> np.ndarray:
    """The smallest difference that is found with a probability of POWER, were the items as many and as clustered as here.

    A true difference brings its own spread: had nothing changed so far, the standard error seen would be zero. How large a
    change of one item is, where none was seen, is taken to be 1.
    """
    reach = special.stdtrit(free, 0.5 + LEVEL / 2) + special.ndtri(POWER)
    events = [part._replace(values=(part.values != 0).astype(float)) for part in parts]
    errors = np.array([abs(of.weight) / np.sqrt(effective_size(of.values, of.within, of.sizes)) for of in events])
    own = np.array([_length(error, alike) ** 2 for error, alike in zip(errors.T, _correlations(events), strict=True)])
    total, changed = sum(np.abs(part.values).sum(0) for part in parts), sum(of.values.sum(0) for of in events)
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


def sign_flip(contributions: Sequence[float] | np.ndarray, rng: np.random.Generator, draws: int = 9999) -> float:
    """Two-sided p-value of a paired difference that is the sum of its clusters' contributions: were it zero, each could
    as well have the other sign.

    Draws:    from `rng` only
    Raises:   ValueError where there is nothing to flip
    Source:   Fisher 1935; random flips, the observed ones counted among them (Phipson and Smyth 2010)
    """
    values = np.asarray(contributions, float)
    if not len(values):
        raise ValueError("a test of paired differences needs at least one cluster")
    values = _moved(values)  # the others are the same either way
    if not len(values):
        return 1.0  # every flip is as far out
    kept = rng.integers(2, size=(draws, len(values)), dtype=np.int8) @ values  # the rest is flipped
    flipped = 2 * kept - values.sum()
    as_far = np.abs(flipped) >= abs(values.sum()) - RESIDUE * np.abs(values).sum()
    return float((1 + as_far.sum()) / (1 + draws))
