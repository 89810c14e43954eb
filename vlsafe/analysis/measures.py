"""What a measure is: which raw rows it counts, how answers make one event, how parts make a composite; its rates and changes.

A plain measure is a share of events. A stratified one is a mean over parts, each a mean over its strata: MME's score over
tasks, helpfulness over MMBench, MME and SEED-Bench. `measures.yaml` says what each is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pandas.api.typing import SeriesGroupBy

from vlsafe.analysis import clustered, stats
from vlsafe.core.schema import MAIN_LINE
from vlsafe.core.texts import frozen

UNIT = ["backbone", "seed"]  # one study
MODEL = ["scale", "backbone", "seed", "stage", "recipe", "step", "exam", "model"]


class Lacking(ValueError):
    """What a table or a figure is made of is not there; the message says what."""


def run_names(raw: pd.DataFrame) -> pd.Series:
    """The run that each row belongs to, as `schema.MAIN_LINE` names it: stage/recipe."""
    return raw["stage"] + "/" + raw["recipe"]


def shared(rows: pd.DataFrame) -> bool:
    """Whether all seeds were asked the same items, as where benchmarks are loaded."""
    return "shared" in rows and bool(rows["shared"].any())


def in_worlds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose clusters are those of one seed, unless all seeds share their items: one pair in two seeds is of two worlds."""
    seeded = rows["seed"].astype(str) + " " + rows["cluster"].astype(str)
    return rows if shared(rows) else rows.assign(cluster=seeded)


def main_line(raw: pd.DataFrame) -> pd.DataFrame:
    """The rows of panels and full examinations of the main line: no other recipe, no altered prompt."""
    return raw[run_names(raw).isin(MAIN_LINE.values()) & raw["exam"].isin(["panel", "full"])]


def groups(frame: pd.DataFrame, by: Sequence[str], sort: bool = False) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows of each group, with the group's key as the first columns of a result line."""
    for key, rows in frame.groupby(list(by), sort=sort):
        yield dict(zip(by, key, strict=True)), rows


