"""F05 and F06 as pictures: what safety tuning buys, and what it costs. Draws what `tradeoff` has counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vlsafe.analysis import tuning
from vlsafe.plots.style import KINDS, STYLE, origin, spread

MEAN = ["asr", "asr_low", "asr_high", "helpfulness", "helpfulness_low", "helpfulness_high"]


def plane(points: pd.DataFrame, scale: str) -> Figure:
    """F05: attack success against helpfulness, a point per model with intervals both ways, text left and pictures right.

    `points` is `tradeoff.plane`'s. Several seeds are averaged, intervals too, and each seed is a small mark; the front is that
    of the points drawn.
    """
    note = "bars: 95 % intervals, clustered by verb–object pair\nline: models that no other beats in both; dotted: parent; "
    note += "judge: the world's truth"
    return planes(points, 2.7, _draw_plane, _marks(points), _told(points), _caption(points, scale, note))


def planes(
    points: pd.DataFrame, inches: float, draw: Callable[[Any, pd.DataFrame], None], marks: Sequence[Any], title: str, caption: str
) -> Figure:
    """Attack success against helpfulness, a row of `inches` per backbone, text left, pictures right; `draw` fills a plane."""
    backbones = sorted(points["backbone"].unique())
    with plt.style.context(STYLE):
        size = (7.0, 0.8 + inches * len(backbones))
        figure, axes = plt.subplots(len(backbones), 2, figsize=size, squeeze=False, sharey=True, layout="constrained")
        for row, backbone in zip(axes, backbones, strict=True):
            for axis, modality in zip(row, ("text", "pictures"), strict=True):
                draw(axis, points[(points["backbone"] == backbone) & (points["modality"] == modality)])
                axis.set_title("attacks in text" if modality == "text" else "attacks with pictures", loc="left", fontsize=7)
            row[0].set_ylabel(f"{backbone}\nattack success, percent (↓ safer)")
        for axis in axes[-1]:
            axis.set_xlabel("helpfulness, percent (→ better)")
        figure.legend(handles=marks, loc="outside right center", frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
        figure.supxlabel(caption, x=0.01, ha="left", ma="left", fontsize=6, color="#555555")
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure


def _draw_plane(axis: Any, points: pd.DataFrame) -> None:
    parents = points.loc[points["kind"] == "parent", "asr"]
    if len(parents):
        axis.axhline(100 * parents.mean(), color=KINDS["parent"]["color"], linewidth=0.7, linestyle=(0, (1, 3)))
    placed = points.dropna(subset=["helpfulness"])
    if placed.empty:
        return
    mean = placed.groupby(["kind", "stage", "recipe"], sort=False)[MEAN].mean().reset_index()
    if placed["seed"].nunique() > 1:
        for line in placed.itertuples():
            axis.plot(100 * line.helpfulness, 100 * line.asr, markersize=2, alpha=0.5, linestyle="", **KINDS[line.kind])
    for line in mean.itertuples():
        x, y, colour = 100 * line.helpfulness, 100 * line.asr, KINDS[line.kind]["color"]
        axis.plot([100 * line.helpfulness_low, 100 * line.helpfulness_high], [y, y], color=colour, linewidth=0.7, alpha=0.6)
        axis.plot([x, x], [100 * line.asr_low, 100 * line.asr_high], color=colour, linewidth=0.7, alpha=0.6)
        axis.plot(x, y, markersize=5, linestyle="", **KINDS[line.kind])
    best = mean[tuning.front(mean)].sort_values("helpfulness")
    axis.plot(100 * best["helpfulness"], 100 * best["asr"], color="#AAAAAA", linewidth=0.8, zorder=0)
    axis.set_ylim(-4, 104)
    _label(axis, mean)


def _label(axis: Any, points: pd.DataFrame) -> None:
    """Names at the right edge, in the order of the points' heights and apart from each other, each tied to its point."""
    points = points.sort_values(["asr", "helpfulness"])
    heights = spread(list(100 * points["asr"]), gap=5.0)
    for line, height in zip(points.itertuples(), heights, strict=True):
        colour = KINDS[line.kind]["color"]
        axis.annotate(
            _name(line.stage, line.recipe), (100 * line.helpfulness, 100 * line.asr), xytext=(1.03, height), va="center",
            textcoords=axis.get_yaxis_transform(), fontsize=5.5, color=colour,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.4, alpha=0.5, shrinkA=0, shrinkB=2, relpos=(0, 0.5)),
        )  # fmt: skip


