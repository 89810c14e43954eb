"""F07 to F11: layers across, what happens in them upwards. Draws the tables of `analysis.probing` and `analysis.causal`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis.measures import MEASURES
from vlsafe.analysis.probing import last
from vlsafe.analysis.stats import wilson
from vlsafe.plots import style
from vlsafe.plots.style import LINES

MODALITIES = {group: f"{group} prompts" for group in ("text", "picture", "typographic")}
COSINES: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("raw", dict(color="#777777", marker="o", linestyle="-")),
    "cosine_centred": ("centred", dict(color="#D55E00", marker="s", linestyle="--")),
}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vl": ("two batches of stage 2", dict(color="#E69F00", linestyle="--")),
    "safety": ("two batches of safety rows", dict(color="#0072B2", linestyle="--")),
    "both": ("one of each", dict(color="#000000", linestyle="-")),
}
VECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "sibling": ("safety from stage 1", dict(color="#0072B2", marker="o")),
    "sl": ("safety SFT after it", dict(color="#D55E00", marker="o")),
    "dpo": ("DPO after it", dict(color="#009E73", marker="o")),
}
PAIRED = {"normal_normal": ("N–N", "#0072B2"), "normal_harmful": ("N–M", "#000000"), "harmful_harmful": ("M–M", "#D55E00")}
SHOWN = ("text_asr", "multimodal_asr")  # in F10; its CSV has three more


def _caption(frame: pd.DataFrame, scale: str, *notes: str) -> str:
    return style.caption(frame, scale, "means over seeds" if style.several_seeds(frame) else "", *notes)


def _modalities(lines: pd.DataFrame) -> dict[str, str]:
    return {group: title for group, title in MODALITIES.items() if group in set(lines["group"])}


def similarity(lines: pd.DataFrame, scale: str) -> Figure:
    """F07: by how much less alike parent and adapted model are on harmful than on benign prompts, in every layer, one panel per
    modality; solid: raw cosines, dashed: centred over prompts."""
    adapted = last(lines)
    drawn = adapted[adapted["measure"].isin(list(COSINES)) & (adapted["kind"] == "difference")]
    text = adapted[(adapted["group"] == "text") & (adapted["measure"] == "cosine")]
    n = int(text.loc[text["kind"] != "difference", "n"].min())
    caption = _caption(
        drawn, scale, "title: centred cosine", "thin: single seeds" * style.several_seeds(drawn), "last position",
        f"n = {n} prompts of each kind and seed", "95 % intervals over what was asked",
        "pictures: the reference is the parent's language weights with the adapted vision tower and projector",
    )  # fmt: skip
    rows = style.by_backbone(drawn, "cosine, harmful − benign\n(↓ harmful moved further)")
    keys = style.handles(dict(COSINES.values()), linestyle="-", markersize=3)
    centred = drawn[(drawn["group"] == "text") & (drawn["measure"] == "cosine_centred")]
    with style.panels(rows, _modalities(drawn), 2.0, _moved_further(centred), caption, "block", keys, sharey="row") as (
        figure,
        axes,
    ):
        for (backbone, group, measure), line in drawn.groupby(["backbone", "group", "measure"]):
            if group in MODALITIES:
                style.draw_line(axes[backbone, group], line, "layer", **COSINES[measure][1])
        for axis in axes.values():
            axis.axhline(0, color="black", linewidth=0.6)
            _number(axis.xaxis, drawn["layer"])
    return figure


def _number(axis: Any, blocks: pd.Series) -> None:
    """Ticks at the blocks, of more than twelve at every second or third."""
    axis.set_ticks(sorted(blocks.unique())[:: 1 + blocks.nunique() // 13])


def _moved_further(text: pd.DataFrame) -> str:
    mean = text.groupby("layer").agg(value=("value", "mean"), high=("high", "max"))
    clear = mean[mean["high"] < 0]
    if clear.empty:
        return "On text (centred), harmful prompts moved clearly further than benign ones in no block"
    most = f"most in block {int(clear['value'].idxmin())} ({clear['value'].min():+.3f})"
    where = f"{len(clear)} of {len(mean)} blocks"
    return f"On text (centred), harmful prompts moved clearly further than benign ones in {where}, {most}"


def similarity_over_steps(lines: pd.DataFrame, scale: str) -> Figure:
    """F08: how much further harmful prompts have moved than benign ones, layer by checkpoint, one panel per modality.

    Values are differences of mean centred cosines, harmful less benign, as in F07; where the interval excludes zero in every
    seed, a dot.
    """
    gap = lines[(lines["stage"] == "instruct") & (lines["measure"] == "cosine_centred") & (lines["kind"] == "difference")]
    gap = gap.assign(clear=(gap["low"] > 0) | (gap["high"] < 0))
    bound = max(0.01, float(gap.groupby(["backbone", "group", "layer", "step"])["value"].mean().abs().max()))
    text = gap[gap["group"] == "text"]
    largest = text.assign(value=text["value"].abs()).groupby(["backbone", "seed", "step"])["value"].max().unstack()
    half = largest.ge(largest.max(axis=1) / 2, axis=0).idxmax(axis=1)
    by = "–".join(str(step) for step in sorted({half.min(), half.max()}))
    ends = text.loc[text.groupby(["backbone", "seed"])["value"].agg(lambda of: of.abs().idxmax()), "value"]
    further = "harmful moved further" if (ends < 0).all() else "benign moved further" if (ends > 0).all() else "to either side"
    several = " in every seed" * style.several_seeds(gap)
    dots = text.groupby(["backbone", "layer", "step"])["clear"].all().groupby("backbone").agg(["sum", "size"])
    many = "–".join(str(n) for n in sorted({dots["sum"].min(), dots["sum"].max()}))
    title = f"Cells in which harmful and benign text prompts moved differently{several}: {many} of {dots['size'].max()}"
    opened = bool(dots["sum"].min())
    title += f"; {further}, half of the largest gap by step {by}" if opened else ""
    note = f"harmful − benign, centred cosine to the parent; dot: 95 % interval excludes zero{several}"
    rows, caption = style.by_backbone(gap, "block"), _caption(gap, scale, note, "largest over blocks in each study" * opened)
    with style.panels(rows, _modalities(gap), 2.2, title, caption, "step of stage 2") as (figure, axes):
        for _, axis, cells in style.facets(axes, gap, "group"):
            shade = cells.pivot_table(index="layer", columns="step", values="value")
            clear = cells.pivot_table(index="layer", columns="step", values="clear", aggfunc="all").to_numpy(bool)
            image = axis.imshow(shade, origin="lower", aspect="auto", cmap="PuOr", vmin=-bound, vmax=bound)
            axis.plot(*np.nonzero(clear)[::-1], ".", color="black", markersize=2)
            axis.set_xticks(range(shade.shape[1]), shade.columns)
            _number(axis.yaxis, cells["layer"])
        figure.colorbar(
            image, ax=figure.axes, shrink=0.9, label="← harmful moved further   benign moved further →"
        ).outline.set_visible(False)
    return figure


def localisation(curves: pd.DataFrame, scaling: pd.DataFrame, located: pd.DataFrame, scale: str) -> Figure:
    """F09: cosines of pairs of prompts in the parents of each backbone with the angular gap, and refusals of harmless prompts
    with the best band scaled and with none.

    The search kept no single pairs, so the cosines have no interval; refusals have Wilson's. The bands are those tried with the
    last factor, the one that was used where a band was located.
    """
    by = scaling.groupby(["backbone", "seed"])["refusals"]
    more = (100 * (by.max() - by.first()) / located.set_index(["backbone", "seed"])["prompts"]).round().astype(int)
    many = "–".join(map(str, sorted({more.min(), more.max()})))
    title = f"Scaling the best band makes parents refuse {many} points more of {located['prompts'].max()} harmless prompts"
    chance = located["p"].dropna()
    title += f"; beyond chance (p < .05) in {(chance < 0.05).sum()} of {len(chance)} parents" if len(chance) else ""
    note = "N: harmless, M: harmful; shaded: located band; right: its blocks [start, end) with their projections multiplied "
    note += "(hollow: as they are); thin: single parents; "
    rows = {name: str(name) for name in located["backbone"].unique()}
    columns = {"pairs": "cosine of pairs", "gap": "angular gap, degrees", "refused": "harmless prompts refused, %"}
    note += "p: of the best of all scaled bands against none, signs of clusters flipped; "
    caption = _caption(located, scale, note + "95 % intervals as if prompts, wordings of fewer requests, were independent")
    with style.panels(rows, columns, 1.6, title, caption) as (figure, axes):
        for name in rows:
            curve, scaled, bands = (frame[frame["backbone"] == name] for frame in (curves, scaling, located))
            for values, (label, colour) in PAIRED.items():
                _draw_curves(axes[name, "pairs"], curve, values, colour, label)
            _draw_curves(axes[name, "gap"], curve, "gap", "#000000")
            for axis in (axes[name, "pairs"], axes[name, "gap"]):
                _number(axis.xaxis, curve["layer"])
                for band in bands[bands["located"]].itertuples():
                    span, alpha = (band.start - 0.5, band.end - 0.5), 0.2 / len(bands) ** 0.5
                    axis.axvspan(*span, color="#E69F00", alpha=alpha, linewidth=0)
            _draw_located(axes[name, "refused"], scaled, bands)
        axes[name, "pairs"].set_xlabel("block")
        axes[name, "gap"].set_xlabel("block")
        axes[next(iter(rows)), "pairs"].legend(loc="best")
    return figure


def _draw_curves(axis: Any, curve: pd.DataFrame, values: str, colour: str, label: str = "") -> None:
    """The mean over parents by block, and where there are several each of them."""
    mean, seeds = curve.groupby("layer")[values].mean(), curve.groupby("seed")
    axis.plot(mean.index, mean, color=colour, marker="o", markersize=2, label=label)
    for _, own in seeds if len(seeds) > 1 else ():
        axis.plot(own["layer"], own[values], color=colour, linewidth=0.4, alpha=0.5)


def _draw_located(axis: Any, scaled: pd.DataFrame, bands: pd.DataFrame) -> None:
    """Harmless prompts that each parent refuses, with the located band scaled and with none; a line per seed."""
    labels = []
    for place, band in enumerate(bands.sort_values("seed").itertuples()):
        own = scaled[scaled["seed"] == band.seed]
        last = own[own["factor"] == own["factor"].iloc[-1]]
        best = last[(last["start"] == band.start) & (last["end"] == band.end)]["refusals"]
        shares = [own["refusals"].iloc[0] / band.prompts, *best.iloc[:1] / band.prompts]
        for share, filled in zip(shares, (False, True), strict=False):
            low, high = wilson(share, band.prompts)
            fill = dict(markerfacecolor="#E69F00" if filled else "white", markeredgecolor="#000000", markeredgewidth=0.6)
            bars, y = [[100 * (share - low)], [100 * (high - share)]], place + (0.13 if filled else -0.13)
            axis.errorbar(100 * share, y, xerr=bars, fmt="o", markersize=3, linewidth=0.6, color="#000000", **fill)
        labels.append(f"seed {band.seed}, [{band.start}, {band.end})")
    axis.set_yticks(range(len(labels)), labels, fontsize=5)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def transplants(lines: pd.DataFrame, scale: str) -> Figure:
    """F10: the parent's blocks in the adapted model, by start and width of the band; random sets of as many blocks beside."""
    drawn = lines[lines["kind"].isin(["band", "random"]) & lines["measure"].isin(SHOWN)]
    studies = drawn.groupby("width")[["backbone", "seed"]].apply(lambda of: len(of.drop_duplicates()))
    drawn = drawn[drawn["width"].isin(studies.index[studies == studies.max()])]  # a located band may have a width of its own
    note = "percent; circles: bands, bars: 95 % intervals over what was asked; crosses: random sets of as many blocks; "
    note += "filled: located band; dotted: adapted model; dashed: the parent with the adapted vision tower and projector"
    rows = {
        (name, measure): f"{name}\n{MEASURES[measure]['label']}"
        for name in style.by_backbone(drawn)
        for measure in SHOWN
        if measure in set(drawn["measure"])
    }
    columns = {width: f"{width} block{'s' if width > 1 else ''}" for width in sorted(drawn["width"].unique())}
    caption = _caption(drawn, scale, note)
    with style.panels(rows, columns, 1.1, _best_band(drawn), caption, "first block", sharey="row") as (figure, axes):
        for ((backbone, measure), width), axis in axes.items():
            own = style.percent(lines[(lines["backbone"] == backbone) & (lines["measure"] == measure)])
            _draw_patches(axis, own, width, LINES[measure]["color"])
            axis.tick_params(labelbottom=(backbone, measure) == list(rows)[-1])
            axis.yaxis.label.set_fontsize(6)
    return figure


