"""F01: how a guard scores harmful and harmless rows, and where its threshold lies. Draws what `analysis.filtering` counted."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis.filtering import guard_truths, truth_known
from vlsafe.plots import style


def guard_scores(audit: pd.DataFrame, scale: str) -> Figure:
    """F01: scores of both guards with the threshold drawn, by true label where that is known."""
    known, guards = truth_known(audit), ("text", "image")
    columns = {guard: f"{guard} guard: score" for guard in guards}
    truths = guard_truths(audit) if known else dict.fromkeys(guards, audit["seed"].notna())
    found = {guard: 100 * (audit.loc[truths[guard], f"{guard}_score"].dropna() > 0.5).mean() for guard in guards}
    text, image = (f"{found[guard]:.0f} %" if pd.notna(found[guard]) else "none" for guard in guards)
    title = f"The text guard flags {text} of the rows that it scored, the image guard {image}"
    if known:
        many = {guard: int(truths[guard].sum()) for guard in guards}
        pictures = f"the image guard {image} of {many['image']} graphic pictures" if many["image"] else "no picture is graphic"
        title = f"The text guard finds {text} of {many['text']} harmful texts, {pictures}"
    looks = {False: ("harmless", "#0072B2"), True: ("harmful", "#D55E00")} if known else {True: ("all rows", "#777777")}
    caption = style.caption(audit, scale, "all screened rows")
    with style.panels({"": "percent of rows"}, columns, 1.5, title, caption, "score; dashed: threshold") as (figure, axes):
        for (_, guard), axis in axes.items():
            for harmful, (name, colour) in looks.items():
                scores = audit.loc[truths[guard] == harmful, f"{guard}_score"].dropna()
                weights = np.full(len(scores), 100 / max(1, len(scores)))
                if len(scores):
                    label = f"{name} (n = {len(scores)})"
                    axis.hist(scores, np.linspace(0, 1, 26), color=colour, alpha=0.6, weights=weights, label=label)
            axis.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
            axis.legend(loc="upper left", bbox_to_anchor=(0.08, 1.0))
    return figure
