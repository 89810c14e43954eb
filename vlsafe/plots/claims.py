"""F00, F14 and F15: the answer, the claims and the judges. Draws `analysis.claims`, `.agreement` and `.degradation`."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis import claims
from vlsafe.analysis.measures import Lacking
from vlsafe.analysis.tuning import TAUGHT_ON, with_seeds
from vlsafe.core.schema import MAIN_LINE
from vlsafe.plots import style
from vlsafe.plots.style import KINDS
from vlsafe.plots.tuning import INTERVALS

VERDICTS = {claims.SUPPORTED: "#0072B2", claims.CONTRADICTED: "#D55E00"}  # all others grey
GREY, MARKS = "#8A8A8A", "osDv^P"
PITCH, LEADING, GAP = 0.09, 0.1, 0.06  # of F14, in inches: from line to line of a claim, of its words, between claims
ORDER = ("parent", "stage 1", "adapted", "SFT", "DPO", "merged")


def forest(ledger: pd.DataFrame, scale: str) -> Figure:
    """F14: every claim's deciding difference, drawn so that right of zero is as claimed; a line per backbone.

    Thick: item-level interval; thin: seed-level interval, with single seeds as ticks. Colour: the item-level verdict. Registered
    claims come first; marks of exploratory ones are hollow.
    """
    title, missing = _count(ledger), int((ledger["item_level"] == claims.NOT).sum())
    ledger = ledger[ledger["item_level"] != claims.NOT]
    marks = dict(zip(ledger["backbone"].unique(), MARKS * len(ledger), strict=False))
    note = "thick: 95 % interval over items, clustered by what was asked; thin: over seeds; ticks: seeds "
    note += "(of the part that decides over seeds); "
    note += "Holm over the claims of a family, in verdicts and not in intervals; "
    note += "blue: supported, orange: contradicted, grey: undecided or differs by seed"
    xlabel = "← against the claim    difference in points beyond the claim's threshold    as claimed →"
    caption = f"{style.origin(scale)}; {note}; {missing} lines of the ledger are not measured and not drawn"
    drawn = [np.zeros(1), *(of for row in ledger.itertuples() for of in _drawn(row))]
    reach = min(110.0, 10 + np.nanmax(np.abs(np.hstack(drawn))))  # points
    height, heads, border = 0.0, {}, None
    for name, rows in ledger.groupby("claim", sort=False):
        if rows["status"].iloc[0] == claims.EXPLORATORY and border is None:
            border, height = height, height + 3 * GAP
        words = textwrap.fill(f"{name}  {rows['statement'].iloc[0]}", 46)
        tall = max(PITCH * len(rows), LEADING * len(words.splitlines())) + GAP
        heads[name] = height + tall / 2, words
        height += tall
    with style.panels({"": ""}, {"": ""}, 0.3 + height, title, caption, xlabel) as (figure, axes):
        axis = axes["", ""]
        axis.axvspan(0, reach, color="#F1F6FA", zorder=0)
        axis.axvline(0, color="black", linewidth=0.7)
        if border is not None:
            axis.axhline(border, color=GREY, linewidth=0.5)
            what = "exploratory: the rule was made\nafter results were seen"
            axis.text(-0.98 * reach, border + 0.02, what, fontsize=5.5, va="top")
        for name, rows in ledger.groupby("claim", sort=False):
            for place, row in enumerate(rows.itertuples()):
                _draw_claim(axis, row, heads[name][0] + PITCH * (place - (len(rows) - 1) / 2), marks[row.backbone])
        axis.set_yticks([place for place, _ in heads.values()], [words for _, words in heads.values()])
        axis.tick_params(axis="y", length=0, labelsize=6)
        axis.set(xlim=(-reach, reach), ylim=(height, -0.15))
        axis.text(1.02 * reach, -0.03, "item-level / seed-level", fontsize=5.5, va="bottom")
        looks = {name: dict(marker=mark, color=GREY) for name, mark in marks.items()}
        axis.legend(handles=style.handles(looks), loc="upper left", borderaxespad=0)
    return figure


def _draw_claim(axis: Any, row: Any, y: float, mark: str) -> None:
    colour = VERDICTS.get(row.item_level, GREY)
    reach = axis.get_xlim()[1]
    axis.text(1.02 * reach, y, f"{row.item_level} / {row.seed_level}", fontsize=5.5, va="center", color=colour, clip_on=False)
    effect, items, effects, seeds = _drawn(row)
    if row.seeds > 1:
        axis.plot(seeds.clip(-0.98 * reach, 0.98 * reach), [y, y], color=colour, linewidth=0.6)
    axis.plot(effects, [y] * len(effects), "|", color=colour, markersize=4, alpha=0.7)
    axis.plot(items, [y, y], color=colour, linewidth=2.2, alpha=0.5, solid_capstyle="butt")
    inside = "white" if row.status == claims.EXPLORATORY else colour
    axis.plot(effect, y, mark, color=colour, markerfacecolor=inside, markersize=3.6)


def _drawn(row: Any) -> list[np.ndarray]:
    """A claim's effect and its interval over items, the effects of single seeds and the interval over them, in points beyond the
    threshold, positive as claimed."""
    items, seeds = (row.effect, (row.low, row.high)), (row.effects, (row.seed_low, row.seed_high))
    return [100 * row.sign * (np.array(of) - row.against) for of in items] + [
        100 * row.seed_sign * (np.array(of) - row.seed_against) for of in seeds
    ]


def _count(ledger: pd.DataFrame) -> str:
    """How many rows of the ledger hold, over items and over seeds."""
    rows = ledger[ledger["item_level"] != claims.NOT]
    backbones = rows["backbone"].nunique()
    counts = [(rows[level] == verdict).sum() for level in ("item_level", "seed_level") for verdict in VERDICTS]
    what = f"{rows['claim'].nunique()} claims{f' in {backbones} parents, {len(rows)} verdicts' * (backbones > 1)}"
    return "{}: over items {} supported, {} contradicted; over seeds {} and {}".format(what, *counts)


def judges(rates: pd.DataFrame, pairs: pd.DataFrame, scale: str) -> Figure:
    """F15: the ASR of every method as each judge sees it, a line per method; lines that cross are a ranking that changes.

    Under each panel: kappa on single answers and tau of the ranking, per pair of judges.
    """
    names = sorted(rates["judge"].unique(), key=lambda name: (name == "people", name != "world", name))
    rates = rates.assign(kind=[kind(*pair) for pair in zip(rates["stage"], rates["recipe"], strict=True)])
    rates = style.percent(rates.assign(place=rates["judge"].map(names.index)).dropna(subset=["value"])).sort_values("place")
    handles = style.handles(KINDS, rates["kind"], linestyle="-")
    note = "one line per model, of all seeds here; bars: 95 % intervals, clustered by what was asked; "
    note += "world: the miniature's truth; " if "world" in names else ""
    note += "κ: agreement on answers beyond chance; τ: on the order of the models; "
    note += f"up to n = {int(rates['n'].max())} a point"
    rows, title = style.by_backbone(rates, "attack success, percent (↓ safer)"), _by_judge(rates)
    columns, caption = {"text": "text", "pictures": "pictures"}, f"{style.origin(scale)}; {note}"
    with style.panels(rows, columns, 2.4, title, caption, handles=handles, sharey=True) as (figure, axes):
        parts = (style.facets(axes, frame, "modality") for frame in (rates, pairs))
        for (_, axis, models), (_, _, agreement) in zip(*parts, strict=True):
            for (name, *_), line in models.groupby(["kind", "stage", "recipe"]):
                axis.plot(line["place"], line["value"], linewidth=0.9, markersize=3.2, alpha=0.8, **KINDS[name])
                axis.vlines(line["place"], line["low"], line["high"], color=KINDS[name]["color"], linewidth=0.5, alpha=0.35)
            axis.set_xticks(range(len(names)), [name.replace("-", "-\n") for name in names] if len(names) > 3 else names)
            axis.set(xlim=(-0.3, len(names) - 0.7), ylim=(-4, 104))
            texts = [f"{p.judge} – {p.other}: κ {_two_places(p.kappa)}, τ {_two_places(p.tau)}" for p in agreement.itertuples()]
            axis.set_xlabel("\n".join(texts), fontsize=5.5, loc="left")
    return figure


def _by_judge(rates: pd.DataFrame) -> str:
    """By how much adaptation changes ASR as the judges see it, or what it is afterwards where stage 1 was not judged by them: of
    the judge who sees least and of the one who sees most, means over backbones."""
    runs, said = rates["stage"] + "/" + rates["recipe"], []
    for modality, start in {"text": "parent", "pictures": "stage 1"}.items():
        ends = (rates[(rates["modality"] == modality) & (runs == MAIN_LINE[name])] for name in (start, "adapted"))
        before, after = (of.set_index(["backbone", "judge"])["value"] for of in ends)
        form, what = ("{:+.0f}", modality) if len(before) else ("{:.0f} %", f"{modality} afterwards")
        seen = (after - before if len(before) else after).groupby("judge").mean().dropna().sort_values(kind="stable")
        sizes = [f"{form.format(seen[judge])} ({judge})" for judge in dict.fromkeys(seen.index[[0, -1]])] if len(seen) else []
        said += [f"{what} {' to '.join(sizes)}"] if sizes else []
    return f"Adaptation changes ASR by judge, points: {', '.join(said)}" if said else "Attack success by judge"


def _two_places(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.2f}"


def kind(stage: str, recipe: str) -> str:
    """What a model is, as KINDS calls it; every recipe of stage 2 is an adapted model."""
    known = {"parent": "parent", "projector": "stage 1", "instruct": "adapted", "merge": "merged"}
    return known.get(stage) or TAUGHT_ON[recipe.rpartition("-")[0]][0]


def lineage_points(lines: pd.DataFrame) -> pd.DataFrame:
    """F00's points from T08's lines: parent, stage 1, adapted, one tuned model per method and the merged ones, in what they are
    judged by.

    The models are those that the claims are decided by, not the best ones.

    Raises:   Lacking where none of them was examined on that
    """
    runs = lines["stage"] + "/" + lines["recipe"]
    chosen = runs.isin([*MAIN_LINE.values(), *claims.TUNED]) | runs.map(claims.is_merged)
    points = lines[chosen & lines["measure"].isin(list(style.JUDGED))]
    if not set(points["measure"]) - {"text_asr"}:
        raise Lacking("no model of the lineage was examined on pictures")
    kinds = [kind(*pair) for pair in zip(points["stage"], points["recipe"], strict=True)]
    partners = [recipe.partition("+")[2].partition("/")[0].rpartition("-")[0] for recipe in points["recipe"]]
    partners = [TAUGHT_ON.get(partner, ("parent",))[0] for partner in partners]
    names = [f"{of}{f' with {partner}' if of == 'merged' else ''}" for of, partner in zip(kinds, partners, strict=True)]
    points = with_seeds(points.assign(kind=kinds, name=names, what=points["measure"]))
    return points.sort_values("kind", key=lambda of: of.map(ORDER.index), kind="stable")


def lineage(points: pd.DataFrame, scale: str) -> Figure:
    """F00: from the parent over stage 1 and the adapted to the tuned and merged models, in what they are judged by."""
    ratios = sorted(points.loc[points["kind"] == "merged", "recipe"].str.split("/").str[-1].unique())
    weight = f", {'–'.join(dict.fromkeys([ratios[0], ratios[-1]]))} of the safe partner" if ratios else ""
    models = f"the models that the claims are decided by; merged: at the interior ratio that validation chose{weight}"
    notes = ("small ticks: single seeds", INTERVALS, style.judges(points), models)
    caption = style.caption(points, scale, *notes, "the parent cannot see")
    columns = {name: text for name, text in style.JUDGED.items() if name in set(points["what"])}
    return style.dots(points, columns, _asr_by_kind(points), caption)


def _asr_by_kind(points: pd.DataFrame) -> str:
    """Text ASR from the parent to the tuned and merged models and what it costs, mean over seeds of each backbone."""
    said, remedies = [], set(ORDER[3:])
    for what, (name, *shown) in FROM.items():
        of, texts = points[points["what"] == what].dropna(subset=["value"]), []
        for kind, of_kind in [*((kind, {kind}) for kind in shown), ("tuned or merged", remedies)]:
            means = 100 * of[of["kind"].isin(of_kind)].groupby(["kind", "backbone"])["value"].mean()
            ends = dict.fromkeys(f"{end:.0f}" for end in (means.min(), means.max()))
            texts += [f"{kind} {'–'.join(ends)} %"] if len(means) else []
        said += [f"{name}: {', '.join(texts)}"] if texts else []
    return "; ".join(said)


FROM = {  # what F00's title tells, and of which models beside the remedies
    "text_asr": ("Text ASR", "parent", "adapted"), "twin_refusal": ("harmless picture requests refused", "stage 1", "adapted"),
}  # fmt: skip
