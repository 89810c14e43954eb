"""Notebook 02: training losses."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vlsafe.plots.style import STYLE


def losses(frame: pd.DataFrame, smooth: int = 1) -> Figure:
    """One line per column of `Study.losses`, each the mean of the last `smooth` steps. Units: nats per token."""
    with plt.style.context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 2.8))
        for name, values in frame.items():
            axis.plot(values.dropna().rolling(smooth, min_periods=1).mean(), label=name, linewidth=0.9)
        label = "loss, nats per token" + (f"\n(mean of {smooth} steps)" if smooth > 1 else "")
        axis.set(xlabel="training step", ylabel=label, yscale="log")
        axis.legend(frameon=False, fontsize=6, ncols=2)
        plt.close(figure)
    return figure
