"""T01 and F01: what the guards removed from each corpus, and how good they are where the truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vlsafe.analysis import stats


def filtering_audit(audit: pd.DataFrame) -> pd.DataFrame:
    """T01: per corpus, source and true category, how many rows each guard dropped; precision and recall per guard below.

    A guard's truth: any harmful category for the text guard, "graphic" for the image guard.
    """
    lines = []
    audit = audit.assign(category=audit["category"].fillna("benign"))
    for key, part in audit.groupby(["seed", "corpus", "source", "category"], sort=True):
        reasons = part["reasons"].str.split(",")
        lines.append(
            dict(zip(["seed", "corpus", "source", "category"], key, strict=True))
            | {"rows": len(part), "kept": int(part["kept"].sum()), "dropped": int((~part["kept"]).sum())}
            | {f"dropped_by_{g}": int(reasons.map(lambda r, g=g: g in r).sum()) for g in ("text", "image")}
            | {"both": int(reasons.map(lambda r: {"text", "image"} <= set(r)).sum())}
            | {"unread": int(part["reasons"].str.contains("unread").sum()), "skipped": int(part["skipped"].sum())}
        )
    return pd.DataFrame(lines)


def score_counts(audit: pd.DataFrame, bins: int = 25) -> pd.DataFrame:
    """F01's numbers: rows per seed × guard × truth × bin of the guard's score; rows that it did not see are left out."""
    edges, lines = np.linspace(0, 1, bins + 1), []
    for guard, truth in guard_truths(audit).items():
        if guard == "either":
            continue
        seen = audit[f"{guard}_score"].notna()
        for (seed, harmful), scores in audit[seen].groupby(["seed", truth[seen]])[f"{guard}_score"]:
            counts = np.histogram(scores, edges)[0]
            told = dict(seed=seed, guard=guard, harmful=bool(harmful))
            lines += [told | dict(low=low, rows=int(n)) for low, n in zip(edges, counts, strict=False) if n]
    return pd.DataFrame(lines)


def guard_truths(audit: pd.DataFrame) -> dict[str, pd.Series]:
    """Which rows each guard is there to find: harmful texts, graphic pictures, either."""
    graphic = audit["category"] == "graphic"
    return {"text": audit["category"].notna() & ~graphic, "image": graphic, "either": audit["category"].notna()}


def guard_quality(audit: pd.DataFrame) -> pd.DataFrame:
    """Precision and recall of each guard against the miniature's truth, with intervals; rows are the sample.

    Rows that intake skipped were seen by no guard and are left out.
    """
    lines, audit = [], audit[~audit["skipped"].astype(bool)]
    for seed in sorted(audit["seed"].unique()):
        for guard, truth in guard_truths(audit).items():
            of = (audit["seed"] == seed) & (audit["has_picture"] if guard == "image" else True)
            reasons = audit.loc[of, "reasons"].str.split(",")
            flagged = reasons.map(lambda r, g=guard: bool({"text", "image"} & set(r)) if g == "either" else g in r)
            right = truth[of]
            for name, hits in (("precision", right[flagged]), ("recall", flagged[right])):
                if len(hits):
                    found = vars(stats.rate(hits.tolist(), hits.index.tolist()))
                    lines.append(
                        {"seed": seed, "guard": guard, "measure": name} | {k: found[k] for k in ("value", "low", "high", "n")}
                    )
    return pd.DataFrame(lines)
