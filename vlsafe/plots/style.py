"""The look of every figure: style sheet, colours and markers per kind of model, captions, files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

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


def origin(scale: str) -> str:
    """What world a picture is from, as its caption begins."""
    return f"{'miniature: a synthetic world, ' if scale == 'mini' else ''}scale {scale}"


def write(figure: Figure, frame: pd.DataFrame, folder: Path, name: str, told: Mapping[str, Any] | None = None) -> Sequence[Path]:
    """A PNG for the eye, a PDF for the paper, a CSV for the sceptic; no time stamp, so equal data give equal files.

    `told` is the picture's provenance, which goes into both pictures' metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(told, sort_keys=True) if told else None
    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None, "Title": name, "Description": text})
    made = {"CreationDate": None, "Producer": f"matplotlib {matplotlib.__version__}", "Title": name, "Keywords": text}
    figure.savefig(folder / f"{name}.pdf", metadata=made)
    frame.round(4).to_csv(folder / f"{name}.csv", index=False)
    return [folder / f"{name}{suffix}" for suffix in (".png", ".pdf", ".csv")]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places near the wanted ones, in their order and at least `gap` apart: each is pushed up by the one below."""
    placed: list[float] = []
    for place in wanted:
        placed.append(max(place, placed[-1] + gap) if placed else place)
    return placed
