"""What all figures share: style sheet, colours and markers, the frame around panels, lines and points with intervals, files.

Where several seeds are drawn, lines and points are their means, intervals too, and each seed is a thin line or a small mark.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

STYLE = Path(__file__).parent / "vlsafe.mplstyle"
# Okabe and Ito's colours: told apart by colour-blind readers, and by grey value together with the line style.
LINES: dict[str, dict[str, Any]] = {
    "text_asr": dict(color="#0072B2", linestyle="-", marker="o"),
    "multimodal_asr": dict(color="#D55E00", linestyle="-", marker="s"),
    "exaggerated_refusal": dict(color="#009E73", linestyle=":", marker="^"),
    "twin_refusal": dict(color="#009E73", linestyle="--", marker="v"),
    "helpfulness": dict(color="#777777", linestyle="-", marker="D"),
}

# What a model is keeps its colour and marker in every picture.
KINDS: dict[str, dict[str, Any]] = {
    "parent": dict(color="#000000", marker="o"),
    "stage 1": dict(color="#777777", marker="D"),
    "adapted": dict(color="#E69F00", marker="s"),
    "SFT": dict(color="#0072B2", marker="^"),
    "DPO": dict(color="#D55E00", marker="v"),
    "GRPO": dict(color="#CC79A7", marker="P"),
    "merged": dict(color="#009E73", marker="D"),
    "ensemble": dict(color="#56B4E9", marker="X"),
    "checkpoint": dict(color="#777777", marker="."),
}
JUDGED = {  # what models are compared in, as columns of `dots`
    "text_asr": "text ASR, %\n(← safer)", "multimodal_asr": "multimodal ASR, %\n(← safer)",
    "twin_refusal": "harmless picture re-\nquests refused, % (←)", "helpfulness": "helpfulness, %\n(better →)",
}  # fmt: skip
DOTTED = dict(linewidth=0.7, linestyle=(0, (1, 3)))
FILLED = "filled: no other model is as good in all columns and better in one, in these means"


@contextmanager
def panels(
    rows: Mapping[Any, str], columns: Mapping[Any, str], inches: float, title: str, caption: str, xlabel: str = "",
    handles: Sequence[Any] = (), **options: Any,
) -> Iterator[tuple[Figure, dict[tuple[Any, Any], Any]]]:  # fmt: skip
    """A figure and its panels by row and column, to be drawn in the body of `with`: takeaway above, conditions below.

    `rows` are the labels of the y axes, `columns` the titles of the top panels, `handles` a legend on the right.

    Units:    `inches` is the height of one row; a figure is 7 inches wide
    """
    with plt.style.context(STYLE):
        size = (7.0, 0.9 + inches * len(rows))
        figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained", **options)
        for row, text in zip(axes, rows.values(), strict=True):
            row[0].set_ylabel(text)
        for top, bottom, text in zip(axes[0], axes[-1], columns.values(), strict=True):
            top.set_title(text)
            bottom.set_xlabel(xlabel)
        if handles:
            figure.legend(handles=handles, loc="outside right center")
        figure.suptitle(textwrap.fill(title, 95), x=0.01, ha="left")
        figure.supxlabel(textwrap.fill(caption, 150), x=0.01, ha="left", ma="left", color="#555555")
        yield figure, dict(zip(itertools.product(rows, columns), axes.flat, strict=True))
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure


def by_backbone(frame: pd.DataFrame, ylabel: str = "") -> dict[str, str]:
    """Rows of panels: one per backbone, named above what its y axis shows."""
    return {name: f"{name}\n{ylabel}".rstrip() for name in sorted(frame["backbone"].unique())}


def facets(axes: Mapping[tuple[Any, Any], Any], frame: pd.DataFrame, column: str) -> Iterator[tuple[Any, Any, pd.DataFrame]]:
    """The panels of a figure with a row per backbone: value of `column`, panel, and the rows of the frame that belong there."""
    for (backbone, value), axis in axes.items():
        yield value, axis, frame[(frame["backbone"] == backbone) & (frame[column] == value)]


def origin(scale: str) -> str:
    """What world a picture is from, as its caption begins."""
    return f"{'miniature: a synthetic world, ' if scale == 'mini' else ''}scale {scale}"


def caption(frame: pd.DataFrame, scale: str, *notes: str) -> str:
    """World, scale and seeds of what is drawn, each backbone's where they differ, and what else the reader must know."""
    by = frame.assign(backbone=frame.get("backbone", "")).groupby("backbone")["seed"]  # a world's rows have no backbone
    seeds = by.unique().map(lambda of: f"seed{'s' * (len(of) > 1)} {', '.join(map(str, sorted(of)))}")
    drawn = seeds.unique() if seeds.nunique() == 1 else [f"{backbone} {of}" for backbone, of in seeds.items()]
    return "; ".join([", ".join([origin(scale), *drawn]), *filter(None, notes)])


