"""Notebook 00: the world's pictures. Shows them, counts nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from vlsafe.plots import style


def pictures(rows: Sequence[Mapping[str, Any]], columns: int = 8) -> Figure:
    """A grid of pictures under what they show: rows with `png`, `colour` and `thing`."""
    height, width = (dict.fromkeys(range(n), "") for n in (-(-len(rows) // columns), columns))
    with style.panels(height, width, 0.75, "", "") as (figure, axes):
        for axis in axes.values():
            axis.axis("off")
        for axis, row in zip(axes.values(), rows, strict=False):
            axis.imshow(Image.open(io.BytesIO(row["png"])).convert("RGB"))
            axis.set_title(f"{row['colour']} {row['thing']}", loc="center", fontsize=6)
    return figure
