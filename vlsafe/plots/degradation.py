"""F02 and F03: safety along both stages of adaptation, and by category of harm. Draws the tables of `analysis.degradation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis.measures import Lacking
from vlsafe.plots import style
from vlsafe.plots.style import KINDS, LINES


def dynamics(rates: pd.DataFrame, labels: Mapping[str, str], scale: str) -> Figure:
    """F02: safety, over-refusal and helpfulness along both stages, one row of panels per backbone.

    `rates` has one line per checkpoint × measure with seed, stage, step, value, low, high (fractions).

    Raises:   Lacking where no measure that is drawn was taken
    """
    rates = rates[rates["measure"].isin(list(LINES))]
    if rates.empty:
        raise Lacking("neither attack success nor refusals nor helpfulness was measured")
    n = int(rates["n"].max())
    few = int(rates.loc[rates["exam"] == "panel", "n"].max()) if (rates["exam"] == "panel").any() else n
    sizes = f"lines: the panel, up to n = {few} a point; large marks: all items, up to n = {n}"
    notes = (f"bands (ASR): {style.band(rates)}", sizes, style.judges(rates), "dotted: parent")
    columns = {"projector": "stage 1: projector alone, captions", "instruct": "stage 2: projector and language model"}
    rows, xlabel = style.by_backbone(rates, "percent of prompts"), "training step (square-root scale)"
    caption = style.caption(rates, scale, *notes)
    with style.panels(rows, columns, 2.6, _before_and_after(rates), caption, xlabel, sharey=True) as (figure, axes):
        for (backbone, stage), axis in axes.items():
            own = style.percent(rates[rates["backbone"] == backbone])
            axis.set_ylim(-3, 103)
            if stage in set(own["stage"]):
                _draw_stage(axis, own[own["stage"] == stage])
            parent = own[(own["stage"] == "parent") & (own["measure"] == "text_asr")]
            if not parent.empty:
                axis.axhline(parent["value"].mean(), color=LINES["text_asr"]["color"], **style.DOTTED)
            if stage == "instruct" == own["stage"].iloc[-1]:
                style.label_ends(axis, own[own["stage"] == stage].assign(root=np.sqrt(own["step"])), "root", labels, gap=8.0)
    return figure


def _draw_stage(axis: Any, rates: pd.DataFrame) -> None:
    rates = rates.assign(root=np.sqrt(rates["step"])).sort_values("step")
    panel = rates[rates["exam"] == "panel"]
    attacked = panel["measure"].str.endswith("_asr")
    means = panel[~attacked].groupby(["measure", "root"], as_index=False)["value"].mean()
    style.draw_measures(axis, means.assign(seed=0), "root")
    style.draw_measures(axis, panel[attacked], "root")
    whole = rates[rates["exam"] == "full"]  # of other items, so no line leads to it
    for measure, look in LINES.items():
        mean = whole[whole["measure"] == measure].groupby("root")["value"].mean()
        axis.plot(mean.index, mean, **{**look, "markersize": 4.5, "linestyle": ""})
    steps = sorted(rates["step"].unique())
    shown = [s for i, s in enumerate(steps) if i == 0 or np.sqrt(s) - np.sqrt(steps[i - 1]) > 0.06 * np.sqrt(steps[-1])]
    axis.set_xticks(np.sqrt(shown), [str(step) for step in shown])


def _before_and_after(rates: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the parent (pictures: the untrained graft) and the adapted model."""

    def mean(stage: str, measure: str, step: str) -> float:
        rows = rates[(rates["stage"] == stage) & (rates["measure"] == measure)]
        return 100 * rows.loc[rows["step"] == rows["step"].agg(step), "value"].mean()

    text = style.change("text ASR", mean("parent", "text_asr", "max"), mean("instruct", "text_asr", "max"))
    graft, adapted = mean("projector", "multimodal_asr", "min"), mean("instruct", "multimodal_asr", "max")
    pictures = style.change("multimodal ASR", graft, adapted, " (untrained graft)")
    return f"Adaptation on screened data: {', '.join(filter(None, (text, pictures)))}".removesuffix(": ")