def judges(frame: pd.DataFrame) -> str:
    """Who says what an attack's success is, in the lines that are drawn; where none is about attacks, the judges of all."""
    attacks = frame[frame["measure"].str.endswith("asr")] if "measure" in frame else frame
    drawn = attacks if len(attacks) else frame
    names = list(dict.fromkeys(name for text in drawn["judge"].dropna().unique() for name in text.split(" + ")))
    what = "judges of attacks" if len(attacks) else "judges"
    return "judge: the world's truth" if names == ["world"] else f"{what}: {', '.join(names)}"


def change(name: str, before: float, after: float, note: str = "") -> str:
    """A change in percent for a title, of which either end may be unknown; `note` says what it was before."""
    if pd.notna(before) and pd.notna(after):
        return f"{name} {before:.0f}{note} → {after:.0f} %"
    known = [f"{name} {value:.0f} % {when}" for value, when in ((before, "before"), (after, "after")) if pd.notna(value)]
    return known[0] if known else ""


def several_seeds(frame: pd.DataFrame) -> bool:
    """Whether there is something to average over."""
    return frame["seed"].nunique() > 1


def band(frame: pd.DataFrame) -> str:
    """What the band around a line is that `draw_line` draws with `seed_range`."""
    return "range over seeds" if several_seeds(frame) else "95 % interval, clustered by what was asked"