def events(raw: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The rows that a measure is about, one per event; an `event` is in [0, 1], or None where it could not be judged.

    Where rows say of which events their judge has the say (`headline`), those of the measure's event count, whoever their judge
    is, and the event is their `outcome`; else the rows of the measure's own judge.

    Whole questions (MMBench's rotations, MME's pictures) become one row each. `part` is the measure that a row belongs
    to, `stratum` the group that its mean is taken in, `floor` the chance level that it is rescaled from (0: it is not).

    Raises:   KeyError for a measure that is not in MEASURES
    """
    spec = MEASURES[measure]
    if "parts" in spec:
        parts = [events(raw, part) for part in spec["parts"]]
        rows = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        return rows.assign(floor=rows["part"].map(CHANCE)) if spec.get("rescaled") else rows
    rows = _judged(about(raw, spec), spec)
    if "whole" in spec:
        rows = rows.assign(answer=pd.to_numeric(rows["event"].astype("Float64")).astype(float))
        by = rows.groupby([*MODEL, "cluster", "group"], sort=False)
        event, judge = WHOLE[spec["whole"]](by["answer"]).astype(object), by["judge"].first()
        rows = pd.DataFrame({"event": event, "judge": judge}).reset_index()
        rows = rows.assign(item=rows["cluster"], event=rows["event"].where(rows["event"].notna(), None))
    return rows.assign(part=measure, stratum=rows["group"] if spec.get("by_group") else "", floor=0.0)


def about(raw: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of a measure's benchmark that it is about, by all judges; of the first that stands in where that one has none."""
    for benchmark in (spec["benchmark"], *spec.get("stand_in", ())):
        chosen = raw["benchmark"] == benchmark
        if "harmful" in spec:
            chosen &= raw["harmful"] == spec["harmful"]
        if chosen.any():
            break
    return raw[chosen & raw["group"].isin(spec["groups"])] if "groups" in spec else raw[chosen]


def _judged(rows: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """Of the rows of all judges those of one, with the measure's event."""
    if "headline" in spec and "headline" in rows:
        said = [text for text in rows["headline"].dropna().unique() if spec["headline"] in text.split()]
        leading = rows[rows["headline"].isin(said)]
        if len(leading):
            happened = (leading["outcome"] == spec["headline"]).astype(object)
            return leading.assign(event=happened.where(leading["outcome"].notna(), None))
    rows = rows[rows["judge"] == spec["judge"]]
    if "column" in spec:  # older raw tables lack it
        rows = rows.assign(event=rows[spec["column"]]) if spec["column"] in rows else rows.iloc[:0]
    rows = rows.assign(event=rows["event"].astype(object))
    if "labels" in spec:
        rows["event"] = rows["label"].isin(spec["labels"]).astype(object).where(rows["event"].notna(), None)
    return rows


def settled(rows: pd.DataFrame) -> pd.DataFrame:
    """Events of which those of right answers are never open: who names no option has not answered right."""
    open_and_wrong = rows["part"].isin(RIGHT) & rows["event"].isna()
    return rows.assign(event=rows["event"].mask(open_and_wrong, 0.0)) if open_and_wrong.any() else rows


def all_right(answers: SeriesGroupBy) -> pd.Series:
    """A whole question is wrong once one answer is wrong, and open while the only doubts are unjudged ones."""
    least, judged = answers.min(), answers.count() == answers.size()
    return (least > 0).astype(object).where((least == 0) | judged, None)


def mme_score(answers: SeriesGroupBy) -> pd.Series:
    """A picture's share of MME's 200 points, half for questions answered right, half for the whole: 0, 1/4 or 1 of two.

    Source:   Fu et al. 2023: 100 × acc + 100 × acc+; both are means, so their sum is a mean over pictures
    """
    return ((answers.mean() + answers.min()) / 2).where(answers.count() == answers.size())


def estimate(rows: pd.DataFrame, measure: str) -> stats.Rate | None:
    """The value of a measure with its interval, over `events` of one model; None where a part of it was not examined."""
    if not stratified(measure):
        judged = [None if pd.isna(event) else bool(event) for event in rows["event"]]
        return stats.rate(judged, rows["cluster"].tolist())
    least, most = (rows["event"].map(lambda event, u=u: u if pd.isna(event) else float(event)) for u in (0.0, 1.0))
    weighted = strata(rows.assign(least=least.astype(float), most=most.astype(float)), measure)
    if not weighted:
        return None
    chance = sum(stratum.weight for stratum in weighted) - 1  # what weights that stretch to the best score add for guessing
    value, value_high, low, high = (end - chance for end in clustered.stratified(weighted))
    n_clusters = len({str(name) for stratum in weighted for name in stratum.clusters})
    return stats.Rate(value, low, high, len(rows), n_clusters, int(rows["event"].isna().sum()), value_high)


def stratified(measure: str) -> bool:
    """Whether a measure is a mean over parts or strata instead of over all its events."""
    return "parts" in MEASURES[measure] or bool(MEASURES[measure].get("by_group"))


def whole(rows: pd.DataFrame, measure: str) -> bool:
    """Whether events of all parts of a measure are there."""
    return set(rows["part"]) == set(MEASURES[measure].get("parts", (measure,)))


def present(raw: pd.DataFrame, measures: Iterable[str]) -> list[str]:
    """Those of some measures whose parts the raw rows all have."""
    return [measure for measure in measures if whole(events(raw, measure), measure)]


def strata(rows: pd.DataFrame, measure: str) -> list[clustered.Stratum]:
    """The weighted strata of a measure, from the columns least, most and cluster; none where a part is missing."""
    return [
        clustered.Stratum(weight, of["least"].tolist(), of["most"].tolist(), of["cluster"].tolist())
        for weight, of in weighted(rows[[*SAME, "least", "most"]], measure)
    ]


def weighted(rows: pd.DataFrame, measure: str) -> list[tuple[float, pd.DataFrame]]:
    """The rows of each stratum of a measure with the stratum's weight; none where a part is missing.

    Weights of a measure that is rescaled from chance are larger by 1 / (1 - chance), so that changes need no rescaling.
    """
    return [(weight / (1 - of["floor"].iloc[0]), of) for weight, of in weighted_groups(rows)] if whole(rows, measure) else []


def weighted_groups(rows: pd.DataFrame) -> Iterator[tuple[float, pd.DataFrame]]:
    """The rows of each stratum of each part, with the stratum's weight: parts count alike, and in each its strata."""
    parts = [[stratum for _, stratum in part.groupby("stratum", sort=False)] for _, part in rows.groupby("part", sort=False)]
    for part in parts:
        yield from ((1 / len(parts) / len(part), stratum) for stratum in part)


WHOLE = {"all_right": all_right, "mme_score": mme_score}
DATA = frozen(yaml.safe_load(Path(__file__).with_name("measures.yaml").read_text(encoding="utf-8")))
MEASURES: dict[str, dict[str, Any]] = DATA["measures"]
CHANCE: dict[str, float] = DATA["chance"]
RIGHT = {name for name in MEASURES if name in CHANCE or name.startswith("capability_")}
CHANCE["helpfulness"] = sum(CHANCE[part] for part in MEASURES["helpfulness"]["parts"]) / 3
HEADLINE: tuple[str, ...] = DATA["headline"]
GRADED: tuple[str, ...] = DATA["graded"]


def rates(raw: pd.DataFrame, measures: Sequence[str], by: Sequence[str] = MODEL) -> pd.DataFrame:
    """One line per model (or other grouping) × measure: value, interval, n, clusters, unjudged, and the judges by name.

    A model that was not examined on all parts of a composite has no line for it.

    Units:    fractions in [0, 1]; above chance, helpfulness can be negative
    """
    lines = []
    for measure in measures:
        for key, rows in groups(events(raw, measure)[[*dict.fromkeys([*by, "judge", "event", *SAME])]], by):
            if rate := estimate(rows, measure):
                lines.append(key | {"measure": measure} | vars(rate) | {"judge": named(rows["judge"])})
    return pd.DataFrame(lines)


def named(judges: Iterable[str]) -> str:
    """Judges by name, each once."""
    return " + ".join(dict.fromkeys(judges))


def judged_by(raw: pd.DataFrame, measures: Sequence[str] = HEADLINE) -> str:
    """A sentence for captions: by which judges the measures are, those alone that the rows have."""
    found: dict[str, list[str]] = {}
    for measure in measures:
        if judge := named(events(raw, measure)["judge"]):
            found.setdefault(judge, []).append(MEASURES[measure]["label"])
    texts = [f"{judge} ({', '.join(labels)})" for judge, labels in found.items()]
    return f"Judges: {'; '.join(texts)}." if texts else ""


def differences(
    raw: pd.DataFrame, before: str, after: Sequence[str], measures: Sequence[str], tested: bool = False
) -> pd.DataFrame:  # fmt: skip
    """Paired changes from one run to others over the items that both answered, per backbone and seed.

    `before` and each of `after` are stage/recipe; the last checkpoint of each (exam "full") is compared, and the columns `stage`
    and `recipe` say of which change a line is. Unjudged items are left out of the difference and counted, but for right answers,
    where they are wrong; a composite is compared where both models were examined on all its parts. Where they are `tested`, every
    line has a two-sided p-value by flipping the signs of clusters.
    """
    columns = [*UNIT, "stage", "recipe", "measure", "difference", "low", "high", "n", "n_left_out"]
    lines, of_them = [], raw[(raw["exam"] == "full") & run_names(raw).isin([before, *after])]
    for measure in measures:
        for (backbone, seed, run), judged, left_out in paired(of_them, before, measure):
            strata = changes(judged, measure) if len(judged) else []
            if not strata:
                continue
            result = clustered.compare(strata, np.random.default_rng(seed))
            ends = (float(end[0]) for end in (result.effect, result.low, result.high))
            stage, _, recipe = run.partition("/")
            lines.append([backbone, seed, stage, recipe, measure, *ends, len(judged), left_out])
            if tested:
                lines[-1].append(clustered.sign_flip(result.contributions[:, 0], np.random.default_rng(seed)))
    return pd.DataFrame(lines, columns=[*columns, *(["p"] if tested else [])])


def paired(raw: pd.DataFrame, before: str, measure: str) -> Iterator[tuple[tuple[str, int, str], pd.DataFrame, int]]:
    """Per backbone, seed and other run, of full examinations: the judged events shared with `before`; how many are left out."""
    rows = settled(events(raw, measure))
    rows = rows.assign(run=run_names(rows))[[*UNIT, "run", "event", *SAME]]
    first, second = rows[rows["run"] == before], rows[rows["run"] != before]
    both = first.merge(second, on=[*UNIT, *SAME], suffixes=("_a", "_b"))
    for unit, part in both.groupby([*UNIT, "run_b"], sort=False):
        judged = part[part["event_a"].notna() & part["event_b"].notna()]
        yield unit, judged, len(part) - len(judged)


SAME = ["part", "item", "stratum", "floor", "cluster"]  # what two models' events must share to be compared


def changes(judged: pd.DataFrame, measure: str) -> list[clustered.Stratum]:
    """The changes from event_a to event_b in the strata of a measure; none where a part of a composite is missing."""
    change = judged["event_b"].astype(float) - judged["event_a"].astype(float)
    return strata(judged.assign(least=change, most=change), measure)


def with_changes(lines: pd.DataFrame, change: pd.DataFrame, prefix: str = "") -> pd.DataFrame:
    """Lines of `rates` beside the paired changes of the same models as difference, difference_low and difference_high."""
    change = change.drop(columns="n").rename(columns={"low": "difference_low", "high": "difference_high"})
    keys = [name for name in (*UNIT, "stage", "recipe", "measure") if name in lines]
    others = {name: f"{prefix}{name}" for name in change.columns if name not in (*UNIT, "stage", "recipe", "measure")}
    return lines.merge(change[[*keys, *others]].rename(columns=others), on=keys, how="left")


def compact(lines: pd.DataFrame, index: Sequence[str], at: str | None = None) -> pd.DataFrame:
    """One line per `index`, a column per measure and one for its difference, in percent with intervals, for the eye; graded
    measures are left to the CSV."""
    lines = lines if at is None else lines[lines["at"] == at]
    index, cells = list(index), {}
    if lines.empty:
        return lines[index]
    for measure in dict.fromkeys(lines.loc[~lines["measure"].isin(GRADED), "measure"]):
        of, label = lines[lines["measure"] == measure].set_index(index), MEASURES[measure]["label"]
        cells[label] = of.apply(_cell, axis=1, names=("value", "low", "high"))
        cells[f"Δ {label}"] = of.apply(_cell, axis=1, names=("difference", "difference_low", "difference_high"), sign="+")
    return lines[index].drop_duplicates().join(pd.DataFrame(cells), on=index).reset_index(drop=True)


def _cell(line: pd.Series, names: Sequence[str], sign: str = "") -> str:
    value, low, high = (100 * line[name] for name in names)
    ends = bounds(line[names[0]], line.get("value_high") if names[0] == "value" else None, sign)
    return "" if pd.isna(value) else f"{ends} [{round(low):{sign}}, {round(high):{sign}}]"


def bounds(least: float, most: float | None, sign: str = "") -> str:
    """A rate in percent, for the eye; its two bounds where unjudged answers set them apart."""
    ends = [f"{round(100 * end):{sign}}" for end in (least, most) if end is not None and not pd.isna(end)]
    return "–".join(dict.fromkeys(ends))


def signed(value: float) -> str:
    """A fraction in points, with its sign; one digit more for what would be rounded to zero; no negative zero."""
    digits = int(round(100 * value) == 0 != round(100 * value, 1))
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"


def points(value: float, low: float, high: float) -> str:
    """A difference of fractions with its interval, in points."""
    return f"{signed(value)} [{signed(low)}, {signed(high)}]"


def cautious(lines: pd.DataFrame, measure: str = "measure") -> pd.Series:
    """The rates of lines by the bound that speaks against a model: what could not be judged counts as what is worse."""
    high = lines["value_high"].fillna(lines["value"]) if "value_high" in lines else lines["value"]
    return high.where(lines[measure].map(lambda name: MEASURES[name]["worse"] == "higher"), lines["value"])


def spread(lines: pd.DataFrame, names: Sequence[str] = ("value", "low", "high"), sign: str = "") -> str:
    """A fraction in percent, for the eye: the mean of several seeds and their range, of one its interval if it has one."""
    columns = [100 * lines[name].to_numpy(float) for name in names if name in lines] or [np.empty(0)]
    values, *ends = (column[~np.isnan(columns[0])] for column in columns)
    most = values
    if (high := f"{names[0]}_high") in lines and names[0].endswith("value"):
        most = 100 * lines[high].fillna(lines[names[0]]).to_numpy(float)[~np.isnan(columns[0])]
    if len(values) < 2:
        bounded = len(values) and ends and not np.isnan(ends).any()
        interval = f" [{round(ends[0][0]):{sign}}, {round(ends[1][0]):{sign}}]" if bounded else ""
        return "".join(f"{bounds(least / 100, end / 100, sign)}{interval}" for least, end in zip(values, most, strict=True))
    mean = bounds(values.mean() / 100, most.mean() / 100, sign)
    return f"{mean} ({round(values.min()):{sign}}{' to ' if sign else '–'}{round(most.max()):{sign}})"


def change(lines: pd.DataFrame) -> str:
    """A change in points, for the eye: its mean over seeds with the interval over them, of one seed that over its items."""
    value, low, high = (lines[f"difference{end}"].dropna().to_numpy(float) for end in ("", "_low", "_high"))
    if len(value) > 1:
        over = stats.over_seeds(value, (high - low) / 3.92, np.ones(len(value)))  # twice 1.96 errors
        low, high = ([over[end]] for end in ("seed_low", "seed_high"))
    return spread(pd.DataFrame({"value": value.mean(), "low": low[:1], "high": high[:1]}), sign="+") if len(value) else ""
