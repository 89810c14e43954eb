"""F07 to F11 as pictures: layers across, what happens in them upwards. Draws what `layers` and `interventions` have counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vlsafe.analysis.measures import MEASURES
from vlsafe.analysis.probing import last
from vlsafe.analysis.stats import wilson
from vlsafe.plots.style import LINES, STYLE, origin

MODALITIES = ("text", "picture", "typographic")
PROMPTS = {"harmful": dict(color="#D55E00", marker="s"), "benign": dict(color="#0072B2", marker="o")}
TASKS = {
    "vl": ("two batches of stage 2", dict(color="#E69F00", linestyle="--")),
    "safety": ("two batches of safety rows", dict(color="#0072B2", linestyle="--")),
    "both": ("one of each", dict(color="#000000", linestyle="-")),
}
PAIRS = {
    "sibling": ("safety from stage 1", "#0072B2"), "sl": ("safety SFT after it", "#D55E00"), "dpo": ("DPO after it", "#009E73"),
}  # fmt: skip
PAIRED = {"normal_normal": ("N–N", "#0072B2"), "normal_harmful": ("N–M", "#000000"), "harmful_harmful": ("M–M", "#D55E00")}
SHOWN = ("text_asr", "multimodal_asr", "twin_refusal", "helpfulness")


def similarity(lines: pd.DataFrame, scale: str) -> Figure:
    """F07: cosine of parent and adapted model in every layer, harmful and benign prompts, one panel per modality.

    `lines` is `layers.similarity`'s; solid lines are raw cosines, dashed ones centred over prompts. Several seeds are averaged,
    intervals too, and each seed is a thin line.
    """
    adapted = last(lines)
    raw = adapted[adapted["measure"].isin(["cosine", "cosine_centred"])]
    figure, axes = _grid(raw, MODALITIES, 2.3)
    with plt.style.context(STYLE):
        for backbone, row in zip(sorted(raw["backbone"].unique()), axes, strict=True):
            for group, axis in zip(MODALITIES, row, strict=True):
                for kind, look in PROMPTS.items():
                    for measure, style in (("cosine", "-"), ("cosine_centred", (0, (3, 2)))):
                        of = raw[(raw[["backbone", "group", "kind", "measure"]] == [backbone, group, kind, measure]).all(axis=1)]
                        _draw_line(axis, of, linestyle=style, **look)
                axis.set_title(f"{group} prompts", loc="left", fontsize=7)
            row[0].set_ylabel(f"{backbone}\ncosine (↓ moved further)")
        handles = [plt.Line2D([], [], markersize=3, label=kind, **look) for kind, look in PROMPTS.items()]
        handles += [
            plt.Line2D([], [], color="#777777", linestyle=s, label=n) for n, s in (("raw", "-"), ("centred", (0, (3, 2))))
        ]
        axes[0][1].legend(handles=handles, frameon=False, ncols=2, fontsize=6, loc="center right", bbox_to_anchor=(1, 0.55))
        for axis in axes[-1]:
            axis.set_xlabel("block")
        text = adapted[(adapted["group"] == "text") & (adapted["measure"] == "cosine")]
        mean = text.groupby(["kind", "layer"])["value"].mean()
        layer = int(mean["difference"].idxmin())
        apart = f"{mean['harmful'][layer]:.2f} against {mean['benign'][layer]:.2f}"
        told = f"In words, harmful prompts moved further than benign ones, most in block {layer}: {apart}"
        if mean["difference"].min() >= 0:
            told = (
                f"In words, harmful prompts moved no further than benign ones in any block; least apart in block {layer}: {apart}"
            )
        n = int(text.loc[text["kind"] != "difference", "n"].min())
        note = f"last position; n = {n} prompts a line and seed; 95 % intervals over "
        return _finish(
            figure,
            raw,
            scale,
            told,
            note + "verb–object pairs; pictures: the reference is the parent's language weights behind the same eyes",
        )


def along(lines: pd.DataFrame, scale: str) -> Figure:
    """F08: how much further harmful prompts have moved than benign ones, layer by checkpoint, one panel per modality.

    Values are differences of mean centred cosines, benign less harmful; where the interval excludes zero in every seed, a dot.
    """
    of = lines[(lines["stage"] == "instruct") & (lines["measure"] == "cosine_centred") & (lines["kind"] == "difference")]
    figure, axes = _grid(of, MODALITIES, 2.3)
    bound = max(0.01, float((-of.groupby(["backbone", "group", "layer", "step"])["value"].mean()).abs().max()))
    with plt.style.context(STYLE):
        for backbone, row in zip(sorted(of["backbone"].unique()), axes, strict=True):
            for group, axis in zip(MODALITIES, row, strict=True):
                part = of[(of["backbone"] == backbone) & (of["group"] == group)]
                shade = -part.pivot_table(index="layer", columns="step", values="value")
                clear = part.assign(clear=(part["low"] > 0) | (part["high"] < 0)).groupby(["layer", "step"])["clear"].all()
                image = axis.imshow(shade, origin="lower", aspect="auto", cmap="PuOr_r", vmin=-bound, vmax=bound)
                for (layer, step), sure in clear.items():
                    if sure:
                        axis.plot(list(shade.columns).index(step), layer, ".", color="black", markersize=2)
                axis.set_xticks(range(shade.shape[1]), shade.columns)
                axis.set_yticks(range(shade.shape[0]))
                axis.set_title(f"{group} prompts", loc="left", fontsize=7)
            row[0].set_ylabel(f"{backbone}\nblock")
        for axis in axes[-1]:
            axis.set_xlabel("step of stage 2")
        figure.colorbar(image, ax=axes, shrink=0.9, label="harmful moved further →").outline.set_visible(False)
        text = -of[of["group"] == "text"].groupby(["step", "layer"])["value"].mean().groupby("step").max()
        half = text.index[(text >= text.max() / 2).to_numpy()][0]
        told = f"In words, half of the gap between harmful and benign prompts is there by step {half}"
        note = "benign less harmful, centred cosine to the parent; dot: 95 % interval excludes zero in every seed"
        return _finish(figure, of, scale, told, note)


def localisation(curves: pd.DataFrame, scaling: pd.DataFrame, located: pd.DataFrame, scale: str) -> Figure:
    """F09: cosines of pairs of prompts in the parent with the angular gap, and refusals of harmless prompts under scaling.

    The search kept no single pairs, so the cosines have no interval; refusals have Wilson's. The bands are those tried with the
    last factor, the one that was used where a band was located.
    """
    units = list(located.groupby(["backbone", "seed"]).groups)
    with plt.style.context(STYLE):
        size = (7.0, 0.7 + 1.6 * len(units))
        figure, axes = plt.subplots(len(units), 3, figsize=size, squeeze=False, layout="constrained")
        for unit, row in zip(units, axes, strict=True):
            mine, tried, band = (
                frame[(frame[["backbone", "seed"]] == list(unit)).all(axis=1)] for frame in (curves, scaling, located)
            )
            for name, (label, colour) in PAIRED.items():
                row[0].plot(mine["layer"], mine[name], color=colour, marker="o", markersize=2, label=label)
            row[1].plot(mine["layer"], mine["gap"], color="#000000", marker="o", markersize=2)
            _draw_scaling(row[2], tried, int(band["prompts"].iloc[0]))
            for axis in row[:2]:
                axis.set_xticks(mine["layer"])
                if band["located"].iloc[0]:
                    axis.axvspan(*(band[["start", "end"]].iloc[0] - 0.5), color="#E69F00", alpha=0.2, linewidth=0)
            row[0].set_ylabel(f"{unit[0]}\nseed {unit[1]}")
        for axis, title in zip(axes[0], ("cosine of pairs", "angular gap, degrees", "harmless prompts refused, %"), strict=True):
            axis.set_title(title, loc="left", fontsize=7)
        for axis in axes[-1][:2]:
            axis.set_xlabel("block")
        axes[0][0].legend(frameon=False, fontsize=6, loc="center right")
        refused = scaling.groupby(["backbone", "seed"])["refusals"].max()
        n = located["prompts"].max()
        told = f"A safety band is located in {located['located'].sum()} of {len(located)} parents, by "
        told += f"{'–'.join(map(str, sorted({refused.min(), refused.max()})))} of {n} harmless prompts that are then refused"
        note = "N: harmless, M: harmful; shaded: located band; right: bands whose projections are multiplied, dotted: none is; "
        return _finish(figure, located, scale, told, note + "95 % intervals over prompts")


def _draw_scaling(axis: Any, tried: pd.DataFrame, n: int) -> None:
    """Refused harmless prompts, with each band scaled by the last factor that was tried."""
    of = tried[tried["factor"] == tried["factor"].iloc[-1]].drop_duplicates(["start", "end"]).sort_values(["start", "end"])
    share = (of["refusals"] / n).to_numpy()
    bars = 100 * np.abs(np.array([wilson(value, n) for value in share]).T - share)
    axis.errorbar(range(len(of)), 100 * share, bars, fmt="o", markersize=2, linewidth=0.7, color="#000000")
    names = [f"[{start}, {end})" for start, end in zip(of["start"], of["end"], strict=True)]
    axis.set_xticks(range(len(of)), names, rotation=90, fontsize=4)
    axis.axhline(100 * tried["refusals"].iloc[0] / n, color="#777777", linewidth=0.7, linestyle=":")


def transplants(lines: pd.DataFrame, scale: str) -> Figure:
    """F10: the parent's blocks in the adapted model, by start and width of the band; random sets of as many blocks beside.

    `lines` is `interventions.transplants`'s. Several seeds are averaged, intervals too. Starts that are located bands are filled.
    """
    of = lines[lines["kind"].isin(["band", "random"]) & lines["measure"].isin(SHOWN)]
    backbones, widths = sorted(of["backbone"].unique()), sorted(of["width"].unique())[:4]
    with plt.style.context(STYLE):
        size = (7.0, 0.8 + 3.6 * len(backbones))
        figure, axes = plt.subplots(
            len(SHOWN) * len(backbones), len(widths), figsize=size, squeeze=False, sharey="row", layout="constrained"
        )
        for place, row in enumerate(axes):
            backbone, measure = backbones[place // len(SHOWN)], SHOWN[place % len(SHOWN)]
            mine = lines[(lines["backbone"] == backbone) & (lines["measure"] == measure)]
            for width, axis in zip(widths, row, strict=True):
                _draw_patches(axis, mine, width, LINES[measure]["color"])
                if place == 0:
                    axis.set_title(f"{width} block{'s' if width > 1 else ''}", loc="left", fontsize=7)
                axis.tick_params(labelbottom=place == len(axes) - 1)
            row[0].set_ylabel(MEASURES[measure]["label"].replace("refusal of benign picture twins", "twin refusal"), fontsize=6)
        for axis in axes[-1]:
            axis.set_xlabel("first block")
        band = of[(of["kind"] == "band") & (of["measure"] == "text_asr")].groupby(["width", "start"])["value"].mean()
        best = band.idxmin()
        adapted = (of["value"] - of["change"])[of["measure"] == "text_asr"].mean()
        fall = f"{100 * adapted:.0f} to {100 * band.min():.0f} %"
        told = f"The parent's blocks [{int(best[1])}, {int(best[1] + best[0])}) take text ASR from {fall}" + _beaten(of, *best)
        note = "percent; circles: bands, bars: 95 % intervals over verb–object pairs; crosses: random sets of as many blocks; filled: located "
        return _finish(figure, of, scale, told, note + "band\ndotted: adapted model; dashed: the parent behind the same eyes")


def _beaten(lines: pd.DataFrame, width: int, start: int) -> str:
    """How many random sets lower text ASR as far as a band, in words; over all studies."""
    of = lines[(lines["measure"] == "text_asr") & (lines["width"] == width)].set_index(["backbone", "seed"])
    band, others = of.loc[(of["kind"] == "band") & (of["start"] == start), "value"], of.loc[of["kind"] == "random", "value"]
    if others.empty:
        return ""
    return f"; {int((others <= band.reindex(others.index)).sum())} of {len(others)} random sets do as well"


def _draw_patches(axis: Any, lines: pd.DataFrame, width: int, colour: str) -> None:
    of = lines[lines["width"] == width]
    bands = of[of["kind"] == "band"].groupby("start").agg(
        value=("value", "mean"), low=("low", "mean"), high=("high", "mean"), located=("located", "any")
    ) * [100, 100, 100, 1]  # fmt: skip
    others = 100 * of[of["kind"] == "random"].groupby("patch")["value"].mean()
    axis.vlines(bands.index, bands["low"], bands["high"], color=colour, linewidth=0.8, alpha=0.6)
    axis.plot(bands.index, bands["value"], "o", color=colour, markersize=3.5, markerfacecolor="white")
    marked = bands[bands["located"].astype(bool)]
    axis.plot(marked.index, marked["value"], "o", color=colour, markersize=3.5)
    if len(others):
        spot = bands.index.max() + 1.6
        axis.plot(spot + np.linspace(-0.35, 0.35, len(others)), others, "x", color="#777777", markersize=2.5, markeredgewidth=0.6)
        axis.axvline(spot - 0.8, color="#CCCCCC", linewidth=0.5)
    for kind, style in (("all", (0, (4, 2))), ("band", ":")):
        height = lines[lines["kind"] == kind]
        level = height["value"].mean() if kind == "all" else (height["value"] - height["change"]).mean()
        axis.axhline(100 * level, color="#777777", linewidth=0.7, linestyle=style)
    axis.set_xticks(
        [*bands.index, *([spot] if len(others) else [])], [*map(int, bands.index), *(["random"] if len(others) else [])]
    )


def objectives(vectors: pd.DataFrame, gradients: pd.DataFrame, scale: str) -> Figure:
    """F11: do safety and stage 2 want the same? Task vectors left, gradients at points of the training right.

    `vectors` and `gradients` are `layers`' tables; several seeds are averaged, intervals too.
    """
    steps = sorted(gradients["step"].unique())
    figure, axes = _grid(gradients, ["task vectors", *steps], 2.1)
    with plt.style.context(STYLE):
        for backbone, row in zip(sorted(gradients["backbone"].unique()), axes, strict=True):
            mine = vectors[vectors["backbone"] == backbone]
            chance = mine["chance"].mean()
            row[0].axhspan(-chance, chance, color="#DDDDDD", linewidth=0)
            for pair, (label, colour) in PAIRS.items():
                _draw_line(row[0], mine[mine["pair"] == pair], color=colour, marker="o", label=label)
            for step, axis in zip(steps, row[1:], strict=True):
                for kind, (label, look) in TASKS.items():
                    of = (gradients["backbone"] == backbone) & (gradients["step"] == step) & (gradients["kind"] == kind)
                    _draw_line(axis, gradients[of], label=label, **look)
                axis.set_title(f"gradients, step {step}", loc="left", fontsize=7)
                axis.set_ylim(-0.3, 1.05)
            row[0].set_title("task vectors", loc="left", fontsize=7)
            row[0].set_ylabel(f"{backbone}\ncosine")
        handles = [handle for axis in axes[0][:2] for handle in axis.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=6)
        for axis in axes.flat:
            axis.axhline(0, color="#777777", linewidth=0.5)
        both = gradients[gradients["kind"] == "both"]
        reach = f"cosine {both['value'].min():+.2f} to {both['value'].max():+.2f}"
        near = ", near a right angle" if both["value"].abs().max() < 0.2 else ""
        told = f"Gradients of stage 2 and of safety rows: {reach}{near}"
        note = "grey: what random vectors reach; two batches of one task: what noise leaves of 1; 95 % intervals over batches"
        return _finish(figure, gradients, scale, told, note)


def _grid(frame: pd.DataFrame, columns: Sequence[Any], height: float) -> tuple[Figure, np.ndarray]:
    """Panels, a row per backbone; one column's figure is 7 inches wide."""
    rows = frame["backbone"].nunique()
    with plt.style.context(STYLE):
        return plt.subplots(rows, len(columns), figsize=(7.0, 0.7 + height * rows), squeeze=False, layout="constrained",
                            sharey=False)  # fmt: skip


