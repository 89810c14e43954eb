"""Judges against each other, by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest

from vlsafe.analysis import agreement

ASR = {"a-full": 2, "b-full": 5, "c-full": 8}  # of ten, as the first judge sees it


def raw(*others):
    """Three models, ten harmful requests each; every judge is a rule from (model's count, item) to an event."""
    rules = {"world": lambda k, i: i < k, **dict(others)}
    rows = []
    for (recipe, k), i, (judge, rule) in itertools.product(ASR.items(), range(10), rules.items()):
        facts = dict(
            backbone="b", seed=0, stage="safety", recipe=recipe, exam="full", harmful=True, benchmark="sorry_bench", group="base"
        )
        rows.append(facts | dict(item=f"i{i}", cluster=f"c{i}", judge=judge, event=rule(k, i)))
    return pd.DataFrame(rows)


def line(*others):
    found = agreement.pairs(agreement.verdicts(raw(*others)))
    return found.set_index(["judge", "other"]).loc[("other", "world")]


def test_a_judge_that_agrees_and_one_that_turns_everything_round():
    same, turned = line(("other", lambda k, i: i < k)), line(("other", lambda k, i: i >= k))
    assert (same["kappa"], same["tau"], same["agreement"], same["n"], same["methods"]) == (1, 1, 1, 30, 3)
    assert turned["kappa"] == pytest.approx(-1) and turned["tau"] == pytest.approx(-1) and turned["agreement"] == 0


def test_a_judge_that_misses_much_may_rank_alike():
    deaf = line(("other", lambda k, i: i < k // 2))
    assert deaf["tau"] == pytest.approx(1) and 0 < deaf["kappa"] < 0.6
    assert (deaf["both"], deaf["only_judge"], deaf["only_other"], deaf["neither"]) == (1 + 2 + 4, 0, 8, 15)


def test_nothing_to_agree_on_is_no_agreement():
    mute = line(("other", lambda k, i: False))
    assert np.isnan(mute["kappa"]) and np.isnan(mute["tau"]) and mute["agreement"] == 0.5


def test_rates_are_over_answers_that_all_judges_judged():
    wide = agreement.verdicts(raw(("other", lambda k, i: None if i == 0 else i < k)))
    rates = agreement.rates(wide).set_index(["recipe", "judge"])
    assert set(rates["n"]) == {9} and rates.loc[("a-full", "world"), "value"] == pytest.approx(1 / 9)


def test_models_that_are_fine_tuned_again_are_no_methods():
    """The model before it is a run of its own, whose answers would count twice."""
    rows = raw(("other", lambda k, i: i < k + 1))
    again = [rows.assign(stage=stage, recipe=recipe) for stage, recipe in (("durability", "sl-full/start"), ("worst", "sl-full"))]
    pd.testing.assert_frame_equal(agreement.verdicts(pd.concat([rows, *again], ignore_index=True)), agreement.verdicts(rows))


def test_people_join_as_one_more_judge():
    people = raw().assign(judge="people", event=True)
    wide = agreement.verdicts(raw(), people)
    assert agreement.judges(wide) == ["world", "people"] and wide["people"].eq(1).all()
