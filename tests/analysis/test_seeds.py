"""The seed-level procedure on simulated training runs with a known truth: coverage, false verdicts, seeds that differ, power."""

import os

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from vlsafe.analysis import claims, clustered, stats
from vlsafe.analysis.comparisons import Part

RECORD = bool(os.environ.get("VLSAFE_RECORD"))
DRAWS, ITEMS = (20_000, 236) if RECORD else (3000, 236)
DESIGNS = [  # mean rate before and after: no effect in the middle and to either side, effects of 20 and 40 points
    (0.5, 0.5), (0.3, 0.3), (0.75, 0.75), (0.3, 0.5), (0.7, 0.5), (0.3, 0.7)
]  # fmt: skip
NEAR_A_BOUND = [(0.0, 0.3), (0.0, 0.9)]  # rates before are 0 in every run


def spread(mean, sd, size, rng):
    """True rates of runs: a beta distribution of some mean and standard deviation."""
    weight = mean * (1 - mean) / sd**2 - 1
    return rng.beta(mean * weight, (1 - mean) * weight, size) if mean and weight > 0 else np.full(size, mean)


def simulated(seeds, sd, before, after, draws, rng):
    """`stats.over_seeds` of many studies whose effects differ between seeds by `sd`, and the effects: [seeds, draws]."""
    each = sd if before == 0 else sd / np.sqrt(2)
    drawn = [rng.binomial(ITEMS, spread(mean, each, (seeds, draws), rng)) / ITEMS for mean in (before, after)]
    effects, se = drawn[1] - drawn[0], np.sqrt(sum(rate * (1 - rate) + 1 / ITEMS for rate in drawn) / ITEMS)
    p = 2 * norm.sf(np.abs(effects) / se)
    return stats.over_seeds(effects, se, p), effects


RECORDED = {"seed_coverage": [], "seed_power": []}


@pytest.fixture(scope="module", autouse=True)
def recorded():
    """Where it is wanted, what was simulated, as tables beside the figures."""
    yield
    for name, rows in RECORDED.items() if RECORD else ():
        pd.DataFrame(rows).round(4).to_csv(f"figures/{name}.csv", index=False)


