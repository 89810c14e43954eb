"""Judges against each other: how far they agree on single responses, and whether they rank models alike.

Rows are those of raw tables: one per item, model and judge, `event` None where the judge could not tell. Rows of judges
that are compared must count the same event.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

UNIT = ["benchmark", "backbone", "seed", "model", "item"]


def wide(raw: pd.DataFrame) -> pd.DataFrame:
    """One row per response and one column per judge, holding 0.0, 1.0 or NaN (unjudged, or never put to this judge)."""
    unit = [column for column in UNIT if column in raw]
    return raw.assign(event=raw["event"].astype(float)).pivot(index=unit, columns="judge", values="event")


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two judges with two labels; NaN where chance alone agrees always.

    Shapes:   a, b  [N] of 0 and 1  ->  a number in [-1, 1]
    Source:   Cohen 1960
    """
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float(((a == b).mean() - expected) / (1 - expected)) if expected < 1 else float("nan")


def matrix(raw: pd.DataFrame) -> pd.DataFrame:
    """Every pair of judges on every benchmark: responses judged by both, share of equal verdicts, kappa, each one's rate.

    `n_one_unjudged` counts responses that only one of the two could judge: they are in no other column.
    """
    lines = []
    for benchmark, rows in raw.groupby("benchmark", sort=False):
        told = wide(rows)
        for first, second in combinations(told.columns, 2):
            both = told[[first, second]].dropna()
            a, b = (both[name].to_numpy() for name in (first, second))
            known = dict(n=len(both), n_one_unjudged=int((told[first].isna() ^ told[second].isna()).sum()))
            if len(both):
                known |= dict(agreement=float((a == b).mean()), kappa=kappa(a, b), rate_a=float(a.mean()), rate_b=float(b.mean()))
            lines.append(dict(benchmark=benchmark, judge_a=first, judge_b=second, **known))
    columns = ["benchmark", "judge_a", "judge_b", "n", "n_one_unjudged", "agreement", "kappa", "rate_a", "rate_b"]
    return pd.DataFrame(lines, columns=columns)


def rankings(raw: pd.DataFrame) -> pd.DataFrame:
    """How the order of models changes with the judge: Kendall's tau-b of their rates, and how many pairs change places.

    Rates are taken over the responses that both judges could judge. Two models of equal rate change places with nobody.
    """
    lines = []
    for benchmark, rows in raw.groupby("benchmark", sort=False):
        told = wide(rows)
        for first, second in combinations(told.columns, 2):
            rates = told[[first, second]].dropna().groupby("model", sort=False).mean()
            pairs = combinations(rates.to_numpy(), 2)
            swapped = sum(bool((x[0] - y[0]) * (x[1] - y[1]) < 0) for x, y in pairs)
            tau = stats.kendalltau(rates[first], rates[second]).statistic if len(rates) > 1 else float("nan")
            n = len(rates)
            known = dict(n_models=n, tau=float(tau), n_pairs=n * (n - 1) // 2, n_swapped=swapped)
            lines.append(dict(benchmark=benchmark, judge_a=first, judge_b=second, **known))
    return pd.DataFrame(lines, columns=["benchmark", "judge_a", "judge_b", "n_models", "tau", "n_pairs", "n_swapped"])
