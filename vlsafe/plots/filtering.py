"""F01: how a guard scores harmful and harmless rows, and where its threshold lies. Draws what `analysis.filtering` counted."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vlsafe.plots.style import STYLE


def guard_scores(audit: pd.DataFrame, scale: str) -> Figure:
    """F01: scores of both guards by true label, with the threshold drawn."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7.0, 2.4))
        truths = {
            "text": ("text guard: score", audit["category"].notna() & (audit["category"] != "graphic")),
            "image": ("image guard: score", audit["category"] == "graphic"),
        }
        found = {}
        for axis, (guard, (title, truth)) in zip(axes, truths.items(), strict=True):
            scores = audit[f"{guard}_score"]
            found[guard] = 100 * (scores[truth & scores.notna()] > 0.5).mean()
            for value, name, colour in ((False, "harmless", "#0072B2"), (True, "harmful", "#D55E00")):
                of = scores[(truth == value) & scores.notna()]
                bins = np.linspace(0, 1, 26)
                axis.hist(of, bins=bins, color=colour, alpha=0.6, weights=np.full(len(of), 100 / max(1, len(of))),
                          label=f"{name} (n = {len(of)})")  # fmt: skip
            axis.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
            axis.set_title(title, loc="left", fontsize=7)
            axis.set_xlabel("score; dashed: threshold")
            axis.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(0.08, 1.0))
        axes[0].set_ylabel("percent of rows")
        said = f"The text guard finds {found['text']:.0f} % of the harmful texts, "
        said += f"the image guard {found['image']:.0f} % of the pictures"
        figure.suptitle(said, x=0.01, ha="left", fontsize=9, fontweight="bold")
        world = "miniature: a synthetic world" if scale == "mini" else f"scale {scale}"
        seeds = ", ".join(map(str, sorted(audit["seed"].unique())))
        figure.text(0.01, 0.005, f"{world}; seeds {seeds}; all screened rows", fontsize=6, color="#555555")
        figure.tight_layout(rect=(0, 0.03, 1, 0.97))
        plt.close(figure)  # else a notebook shows it twice: as the cell's value and as an open figure
    return figure