@pytest.mark.parametrize("sd", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("seeds", [3, 8, 12])
def test_coverage_and_false_verdicts_over_seeds(seeds, sd):
    rng = np.random.default_rng(seeds)
    for before, after in DESIGNS + NEAR_A_BOUND * RECORD:
        found, _ = simulated(seeds, sd, before, after, DRAWS, rng)
        covered = np.mean((found["seed_low"] <= after - before) & (after - before <= found["seed_high"]))
        decided = np.mean((found["seed_p"] < 0.05) & ~found["differs"])
        both = {"coverage": float(covered), "verdicts": float(decided), "differs": float(found["differs"].mean())}
        RECORDED["seed_coverage"].append({"seeds": seeds, "sd": sd, "before": before, "after": after, **both})
        assert (found["seed_low"] >= -1).all() and (found["seed_high"] <= 1).all()
        if (before, after) in DESIGNS:
            assert covered >= 0.92 and (before != after or decided <= 0.065), (before, after, both)


def test_wilson_over_seeds_by_hand():
    effects, se = np.array([0.2, 0.4, 0.6]), np.full(3, 0.05)
    found = stats.over_seeds(effects, se, np.full(3, 1e-6))
    c = 4.30265**2 * 0.04 / 3 / (1 - 0.16)
    assert found["seed_high"] == pytest.approx((0.4 + (c * (1 + c - 0.16)) ** 0.5) / (1 + c), abs=1e-5)
    at_end = stats.over_seeds(effects, se, np.full(3, 1e-6), against=float(found["seed_low"]))
    assert at_end["seed_p"] == pytest.approx(0.05)  # the interval ends where the test begins to refuse
    assert found["sd_seeds"] == pytest.approx((0.04 - 0.0025) ** 0.5) and found["heterogeneity"] < 1e-5
    wide = stats.over_seeds(2 * effects, 2 * se, np.full(3, 1e-6), bound=2.0)  # a sum of two measures
    assert wide["seed_low"] == pytest.approx(2 * found["seed_low"]) and wide["seed_p"] == pytest.approx(found["seed_p"])


def test_runs_without_any_variation_still_have_an_interval():
    found = stats.over_seeds(np.ones(3), np.full(3, 1 / 236), np.full(3, 1e-9))
    assert 0.5 < found["seed_low"] < 1 == pytest.approx(found["seed_high"]) and 0.001 < found["seed_p"] < 0.05
    assert claims.compared(Part("x", 1, "a", "b"), {("b", s): _unit(1.0) for s in range(3)})["seed_low"] > 0.5


def _unit(rise, n=100):
    changed = [1.0] * round(rise * n) + [0.0] * (n - round(rise * n))
    return claims.Changes([clustered.Stratum(1.0, changed, changed, list(range(n)))], 0.0, rise)


def test_the_variance_of_seeds_and_items_is_separated():
    """Seeds that truly differ by 0.1 and items that blur each by 0.05: both come back on average."""
    rng = np.random.default_rng(0)
    effects = rng.normal(0.3, 0.1, (8, 300)) + rng.normal(0, 0.05, (8, 300))
    found = stats.over_seeds(effects, np.full((8, 300), 0.05), np.zeros((8, 300)))
    assert np.mean(found["sd_seeds"] ** 2) == pytest.approx(0.01, rel=0.1)


def test_seeds_on_both_sides_beyond_their_intervals_differ_and_decide_nothing():
    effects, se, clear = np.array([-0.3, 0.3, 0.4]), np.full(3, 0.05), np.full(3, 1e-6)
    assert stats.over_seeds(effects, se, clear)["differs"]
    assert not stats.over_seeds(effects, se, np.array([0.03, 1e-6, 1e-6]))["differs"]  # not beyond its interval, for one of three
    assert not stats.over_seeds(effects, se, clear, against=-0.5)["differs"]
    part = Part("x", 1, "a", "b")
    line = {"effect": 0.2, "p": 1e-4, "seed_p": 1e-4, "differs": True, "ceiling": False}
    assert claims.weigh(part, {"x": line}, "p")[:2] == (1.0, 1.0)
    lines = {"x": line, "y": line | {"differs": False}}
    whole, either = (claims.Joint(how, (part, part._replace(what="y"))) for how in ("all", "any"))
    assert claims.hindered(whole, lines, "differs") and not claims.hindered(either, lines, "differs")


def verdicts(claim, effect, sd, draws, rng, seeds=8):
    """How often a claim is supported over seeds if each comparison lies `effect` beyond its threshold, by Bonferroni's bound."""
    family = sum((c.family, c.status) == (claim.family, claim.status) for c in claims.CLAIMS)
    parts = claims.leaves(claim.decided_by)
    lines = {}
    for part in parts:
        found, effects = simulated(seeds, sd, 0.5 - effect / 2, 0.5 + effect / 2, draws, rng)
        lines[part.what] = effects.mean(0), found["seed_p"], found["differs"]
    each = [
        claims.weigh(claim.decided_by, {
            part.what: {"effect": part.against + part.sign * lines[part.what][0][i], "seed_p": lines[part.what][1][i],
                        "differs": lines[part.what][2][i]} for part in parts
        }, "seed_p").support for i in range(draws)
    ]  # fmt: skip
    return float(np.mean(np.array(each) * family < 0.05))


def test_power_of_claims_at_eight_seeds():
    rng, draws, lines = np.random.default_rng(0), 400 if RECORD else 60, []
    chosen = claims.CLAIMS if RECORD else [claim for claim in claims.CLAIMS if claim.name in ("1", "3", "11")]
    for claim in chosen:
        line = {"claim": claim.name, "status": claim.status, "comparisons": len(claims.leaves(claim.decided_by))}
        cells = [(sd, effect) for sd in (0.05, 0.15, 0.3) for effect in (0.1, 0.2, 0.4)]
        lines.append(line | {f"SD {100 * s:.0f}, {100 * e:.0f} points": verdicts(claim, e, s, draws, rng) for s, e in cells})
    table = pd.DataFrame(lines).set_index("claim")
    RECORDED["seed_power"] += table.reset_index().to_dict("records")
    assert table.loc["1", "SD 5, 20 points"] > 0.9 and table.loc["1", "SD 30, 10 points"] < 0.3
    assert (table["SD 15, 40 points"] >= table["SD 30, 40 points"]).all()
