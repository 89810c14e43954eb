"""F12, F13 and F16: the ratio of a merge, whether merging dominates, and whether a remedy lasts."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from vlsafe import analysis
from vlsafe.analysis.durability import NAMES, ROWS
from vlsafe.analysis.measures import MEASURES
from vlsafe.plots import style, tuning
from vlsafe.plots.style import KINDS, LINES

# What each partner is for the eye.
PARTNERS = {"sl-full": "SFT", "dpo-both-full": "DPO", "sibling-full": "SFT from stage 1", "aligned": "parent"}
FURTHER = {  # how what is fine-tuned again looks; two kinds of SFT and SPPFT are told apart by line and colour
    "adapted": KINDS["adapted"], "filtered-sppft": KINDS["GRPO"], "merged": KINDS["merged"], "dpo-both-full": KINDS["DPO"],
    "sl-full": KINDS["SFT"], "mtl-full": KINDS["SFT"] | {"linestyle": "--"},
}  # fmt: skip
BANDED = ("adapted", "sl-full")  # six bands over each other say nothing


def sweep(rates: pd.DataFrame, scale: str, bands: pd.DataFrame | None = None) -> Figure:
    """F12: attack success, refusals and helpfulness against the ratio of the linear merge, a column per partner.

    `rates` as `analysis.merging.sweep` gives them, `bands` as its `ratios` does, fractions in [0, 1]; drawn in percent.

    Crosses are the output ensemble at the same ratio; triangles below, the chosen ratios.
    """
    columns = {name: f"merged with {title}" for name, title in PARTNERS.items() if name in set(rates["partner"])}
    n = rates.groupby("measure")["n"].agg(lambda of: "–".join(str(int(end)) for end in sorted({of.min(), of.max()})))
    sizes = ", ".join(f"{MEASURES[name]['label']} {n[name]}" for name in LINES if name in n.index)
    caption = style.caption(
        rates, scale, f"bands: {style.band(rates) if bands is None else WHOLE}", style.judges(rates),
        "lines: linear merge", "crosses: ensemble of the same two models", "triangle: the ratio that validation pairs chose",
        f"{'on the panel, ' if bands is None else ''}n: {sizes}", _few(rates, bands),
    )  # fmt: skip
    xlabel = "ratio: weight of the safe partner"
    rows = style.by_backbone(rates, "percent")
    with style.panels(rows, columns, 2.2, _chosen(rates), caption, xlabel, sharey=True) as (figure, axes):
        for partner, axis, part in style.facets(axes, style.percent(rates), "partner"):
            axis.set(xlim=(-0.03, 1.03), ylim=(-6, 104))
            axis.xaxis.label.set_fontsize(6)
            linear = part[part["rule"] == "linear"].sort_values("ratio")
            own = None if bands is None else style.percent(bands).merge(linear[["backbone", "partner", "rule"]].drop_duplicates())
            style.draw_measures(axis, linear, "ratio", own)
            ensemble = part[(part["rule"] == "ensemble") & part["measure"].isin(list(LINES))]
            for (measure, ratio), value in ensemble.groupby(["measure", "ratio"])["value"].mean().items():
                axis.plot(ratio, value, marker="x", color=LINES[measure]["color"], markersize=4.5)
            picked = linear.loc[linear["chosen"].eq(True), "ratio"].drop_duplicates()
            axis.plot(picked, [-6] * len(picked), marker="^", color="black", markersize=4, linestyle="", clip_on=False)
            if partner == list(columns)[-1] and len(linear):
                names = {name: MEASURES[name]["label"].replace("harmless ", "harmless\n") for name in LINES}
                style.label_ends(axis, linear, "ratio", names, gap=9.0)
    return figure


def _few(rates: pd.DataFrame, bands: pd.DataFrame | None) -> str:
    """What lines without a band are of, where others have one."""
    lines = ["backbone", "partner"]
    few = bands is not None and len(rates[lines].drop_duplicates()) > len(bands[lines].drop_duplicates())
    return "lines without a band: the panel alone" if few else ""


WHOLE = "95 %, over seeds and what was asked, hold all ratios at once"


def _chosen(rates: pd.DataFrame) -> str:
    """The takeaway: the linear merge's chosen ratios, and in how many studies that is an end of the line."""
    linear = rates[(rates["rule"] == "linear") & rates["chosen"].eq(True)].drop_duplicates(["backbone", "seed", "partner"])
    parts = []
    for partner in PARTNERS:
        rows = linear[linear["partner"] == partner]
        if len(rows):
            ratios = "–".join(f"{ratio:.1f}" for ratio in sorted({rows["ratio"].min(), rows["ratio"].max()}))
            parts.append(
                f"{PARTNERS[partner]} {ratios} (no merge in {rows['ratio'].isin([0.0, 1.0]).sum()} of {len(rows)} studies)"
            )
    return f"Weight α that validation chose: {', '.join(parts)}" if parts else "Linear merges and ensembles by ratio"


def fronts(points: pd.DataFrame, answer: str, scale: str) -> Figure:
    """F13: every chosen merge, its controls and all tunings in what they are judged by; the title begins `answer`."""
    return tuning.judged(points, f"Does merging dominate? {answer.partition(' (')[0]}", scale)


def durability(rates: pd.DataFrame, lives: pd.DataFrame, scale: str) -> Figure:
    """F16: text ASR along a further fine-tuning, a line per model and a column per kind of rows.

    `rates` are those of `analysis.durability.curves`, `lives` its half-lives, which the title counts.
    """
    rates = rates[rates["measure"] == "text_asr"]
    columns = {kind: title for kind, title in ROWS.items() if kind in set(rates["rows"])}
    title = f"Half of a remedy's gain in text ASR is still there, over seeds, after {analysis.durability.tally(lives)}"
    notes = (f"bands ({', '.join(NAMES[model] for model in BANDED)}): {style.band(rates)}", style.judges(rates))
    caption = style.caption(rates, scale, *notes, f"n = {int(rates['n'].max())} a point, on the panel")
    marks = style.handles({NAMES[model]: look for model, look in FURTHER.items() if model in set(rates["model"])}, linestyle="-")
    rows = style.by_backbone(rates, "text ASR, percent")
    with style.panels(rows, columns, 2.2, title, caption, "step", handles=marks, sharey=True) as (figure, axes):
        for _, axis, part in style.facets(axes, style.percent(rates), "rows"):
            axis.set(ylim=(-3, 103))
            axis.xaxis.get_major_locator().set_params(integer=True)
            for model, look in FURTHER.items():
                of = part[part["model"] == model].sort_values("step")
                if model not in BANDED:
                    of = of.groupby("step", as_index=False)["value"].mean().assign(seed=0)
                if len(of):
                    style.draw_line(axis, of, "step", seed_range=True, **look)
    return figure
