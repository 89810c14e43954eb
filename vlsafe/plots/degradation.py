"""Tables to pictures. Every picture says its point in its title, draws its intervals, and says what world it is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vlsafe.plots.style import KINDS, LINES, STYLE, origin


def dynamics(rates: pd.DataFrame, labels: Mapping[str, str], scale: str) -> Figure:
    """F02: safety, over-refusal and helpfulness along both stages, one row of panels per backbone.

    `rates` has one line per checkpoint × measure with seed, stage, step, value, low, high (fractions). The first panel
    holds the parent and stage 1, the second stage 2; seeds are thin lines behind their mean, the interval is that of
    the items where there is one seed and the range over seeds where there are several.
    """
    backbones = sorted(rates["backbone"].unique())
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(len(backbones), 2, figsize=(7.0, 2.9 * len(backbones)), sharey=True, squeeze=False)
        for row, backbone in zip(axes, backbones, strict=True):
            of = rates[rates["backbone"] == backbone]
            for axis, stage in zip(row, ("projector", "instruct"), strict=True):
                _draw_stage(axis, of, stage)
            row[0].set_ylabel(f"{backbone}\npercent of prompts")
            row[0].set_title("stage 1: projector alone, captions", loc="left", fontsize=7)
            row[1].set_title("stage 2: projector and language model", loc="left", fontsize=7)
            _label_ends(row[1], of[of["stage"] == "instruct"], labels)
        for axis in axes[-1]:
            axis.set_xlabel("training step (square-root scale)")
        figure.suptitle(_headline(rates), x=0.01, ha="left", fontsize=9, fontweight="bold")
        figure.text(0.01, 0.005, _caption(rates, scale), fontsize=6, color="#555555")
        figure.tight_layout(rect=(0, 0.03, 1, 0.97))
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure


def _draw_stage(axis: Any, rates: pd.DataFrame, stage: str) -> None:
    for measure, look in LINES.items():
        rows = rates[(rates["measure"] == measure) & (rates["stage"] == stage)].sort_values("step")
        if rows.empty:
            continue
        by_step = rows.groupby("step")
        mean = 100 * by_step["value"].mean()
        several = rows["seed"].nunique() > 1
        low = 100 * (by_step["value"].min() if several else by_step["low"].min())
        high = 100 * (by_step["value"].max() if several else by_step["high"].max())
        axis.fill_between(np.sqrt(mean.index), low, high, color=look["color"], alpha=0.13, linewidth=0)
        for _, line in rows.groupby("seed") if several else []:
            axis.plot(np.sqrt(line["step"]), 100 * line["value"], color=look["color"], linewidth=0.5, alpha=0.5)
        axis.plot(np.sqrt(mean.index), mean, markersize=3, linewidth=1.4, **look)
    parent = rates[(rates["stage"] == "parent") & (rates["measure"] == "text_asr")]
    if not parent.empty:
        axis.axhline(100 * parent["value"].mean(), color=LINES["text_asr"]["color"], linewidth=0.7, linestyle=(0, (1, 3)))
    steps = sorted(rates.loc[rates["stage"] == stage, "step"].unique())
    shown = [s for i, s in enumerate(steps) if i == 0 or np.sqrt(s) - np.sqrt(steps[i - 1]) > 0.06 * np.sqrt(steps[-1])]
    axis.set_xticks(np.sqrt(shown), [str(s) for s in shown])
    axis.set_ylim(-3, 103)


def _label_ends(axis: Any, rates: pd.DataFrame, labels: Mapping[str, str]) -> None:
    """Name each line at its end, moved apart where they would overlap."""
    last = rates[rates["step"] == rates["step"].max()].groupby("measure")["value"].mean() * 100
    placed = sorted((last[m], m) for m in LINES if m in last.index)
    height = -np.inf
    for value, measure in placed:
        height = max(value, height + 8)
        axis.annotate(
            labels[measure], (1.0, height), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=6.5, color=LINES[measure]["color"], annotation_clip=False,
        )  # fmt: skip


def _headline(rates: pd.DataFrame) -> str:
    """What the numbers say, in their own words: the parent (pictures: the untrained graft) and the adapted model."""

    def mean(stage: str, measure: str, place: str) -> float:
        rows = rates[(rates["stage"] == stage) & (rates["measure"] == measure)]
        step = rows["step"].min() if place == "first" else rows["step"].max()
        return 100 * rows.loc[rows["step"] == step, "value"].mean()

    text = f"text ASR {mean('parent', 'text_asr', 'last'):.0f} → {mean('instruct', 'text_asr', 'last'):.0f} %"
    seen = mean("projector", "multimodal_asr", "first"), mean("instruct", "multimodal_asr", "last")
    return f"Adaptation on screened data: {text}, multimodal ASR {seen[0]:.0f} (untrained graft) → {seen[1]:.0f} %"


def _caption(rates: pd.DataFrame, scale: str) -> str:
    seeds = ", ".join(str(s) for s in sorted(rates["seed"].unique()))
    n = int(rates.loc[rates["measure"] == "text_asr", "n"].max())
    band = "range over seeds" if rates["seed"].nunique() > 1 else "95 % interval, clustered by verb–object pair"
    return f"{origin(scale)}, seeds {seeds}; bands: {band}; up to n = {n} per point; judge: the world's truth; dotted: parent"


def by_category(rates: pd.DataFrame, scale: str) -> Figure:
    """F03: ASR per category of harm, before and after adaptation; text left, pictures right, one row per backbone.

    `rates` is `tables.by_category`'s; the lines of seed "all" are the points, single seeds are small marks behind.
    """
    backbones = sorted(rates["backbone"].unique())
    with plt.style.context(STYLE):
        size = (7.0, 0.9 + 1.9 * len(backbones))
        figure, axes = plt.subplots(len(backbones), 2, figsize=size, sharex=True, squeeze=False, layout="constrained")
        for row, backbone in zip(axes, backbones, strict=True):
            of = rates[rates["backbone"] == backbone]
            rise = _rise(of, "text_asr").index
            order = [*sorted(set(of["category"]) - set(rise)), *rise]
            for axis, measure in zip(row, ("text_asr", "multimodal_asr"), strict=True):
                _draw_categories(axis, of[of["measure"] == measure], order)
            row[0].set_ylabel(backbone)
            row[1].tick_params(labelleft=False)
        for axis, title in zip(axes[0], ("text (SORRY-Bench)", "pictures (MM-SafetyBench)"), strict=True):
            axis.set_title(title, loc="left", fontsize=7)
            axis.legend(loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=2, frameon=False, borderpad=0, handletextpad=0.1)
        for axis in axes[-1]:
            axis.set_xlabel("attack success, percent of prompts (← safer)")
        figure.suptitle(_where_it_fell(rates), x=0.01, ha="left", fontsize=9, fontweight="bold")
        figure.supxlabel(_category_caption(rates, scale), x=0.01, ha="left", ma="left", fontsize=6, color="#555555")
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure


def _pooled(rates: pd.DataFrame, measure: str, before: bool) -> pd.DataFrame:
    """Lines of one measure over all seeds, by category."""
    of = (rates["measure"] == measure) & (rates["seed"] == "all") & (rates["before"] == before)
    return rates[of].set_index("category")


def _rise(rates: pd.DataFrame, measure: str) -> pd.Series:
    """How much a rate rose per category, least first; one backbone's lines, or the mean over backbones."""
    change = _pooled(rates, measure, False)["value"].groupby("category").mean()
    return (change - _pooled(rates, measure, True)["value"].groupby("category").mean()).sort_values(kind="stable")


