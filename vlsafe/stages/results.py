"""What the gallery and the claims read: results of finished stages of several studies as frames. Loads no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from vlsafe import store
from vlsafe.stages import planned, tables
from vlsafe.stages.study import Study


def results(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """The frames that `gallery.make` takes, by name, of those stages of a grid that are made. Nothing is made here.

    `raw`: raw tables, one row per item × model × judge. `audit`: the screened rows of each seed. `tried`: validation lines
    of all tuned checkpoints. A frame none of whose stages is made is left out.
    """
    once = list({study.seed: study for study in studies}.values())  # a screen does not depend on the backbone
    tuned = [name for name in planned(grid) if name.startswith("safety/")]
    found = {
        "raw": read(studies, tables(grid), "raw.parquet"),
        "audit": read(once, ["screen/filtered"], "audit.parquet", ("seed",)),
        "tried": read(studies, tuned, "validation.parquet", ("backbone", "seed", "stage", "recipe")),
    }
    return {name: frame for name, frame in found.items() if frame is not None}


def made(studies: Sequence[Study], names: Sequence[str]) -> Iterator[tuple[Study, str, Path]]:
    """Every stage of every study whose run is valid, and its folder."""
    for study in studies:
        for name in names:
            if store.status(run := study.run(name)) == "valid":
                yield study, name, run.folder


def read(studies: Sequence[Study], names: Sequence[str], file: str, whose: Sequence[str] = ()) -> pd.DataFrame | None:
    """One file of several stages of several studies as one frame; None where none of them is made.

    `whose`: which of backbone, seed, stage and recipe to put before the file's own columns.
    """
    frames = []
    for study, name, folder in made(studies, names):
        stage, _, recipe = name.partition("/")
        told = {"backbone": study.backbone, "seed": study.seed, "stage": stage, "recipe": recipe}
        frame = pd.read_parquet(folder / file)
        for place, column in enumerate(whose):
            frame.insert(place, column, told[column])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None
