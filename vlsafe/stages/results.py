"""What the gallery and the claims read: results of finished stages of several studies as frames. Loads no model."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vlsafe.stages import probed, tables, tried
from vlsafe.stages.study import Study


def results(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """The frames that `gallery.make` takes, by name; what is missing is made.

    `raw`: raw tables, one row per item × model × judge. `audit`: the screened rows of each seed. `tried`: validation lines
    of all tuned checkpoints.
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
        **inside(studies, grid),
    }


# Frames of notebook 05 by name: stage and file.
INSIDE = {
    "layers": ("probe/layers", "layers.parquet"), "sets": ("probe/layers", "sets.parquet"),
    "drift": ("probe/drift", "drift.parquet"), "alike": ("probe/drift", "alike.parquet"),
    "vectors": ("probe/objectives", "vectors.parquet"), "gradients": ("probe/objectives", "gradients.parquet"),
    "patched": ("causal/transplants", "raw.parquet"), "directed": ("causal/directions", "raw.parquet"),
    "chosen_layer": ("probe/direction", "layers.parquet"), "curves": ("probe/localisation", "curves.parquet"),
    "scaling": ("probe/localisation", "scaling.parquet"),
}  # fmt: skip


def inside(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """What notebook 05 and its pictures read, by the names of INSIDE.

    And `located`: the band of each study; `remedy`: raw rows of multitask tuning with and without conflicts; `validated`:
    their checkpoints; `frozen`: raw rows of the SPPFT grid, empty unless the grid is "full".
    """
    found = {name: _of_each(studies, *place) for name, place in INSIDE.items()}
    bands = [(study, study.numbers("probe/localisation")) for study in studies]
    found["located"] = pd.DataFrame(
        [_whose(study) | {"start": told["band"][0], "end": told["band"][1], "located": told["located"], "reason": told["reason"],
                          "prompts": told["prompts"]} for study, told in bands]
    )  # fmt: skip
    remedies = ["safety/mtl-full", *(name for name in probed() if name.startswith("safety/"))]
    found["remedy"] = read(studies, [f"examination/{name.replace('/', '.')}" for name in remedies], "raw.parquet")
    found["validated"] = pd.concat(
        [_of_each(studies, name, "validation.parquet").assign(recipe=name.partition("/")[2]) for name in remedies]
    )
    grids = [name for name in probed(grid) if name.startswith("sppft/")]
    frozen = [study.folder(name) / "raw.parquet" for study in studies for name in grids]
    frames = [pd.read_parquet(file) for file in frozen if file.exists()]  # a study may have no random sets
    found["frozen"] = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return found


def _whose(study: Study) -> dict[str, object]:
    return {"backbone": study.backbone, "seed": study.seed}


def _of_each(studies: Sequence[Study], name: str, file: str) -> pd.DataFrame:
    """One file of a stage of several studies, with whose it is."""
    frames = [pd.read_parquet(study.folder(name) / file).assign(**_whose(study)) for study in studies]
    return pd.concat(frames, ignore_index=True)


def read(studies: Sequence[Study], names: Sequence[str], file: str) -> pd.DataFrame:
    """One file of several stages of several studies as one frame."""
    return pd.concat([pd.read_parquet(study.folder(name) / file) for study in studies for name in names], ignore_index=True)
