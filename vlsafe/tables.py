"""Raw rows to tables: rates with intervals, never a number without n. Imports no model library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlsafe import measures as measured
from vlsafe import stats
from vlsafe.measures import CHANCE, MEASURES, MODEL, events, main_line, named
from vlsafe.schema import MAIN_LINE

__all__ = ["CHANCE", "MEASURES", "MODEL"]


def rates(raw: pd.DataFrame, measures: Sequence[str], by: Sequence[str] = MODEL) -> pd.DataFrame:
    """One line per model (or other grouping) × measure: value, interval, n, clusters, unjudged.

    A model that was not asked all parts of a composite has no line for it.

    Units:    fractions in [0, 1]; above chance, helpfulness can be negative
    """
    lines = []
    for measure in measures:
        rows = events(raw, measure)
        for key, part in rows.groupby(list(by), sort=False):
            found = measured.estimate(part, measure)
            if found:
                lines.append({**dict(zip(by, key, strict=True)), "measure": measure, **vars(found)})
    return pd.DataFrame(lines)


def differences(
    raw: pd.DataFrame, before: str, after: Sequence[str], measures: Sequence[str], tested: bool = False
) -> pd.DataFrame:  # fmt: skip
    """Paired changes from one run to others over the items that both answered, per backbone and seed.

    `before` and each of `after` are stage/recipe; the last checkpoint of each (exam "full") is compared, and the columns `stage`
    and `recipe` say of which change a line is. Unjudged items are left out of the difference and counted; a composite is compared
    where both models were asked all its parts. Where they are `tested`, every line has a two-sided p-value by flipping the signs
    of clusters.
    """
    lines = []
    for measure in measures:
        for (backbone, seed, run), judged, left_out in paired(raw, before, after, measure):
            strata = changes(judged, measure) if len(judged) else []
            if not strata:
                continue
            found = stats.compare(strata, np.random.default_rng(seed))
            line = {"difference": float(found.effect[0]), "low": float(found.low[0]), "high": float(found.high[0])}
            line |= {"n": len(judged), "n_left_out": left_out}
            if tested:
                line["p"] = stats.sign_flip(contributions(strata).tolist(), np.random.default_rng(seed))
            stage, _, recipe = run.partition("/")
            lines.append({"backbone": backbone, "seed": seed, "stage": stage, "recipe": recipe, "measure": measure, **line})
    columns = ["backbone", "seed", "stage", "recipe", "measure", "difference", "low", "high", "n", "n_left_out"]
    return pd.DataFrame(lines, columns=[*columns, *(["p"] if tested else [])])


def paired(
    raw: pd.DataFrame, before: str, after: Sequence[str], measure: str
) -> Iterator[tuple[tuple[str, int, str], pd.DataFrame, int]]:
    """Per backbone, seed and run of `after`: the judged events that it shares with `before`, and how many are left out."""
    rows = events(raw[(raw["exam"] == "full") & named(raw).isin([before, *after])], measure)
    rows = rows.assign(run=named(rows))[["backbone", "seed", "run", "event", *SAME]]
    first, second = rows[rows["run"] == before], rows[rows["run"] != before]
    both = first.merge(second, on=["backbone", "seed", *SAME], suffixes=("_a", "_b"))
    for unit, part in both.groupby(["backbone", "seed", "run_b"], sort=False):
        judged = part.dropna(subset=["event_a", "event_b"])
        yield unit, judged, len(part) - len(judged)


SAME = ["part", "item", "stratum", "floor", "cluster"]  # what two models' events must share to be compared


def changes(judged: pd.DataFrame, measure: str) -> list[stats.Stratum]:
    """The changes from event_a to event_b in the strata of a measure; none where a part of a composite is missing."""
    change = judged["event_b"].astype(float) - judged["event_a"].astype(float)
    return measured.strata(judged.assign(least=change, most=change), measure)


def contributions(strata: Sequence[stats.Stratum]) -> np.ndarray:
    """What each cluster adds to the change that `differences` reports; they sum up to it. Empty where a part is missing."""
    found = []
    for stratum in strata:
        by_cluster = pd.Series(stratum.least).groupby([str(c) for c in stratum.clusters]).sum()
        found.append(stratum.weight * by_cluster.to_numpy() / len(stratum.least))
    return np.concatenate(found) if found else np.array([])


def degradation(raw: pd.DataFrame) -> pd.DataFrame:
    """T02: parent against adapted on every measure, one line per backbone × seed × measure; other recipes are T03's.

    A parent has no pictures to be asked about: its multimodal cells are empty, and the graft with its random
    projector stands in the table of the dynamics (F02), not here.
    """
    raw = main_line(raw)
    final = raw[(raw["exam"] == "full") & raw["stage"].isin(["parent", "instruct"])]
    found = rates(final, list(MEASURES), ["backbone", "seed", "stage"])
    change = differences(raw, MAIN_LINE["parent"], [MAIN_LINE["adapted"]], list(MEASURES)).drop(columns=["stage", "recipe"])
    wide = found.pivot_table(
        index=["backbone", "seed", "measure"], columns="stage", values=["value", "low", "high", "n", "n_unjudged"], sort=False
    )
    wide.columns = [f"{stage}_{value}" for value, stage in wide.columns]
    merged = wide.reset_index().merge(change, on=["backbone", "seed", "measure"], how="left", suffixes=("", "_difference"))
    merged.insert(3, "label", merged["measure"].map(lambda name: MEASURES[name]["label"]))
    order = {name: i for i, name in enumerate(MEASURES)}
    return merged.sort_values(["backbone", "seed", "measure"], key=lambda c: c.map(order) if c.name == "measure" else c)


OVERVIEW = (
    "text_asr", "wildjailbreak_asr", "multimodal_asr", "figstep_asr", "siuo_asr", "twin_refusal", "exaggerated_refusal",
    "picture_refusal", "helpfulness", "helpfulness_rescaled", "mmbench_circular", "mme_score", "seed_likelihood",
    "text_incoherent", "multimodal_incoherent",
)  # fmt: skip


def everything(raw: pd.DataFrame) -> pd.DataFrame:
    """T08: one line per backbone × seed × model × measure, of every model's full examination."""
    return rates(raw[raw["exam"] == "full"], OVERVIEW, ["backbone", "seed", "stage", "recipe"])


