"""T01 and F01: what the guards removed from each corpus, and how good they are where the truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vlsafe.analysis import stats
from vlsafe.analysis.measures import Lacking, groups


def filtering_audit(audit: pd.DataFrame) -> pd.DataFrame:
    """T01: per corpus, source and true category, how many rows were kept, dropped by each guard, unread or skipped.

    The category is "unknown" where no row's is known: corpora of others do not say which of their rows are harmful.
    """
    flagged = {guard: flagged_by(audit, guard) for guard in ("text", "image")}
    others = "benign" if truth_known(audit) else "unknown"
    counts = audit.assign(
        category=audit["category"].fillna(others), rows=1, kept=audit["kept"].astype(int), dropped=1 - audit["kept"],
        dropped_by_text=flagged["text"], dropped_by_image=flagged["image"], both=flagged["text"] & flagged["image"],
        unread=audit["reasons"].str.contains("unread") & ~flagged["text"] & ~flagged["image"],
    )  # fmt: skip
    columns = ["rows", "kept", "dropped", "dropped_by_text", "dropped_by_image", "both", "unread", "skipped"]
    return counts.groupby(["seed", "corpus", "source", "category"])[columns].sum().astype(int).reset_index()


def flagged_by(audit: pd.DataFrame, guard: str) -> pd.Series:
    """Which rows a guard, or "either" of them, gave a reason to drop."""
    wanted = {"text", "image"} if guard == "either" else {guard}
    return audit["reasons"].map(lambda reasons: bool(wanted & set(reasons.split(","))))


def reasons(audit: pd.DataFrame) -> pd.DataFrame:
    """How many rows have each combination of reasons to be dropped, by whether they are harmful, or "unknown". What a
    reason ends with in brackets, as a size, is left out."""
    short = audit["reasons"].str.replace(r" \(.*?\)", "", regex=True)
    harmful = audit["category"].notna() if truth_known(audit) else "unknown"
    return audit.assign(harmful=harmful, reasons=short).groupby(["reasons", "harmful"]).size().unstack(fill_value=0)


def score_counts(audit: pd.DataFrame) -> pd.DataFrame:
    """F01's numbers: rows per seed × guard × truth × bin of the guard's score; rows that it did not score are left out.

    The truth is "unknown" where no row's is known.
    """
    edges, lines = np.linspace(0, 1, 26), []
    truths = guard_truths(audit) if truth_known(audit) else {"text": "unknown", "image": "unknown"}
    for guard in ("text", "image"):
        scored = audit.assign(guard=guard, harmful=truths[guard]).dropna(subset=[f"{guard}_score"])
        for key, rows in groups(scored, ["seed", "guard", "harmful"], sort=True):
            counts = np.histogram(rows[f"{guard}_score"], edges)[0]
            lines += [key | {"low": low, "rows": int(n)} for low, n in zip(edges, counts, strict=False) if n]
    return pd.DataFrame(lines)


def truth_known(audit: pd.DataFrame) -> bool:
    """Whether it is known which rows are harmful: some row says so of itself."""
    return bool(audit["category"].notna().any())


def guard_truths(audit: pd.DataFrame) -> dict[str, pd.Series]:
    """Which rows each guard should find: harmful texts, graphic pictures, either."""
    graphic = audit["category"] == "graphic"
    return {"text": audit["category"].notna() & ~graphic, "image": graphic, "either": audit["category"].notna()}


def guard_quality(audit: pd.DataFrame) -> pd.DataFrame:
    """Precision and recall of each guard against the miniature's truth, with intervals; rows are the sample.

    Rows that intake skipped were scored by no guard and are left out.

    Raises:   Lacking where no row's truth is known
    """
    if not truth_known(audit):
        raise Lacking("nobody knows which rows of these corpora are harmful")
    lines, audit = [], audit[~audit["skipped"].astype(bool)]
    for seed, rows in audit.groupby("seed"):
        for guard, truth in guard_truths(rows).items():
            of = rows["has_picture"].astype(bool) if guard == "image" else rows["seed"].notna()
            flagged, right = flagged_by(rows, guard)[of], truth[of]
            for name, hits in (("precision", right[flagged]), ("recall", flagged[right])):
                if len(hits):
                    rate = stats.rate(hits.tolist(), hits.index.tolist())
                    lines.append([seed, guard, name, rate.value, rate.low, rate.high, rate.n])
    return pd.DataFrame(lines, columns=["seed", "guard", "measure", "value", "low", "high", "n"])