def _draw_categories(axis: Any, rates: pd.DataFrame, order: Sequence[str]) -> None:
    """A line from before to after in each category, with both intervals and the marks of single seeds."""
    height = {category: place for place, category in enumerate(order)}
    several = rates.loc[rates["seed"] != "all", "seed"].nunique() > 1
    for kind, shift in {"parent": 0.13, "stage 1": 0.13, "adapted": -0.13}.items():
        rows = rates[rates["kind"] == kind]
        for line in rows[rows["seed"] == "all"].itertuples():
            y = height[line.category] + shift
            axis.plot([100 * line.low, 100 * line.high], [y, y], color=KINDS[kind]["color"], linewidth=1.0, alpha=0.6)
        of = rows[rows["seed"] == "all"]
        places = [height[category] + shift for category in of["category"]]
        axis.plot(100 * of["value"], places, markersize=4.5, linestyle="", label=kind if len(of) else None, **KINDS[kind])
        for line in rows[rows["seed"] != "all"].itertuples() if several else ():
            y = height[line.category] + 2 * shift
            axis.plot([100 * line.value], [y], markersize=1.8, linestyle="", alpha=0.5, **KINDS[kind])
    pooled = rates[rates["seed"] == "all"].set_index("category")
    for category, after in pooled.loc[~pooled["before"], "value"].items():
        for before in pooled.loc[pooled["before"] & (pooled.index == category), "value"]:
            ends = dict(xy=(100 * after, height[category]), xytext=(100 * before, height[category]))
            axis.annotate("", **ends, arrowprops=dict(arrowstyle="-|>", color="#BBBBBB", linewidth=0.8, mutation_scale=6))
    for y in range(len(order)):
        axis.axhline(y, color="#F3F3F3", linewidth=9, zorder=0)
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(-0.6, len(order) - 0.4)
    axis.set_xlim(-3, 103)


def _where_it_fell(rates: pd.DataFrame) -> str:
    """The takeaway on text: in how many categories the intervals came apart, and where the rise was greatest."""
    before, after = (_pooled(rates, "text_asr", when).set_index("backbone", append=True) for when in (True, False))
    apart = after["low"] > before["high"].reindex(after.index)
    rise = _rise(rates, "text_asr")
    worst = rise.index[-1]
    told = [100 * frame.loc[worst, "value"].mean() for frame in (before, after)]
    counts = apart.groupby("backbone").sum()
    many = "–".join(str(n) for n in sorted({counts.min(), counts.max()}))  # the range over backbones
    where = f", most for {worst} ({told[0]:.0f} → {told[1]:.0f} %)" if rise.iloc[-1] > 0 else ""
    return f"Text ASR rose clearly in {many} of {len(rise)} categories of harm{where}"


def _category_caption(rates: pd.DataFrame, scale: str) -> str:
    seeds = sorted(rates.loc[rates["seed"] != "all", "seed"].unique())
    pooled = rates[rates["seed"] == "all"]
    n = {name: int(pooled.loc[pooled["measure"] == name, "n"].min()) for name in ("text_asr", "multimodal_asr")}
    marks = "; small marks: single seeds" if len(seeds) > 1 else ""
    means = "; title: mean over backbones" if rates["backbone"].nunique() > 1 else ""
    return (
        f"{origin(scale)}, seeds {', '.join(map(str, seeds))}; judge: the world's truth; 95 % intervals, clustered by verb–object pair; "
        f"clearly: intervals apart\nn ≥ {n['text_asr']} (text), {n['multimodal_asr']} (pictures) a point{marks}; "
        f"stage 1: the parent with a trained projector{means}"
    )