def overview(lines: pd.DataFrame) -> pd.DataFrame:
    """T08 for the eye: one line per backbone × model, a column per measure, in percent: the mean over seeds and their range."""
    index = ["backbone", "stage", "recipe"]
    by = lines.groupby([*index, "measure"], sort=False)["value"]
    told = (100 * by.agg(["mean", "min", "max"])).round().astype(int)
    ranged = told["mean"].astype(str) + " (" + told["min"].astype(str) + "–" + told["max"].astype(str) + ")"
    cells = ranged.where(by.size() > 1, told["mean"].astype(str)).unstack("measure")  # one seed has no range
    found = cells.reindex(columns=list(OVERVIEW)).rename(columns=lambda name: MEASURES[name]["label"])
    order = {stage: place for place, stage in enumerate(dict.fromkeys(lines["stage"]))}
    return found.reset_index().sort_values(["backbone", "stage"], key=lambda c: c.map(order) if c.name == "stage" else c)


def dynamics(raw: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """F02: every checkpoint of the main line, from the graft with its random projector (stage 1, step 0) to the last."""
    return rates(main_line(raw), measures)


def by_category(raw: pd.DataFrame) -> pd.DataFrame:
    """F03: ASR per category of harm before and after adaptation, for each seed and (seed "all") over all of them.

    Before means the parent for text. For pictures it is the end of stage 1: the same language model, which has just
    been given eyes. One deed in two seeds is two clusters, for it is a deed of two worlds.
    """
    raw = main_line(raw)
    final = raw[(raw["exam"] == "full") & raw["harmful"].astype(bool)]
    final = final.assign(kind=named(final).map({run: name for name, run in MAIN_LINE.items()}))
    final = final.assign(cluster=final["seed"].astype(str) + " " + final["cluster"].astype(str))
    frames = []
    for measure, before in (("text_asr", "parent"), ("multimodal_asr", "stage 1")):
        of = final[final["kind"].isin([before, "adapted"])]
        by = ["backbone", "kind", "category"]
        frames += [rates(of, [measure], by).assign(seed="all"), rates(of, [measure], ["seed", *by])]
    found = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    found["before"] = found["kind"] != "adapted"
    return found[["backbone", "seed", "measure", "category", "kind", "before", "value", "low", "high", "n", "n_clusters"]]


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


def write(frame: pd.DataFrame, folder: Path, name: str, note: Mapping[str, Any], shown: pd.DataFrame | None = None) -> Path:
    """A table as CSV for the sceptic and Markdown for the eye (`shown`, where that is another form), to four places."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = frame.round(4)
    rounded.to_csv(folder / f"{name}.csv", index=False)
    told = markdown(rounded if shown is None else shown)
    (folder / f"{name}.md").write_text(f"{note['title']}\n\n{told}\n\n{note['caption']}\n", encoding="utf-8")
    return folder / f"{name}.csv"


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; missing values are empty cells."""
    shown = frame.astype(object).where(frame.notna(), "")
    head = "| " + " | ".join(map(str, shown.columns)) + " |\n|" + "---|" * len(shown.columns)
    return "\n".join([head, *("| " + " | ".join(map(str, row)) + " |" for row in shown.itertuples(index=False))])
