"""What the gallery and the claims read: results of finished stages of several studies as frames. Loads no model."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vlsafe.stages import merging, tables, tried
from vlsafe.stages.study import Study


def results(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """The frames that `gallery.make` takes, by name; what is missing is made.

    `raw`: raw tables, one row per item × model × judge. `audit`: the screened rows of each seed. `tried`: validation lines
    of all tuned checkpoints. `panel` and `merged`: panel answers and validation lines of all merges that were examined.
    """
    seeds = {study.seed: study for study in studies}  # a screen does not depend on the backbone
    audits = [
        pd.DataFrame(study.rows("screen/filtered", "audit.parquet")).assign(seed=seed)[lambda f: ["seed", *f.columns[:-1]]]
        for seed, study in seeds.items()
    ]
    return {
        "raw": read(studies, tables(grid), "raw.parquet"),
        "audit": pd.concat(audits, ignore_index=True),
        "tried": pd.DataFrame([line for study in studies for line in tried(study, grid)]),
        "panel": read(studies, merging.names(grid), "panel.parquet"),
        "merged": read(studies, merging.names(grid), "validation.parquet"),
    }


def read(studies: Sequence[Study], names: Sequence[str], file: str) -> pd.DataFrame:
    """One file of several stages of several studies as one frame."""
    return pd.concat([pd.read_parquet(study.folder(name) / file) for study in studies for name in names], ignore_index=True)