def _draw_line(axis: Any, lines: pd.DataFrame, **look: Any) -> None:
    """Mean over seeds by layer with the interval (mean too), and each seed as a thin line where there are several."""
    by = lines.groupby("layer")
    mean = by["value"].mean()
    if {"low", "high"} <= set(lines):
        axis.fill_between(mean.index, by["low"].mean(), by["high"].mean(), color=look["color"], alpha=0.15, linewidth=0)
    if lines["seed"].nunique() > 1:
        for _, of in lines.groupby("seed"):
            axis.plot(of["layer"], of["value"], color=look["color"], linewidth=0.4, alpha=0.5)
    axis.plot(mean.index, mean, markersize=2.5, linewidth=1.2, **look)
    axis.set_xticks(mean.index)


def _finish(figure: Figure, frame: pd.DataFrame, scale: str, told: str, note: str) -> Figure:
    """Takeaway above, condition below."""
    figure.suptitle(told, x=0.01, ha="left", fontsize=9, fontweight="bold")
    seeds = ", ".join(str(seed) for seed in sorted(frame["seed"].unique()))
    several = "means over seeds; " if frame["seed"].nunique() > 1 else ""
    caption = f"{origin(scale)}, seeds {seeds}; {several}{note}"
    figure.supxlabel(caption, x=0.01, ha="left", ma="left", fontsize=5.5, color="#555555", wrap=True)
    plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure
