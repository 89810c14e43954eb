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


def dynamics(rates: pd.DataFrame, scale: str) -> Figure:
    """F02: safety, over-refusal and helpfulness along both stages, a panel each and one row of panels per backbone.

    `rates` has one line per checkpoint × measure with seed, stage, step, value, low, high (fractions).

    Raises:   Lacking where no measure that is drawn was taken
    """
    rates = rates[rates["measure"].isin(list(LINES))]
    if rates.empty:
        raise Lacking("neither attack success nor refusals nor helpfulness was measured")
    several = style.several_seeds(rates)
    n = rates[rates["measure"].isin(ASR)].pivot_table(index="exam", columns="measure", values="n", aggfunc="max")
    sizes = {
        exam: ", ".join(f"{of[name]:.0f} ({what})" for name, what in ASR.items() if of.get(name, 0) > 0)
        for exam, of in n.iterrows()
    }
    notes = (
        "grey: stage 1 (the projector alone, captions), white: stage 2 (the language model too)", "square-root scale",
        f"lines: the panel{_sized(sizes, 'panel')}{', thin: single seeds' * several}",
        f"large marks: all items{_sized(sizes, 'full')}{', small: single seeds' * several}", "dotted: the parent",
        "refused: triangles down with pictures, up in words", style.judges(rates),
    )  # fmt: skip
    columns = {what: text for what, (text, *measures) in COURSES.items() if rates["measure"].isin(measures).any()}
    rows, caption = style.by_backbone(rates, "percent of prompts"), style.caption(rates, scale, *notes)
    with style.panels(rows, columns, 1.5, _before_and_after(rates), caption, "training step", sharey=True) as (figure, axes):
        for (backbone, what), axis in axes.items():
            own = _along(style.percent(rates[rates["backbone"] == backbone]))
            for measure in COURSES[what][1:]:
                for stage, of in own[own["measure"] == measure].groupby("stage"):
                    _draw_course(axis, of, stage, LINES[measure])
            axis.axvspan(-0.08, 1.02, color="#F3F3F3", linewidth=0, zorder=0)
            ticks = own[own["x"].isin(ENDS)].set_index("x")["step"].to_dict()
            axis.set(xlim=(-0.08, 2.12), ylim=(-3, 103))
            axis.set_xticks(list(ticks), list(ticks.values()))
            axis.set_xticks([0.47, 1.57], ["\nstage 1", "\nstage 2"], minor=True)
            axis.tick_params(axis="x", which="minor", length=0)
    return figure


def _sized(sizes: Mapping[str, str], exam: str) -> str:
    return f", n = {sizes[exam]} a point" if sizes.get(exam) else ""


ASR = {"text_asr": "text", "multimodal_asr": "pictures"}
COURSES = {  # column of F02 -> its title and what is drawn in it
    "text_asr": ("text ASR\n(↓ safer)", "text_asr"), "multimodal_asr": ("multimodal ASR\n(↓ safer)", "multimodal_asr"),
    "twin_refusal": ("harmless requests\nrefused (↓ better)", "twin_refusal", "exaggerated_refusal"),
    "helpfulness": ("helpfulness\n(↑ better)", "helpfulness"),
}  # fmt: skip
ENDS = (0.0, 0.95, 2.05)  # where on F02's axis stage 1 begins and ends, and stage 2 ends


def _along(rates: pd.DataFrame) -> pd.DataFrame:
    """Rates of one backbone with their place `x`: the stages one after the other, within each the root of the step."""
    root = np.sqrt(rates["step"])
    by = root.groupby(rates["stage"])
    share = (root - by.transform("min")) / (by.transform("max") - by.transform("min")).clip(lower=1e-9)
    return rates.assign(x=(0.95 * share + 1.1 * (rates["stage"] == "instruct")).round(6))


def _draw_course(axis: Any, rates: pd.DataFrame, stage: str, look: Mapping[str, Any]) -> None:
    """One measure along one stage: the panel as a line, all items (other ones, so no line leads to them) as large marks."""
    panel, whole = (rates[rates["exam"] == exam].sort_values("step") for exam in ("panel", "full"))
    mean = whole.groupby("x")[["value", "low", "high"]].mean()
    if stage == "parent":
        axis.axhline(mean["value"].item(), color=look["color"], **style.DOTTED)
        return
    if len(panel):
        style.draw_line(axis, panel.drop(columns=["low", "high"]), "x", **look)
    axis.vlines(mean.index, mean["low"], mean["high"], color=look["color"], linewidth=1.2, alpha=0.5)
    axis.plot(mean.index, mean["value"], **{**look, "markersize": 4.5, "linestyle": ""})
    if style.several_seeds(rates):
        axis.plot(whole["x"], whole["value"], "_", color=look["color"], markersize=4, markeredgewidth=0.6, alpha=0.7)


def _before_and_after(rates: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: text ASR from the parent, multimodal ASR from stage 1 to the adapted model."""

    def mean(stage: str, measure: str) -> float:
        rows = rates[(rates["stage"] == stage) & (rates["measure"] == measure)]
        rows = rows[rows["step"] == rows["step"].max()]
        rows = rows[rows["exam"] == rows["exam"].min()]  # "full" where it was taken
        return 100 * rows.groupby("backbone")["value"].mean().mean()

    names = {"text_asr": ("text ASR", "parent", ""), "multimodal_asr": ("multimodal ASR", "projector", " (stage 1)")}
    said = [style.change(name, mean(stage, what), mean("instruct", what), of) for what, (name, stage, of) in names.items()]
    return f"Adaptation on screened data: {', '.join(filter(None, said))}".removesuffix(": ")


def by_category(rates: pd.DataFrame, scale: str) -> Figure:
    """F03: ASR per category of harm (where items have none, per source of their prompts), before and after adaptation; rows of
    seed "all" are the points, single seeds small marks."""
    pooled, single = rates[rates["seed"] == "all"], rates[rates["seed"] != "all"]
    n = pooled.groupby("measure")["n"].min()
    sizes = ", ".join(f"{int(n[measure])} ({name})" for measure, name in ASR.items() if measure in n.index)
    caption = style.caption(
        single, scale, style.judges(rates), "95 % intervals, clustered by what was asked", "clearly: intervals apart",
        f"n ≥ {sizes} a point",
        "small marks: single seeds" if style.several_seeds(single) else "", "stage 1: the parent with a trained projector",
        "title: least and most of the backbones" if rates["backbone"].nunique() > 1 else "",
    )  # fmt: skip
    columns = {measure: name for measure, name in ASR.items() if measure in n.index}
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
    """The takeaway: in how many groups of requests ASR rose and the intervals came apart, in text and with pictures."""
    said = []
    for measure, name in ASR.items():
        before, after = (_pooled(rates, measure, when).set_index("backbone", append=True) for when in (True, False))
        before = before.reindex(after.index)
        rose, apart = (_least_most(after[end] > before[other]) for end, other in (("value", "value"), ("low", "high")))
        if many := len(_rise(rates, measure).dropna()):
            said.append(f"{name} {rose} of {many} (clearly {apart})")
    return f"Groups of requests in which ASR rose: {', '.join(said)}" if said else "Attack success by group of requests"


def _least_most(held: pd.Series) -> str:
    """How often something holds, least and most of the backbones."""
    counts = held.groupby("backbone").sum()
    return "–".join(str(n) for n in sorted({counts.min(), counts.max()}))
