import numpy as np
import pytest

from vlsafe import stats


def test_wilson_by_hand():
    # Newcombe 1998, table I, method 3: 81 / 263 and 0 / 20
    assert stats.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    with pytest.raises(ValueError, match="n > 0"):
        stats.wilson(0.5, 0)


def test_clusters_of_equal_answers_count_once():
    values = np.repeat([1, 0, 1, 0, 0, 1, 0, 1], 5).astype(float)
    clusters = np.repeat(np.arange(8), 5)
    assert 6 < stats.effective_size(values, clusters) <= 8
    assert stats.effective_size(values, np.arange(40)) == pytest.approx(40 * 39 / 40)
    assert stats.effective_size(np.zeros(40), clusters) == 8


def test_unjudged_responses_make_a_bound():
    found = stats.rate([True, False, None, None], "abcd")
    assert (found.value, found.value_high, found.n, found.n_unjudged) == (0.25, 0.75, 4, 2)
    assert found.low < 0.25 and found.high > 0.75
    with pytest.raises(ValueError, match="at least one"):
        stats.rate([], [])


def test_paired_difference_repeats_and_covers_nothing_where_nothing_changed():
    a = np.random.default_rng(0).integers(0, 2, 60)
    same = stats.paired_difference(a, a, range(60), np.random.default_rng(1))
    assert same == (0.0, 0.0, 0.0)
    b = np.maximum(a, np.arange(60) % 3 == 0)
    one, two = (stats.paired_difference(a, b, np.arange(60) // 2, np.random.default_rng(5)) for _ in range(2))
    assert one == two and one[1] <= one[0] <= one[2] and one[0] == (b - a).mean()


def test_clustered_intervals_cover():
    """Thirty clusters of four with strong correlation: an interval over items would cover far less."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        p = rng.beta(1, 1, 30)
        values = (rng.random((30, 4)) < p[:, None]).astype(float).ravel()
        found = stats.rate(values.astype(bool).tolist(), np.repeat(np.arange(30), 4).tolist())
        hits += found.low <= 0.5 <= found.high
    assert hits / 400 >= 0.92


def test_a_stratified_mean_by_hand():
    """One stratum that never varies (mean 0.5) and one of two clusters, of which a bootstrap draws 0, 1/2 or 1."""
    still = stats.Stratum(0.5, [1, 0], [1, 0], ["a", "a"])
    loose = stats.Stratum(0.5, [0, 1], [0, 1], ["a", "b"])
    assert stats.stratified([still, loose], np.random.default_rng(0)) == (0.5, 0.5, 0.25, 0.75)
    assert stats.stratified([still], np.random.default_rng(0)) == (0.25, 0.25, 0.25, 0.25)
    open_end = stats.Stratum(1.0, [0, 0], [1, 1], ["a", "b"])
    assert stats.stratified([open_end], np.random.default_rng(0)) == (0.0, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        stats.stratified([stats.Stratum(1.0, [], [], [])], np.random.default_rng(0))


def test_one_stratum_is_the_ordinary_clustered_bootstrap():
    rng = np.random.default_rng(3)
    values, clusters = rng.random(60), (np.arange(60) // 3).tolist()
    found = stats.stratified([stats.Stratum(1.0, values.tolist(), values.tolist(), clusters)], np.random.default_rng(7))
    assert found[:1] + found[2:] == pytest.approx(
        stats.paired_difference(np.zeros(60), values, clusters, np.random.default_rng(7))
    )  # fmt: skip
