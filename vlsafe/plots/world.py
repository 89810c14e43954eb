"""Notebook 00: the world's pictures. Shows them, counts nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from vlsafe.plots.style import STYLE


def pictures(rows: Sequence[Mapping[str, Any]], columns: int = 8) -> Figure:
    """A grid of pictures under what they show: rows with `png`, `colour` and `thing`."""
    with plt.style.context(STYLE):
        height = -(-len(rows) // columns)
        figure, axes = plt.subplots(height, columns, figsize=(columns, 1.2 * height), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, row in zip(axes.flat, rows, strict=False):
            axis.imshow(Image.open(io.BytesIO(row["png"])).convert("RGB"))
            axis.set_title(f"{row['colour']} {row['thing']}", fontsize=6)
        plt.close(figure)
    return figure