def _best_band(lines: pd.DataFrame) -> str:
    """The band that lowers text ASR most, and how many random sets of as many blocks lower it as far, over all studies."""
    text = lines[lines["measure"] == "text_asr"]
    if text.empty:
        return "The parent's blocks in the adapted model"
    bands = text[text["kind"] == "band"].groupby(["width", "start"])["value"].mean()
    width, start = bands.idxmin()
    fall = f"{100 * (text['value'] - text['change']).mean():.0f} to {100 * bands.min():.0f} %"
    title = f"The parent's blocks [{int(start)}, {int(start + width)}) take text ASR from {fall}"
    same = text[text["width"] == width].set_index(["backbone", "seed"])
    band = same.loc[(same["kind"] == "band") & (same["start"] == start), "value"]
    others = same.loc[same["kind"] == "random", "value"]
    if others.empty:
        return title
    return f"{title}; {int((others <= band.reindex(others.index)).sum())} of {len(others)} random sets do as well"


def _draw_patches(axis: Any, lines: pd.DataFrame, width: int, colour: str) -> None:
    rows = lines[lines["width"] == width]
    bands = rows[rows["kind"] == "band"].groupby("start").agg({"value": "mean", "low": "mean", "high": "mean", "located": "any"})
    others = rows[rows["kind"] == "random"].groupby("patch")["value"].mean()
    axis.vlines(bands.index, bands["low"], bands["high"], color=colour, linewidth=0.8, alpha=0.6)
    axis.plot(bands.index, bands["value"], "o", color=colour, markersize=3.5, markerfacecolor="white")
    located = bands[bands["located"].astype(bool)]
    axis.plot(located.index, located["value"], "o", color=colour, markersize=3.5)
    ticks = {start: f"{start:.0f}" for start in bands.index}
    if len(others):
        right = bands.index.max() + 1.6
        places = right + np.linspace(-0.35, 0.35, len(others))
        axis.plot(places, others, "x", color="#777777", markersize=2.5, markeredgewidth=0.6)
        axis.axvline(right - 0.8, color="#CCCCCC", linewidth=0.5)
        ticks[right] = "random"
    adapted = (lines["value"] - lines["change"])[lines["kind"] == "band"].mean()
    for level, dashes in ((lines.loc[lines["kind"] == "all", "value"].mean(), (0, (4, 2))), (adapted, ":")):
        axis.axhline(level, color="#777777", linewidth=0.7, linestyle=dashes)
    axis.set_xticks(list(ticks), list(ticks.values()))