def _name(stage: str, recipe: str) -> str:
    kind = tuning.kind(stage, recipe)
    return kind if kind in KINDS and stage != "safety" else recipe.removesuffix("-full")


def _marks(points: pd.DataFrame) -> list[Any]:
    return [
        plt.Line2D([], [], linestyle="", markersize=4, label=name, **look)
        for name, look in KINDS.items()
        if name in set(points["kind"]) and name != "parent"
    ]


def _told(points: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the adapted model and the safest tuned one, for both kinds of attack."""
    said = []
    for modality, what in (("text", "text ASR"), ("pictures", "with pictures")):
        of = points[points["modality"] == modality]
        tuned = of[of["stage"] == "safety"].groupby("recipe")["asr"].mean() * 100
        adapted = 100 * of.loc[of["kind"] == "adapted", "asr"].mean()
        said.append(f"{what} {adapted:.0f} → {tuned.min():.0f} % ({tuned.idxmin().removesuffix('-full')})")
    return f"The safest after tuning: {', '.join(said)}"


def refusals(rates: pd.DataFrame, scale: str) -> Figure:
    """F06: refusal of harmless requests by kind of request, one row of marks per model; text above, pictures below.

    `rates` is `tradeoff.refusals`'s; several seeds are averaged, intervals too.
    """
    backbones = sorted(rates["backbone"].unique())
    models = list(dict.fromkeys(zip(rates["stage"], rates["recipe"], strict=True)))
    models = sorted(models, key=lambda m: [tuning.kind(*m) != name for name in ("parent", "adapted")])
    whats = [what for _, _, what, _ in tuning.REFUSALS]
    with plt.style.context(STYLE):
        size = (7.0, 0.8 + 0.28 * len(models) * len(backbones) + 0.5 * len(backbones))
        figure, axes = plt.subplots(len(backbones), len(whats), figsize=size, squeeze=False, sharex=True, layout="constrained")
        for row, backbone in zip(axes, backbones, strict=True):
            for axis, what in zip(row, whats, strict=True):
                of = rates[(rates["backbone"] == backbone) & (rates["what"] == what)]
                _draw_refusals(axis, of, models)
                axis.set_title("\n".join(what.rsplit(" ", 1)), fontsize=6, loc="left")
                axis.tick_params(labelleft=axis is row[0])
            row[0].set_yticks(range(len(models)), [_name(*model) for model in models], fontsize=6)
            row[0].set_ylabel(backbone)
        figure.suptitle(_most_refused(rates), x=0.01, ha="left", fontsize=9, fontweight="bold")
        note = "95 % intervals, clustered by verb–object pair\nrefused, percent (← better); the first three in text, the others with pictures"
        figure.supxlabel(_caption(rates, scale, note), x=0.01, ha="left", ma="left", fontsize=6, color="#555555")
        plt.close(figure)
    return figure


def _draw_refusals(axis: Any, rates: pd.DataFrame, models: list[tuple[str, str]]) -> None:
    mean = rates.groupby(["stage", "recipe"])[["value", "low", "high"]].mean() * 100
    for place, model in enumerate(models):
        if model in mean.index:
            line, look = mean.loc[model], KINDS[tuning.kind(*model)]
            axis.plot([line["low"], line["high"]], [place, place], color=look["color"], linewidth=0.9, alpha=0.6)
            axis.plot(line["value"], place, markersize=4, linestyle="", **look)
    axis.set_xlim(-6, 106)
    axis.set_xticks([0, 50, 100])
    axis.set_yticks(range(len(models)))
    axis.set_ylim(len(models) - 0.4, -0.6)


def _most_refused(rates: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the tuned model that refuses most, averaged over kinds, and the adapted one."""
    mean = rates.groupby(["stage", "recipe"])["value"].mean() * 100
    tuned = mean[mean.index.get_level_values("stage") == "safety"]
    adapted = mean[[tuning.kind(*key) == "adapted" for key in mean.index]].mean()
    worst = tuned.idxmax()[1].removesuffix("-full")
    return f"Harmless requests refused: {adapted:.0f} % adapted, {tuned.min():.0f}–{tuned.max():.0f} % tuned (most: {worst})"


def _caption(frame: pd.DataFrame, scale: str, note: str) -> str:
    seeds = ", ".join(str(seed) for seed in sorted(frame["seed"].unique()))
    several = "means over seeds, small marks: single seeds; " if frame["seed"].nunique() > 1 and "asr" in frame else ""
    n = f"; n ≥ {int(frame['n'].min())} a mark" if "n" in frame else ""
    return f"{origin(scale)}, seeds {seeds}; {several}{note}{n}"
