"""F01: how a guard scores harmful and harmless rows, and where its threshold lies. Draws what `analysis.filtering` counted."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis.filtering import guard_truths
from vlsafe.plots import style


def guard_scores(audit: pd.DataFrame, scale: str) -> Figure:
    """F01: scores of both guards by true label, with the threshold drawn."""
    truths = {guard: truth for guard, truth in guard_truths(audit).items() if guard != "either"}
    found = {guard: 100 * (audit.loc[truth, f"{guard}_score"].dropna() > 0.5).mean() for guard, truth in truths.items()}
    title = f"The text guard finds {found['text']:.0f} % of the harmful texts, "
    title += f"the image guard {found['image']:.0f} % of the pictures"
    columns = {guard: f"{guard} guard: score" for guard in truths}
    caption = style.caption(audit, scale, "all screened rows")
    with style.panels({"": "percent of rows"}, columns, 1.5, title, caption, "score; dashed: threshold") as (figure, axes):
        for (_, guard), axis in axes.items():
            for harmful, name, colour in ((False, "harmless", "#0072B2"), (True, "harmful", "#D55E00")):
                scores = audit.loc[truths[guard] == harmful, f"{guard}_score"].dropna()
                weights = np.full(len(scores), 100 / max(1, len(scores)))
                label = f"{name} (n = {len(scores)})"
                axis.hist(scores, np.linspace(0, 1, 26), color=colour, alpha=0.6, weights=weights, label=label)
            axis.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
            axis.legend(loc="upper left", bbox_to_anchor=(0.08, 1.0))
    return figure
