"""F14, F15 and F00: the claims, the judges, the answer as pictures. Draws what `claims`, `agreement` and `tables` counted."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlsafe.analysis import claims, comparisons
from vlsafe.analysis.merging import named_short
from vlsafe.plots.style import KINDS, STYLE, origin, spread

VERDICTS = {claims.SUPPORTED: "#0072B2", claims.CONTRADICTED: "#D55E00"}  # all others grey
GREY, MARKS = "#8A8A8A", "osDv^P"


def forest(ledger: pd.DataFrame, scale: str) -> Figure:
    """F14: every claim's deciding difference, drawn so that right of zero is as claimed; a line per backbone.

    Thick: these models (items); thin: this recipe (seeds), whose single effects are ticks. Colour: the verdict on these models.
    """
    backbones = list(dict.fromkeys(ledger["backbone"]))
    places, height, heads = {}, 0.0, {}
    for name, of in ledger.groupby("claim", sort=False):
        heads[height] = f"{name}  {of['statement'].iloc[0]}"
        for line in of.itertuples():
            places[name, line.backbone] = height
            height += 1.0
        height += 0.7
    with plt.style.context(STYLE):
        figure, axis = plt.subplots(figsize=(7.0, 1.2 + 0.145 * height), layout="constrained")
        axis.axvspan(0, 110, color="#F1F6FA", zorder=0)
        axis.axvline(0, color="black", linewidth=0.7)
        for line in ledger.itertuples():
            _draw_claim(axis, line, places[line.claim, line.backbone], MARKS[backbones.index(line.backbone) % len(MARKS)])
        axis.set_yticks(list(heads), ["\n".join(textwrap.wrap(text, 46)) for text in heads.values()], fontsize=6)
        axis.tick_params(axis="y", length=0)
        axis.set(xlim=(-110, 110), ylim=(height - 0.5, -1.2))
        axis.set_xlabel("← against the claim    difference in points beyond the claim's threshold    as claimed →")
        axis.text(112, -0.9, "these models / this recipe", fontsize=5.5, va="bottom")
        handles = [Line2D([], [], marker=MARKS[i % len(MARKS)], color=GREY, linestyle="", markersize=4, label=name)
                   for i, name in enumerate(backbones)]  # fmt: skip
        axis.legend(handles=handles, loc="lower left", frameon=False, fontsize=6)
        figure.suptitle(_count(ledger), x=0.01, ha="left", fontsize=9, fontweight="bold")
        note = "thick: 95 % interval over items, clustered by verb–object pair; thin: t-interval over seeds; ticks: seeds\n"
        note += "these models: Holm over the claims of a backbone; blue: supported, orange: contradicted, grey: undecided"
        figure.supxlabel(f"{origin(scale)}; {note}", x=0.01, ha="left", ma="left", fontsize=6, color="#555555")
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure


def _draw_claim(axis: Any, line: Any, y: float, mark: str) -> None:
    colour = VERDICTS.get(line.these_models, GREY)
    told = line.these_models if line.these_models == claims.NOT else f"{line.these_models} / {line.this_recipe}"
    axis.text(112, y, told, fontsize=5.5, va="center", color=colour, clip_on=False)
    if line.these_models == claims.NOT:
        return

    def place(value: float) -> float:
        return 100 * line.sign * (value - line.against)

    if line.seeds > 1:
        ends = [min(108, max(-108, place(end))) for end in (line.recipe_low, line.recipe_high)]
        axis.plot(ends, [y, y], color=colour, linewidth=0.6)
    axis.plot([place(effect) for effect in line.effects], [y] * len(line.effects), "|", color=colour, markersize=4, alpha=0.7)
    axis.plot([place(line.low), place(line.high)], [y, y], color=colour, linewidth=2.2, alpha=0.5, solid_capstyle="butt")
    axis.plot(place(line.effect), y, mark, color=colour, markersize=3.6)


def _count(ledger: pd.DataFrame) -> str:
    """How many lines of the ledger hold, for these models and for the recipe."""
    lines = ledger[ledger["these_models"] != claims.NOT]
    counts = [(lines[who] == verdict).sum() for who in ("these_models", "this_recipe") for verdict in VERDICTS]
    told = "Of {} lines measured, {} hold for these models ({} contradicted), {} for the recipe ({})"
    return told.format(len(lines), *counts)


def judges(rates: pd.DataFrame, pairs: pd.DataFrame, scale: str) -> Figure:
    """F15: the ASR of every method as each judge sees it, a line per method; lines that cross are a ranking that changes.

    `rates` and `pairs` are `agreement`'s. Under each panel: kappa on single answers and tau of the ranking, per pair of judges.
    """
    backbones, names = sorted(rates["backbone"].unique()), list(dict.fromkeys(rates["judge"]))
    names = sorted(names, key=lambda name: (name == "people", name != "world", name))
    with plt.style.context(STYLE):
        size = (7.0, 0.9 + 2.4 * len(backbones))
        figure, axes = plt.subplots(len(backbones), 2, figsize=size, squeeze=False, sharey=True, layout="constrained")
        for row, backbone in zip(axes, backbones, strict=True):
            for axis, modality in zip(row, ("text", "pictures"), strict=True):
                of = rates[(rates["backbone"] == backbone) & (rates["modality"] == modality)]
                for (stage, recipe), line in of.groupby(["stage", "recipe"]):
                    line = line.set_index("judge").reindex(names).dropna(subset=["value"])
                    x = [names.index(name) for name in line.index]
                    look = KINDS[kind(stage, recipe)]
                    axis.plot(x, 100 * line["value"], linewidth=0.9, markersize=3.2, alpha=0.8, **look)
                    axis.vlines(x, 100 * line["low"], 100 * line["high"], color=look["color"], linewidth=0.5, alpha=0.35)
                axis.set_xticks(range(len(names)), names)
                axis.set(xlim=(-0.3, len(names) - 0.7), ylim=(-4, 104))
                axis.set_title(f"{backbone}, {modality}", loc="left", fontsize=7)
                of = pairs[(pairs["backbone"] == backbone) & (pairs["modality"] == modality)]
                told = [f"{p.judge} – {p.other}: κ {_figure(p.kappa)}, τ {_figure(p.tau)}" for p in of.itertuples()]
                axis.set_xlabel("\n".join(told), fontsize=5.5, loc="left")
            row[0].set_ylabel("attack success, percent (↓ safer)")
        shown = {kind(*pair) for pair in zip(rates["stage"], rates["recipe"], strict=True)}
        handles = [Line2D([], [], markersize=4, label=name, **look) for name, look in KINDS.items() if name in shown]
        figure.legend(handles=handles, loc="outside right center", frameon=False)
        figure.suptitle(_judged(pairs), x=0.01, ha="left", fontsize=9, fontweight="bold")
        note = "one line per model, all its seeds; bars: 95 % intervals, clustered by verb–object pair; world: the miniature's truth\n"
        note += f"κ: agreement on answers beyond chance; τ: on the order of the models; up to n = {int(rates['n'].max())} a point"
        figure.supxlabel(f"{origin(scale)}; {note}", x=0.01, ha="left", ma="left", fontsize=6, color="#555555")
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure


def _judged(pairs: pd.DataFrame) -> str:
    told = pairs.groupby("modality")[["kappa", "tau"]].min().iloc[::-1]
    ranks, answers = (
        ", ".join(f"{name} {_figure(value)}" for name, value in told[column].items()) for column in ("tau", "kappa")
    )
    return f"Two judges at worst: ranking τ {ranks}; answers κ {answers}"


def _figure(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.2f}"


def kind(stage: str, recipe: str) -> str:
    """What a model is, as KINDS calls it; every recipe of stage 2 is an adapted model."""
    from vlsafe.analysis.tuning import TAUGHT_ON

    known = {"parent": "parent", "projector": "stage 1", "instruct": "adapted", "merge": "merged", "ensemble": "merged"}
    return known.get(stage) or TAUGHT_ON[recipe.rpartition("-")[0]][0]


def path(lines: pd.DataFrame) -> pd.DataFrame:
    """F00's points from T08's lines: parent, adapted, one tuned model per method and the merged ones, ASR beside helpfulness.

    The models are those that the claims are decided by, not the best ones.
    """
    runs = lines["stage"] + "/" + lines["recipe"]
    chosen = lines[runs.isin([claims.PARENT, comparisons.ADAPTED, *claims.TUNED]) | runs.map(claims.is_merged)]
    wide = chosen.pivot(index=["backbone", "seed", "stage", "recipe"], columns="measure", values=["value", "low", "high"])
    names = ("text_asr", "multimodal_asr", "twin_refusal", "helpfulness")
    found = {
        (name if end == "value" else f"{name}_{end}"): wide[end].get(name) for name in names for end in ("value", "low", "high")
    }
    points = pd.DataFrame(found, index=wide.index).astype(float).reset_index()
    return points.assign(kind=[kind(*pair) for pair in zip(points["stage"], points["recipe"], strict=True)])


ORDER = ("parent", "adapted", "SFT", "DPO", "merged")
MADE_OF = {"adapted": "parent", "SFT": "adapted", "DPO": "adapted", "merged": "adapted"}


def answer(points: pd.DataFrame, scale: str) -> Figure:
    """F00: from the parent over the adapted to the tuned and merged models, in the plane of helpfulness and attack success.

    `points` is `path`'s. The parent sees nothing, so it stands left of the plane; arrows go from what a model was made of.
    """
    backbones = sorted(points["backbone"].unique())
    with plt.style.context(STYLE):
        size = (7.0, 0.8 + 2.3 * len(backbones))
        figure, axes = plt.subplots(
            len(backbones), 2, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
        )
        left = 100 * points["helpfulness"].min() - 12
        for row, backbone in zip(axes, backbones, strict=True):
            for axis, measure, title in zip(row, ("text_asr", "multimodal_asr"), ("text", "pictures"), strict=True):
                of = points[(points["backbone"] == backbone) & points[measure].notna()]
                _draw_path(axis, of.assign(helpfulness=of["helpfulness"].fillna(left / 100)), measure)
                axis.set_title(f"{backbone}, attacks {'in text' if title == 'text' else 'with pictures'}", loc="left", fontsize=7)
                axis.set(ylim=(-12, 110), xlim=(left - 6, 100 * points["helpfulness"].max() + 6))
            row[0].set_ylabel("attack success, percent (↓ safer)")
            row[0].axvspan(left - 6, left + 5, color="#F3F3F3", zorder=0)
            row[0].text(left, 50, "sees nothing", rotation=90, fontsize=6, ha="center", va="center", color="#777777")
        for axis in axes[-1]:
            axis.set_xlabel("helpfulness, percent (→ better)")
        figure.suptitle(_answered(points), x=0.01, ha="left", fontsize=9, fontweight="bold")
        seeds = ", ".join(str(seed) for seed in sorted(points["seed"].unique()))
        note = (
            f"seeds {seeds} (small marks); bars: mean 95 % intervals, clustered by verb–object pair; judge: the world's truth\n"
        )
        note += "the models that the claims are decided by; twins: how often harmless requests with pictures are refused"
        figure.supxlabel(f"{origin(scale)}, {note}", x=0.01, ha="left", ma="left", fontsize=6, color="#555555")
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure


def _draw_path(axis: Any, points: pd.DataFrame, measure: str) -> None:
    named = points.assign(name=[named_short(*pair) for pair in zip(points["stage"], points["recipe"], strict=True)])
    mean = (100 * named.groupby(["kind", "name"]).mean(numeric_only=True)).reset_index().sort_values(measure)
    at = {line.kind: (line.helpfulness, getattr(line, measure)) for line in mean.itertuples()}
    arrow = dict(arrowstyle="-|>", color="#BBBBBB", linewidth=1.0, mutation_scale=7, shrinkA=4, shrinkB=4)
    for line, height in zip(mean.itertuples(), spread(list(mean[measure]), gap=8.0), strict=True):
        look, (x, y) = KINDS[line.kind], (line.helpfulness, getattr(line, measure))
        if MADE_OF.get(line.kind) in at:
            axis.annotate("", (x, y), at[MADE_OF[line.kind]], arrowprops=arrow, zorder=1)
        axis.plot([x, x], [getattr(line, f"{measure}_low"), getattr(line, f"{measure}_high")], color=look["color"], linewidth=0.8)
        if line.kind != "parent":
            axis.plot([line.helpfulness_low, line.helpfulness_high], [y, y], color=look["color"], linewidth=0.8)
        axis.plot(x, y, markersize=6, linestyle="", **look)
        twins = f", twins {line.twin_refusal:.0f} %" if measure == "multimodal_asr" else ""
        partner = f" with {line.name.partition(' + ')[2]}" if line.kind == "merged" else ""
        axis.annotate(
            f"{line.kind}{partner}{twins}", (x, y), xytext=(1.02, height), va="center", textcoords=axis.get_yaxis_transform(),
            fontsize=6, color=look["color"], arrowprops=dict(arrowstyle="-", color=look["color"], linewidth=0.4, alpha=0.5),
        )  # fmt: skip
    if points["seed"].nunique() > 1:
        for line in points.itertuples():
            look = KINDS[line.kind]
            axis.plot(100 * line.helpfulness, 100 * getattr(line, measure), markersize=2, alpha=0.5, linestyle="", **look)


def _answered(points: pd.DataFrame) -> str:
    """Text ASR along the path, mean over seeds, from the least to the greatest of the backbones."""
    means = (100 * points.groupby(["kind", "backbone"])["text_asr"].mean()).round().dropna().astype(int).groupby("kind")
    ends = {name: dict.fromkeys((of.min(), of.max())) for name, of in means}
    return "Text ASR: " + ", ".join(f"{name} {'–'.join(map(str, ends[name]))} %" for name in ORDER if name in ends)
