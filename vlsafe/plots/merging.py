"""F12 and F13 as pictures: how to choose the ratio of a merge, and whether merging dominates. Draws what `merges` has counted."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vlsafe.analysis import tuning
from vlsafe.analysis.measures import MEASURES
from vlsafe.plots.style import KINDS, LINES, STYLE, origin, spread
from vlsafe.plots.tuning import MEAN, planes

PARTNERS = {  # what each partner is for the eye
    "sl-full": "child: SL", "dpo-both-full": "child: DPO on both", "sibling-full": "sibling", "aligned": "parent",
}  # fmt: skip
FRONTS = {"merged": ("merged",), "ensemble": ("ensemble",), "SFT": ("SFT", "DPO", "GRPO")}  # colour of -> whose points


def sweep(rates: pd.DataFrame, scale: str) -> Figure:
    """F12: attack success, refusals and helpfulness against the ratio of the linear merge, a column per partner.

    `rates` is `merges.sweep`'s. Seeds are thin lines behind their mean; the band is the interval of the items, or the range over
    seeds where there are several. Crosses are the output ensemble at the same ratio; triangles below, the chosen ratios.
    """
    backbones = sorted(rates["backbone"].unique())
    partners = [name for name in PARTNERS if name in set(rates["partner"])]
    with plt.style.context(STYLE):
        size = (7.0, 0.9 + 2.2 * len(backbones))
        figure, axes = plt.subplots(len(backbones), len(partners), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for row, backbone in zip(axes, backbones, strict=True):
            for axis, partner in zip(row, partners, strict=True):
                of = rates[(rates["backbone"] == backbone) & (rates["partner"] == partner)]
                for measure, look in LINES.items():
                    _draw_sweep(axis, of[of["measure"] == measure], look)
                picked = of.loc[(of["rule"] == "linear") & of["chosen"].eq(True), "ratio"].drop_duplicates()
                axis.plot(picked, [-6] * len(picked), marker="^", color="black", markersize=4, linestyle="", clip_on=False)
                axis.set_title(PARTNERS[partner], loc="left", fontsize=7)
                axis.set_xlim(-0.03, 1.03)
                axis.set_ylim(-6, 104)
            row[0].set_ylabel(f"{backbone}\npercent")
            _label(row[-1], of[of["rule"] == "linear"])
        for axis in axes[-1]:
            axis.set_xlabel("ratio (weight of the safe partner)", fontsize=6)
        figure.suptitle(_chosen(rates), x=0.01, ha="left", fontsize=9, fontweight="bold")
        figure.supxlabel(_caption(rates, scale), x=0.01, ha="left", ma="left", fontsize=6, color="#555555")
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure


def _label(axis: Any, rates: pd.DataFrame) -> None:
    """Name each line at its right end."""
    last = rates[rates["ratio"] == rates["ratio"].max()].groupby("measure")["value"].mean().mul(100).sort_values()
    for (measure, value), height in zip(last.items(), spread(last.tolist(), gap=9.0), strict=True):
        place = dict(xy=(1.0, value), xytext=(1.06, height), xycoords=axis.get_yaxis_transform())
        axis.annotate(
            MEASURES[measure]["label"].replace("benign picture ", "picture\n"), **place, textcoords=axis.get_yaxis_transform(),
            va="center", fontsize=6, color=LINES[measure]["color"], annotation_clip=False,
        )  # fmt: skip


def _draw_sweep(axis: Any, rates: pd.DataFrame, look: dict[str, Any]) -> None:
    line = rates[rates["rule"] == "linear"].sort_values("ratio")
    if line.empty:
        return
    by = line.groupby("ratio")
    mean, several = 100 * by["value"].mean(), line["seed"].nunique() > 1
    low = 100 * (by["value"].min() if several else by["low"].min())
    high = 100 * (by["value"].max() if several else by["high"].max())
    axis.fill_between(mean.index, low, high, color=look["color"], alpha=0.09, linewidth=0)
    for _, of in line.groupby("seed") if several else []:
        axis.plot(of["ratio"], 100 * of["value"], color=look["color"], linewidth=0.4, alpha=0.5)
    axis.plot(mean.index, mean, markersize=2.5, linewidth=1.1, **look)
    both = 100 * rates[rates["rule"] == "ensemble"].groupby("ratio")["value"].mean()
    axis.plot(both.index, both, marker="x", color=look["color"], markersize=4.5, linestyle="")


def _chosen(rates: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the linear merge's chosen ratios, and the attacks with pictures that remain there."""
    of = rates[(rates["rule"] == "linear") & rates["chosen"].eq(True) & (rates["measure"] == "multimodal_asr")]
    told = []
    for partner in PARTNERS:
        at = of[of["partner"] == partner]
        if len(at):
            ratios = "–".join(f"{r:.1f}" for r in sorted({at["ratio"].min(), at["ratio"].max()}))
            told.append(f"{PARTNERS[partner].removeprefix('child: ')} {ratios} ({100 * at['value'].mean():.0f} %)")
    return textwrap.fill(f"Chosen ratio (multimodal ASR there): {', '.join(told)}", 90)


