"""Notebook 02: training losses; F04: what doses of how-tos do."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlsafe.plots import style


def losses(frame: pd.DataFrame, smooth: int = 1) -> Figure:
    """One line per column of `Study.losses`, each the mean of the last `smooth` steps. Units: nats per token."""
    label = "loss, nats per token" + (f"\n(mean of {smooth} steps)" if smooth > 1 else "")
    end = frame.apply(lambda values: values.dropna().tail(max(smooth, 20)).mean()).sort_values()
    title = f"Training loss, mean of the last {max(smooth, 20)} steps: {end.iloc[0]:.2f} ({end.index[0]})"
    title += f" to {end.iloc[-1]:.2f} ({end.index[-1]})" if len(end) > 1 else ""
    with style.panels({"": label}, {"": ""}, 1.9, title, "", "training step") as (figure, axes):
        for name, values in frame.items():
            axes["", ""].plot(values.dropna().rolling(smooth, min_periods=1).mean(), label=name, linewidth=0.9)
        axes["", ""].set_yscale("log")
        axes["", ""].legend(ncols=2)
    return figure


DOSES = {
    "about pictures": dict(color="#D55E00", marker="s"), "text-only": dict(color="#0072B2", marker="o", linestyle="--"),
}  # fmt: skip
DRAWN = {
    "text_asr": "text ASR\n(↓ safer)", "multimodal_asr": "multimodal ASR\n(↓ safer)",
    "multimodal_incoherent": "incoherent beside\npictures (↓ better)", "helpfulness": "helpfulness\n(↑ better)",
}  # fmt: skip


def doses(frame: pd.DataFrame, scale: str) -> Figure:
    """F04: ASR and helpfulness against the dose of harmless how-tos, about pictures and without any, a row per backbone."""
    frame = frame.assign(kind=frame["kind"].map({"pictured": "about pictures", "text": "text-only"}))
    columns = {name: text for name, text in DRAWN.items() if name in set(frame["measure"])}
    rows, xlabel = style.by_backbone(frame, "percent"), "how-tos, % of rows"
    notes = (f"bands: {style.band(frame)}", "all other rows ask what a picture shows; square-root scale", style.judges(frame))
    handles = style.handles(DOSES, frame["kind"], linestyle="-")
    caption = style.caption(frame, scale, *notes)
    with style.panels(rows, columns, 2.2, _largest(frame), caption, xlabel, handles, sharey=True) as (figure, axes):
        for _, axis, own in style.facets(axes, style.percent(frame), "measure"):
            for kind, of in own.assign(root=np.sqrt(own["dose"])).groupby("kind", sort=False):
                style.draw_line(axis, of, "root", seed_range=True, **DOSES[kind])
            shown = sorted(own["dose"].unique())
            axis.set_xticks(np.sqrt(shown), [str(dose) for dose in shown])
            axis.set_ylim(-3, 103)
    return figure


def _largest(frame: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: ASR without any how-to and at the largest dose of each kind."""
    mean = frame.groupby(["measure", "kind", "dose"])["value"].mean() * 100
    parts = []
    for measure, name in {"text_asr": "text ASR", "multimodal_asr": "multimodal ASR"}.items():
        if measure in mean.index:
            ends = {kind: mean[measure, kind] for kind in mean[measure].index.unique("kind")}
            after = ", ".join(f"{of.iloc[-1]:.0f} % ({kind})" for kind, of in ends.items())
            parts.append(f"{name} {next(iter(ends.values())).iloc[0]:.0f} → {after}")
    return f"{frame['dose'].max()} % harmless how-tos: {'; '.join(parts)}"
