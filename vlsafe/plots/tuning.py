"""F05 and F06: what safety tuning buys, and what it costs. Draws the tables of `analysis.tuning`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis import tuning
from vlsafe.plots import style
from vlsafe.plots.style import KINDS

MEAN = ["asr", "asr_low", "asr_high", "helpfulness", "helpfulness_low", "helpfulness_high"]


def tradeoff(points: pd.DataFrame, scale: str) -> Figure:
    """F05: attack success against helpfulness, a point per model with intervals both ways, and the front of the points drawn."""
    seeds = "means over seeds, small marks: single seeds" if style.several_seeds(points) else ""
    note = "bars: 95 % intervals, clustered by what was asked; line: models that no other beats in both; dotted: parent"
    least = f"n ≥ {int(points['n'].min())} a mark" if "n" in points else ""
    caption = style.caption(points, scale, seeds, note, style.judges(points), least)
    marks = style.handles(KINDS, set(points["kind"]) - {"parent"})
    return asr_against_helpfulness(points, 2.7, _draw_models, marks, _safest(points), caption)


def asr_against_helpfulness(
    points: pd.DataFrame, inches: float, draw: Callable[[Any, pd.DataFrame], None], marks: Sequence[Any], title: str, caption: str
) -> Figure:
    """Attack success against helpfulness, a row of `inches` per backbone, text left, pictures right; `draw` fills a panel."""
    rows = style.by_backbone(points, "attack success, percent (↓ safer)")
    columns, xlabel = {"text": "attacks in text", "pictures": "attacks with pictures"}, "helpfulness, percent (→ better)"
    columns = {name: title for name, title in columns.items() if name in set(points["modality"])}
    with style.panels(rows, columns, inches, title, caption, xlabel, marks, sharey=True) as (figure, axes):
        for _, axis, models in style.facets(axes, style.percent(points), "modality"):
            axis.set_ylim(-4, 104)
            draw(axis, models)
    return figure


def _draw_models(axis: Any, points: pd.DataFrame) -> None:
    parents = points.loc[points["kind"] == "parent", "asr"]
    if len(parents):
        axis.axhline(parents.mean(), color=KINDS["parent"]["color"], **style.DOTTED)
    placed = points.dropna(subset=["helpfulness"])
    if placed.empty:
        return
    mean = placed.groupby(["kind", "stage", "recipe"], sort=False)[MEAN].mean().reset_index()
    style.draw_models(axis, mean, placed, "asr", 5)
    best = mean[tuning.front(mean)].sort_values("helpfulness")
    axis.plot(best["helpfulness"], best["asr"], color="#AAAAAA", linewidth=0.8, zorder=0)
    names = [(_name(m.stage, m.recipe), m.helpfulness, m.asr, KINDS[m.kind]["color"]) for m in mean.itertuples()]
    style.label_right(axis, names, gap=5.0)


def _name(stage: str, recipe: str) -> str:
    return recipe.removesuffix("-full") if stage == "safety" else tuning.kind(stage, recipe)


def _safest(points: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the adapted model and the safest tuned one, for both kinds of attack."""
    parts = []
    for modality, name in (("text", "text ASR"), ("pictures", "with pictures")):
        models = points[points["modality"] == modality]
        tuned = models[models["stage"] == "safety"].groupby("recipe")["asr"].mean() * 100
        adapted = 100 * models.loc[models["kind"] == "adapted", "asr"].mean()
        if len(tuned):
            parts.append(f"{style.change(name, adapted, tuned.min())} ({tuned.idxmin().removesuffix('-full')})")
    return f"The safest after tuning: {', '.join(parts)}"


def refusals(rates: pd.DataFrame, scale: str) -> Figure:
    """F06: refusal of harmless requests, a row of marks per model and a panel per kind of request, those in text first."""
    models = sorted(
        dict.fromkeys(zip(rates["stage"], rates["recipe"], strict=True)),
        key=lambda model: [tuning.kind(*model) != name for name in ("parent", "adapted")],
    )
    columns = {what: "\n".join(what.rsplit(" ", 1)) for _, _, what, _ in tuning.REFUSALS if what in set(rates["what"])}
    in_text = rates.loc[rates["modality"] == "text", "what"].nunique()
    caption = style.caption(
        rates, scale, "95 % intervals, clustered by what was asked", "refused, percent (← better)",
        f"the first {in_text} in text, the others with pictures", f"n ≥ {int(rates['n'].min())} a mark",
        style.judges(rates),
    )  # fmt: skip
    inches = 0.28 * len(models) + 0.5
    with style.panels(style.by_backbone(rates), columns, inches, _most_refused(rates), caption, sharex=True) as (figure, axes):
        for what, axis, rows in style.facets(axes, style.percent(rates), "what"):
            mean = rows.groupby(["stage", "recipe"])[["value", "low", "high"]].mean()
            for place, model in enumerate(models):
                if model in mean.index:
                    row, look = mean.loc[model], KINDS[tuning.kind(*model)]
                    axis.plot([row["low"], row["high"]], [place, place], color=look["color"], linewidth=0.9, alpha=0.6)
                    axis.plot(row["value"], place, markersize=4, linestyle="", **look)
            axis.set(xlim=(-6, 106), xticks=[0, 50, 100], ylim=(len(models) - 0.4, -0.6))
            axis.set_yticks(range(len(models)), [_name(*model) for model in models])
            axis.set_title(axis.get_title("left"), fontsize=6)
            axis.tick_params(labelleft=what == next(iter(columns)))
    return figure


def _most_refused(rates: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the tuned model that refuses most, averaged over kinds, and the adapted one."""
    mean = rates.groupby(["stage", "recipe"])["value"].mean() * 100
    tuned = mean[mean.index.get_level_values("stage") == "safety"]
    adapted = mean[[tuning.kind(*key) == "adapted" for key in mean.index]]
    parts = [f"{adapted.mean():.0f} % adapted"] if len(adapted) else []
    if len(tuned):
        parts.append(f"{tuned.min():.0f}–{tuned.max():.0f} % tuned (most: {tuned.idxmax()[1].removesuffix('-full')})")
    return f"Harmless requests refused{': ' * bool(parts)}{', '.join(parts)}"