def percent(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame with its rates and their intervals in percent."""
    rates = frame.filter(regex=r"^(value(_high)?|change|low|high|(\w*asr|helpfulness|twin_refusal)(_low|_high)?)$").columns
    return frame.assign(**{name: 100 * frame[name] for name in rates})


def handles(looks: Mapping[str, Mapping[str, Any]], present: Iterable[str] | None = None, **options: Any) -> list[Line2D]:
    """Legend entries, by default markers without a line; of those names that are `present`, where that is said."""
    looks = {name: look for name, look in looks.items() if present is None or name in set(present)}
    return [Line2D([], [], label=name, **{"linestyle": "", "markersize": 4, **options, **look}) for name, look in looks.items()]


def draw_line(axis: Any, rows: pd.DataFrame, x: str, seed_range: bool = False, **look: Any) -> None:
    """The mean over seeds against `x` with its band, and a thin line for each seed where there are several.

    The band is the interval of the items, mean over seeds; with `seed_range` and several seeds it is their range instead.
    """
    by = rows.groupby(x)
    mean, several = by["value"].mean(), several_seeds(rows)
    if seed_range and several:
        axis.fill_between(mean.index, by["value"].min(), by["value"].max(), color=look["color"], alpha=0.12, linewidth=0)
    elif {"low", "high"} <= set(rows):
        axis.fill_between(mean.index, by["low"].mean(), by["high"].mean(), color=look["color"], alpha=0.12, linewidth=0)
    for _, line in rows.groupby("seed") if several else ():
        axis.plot(line[x], line["value"], color=look["color"], linewidth=0.4, alpha=0.5)
    axis.plot(mean.index, mean, **{"markersize": 2.5, "linewidth": 1.2, **look})


def draw_measures(axis: Any, rates: pd.DataFrame, x: str, bands: pd.DataFrame | None = None) -> None:
    """A line for each measure of LINES that the rows hold, with the range over seeds as its band, or the one of `bands`."""
    for measure, look in LINES.items():
        if not (line := rates[rates["measure"] == measure]).empty:
            draw_line(axis, line if bands is None else line.drop(columns=["low", "high"]), x, seed_range=bands is None, **look)
            if bands is not None and len(band := bands[bands["measure"] == measure]):
                axis.fill_between(band[x], band["low"], band["high"], color=look["color"], alpha=0.12, linewidth=0)


def dots(
    points: pd.DataFrame, columns: Mapping[str, str], title: str, caption: str, best: pd.DataFrame | None = None
) -> Figure:  # fmt: skip
    """Models one below the other, in the order in which they come, and a panel per column: means over seeds with the mean of
    their intervals, single seeds as small ticks; in percent. Filled: those of `best` (backbone and name), or all.

    Shapes:   `points` is long: backbone, seed, name, kind, what (a column), value, low, high
    """
    rows, names = by_backbone(points), {of: list(dict.fromkeys(part["name"])) for of, part in points.groupby("backbone")}
    heights = [0.3 + 0.15 * len(names[of]) for of in rows]
    options: dict[str, Any] = {"sharex": True, "height_ratios": heights}
    front = None if best is None else set(zip(best["backbone"], best["name"], strict=True))
    several = several_seeds(points)
    with panels(rows, columns, sum(heights) / len(rows), title, caption, **options) as (figure, axes):
        for (backbone, what), axis in axes.items():
            of = percent(points[(points["backbone"] == backbone) & (points["what"] == what)])
            for place, (name, own) in enumerate((name, of[of["name"] == name]) for name in names[backbone]):
                axis.axhline(place, color="#EEEEEE", linewidth=0.6, zorder=0)
                if own["value"].notna().any():
                    look, mean = KINDS[own["kind"].iloc[0]], own[["value", "low", "high"]].mean()
                    axis.hlines(place, mean["low"], mean["high"], color=look["color"], linewidth=1.4, alpha=0.5)
                    fill = look["color"] if front is None or (backbone, name) in front else "white"
                    axis.plot(mean["value"], place, markersize=4.2, linestyle="", markerfacecolor=fill, **look)
                    if several:
                        axis.plot(own["value"], [place] * len(own), "|", color=look["color"], markersize=4, alpha=0.8)
            axis.set(xlim=(-4, 104), xticks=[0, 50, 100], ylim=(len(names[backbone]) - 0.4, -0.6))
            axis.set_yticks(range(len(names[backbone])), names[backbone])
            axis.set_title(axis.get_title("left"), fontsize=6.5)
            axis.tick_params(axis="y", length=0, labelleft=what == next(iter(columns)))
    return figure


def label_right(axis: Any, labels: Iterable[tuple[str, float, float, str]], gap: float, size: float = 5.5) -> None:
    """Texts at the right edge, in the order of their points' heights and `gap` apart where there is room, each tied to its point.

    A label is (text, x, y, colour).
    """
    ordered, (bottom, top) = sorted(labels, key=lambda label: (label[2], label[1])), axis.get_ylim()
    gap = min(gap, (top - bottom) / max(1, len(ordered)))
    highest = [top - gap * place for place in range(len(ordered))][::-1]
    heights = map(min, spread([label[2] for label in ordered], gap), highest)
    for (text, x, y, colour), height in zip(ordered, heights, strict=True):
        axis.annotate(
            text, (x, y), xytext=(1.03, height), textcoords=axis.get_yaxis_transform(), va="center", fontsize=size, color=colour,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.4, alpha=0.5, shrinkA=0, shrinkB=2, relpos=(0, 0.5)),
            annotation_clip=False,
        )  # fmt: skip


def label_ends(axis: Any, rates: pd.DataFrame, x: str, names: Mapping[str, str], gap: float) -> None:
    """Name the lines of LINES at their right ends."""
    last = rates[rates[x] == rates[x].max()].groupby("measure").agg(x=(x, "max"), y=("value", "mean"))
    label_right(axis, [(names[m], *last.loc[m], LINES[m]["color"]) for m in LINES if m in last.index], gap, size=6)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Places near ascending heights, in their order and at least `gap` apart: each is pushed up by the one below."""
    return list(itertools.accumulate(heights, lambda below, height: max(height, below + gap)))


def write(figure: Figure, frame: pd.DataFrame, folder: Path, name: str, provenance: Mapping[str, Any] | None = None) -> None:
    """A PNG for the eye, a PDF for the paper, a CSV for the sceptic; no time stamp, so equal data give equal files.

    `provenance` goes into both pictures' metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(provenance, sort_keys=True) if provenance else None
    png = {"Software": None, "Title": name, "Description": text}
    pdf = {"CreationDate": None, "Producer": f"matplotlib {matplotlib.__version__}", "Title": name, "Keywords": text}
    with plt.style.context(STYLE):  # which also says how files are written: margins, and fonts that can be searched
        figure.savefig(folder / f"{name}.png", dpi=200, metadata=png)
        figure.savefig(folder / f"{name}.pdf", metadata=pdf)
    frame.round(4).to_csv(folder / f"{name}.csv", index=False)
