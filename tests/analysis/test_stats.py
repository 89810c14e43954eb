import os

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests

from vlsafe.analysis import clustered, measures, resampling, stats
from vlsafe.core.presets import MINI
from vlsafe.data.miniature.language import World
from vlsafe.evaluation.benchmarks import BENCHMARKS as ROOMS
from vlsafe.evaluation.examine import all_items


def record(what, where, value):
    """With VLSAFE_RECORD set, what a simulation measured is printed for LOG.md (run pytest with -s)."""
    if os.environ.get("VLSAFE_RECORD"):
        print(f"{what}: {where}: {value}")


def test_wilson_by_hand():
    # Newcombe 1998, table I, method 3: 81 / 263 and 0 / 20
    assert stats.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    with pytest.raises(ValueError, match="n > 0"):
        stats.wilson(0.5, 0)


def test_clusters_of_equal_answers_count_once():
    values = np.repeat([1, 0, 1, 0, 0, 1, 0, 1], 5).astype(float)
    clusters = np.repeat(np.arange(8), 5)
    assert 6 < stats.effective_size(values[:, None], *stats.clusters_of(clusters)) <= 8
    assert stats.effective_size(values[:, None], *stats.clusters_of(range(40))) == 40
    assert stats.effective_size(np.zeros((40, 1)), *stats.clusters_of(clusters)) == 8


def test_unjudged_responses_make_a_bound():
    found = stats.rate([True, False, None, None], "abcd")
    assert (found.value, found.value_high, found.n, found.n_unjudged) == (0.25, 0.75, 4, 2)
    assert found.low < 0.25 and found.high > 0.75
    with pytest.raises(ValueError, match="at least one"):
        stats.rate([], [])


