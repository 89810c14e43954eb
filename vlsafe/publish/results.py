"""What the gallery and the claims read: results of finished stages of several studies as frames. Loads no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from vlsafe.core import store
from vlsafe.publish import provenance
from vlsafe.study import merging
from vlsafe.study.graph import planned, probed, tables
from vlsafe.study.study import Study, project_root


def results(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """The frames that `gallery.make` takes, by name, of those stages of a grid that are made. Nothing is made here.

    `raw`: raw tables, one row per item × model × judge. `audit`: the screened rows of each seed. `tried`: validation lines
    of all tuned checkpoints. `published`: numbers that others have printed. `panel`, `merged`: panel answers and validation
    lines of all merges. A frame none of whose stages is made is left out.
    """
    once = list({study.seed: study for study in studies}.values())  # a screen does not depend on the backbone
    tuned = [name for name in planned(grid) if name.startswith("safety/")]
    found = {
        "raw": read(studies, tables(grid), "raw.parquet"),
        "audit": read(once, ["screen/filtered"], "audit.parquet", ("seed",)),
        "tried": read(studies, tuned, "validation.parquet", ("backbone", "seed", "stage", "recipe")),
        "published": provenance.published(project_root() / "env" / "published"),
        "panel": read(studies, merging.names(grid), "panel.parquet"),
        "merged": read(studies, merging.names(grid), "validation.parquet"),
    }
    return {name: frame for name, frame in found.items() if frame is not None} | inside(studies, grid)


# Frames of notebook 05 by name: stage, file, and whose it is where the file does not say so itself.
INSIDE = {
    "layers": ("probe/layers", "layers.parquet", ()), "sets": ("probe/layers", "sets.parquet", ()),
    "drift": ("probe/drift", "drift.parquet", ()), "alike": ("probe/drift", "alike.parquet", ()),
    "vectors": ("probe/objectives", "vectors.parquet", ()), "gradients": ("probe/objectives", "gradients.parquet", ()),
    "patched": ("causal/transplants", "raw.parquet", ()), "directed": ("causal/directions", "raw.parquet", ()),
    "curves": ("probe/localisation", "curves.parquet", ("backbone", "seed")),
    "scaling": ("probe/localisation", "scaling.parquet", ("backbone", "seed")),
}  # fmt: skip


def inside(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """What notebook 05 and its pictures read, by the names of INSIDE, of those stages that are made.

    And `located`: the band of each study; `remedy`: raw rows of multitask tuning with and without conflicts; `validated`:
    their checkpoints; `frozen`: raw rows of the SPPFT grid, which only the grid "full" has.
    """
    found = {name: read(studies, [stage], file, whose) for name, (stage, file, whose) in INSIDE.items()}
    bands = []
    for study, name, _ in made(studies, ["probe/localisation"]):
        told = study.numbers(name)
        line = {"backbone": study.backbone, "seed": study.seed, "start": told["band"][0], "end": told["band"][1]}
        bands.append(line | {key: told[key] for key in ("located", "reason", "prompts")})
    found["located"] = pd.DataFrame(bands) if bands else None
    remedies = ["safety/mtl-full", *(name for name in probed() if name.startswith("safety/"))]
    found["remedy"] = read(studies, [f"examination/{name.replace('/', '.')}" for name in remedies], "raw.parquet")
    found["validated"] = read(studies, remedies, "validation.parquet", ("backbone", "seed", "recipe"))
    frozen = [
        folder / "raw.parquet" for *_, folder in made(studies, [name for name in probed(grid) if name.startswith("sppft/")])
    ]
    frames = [pd.read_parquet(file) for file in frozen if file.exists()]  # a study may have no random sets
    found["frozen"] = pd.concat(frames, ignore_index=True) if frames else None
    return {name: frame for name, frame in found.items() if frame is not None}


def made(studies: Sequence[Study], names: Sequence[str]) -> Iterator[tuple[Study, str, Path]]:
    """Every stage of every study whose run is valid, and its folder.

    For a sweep of merges that only the grid "full" makes, the default one stands in, which is a part of it.
    """
    for study in studies:
        for wanted in names:
            valid = (n for n in dict.fromkeys((wanted, wanted.removesuffix(".full"))) if store.status(study.run(n)) == "valid")
            if name := next(valid, None):
                yield study, name, study.run(name).folder


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


def across(study: Study) -> list[Study]:
    """All studies of a scale that have runs in the run store, the given one first."""
    places = sorted((study.root / study.scale.name).glob("*/seed*"))
    found = [(place.parent.name, int(place.name.removeprefix("seed"))) for place in places]
    known = [place for place in found if place[0] in study.scale.backbones and place != (study.backbone, study.seed)]
    return [study, *(dataclasses.replace(study, backbone=backbone, seed=seed) for backbone, seed in known)]


def answers(studies: Sequence[Study], grid: str = "default") -> pd.DataFrame:
    """What every finished model answered in its full examination, with the prompt: what `human.export` takes.

    Raises:   ValueError where nothing was examined yet
    """
    frames = []
    for study in studies:
        prompts = pd.DataFrame(study.rows("world/corpora", "items.parquet")).rename(columns={"id": "item"})
        for _, _, folder in made([study], [name for name in tables(grid) if name.startswith(("examination/", "merge/"))]):
            raw, said = (pd.read_parquet(folder / file) for file in ("raw.parquet", "responses.parquet"))
            judged = raw[(raw["exam"] == "full") & (raw["judge"] == "world")].merge(
                said[["item", "model", "text"]], on=["item", "model"]
            )
            frames.append(judged.merge(prompts[["item", "turns", "images"]], on="item"))
    if not frames:
        raise ValueError("no examination is made yet; `make reproduce` makes them")
    return pd.concat(frames, ignore_index=True)