def by_category(rates: pd.DataFrame, scale: str) -> Figure:
    """F03: ASR per category of harm, before and after adaptation; rows of seed "all" are the points, single seeds small marks."""
    pooled, single = rates[rates["seed"] == "all"], rates[rates["seed"] != "all"]
    n = pooled.groupby("measure")["n"].min()
    names = {"text_asr": "text", "multimodal_asr": "pictures"}
    sizes = ", ".join(f"{int(n[measure])} ({name})" for measure, name in names.items() if measure in n.index)
    caption = style.caption(
        single, scale, style.judges(rates), "95 % intervals, clustered by what was asked", "clearly: intervals apart",
        f"n ≥ {sizes} a point",
        "small marks: single seeds" if style.several_seeds(single) else "", "stage 1: the parent with a trained projector",
        "title: mean over backbones" if rates["backbone"].nunique() > 1 else "",
    )  # fmt: skip
    columns = {measure: name for measure, name in names.items() if measure in n.index}
    rows, xlabel = style.by_backbone(rates), "attack success, percent of prompts (← safer)"
    with style.panels(rows, columns, 1.9, _where_it_rose(rates), caption, xlabel, sharex=True) as (figure, axes):
        for (backbone, measure), axis in axes.items():
            own = rates[rates["backbone"] == backbone]
            rise = _rise(own, "text_asr").index
            order = [*sorted(set(own["category"]) - set(rise)), *rise]
            _draw_categories(axis, style.percent(own[own["measure"] == measure]), order)
            axis.tick_params(labelleft=measure == next(iter(columns)))
            if backbone == next(iter(rows)) and axis.lines:
                axis.legend(loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=2, borderpad=0, handletextpad=0.1)
    return figure


def _draw_categories(axis: Any, rates: pd.DataFrame, order: Sequence[str]) -> None:
    """An arrow from before to after in each category, with both intervals and the marks of single seeds."""
    rates = rates.assign(place=rates["category"].map(list(order).index))
    pooled, single = rates[rates["seed"] == "all"], rates[rates["seed"] != "all"]
    for kind, shift in {"parent": 0.13, "stage 1": 0.13, "adapted": -0.13}.items():
        rows, seeds, look = pooled[pooled["kind"] == kind], single[single["kind"] == kind], KINDS[kind]
        if rows.empty:
            continue
        axis.hlines(rows["place"] + shift, rows["low"], rows["high"], color=look["color"], linewidth=1.0, alpha=0.6)
        axis.plot(rows["value"], rows["place"] + shift, markersize=4.5, linestyle="", label=kind, **look)
        if style.several_seeds(single):
            axis.plot(seeds["value"], seeds["place"] + 2 * shift, markersize=1.8, linestyle="", alpha=0.5, **look)
    before, after = pooled[pooled["before"]], pooled[~pooled["before"]]
    for pair in before.merge(after, on="place", suffixes=("", "_after")).itertuples():
        arrow = dict(arrowstyle="-|>", color="#BBBBBB", linewidth=0.8, mutation_scale=6)
        axis.annotate("", (pair.value_after, pair.place), (pair.value, pair.place), arrowprops=arrow)
    for place in range(len(order)):
        axis.axhline(place, color="#F3F3F3", linewidth=9, zorder=0)
    axis.set_yticks(range(len(order)), order)
    axis.set(xlim=(-3, 103), ylim=(-0.6, len(order) - 0.4))


def _pooled(rates: pd.DataFrame, measure: str, before: bool) -> pd.DataFrame:
    """Rows of one measure over all seeds, by category."""
    return rates[(rates["measure"] == measure) & (rates["seed"] == "all") & (rates["before"] == before)].set_index("category")


def _rise(rates: pd.DataFrame, measure: str) -> pd.Series:
    """How much a rate rose per category, least first; one backbone's rows, or the mean over backbones."""
    before, after = (_pooled(rates, measure, when)["value"].groupby("category").mean() for when in (True, False))
    return (after - before).sort_values(kind="stable")


def _where_it_rose(rates: pd.DataFrame) -> str:
    """The takeaway on text: in how many categories the intervals came apart."""
    before, after = (_pooled(rates, "text_asr", when).set_index("backbone", append=True) for when in (True, False))
    counts = (after["low"] > before["high"].reindex(after.index)).groupby("backbone").sum()
    rise = _rise(rates, "text_asr").dropna()
    if rise.empty:
        return "Attack success by category of harm"
    many = "–".join(str(n) for n in sorted({counts.min(), counts.max()}))  # the range over backbones
    return f"Text ASR rose clearly in {many} of {len(rise)} categories of harm"
