"""Notebook 02: training losses."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from vlsafe.plots import style


def losses(frame: pd.DataFrame, smooth: int = 1) -> Figure:
    """One line per column of `Study.losses`, each the mean of the last `smooth` steps. Units: nats per token."""
    label = "loss, nats per token" + (f"\n(mean of {smooth} steps)" if smooth > 1 else "")
    with style.panels({"": label}, {"": ""}, 1.9, "", "", "training step") as (figure, axes):
        for name, values in frame.items():
            axes["", ""].plot(values.dropna().rolling(smooth, min_periods=1).mean(), label=name, linewidth=0.9)
        axes["", ""].set_yscale("log")
        axes["", ""].legend(ncols=2)
    return figure