def objectives(vectors: pd.DataFrame, gradients: pd.DataFrame, scale: str) -> Figure:
    """F11: do safety and stage 2 want the same? Task vectors left, gradients at points of the training right."""
    both = gradients[gradients["kind"] == "both"]
    near = ", near a right angle" if both["value"].abs().max() < 0.2 else ""
    title = f"Gradients of stage 2 and of safety rows: cosine {both['value'].min():+.2f} to {both['value'].max():+.2f}{near}"
    note = "grey: what random vectors reach; two batches of one task: what noise leaves of 1; 95 % intervals over batches"
    steps = {step: f"gradients, step {step}" for step in sorted(gradients["step"].unique())}
    keys = style.handles(dict(VECTORS.values()), linestyle="-") + style.handles(dict(TASKS.values()))
    rows, caption = style.by_backbone(gradients, "cosine"), _caption(gradients, scale, note)
    with style.panels(rows, {"vectors": "task vectors", **steps}, 2.0, title, caption, handles=keys) as (figure, axes):
        for (backbone, column), axis in axes.items():
            axis.axhline(0, color="#777777", linewidth=0.5)
            if column == "vectors":
                lines, key, looks = vectors[vectors["backbone"] == backbone], "pair", VECTORS
                chance = lines["chance"].mean()
                axis.axhspan(-chance, chance, color="#DDDDDD", linewidth=0)
            else:
                lines, key, looks = gradients[(gradients["backbone"] == backbone) & (gradients["step"] == column)], "kind", TASKS
                axis.set_ylim(-0.3, 1.05)
            for name, (_, look) in looks.items():
                style.draw_line(axis, lines[lines[key] == name], "layer", **look)
            _number(axis.xaxis, lines["layer"])
    return figure