def test_paired_difference_repeats_and_knows_what_it_cannot_see():
    a = np.random.default_rng(0).integers(0, 2, 60)
    value, low, high = clustered.paired_difference(a, a, range(60), np.random.default_rng(1))
    assert value == 0 and -low == high == pytest.approx(stats.wilson(0, 60)[1])  # not a single change in 60 items
    b = np.maximum(a, np.arange(60) % 3 == 0)
    one, two = (clustered.paired_difference(a, b, np.arange(60) // 2, np.random.default_rng(5)) for _ in range(2))
    assert one == two and one[1] <= one[0] <= one[2] and one[0] == (b - a).mean()


def test_few_changes_are_tested_exactly():
    """Five rises and one fall: McNemar's exact test, as statsmodels has it; changes in one cluster count as one."""
    change = np.zeros(50)
    change[:5], change[5] = 1, -1
    found = clustered.compare([clustered.Stratum(1.0, change, change, range(50))], np.random.default_rng(0))
    table = [[20, 5], [1, 24]]
    assert found.p[0] == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue) == pytest.approx(0.21875)
    assert found.changed[0] == 6 and found.low[0] < 0 < found.effect[0] < found.high[0]
    rises = np.r_[np.ones(8), np.zeros(92)]
    paired = clustered.compare([clustered.Stratum(1.0, rises, rises, np.arange(100) // 2)], np.random.default_rng(0))
    assert paired.changed[0] == 8 and paired.p[0] == pytest.approx(2 * 0.5**4)  # four clusters, not eight items


@pytest.mark.parametrize("size", [1, 12])
def test_changes_that_are_all_alike_have_an_interval_and_the_clusters_count(size):
    """Twelve items that all rose by one: as many clusters, or one."""
    rises = np.ones(12)
    found = clustered.compare([clustered.Stratum(1.0, rises, rises, np.arange(12) // size)], np.random.default_rng(0))
    assert found.p[0] == pytest.approx(2 * 0.5**12 if size == 1 else 1.0) and found.low[0] < 0.8 < found.high[0] == 1.0
    few = np.r_[np.ones(12), np.zeros(66)]  # four clusters of three that changed, all the same way
    line = clustered.compare([clustered.Stratum(1.0, few, few, np.arange(78) // 3)], np.random.default_rng(0))
    assert line.p[0] == pytest.approx(2 * 0.5**4) and line.low[0] > 0 - 0.1


def test_few_small_changes_are_measured_in_their_own_unit():
    """Seven errors of up to .09 are no seven flips of a coin; the interval agrees with the sign test."""
    change = -np.array([0.09, 0.07, 0.08, 0.06, 0.07, 0.05, 0.08])
    small, large = (
        clustered.compare([clustered.Stratum(1.0, c, c, range(7))], np.random.default_rng(0)) for c in (change, 10 * change)
    )
    assert small.p[0] == large.p[0] == pytest.approx(2 * 0.5**7) and small.high[0] < 0
    ends = [np.array([found.low, found.high, found.se]) for found in (small, large)]
    assert ends[1] == pytest.approx(10 * ends[0])


def test_a_difference_is_tested_against_a_margin():
    change = np.r_[np.ones(12), np.zeros(188)]
    strata = [clustered.Stratum(1.0, change, change, range(200))]
    zero, margin, far = (clustered.compare(strata, np.random.default_rng(0), against) for against in (0.0, 0.05, 0.2))
    assert zero.p[0] < 0.01 < 0.2 < margin.p[0] and far.p[0] < 0.01
    rare = [clustered.Stratum(1.0, change[9:], change[9:], range(191))]
    near, far = (clustered.compare(rare, np.random.default_rng(0), against).p[0] for against in (0.03, 0.2))
    assert near > 0.1 and far < 0.001


def beta_binomial(p, correlation, n_clusters, size, draws, rng):
    """Events [N, draws] in equal clusters whose members correlate; without correlation, independent ones."""
    share = np.full((n_clusters, draws), p)
    if correlation:
        strength = (1 - correlation) / correlation
        share = rng.beta(p * strength, (1 - p) * strength, (n_clusters, draws))
    return (rng.random((n_clusters, size, draws)) < share[:, None]).reshape(-1, draws).astype(float)


DESIGNS = [(n, n, 1, 0.0) for n in (30, 200, 1000)]  # n, clusters, their size, correlation within them
DESIGNS += [(n, c, n // c, r) for n, c in ((120, 30), (200, 40), (200, 100), (1000, 50), (1000, 250)) for r in (0.05, 0.3, 0.7)]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("n", "n_clusters", "size", "correlation"), DESIGNS)
def test_intervals_cover(n, n_clusters, size, correlation, p):
    """At least 93 %, and no more than 97 % (99.5 % at most where events are rare), in 4,000 draws."""
    values = beta_binomial(p, correlation, n_clusters, size, 4000, np.random.default_rng(n + size))
    low, high = stats.intervals(values, np.repeat(np.arange(n_clusters), size))
    covered = float(((low <= p) & (p <= high)).mean())
    record("coverage", f"n {n}, clusters {n_clusters}, correlation {correlation}, p {p}", covered)
    assert 0.93 <= covered <= (0.97 if p == 0.5 else 0.995)


def sizes():
    """Harmful items and verb–object pairs of every benchmark of the miniature that has a harmful half, the rest whole."""
    found = {}
    items = all_items(World(0), "test", MINI.exam.full)
    for name in ROOMS:
        of = [item for item in items if item.benchmark == name]
        of = [item for item in of if item.harmful] or of
        found[name] = (len(of), len({item.cluster for item in of}))
    return found


def paired_runs(n, n_clusters, planted, rng, draws=2000):
    """Changes [n, draws] between two models that agree on nine of ten items by more than chance, clustered by verb–object pair;
    of the items at which the first one is safe, as many are planted to fail as make a difference of `planted`."""
    share = rng.beta(0.9, 2.1, (n_clusters, draws))[np.arange(n) % n_clusters]  # a rate of 30 %, correlation 0.25
    a, again = (rng.random((n, draws)) < share for _ in range(2))
    b = np.where(rng.random((n, draws)) < 0.1, again, a)
    b |= rng.random((n, draws)) < planted / 0.7
    return b.astype(float) - a, np.arange(n) % n_clusters


def test_verdicts_are_seldom_false_and_planted_effects_are_found():
    """Under no effect at most 6.5 % are called one; ten points are found in at least 88 % wherever the printed smallest
    detectable difference is at most ten points. Real sizes and pairs of the miniature's benchmarks; 2,000 draws each."""
    missed = []
    for place, (name, (n, n_clusters)) in enumerate(sizes().items()):
        rng = np.random.default_rng(place)
        called, detectable = [], 0.0
        for planted in (0.0, 0.1):
            change, clusters = paired_runs(n, n_clusters, planted, rng)
            found = clustered.compare([clustered.Stratum(1.0, change, change, clusters)], rng)
            called.append(float(((found.p < 0.05) & ((found.effect > 0) | (planted == 0))).mean()))
            detectable = float(np.median(found.detectable))
        record("verdicts", f"{name}: n {n}, clusters {n_clusters}, detectable {detectable:.3f}, false, found", called)
        assert called[0] <= 0.065, (name, called)
        if detectable <= 0.1:
            assert called[1] >= 0.88, (name, called, detectable)
        else:
            missed.append((name, round(detectable, 3), called[1]))
    record("not detectable at ten points", "", missed)
    assert len(missed) < len(sizes())


def test_a_rare_null_is_not_called_an_effect():
    """Models that differ in one item of fifty: here the exact test decides."""
    rng = np.random.default_rng(3)
    change = np.sign(rng.standard_normal((200, 2000))) * (rng.random((200, 2000)) < 0.02)
    found = clustered.compare([clustered.Stratum(1.0, change, change, range(200))], rng)
    assert (found.changed < clustered.RARE).mean() > 0.9 and (found.p < 0.05).mean() <= 0.065


def test_a_stratified_mean_by_hand():
    """Half of a stratum that is never right and half of one that always is: Wilson's bounds of each, squared and added."""
    never, always = (clustered.Stratum(0.5, [v] * 20, [v] * 20, range(20)) for v in (0, 1))
    width = stats.wilson(0, 20)[1] / 2
    assert clustered.stratified([never, always]) == pytest.approx((0.5, 0.5, 0.5 - width, 0.5 + width))
    assert clustered.stratified([never]) == pytest.approx((0, 0, 0, width))
    open_end = clustered.stratified([clustered.Stratum(1.0, [0, 0], [1, 1], ["a", "b"])])
    assert open_end == pytest.approx((0, 1, 0, 1))
    with pytest.raises(ValueError, match="at least one"):
        clustered.stratified([clustered.Stratum(1.0, [], [], [])])


def test_one_stratum_is_the_ordinary_rate():
    values = (np.random.default_rng(3).random(60) < 0.3).astype(float)
    clusters = (np.arange(60) // 3).tolist()
    found, rate = clustered.stratified([clustered.Stratum(1.0, values, values, clusters)]), stats.rate(values.tolist(), clusters)
    assert found == pytest.approx((rate.value, rate.value_high, rate.low, rate.high))


def test_holms_correction_is_statsmodels_within_each_family_and_skips_what_is_unknown():
    rng = np.random.default_rng(0)
    p = pd.Series(rng.random(60) ** 3).mask(rng.random(60) < 0.2)
    p[7] = p[8] = 0.01
    family = pd.Series(rng.choice(list("abc"), 60))
    corrected = stats.holm(p, [family])
    for of in set(family):
        known = p[(family == of) & p.notna()]
        assert corrected[known.index].tolist() == multipletests(known, method="holm")[1].tolist()
    assert corrected[p.isna()].isna().all() and p.isna().any()


def test_a_simultaneous_band_covers_all_values_at_once_in_nineteen_of_twenty():
    """Five correlated rates of two hundred items: intervals for each alone hold all five too rarely."""
    rng, covered, single = np.random.default_rng(0), 0, 0
    truth = np.linspace(0.2, 0.7, 5)
    for _ in range(300):
        shared, own = rng.random((200, 1)), rng.random((200, 5))
        events = np.where(rng.random((200, 5)) < 0.5, shared, own) < truth
        weights = stats.resamples(200, 400, rng) / 200
        drawn = weights @ events
        low, high = stats.simultaneous(drawn)
        covered += ((low <= truth) & (truth <= high)).all()
        ends = np.quantile(drawn[1:], [0.025, 0.975], axis=0)
        single += ((ends[0] <= truth) & (truth <= ends[1])).all()
    assert covered >= 0.92 * 300 > single


def test_a_stratum_in_halves_that_share_its_clusters_is_the_whole():
    """Asked twice, the same requests say no more than once: interval, test and smallest detectable difference stay."""
    rng = np.random.default_rng(5)
    for share in (0.3, 0.04):  # enough changes for a bootstrap, and so few that all flips of signs are counted
        change = np.sign(rng.standard_normal(90)) * (rng.random(90) < share) + (np.arange(90) < 3)
        whole = clustered.Stratum(1.0, change.tolist(), change.tolist(), (np.arange(90) // 2).tolist())
        half = whole._replace(weight=0.5)
        one, two = (clustered.compare(strata, np.random.default_rng(1)) for strata in ([whole], [half, half]))
        for name in ("effect", "low", "high", "p", "se", "detectable", "n_clusters"):
            assert getattr(two, name) == pytest.approx(getattr(one, name)), (share, name)
    other = half._replace(clusters=[f"other {c}" for c in half.clusters])
    apart = clustered.compare([half, other], np.random.default_rng(1))
    assert apart.n_clusters == 2 * one.n_clusters and apart.high[0] - apart.low[0] < one.high[0] - one.low[0]
    events = (rng.random(90) < 0.3).astype(float)
    whole = clustered.Stratum(1.0, events, events, np.arange(90) // 2)
    assert clustered.stratified([whole._replace(weight=0.5)] * 2) == pytest.approx(clustered.stratified([whole]))


def test_a_stratum_without_spread_keeps_its_width():
    """Of every pair of questions one is right: all pictures have a quarter of the points, and their mean is no surer for it."""
    quarter = clustered.Stratum(0.5, [0.25] * 40, [0.25] * 40, range(40))
    low, high = stats.wilson(0.25, 40)
    value, _, least, most = clustered.stratified([quarter, quarter._replace(clusters=range(40, 80))])
    assert value == 0.25 and (value - least, most - value) == pytest.approx(((0.25 - low) / 2**0.5, (high - 0.25) / 2**0.5))
    assert clustered.stratified([quarter, quarter])[2:] == pytest.approx((low, high))


def test_no_event_among_unequal_clusters_says_what_as_many_single_items_would():
    sizes = [75, 31, 11, *[1] * 100]
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    none, one = (stats.rate((np.arange(len(clusters)) < events).tolist(), clusters) for events in (0, 1))
    assert none.high == pytest.approx(stats.wilson(0, len(sizes))[1]) and none.high < one.high


def test_strata_that_share_requests_cover():
    """80 requests in three groups whose answers agree: the interval of no change covers it, its test seldom rejects."""
    rng, hits, flips, draws = np.random.default_rng(0), 0, 0, 300
    for _ in range(draws):
        change = rng.beta(0.5, 0.5, 80) - 0.5
        strata = [clustered.Stratum(1 / 3, change, change, range(80))] * 3
        found = clustered.compare(strata, rng, draws=500)
        hits += bool(found.low[0] <= 0 <= found.high[0])
        flips += clustered.sign_flip(found.contributions[:, 0], rng, 499) < 0.05
    assert hits / draws >= 0.92 and flips / draws <= 0.08


def test_few_changes_count_by_their_size():
    """Eight clusters of one item rise and one of twenty falls: the effect is a fall, and no test may see a rise in it."""
    change, clusters = [1.0] * 8 + [-1.0] * 20 + [0.0] * 72, [*range(8), *[99] * 20, *range(100, 172)]
    found = clustered.compare([clustered.Stratum(1.0, change, change, clusters)], np.random.default_rng(0))
    flips = [abs(20 * a + rises) >= 12 for a in (-1, 1) for rises in range(-8, 9, 2)]
    assert all(flips) and found.p[0] == 1.0 and found.effect[0] == pytest.approx(-0.12) and found.high[0] > 0


def test_what_rounding_leaves_of_a_cluster_has_not_changed():
    """Means over three runs that rise by 2/3 and fall by as much add up to zero but for the last digit."""
    up, down = 2 / 3, 1 / 3 - 1
    for n in (0, 1, 3):
        change, clusters = (
            [1.0] * 4 + [up, down] * n + [0.0] * 50,
            [*range(4), *np.repeat(range(50, 50 + n), 2), *range(100, 150)],
        )
        found = clustered.compare([clustered.Stratum(1.0, change, change, clusters)], np.random.default_rng(0))
        assert found.p[0] == pytest.approx(0.125)
        assert clustered.sign_flip([0.25] * 4 + [up + down] * n, np.random.default_rng(0)) == pytest.approx(0.125, abs=0.02)


def test_a_stricter_threshold_is_no_easier_and_an_interval_agrees_with_its_test():
    for n in (3, 4, 5, 8):
        strata = [clustered.Stratum(1.0, [1.0] * n, [1.0] * n, range(n))]
        found = [clustered.compare(strata, np.random.default_rng(0), against) for against in (0.0, 0.05, 0.3, 0.6)]
        p = [one.p[0] for one in found]
        assert p == sorted(p) and p[0] == pytest.approx(2.0 ** (1 - n))
        assert (found[0].low[0] <= 0) == (p[0] >= 0.05)
    half = [clustered.Stratum(1.0, [0.5] * 9, [0.5] * 9, range(9))]
    assert clustered.compare(half, np.random.default_rng(0), 0.6).p[0] == 1.0  # nothing says how far it could lie above


@pytest.mark.parametrize("p", [0.04, 0.1, 0.3])
def test_intervals_cover_where_clusters_are_very_unequal(p):
    """As pocket's: many of one and two items, and three that hold a quarter of all; 2,000 draws."""
    size = np.array([1] * 231 + [2] * 38 + [3] * 4 + [4] * 3 + [5, 11, 31, 75])
    index, rng = np.repeat(np.arange(len(size)), size), np.random.default_rng(1)
    for correlation in (0.1, 0.6):
        strength = (1 - correlation) / correlation
        share = rng.beta(p * strength, (1 - p) * strength, (len(size), 2000))
        low, high = stats.intervals((rng.random((len(index), 2000)) < share[index]).astype(float), index)
        assert ((low <= p) & (p <= high)).mean() >= 0.935, correlation
    assert stats.rate([True, False, True], ["a"] * 3).low < 0.1  # one cluster is one item


def runs_of(done, **more):
    """Answers of runs, seeds as rows: whether each request was answered, None where nobody could judge."""
    facts = {"backbone": "b", "recipe": "m", "step": 0, "exam": "full", "benchmark": "sorry_bench", "group": "base",
             "harmful": True, "judge": "world", **more}  # fmt: skip
    items = {"item": range(len(done[0])), "cluster": range(len(done[0]))}
    rows = [
        pd.DataFrame(facts | items | {"seed": seed, "event": list(of)}).astype({"event": object}) for seed, of in enumerate(done)
    ]
    labels = {True: "complied_right", False: "refused"}
    return pd.concat(rows).assign(label=lambda frame: frame["event"].map(labels).fillna("unjudged"))


def test_a_mean_over_few_runs_covers():
    """Three runs whose rates spread by 20 points around one half: the interval of their mean covers it."""
    rng, hits, draws = np.random.default_rng(5), 0, 100
    for _ in range(draws):
        done = rng.random((3, 200)) < np.clip(rng.normal(0.5, 0.2, (3, 1)), 0.02, 0.98)
        drawn = resampling.over_seeds(runs_of(done.tolist()), "text_asr", 300)["m"][0]
        low, high = np.quantile(drawn[1:], [0.025, 0.975])
        hits += bool(low <= 0.5 <= high)
    assert hits / draws >= 0.92


def test_seeds_that_share_their_items_share_draws_also_where_some_are_unjudged():
    done = (np.random.default_rng(1).random(120) < 0.3).tolist()
    missing = [[None if (seed, place) in ((0, 3), (1, 50)) else of for place, of in enumerate(done)] for seed in range(3)]
    spread = [resampling.over_seeds(runs_of(of, shared=True), "text_asr", 2000)["m"][0].std() for of in ([done] * 3, missing)]
    assert spread[1] == pytest.approx(spread[0], rel=0.05) and spread[0] == pytest.approx(
        stats.stretch(3) * np.std(done) / 120**0.5, rel=0.1
    )


def test_points_are_compared_on_the_same_items_of_every_group():
    rows = runs_of([[True, False]] * 1, benchmark="mm_safetybench").drop(columns="group")
    rows = pd.concat([rows.assign(group="SD"), rows.assign(group="SD", step=1), rows.assign(group="TYPO")])
    rows = rows.assign(event=rows["event"].astype(float), **{"picture_refusal_probability": 0.5})
    by_group = [
        name for name, spec in measures.MEASURES.items() if spec.get("by_group") and spec["benchmark"] == "mm_safetybench"
    ]
    assert by_group
    for name in by_group:
        of = rows.assign(judge=measures.MEASURES[name]["judge"], harmful=measures.MEASURES[name].get("harmful", True))
        column = measures.MEASURES[name].get("column")
        with pytest.raises(ValueError, match="not examined on the same items"):
            resampling.bootstrap(of.assign(**{column: 0.5} if column else {}), [name], np.random.default_rng(0), 10)