def _caption(rates: pd.DataFrame, scale: str) -> str:
    seeds = ", ".join(str(seed) for seed in sorted(rates["seed"].unique()))
    band = "range over seeds" if rates["seed"].nunique() > 1 else "95 % interval, clustered by verb–object pair"
    n = rates.groupby("measure")["n"].max()
    asked = ", ".join(f"{MEASURES[name]['label']} {int(n[name])}" for name in LINES if name in n.index)
    note = "lines: linear merge; crosses: ensemble of the same two models; triangle: the ratio that validation pairs chose"
    return f"{origin(scale)}, seeds {seeds}; bands: {band}; judge: the world's truth\n{note}\non the panel, n: {asked}"


def fronts(points: pd.DataFrame, answer: str, scale: str) -> Figure:
    """F13: attack success against helpfulness of every chosen merge, its controls and all tunings, a front for each.

    `points` is `merges.plane`'s, and the title the beginning of `answer`, that of `merges.answer`. Several seeds are averaged,
    intervals too; names are given to what lies on a front.
    """
    looks = [(name, look) for name, look in KINDS.items() if name in set(points["family"])]
    marks = [plt.Line2D([], [], linestyle="", markersize=4, label=name, **look) for name, look in looks]
    seeds = ", ".join(str(seed) for seed in sorted(points["seed"].unique()))
    note = (
        "lines: fronts of merges, ensembles and tunings; bars of what lies on one: 95 % intervals, clustered by verb–object pair"
    )
    caption = f"{origin(scale)}, seeds {seeds}; {note}\nn ≥ {int(points['n'].min())} a mark; judge: the world's truth"
    return planes(points, 2.9, _draw_fronts, marks, answer.partition(" (")[0], caption)


def _draw_fronts(axis: Any, points: pd.DataFrame) -> None:
    mean, named = points.dropna().groupby(["family", "name"], sort=False)[MEAN].mean().reset_index(), []
    for line in mean.itertuples():
        axis.plot(100 * line.helpfulness, 100 * line.asr, markersize=3.5, linestyle="", alpha=0.7, **KINDS[line.family])
    for colour, families in FRONTS.items():
        of = mean[mean["family"].isin(families)]
        best = of[tuning.front(of)].sort_values("helpfulness") if len(of) else of
        axis.plot(100 * best["helpfulness"], 100 * best["asr"], color=KINDS[colour]["color"], linewidth=0.9, zorder=1)
        named.append(best)
        for line in best.itertuples():
            x, y, bar = 100 * line.helpfulness, 100 * line.asr, dict(color=KINDS[line.family]["color"], linewidth=0.7, alpha=0.5)
            axis.plot([100 * line.helpfulness_low, 100 * line.helpfulness_high], [y, y], **bar)
            axis.plot([x, x], [100 * line.asr_low, 100 * line.asr_high], **bar)
    axis.set_ylim(-4, 104)
    told = pd.concat([*named, mean[mean["family"] == "adapted"]]).sort_values(["asr", "helpfulness"])
    for line, height in zip(told.itertuples(), spread(list(100 * told["asr"]), gap=5.0), strict=True):
        colour = KINDS[line.family]["color"]
        axis.annotate(
            line.name, (100 * line.helpfulness, 100 * line.asr), xytext=(1.03, height), va="center",
            textcoords=axis.get_yaxis_transform(), fontsize=5.5, color=colour,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.4, alpha=0.5, shrinkA=0, shrinkB=2, relpos=(0, 0.5)),
        )  # fmt: skip
