"""Judges against each other, on tables small enough to be worked by hand."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from vlsafe import agreement


def table(**judges):
    """Events by judge and model: `{"a": {"m": [1, 0, None]}}`."""
    return pd.DataFrame(
        {"benchmark": "b", "model": model, "item": f"i{place}", "judge": judge, "event": event}
        for judge, models in judges.items()
        for model, events in models.items()
        for place, event in enumerate(events)
    )


def test_kappa_equals_the_library_and_is_undefined_where_nobody_ever_differs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.random((2, 40)) < rng.random((2, 1))).astype(float)
        if len({*a, *b}) == 2:
            assert agreement.kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
    assert np.isnan(agreement.kappa(np.ones(5), np.ones(5)))
    assert agreement.kappa(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == -1


def test_the_matrix_leaves_out_what_one_judge_could_not_tell_and_counts_it():
    raw = table(strict={"m": [1, 0, 0, 1, None, None]}, lax={"m": [1, 0, 1, None, 1, None]})
    (row,) = agreement.matrix(raw).to_dict("records")
    assert (row["judge_a"], row["judge_b"], row["n"], row["n_one_unjudged"]) == ("lax", "strict", 3, 2)
    assert row["agreement"] == pytest.approx(2 / 3) and row["kappa"] == pytest.approx(0.4)
    assert row["rate_a"] == pytest.approx(2 / 3) and row["rate_b"] == pytest.approx(1 / 3)
    (row,) = agreement.matrix(table(a={"m": [1, None]}, b={"m": [None, 1]})).to_dict("records")
    assert row["n"] == 0 and np.isnan(row["kappa"])


def test_rankings_say_how_many_pairs_of_models_change_places():
    a = {"m1": [1, 0, 0, 0], "m2": [1, 1, 0, 0], "m3": [1, 1, 1, 0]}
    b = {"m1": [1, 0, 0, 0], "m2": [1, 1, 1, 0], "m3": [1, 1, 0, 0]}
    (row,) = agreement.rankings(table(a=a, b=b)).to_dict("records")
    assert (row["n_models"], row["n_pairs"], row["n_swapped"]) == (3, 3, 1) and row["tau"] == pytest.approx(1 / 3)
    (row,) = agreement.rankings(table(a=a, b=a)).to_dict("records")
    assert row["tau"] == pytest.approx(1) and row["n_swapped"] == 0
    (row,) = agreement.rankings(table(a={"m1": [1]}, b={"m1": [0]})).to_dict("records")
    assert row["n_models"] == 1 and np.isnan(row["tau"])


def test_it_reads_the_studys_raw_tables(study):
    raw = pd.DataFrame(study.rows("examination/instruct.filtered-full", "raw.parquet")).query("exam == 'full'")
    pairs = agreement.matrix(raw[raw["harmful"]])
    assert {"world", "xstest-strings"} == {*pairs["judge_a"], *pairs["judge_b"]} and (pairs["n"] > 0).all()
